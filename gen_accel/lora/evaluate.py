"""Evaluation of a training: videos of the same prompts, and losses at fixed noise."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gen_accel.attention_processors.attached.clock import first_transformer
from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.families.latents import text_device
from gen_accel.io import replacing, save_tensors, write_json
from gen_accel.lora.artefact import held_guidance
from gen_accel.lora.batches import (
    Adapter,
    Batch,
    Batches,
    Draw,
    draw,
    levels_of,
    seed_of,
    sigmas_of,
)
from gen_accel.lora.caching.encoders import Encoders, hash_of
from gen_accel.lora.caching.latents import LatentCache, hash_of_name, held_out
from gen_accel.lora.causal import context_level
from gen_accel.lora.config import CAUSAL, Stage, TrainConfig
from gen_accel.lora.model import ModelToTrain
from gen_accel.lora.processes import ProcessGroups, by_main
from gen_accel.measure.pictures import side_by_side
from gen_accel.measure.video_io import read_video, write_video
from gen_accel.paths import expanded
from gen_accel.pipelines.generation.config import ConditioningFiles, parts_of
from gen_accel.pipelines.generation.decode import is_streamed
from gen_accel.pipelines.generation.inputs import fit, open_files
from gen_accel.pipelines.generation.progress import Tick
from gen_accel.pipelines.generation.sampling import (
    Clip,
    Sample,
    arguments,
    filled,
    parameters,
    sample,
    served_family,
)
from gen_accel.pipelines.generation.stream import Streamer, StreamSettings
from gen_accel.pipelines.long_video import extend
from gen_accel.pipelines.long_video.chunks import ChunkedAttention
from gen_accel.registry import needed_for

with needed_for("training", extra="train"):
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FOLDER = "validation"
BESIDE, STRIP = ".beside_start.mp4", ".frames.jpg"  # ends of names after a prompt's number
ASKED = "prompts.json"  # in its folder
COLUMNS, COLUMN, GAP = 6, 200, 4  # frames of a strip, most pixels of one, pixels between them
PROMPTS = 1  # version of how prompts are encoded; another one makes all keys new
CLIPS, LEVELS = 8, 4  # training clips that are measured if none is held out; noise levels of each
DRAWS = 1000  # of the training's noise levels, whose quantiles are taken
NOT_A_STEP = -2  # number of the step of draws outside of all steps
DIGITS = 3  # of a noise level
Run = Callable[..., Any]  # a pipeline, or a function that takes its arguments
Tell = Callable[[int, int], None]  # takes the number of parts done, and their total


@contextmanager
def sampling_on(
    device: torch.device,
    pipe: "DiffusionPipeline",
    trained: nn.Module,
    *,
    prompt: Mapping[str, Tensor] | None,
    run: Run | None = None,
    is_given: bool = False,
) -> Iterator[Run]:
    """Yield what `sample` calls in place of the pipeline.

    The autoencoder comes to the device when the last step is done. All else that the pipeline
    has comes at once. Both go back to where they were at the end.

    Args:
        trained: the transformer that trains, which is on the device.
        prompt: what the pipeline takes in place of the text; None encodes the text there.
        run: called in place of the pipeline.
        is_given: whether the pipeline also encodes pictures, and so needs the autoencoder.
    """
    encodes = is_given or not is_streamed(pipe)
    call: Any = run or pipe
    models = {
        name: part
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and part is not trained
    }
    with ExitStack() as stack:
        for name, model in models.items():
            if name != "vae" or encodes:
                stack.enter_context(_moved(model, device))
        embeds = {name: x.to(device) for name, x in (prompt or {}).items()}
        texts = ["prompt"] * bool(embeds)  # that the embeddings replace
        if any(name.startswith("negative_") for name in embeds):
            texts.append("negative_prompt")

        def denoise(**given: Any) -> Any:
            given = {k: v for k, v in given.items() if k not in texts} | embeds
            if encodes:
                return call(**given)
            vae = pipe.vae
            # A pipeline runs on the device of its first model.
            object.__setattr__(pipe, "vae", None)
            try:
                made = call(**given)
            finally:
                object.__setattr__(pipe, "vae", vae)
            stack.enter_context(_moved(vae, device))
            return made

        yield denoise


@contextmanager
def _moved(model: nn.Module, device: torch.device) -> Iterator[None]:
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


class Validation:
    """Sampler of the same prompts from the same seeds at every call.

    Writes `step-000200/00.mp4` and so on, `00.beside_start.mp4` with the video of step 0 on the
    left, and `00.frames.jpg` with some of the frames. All processes generate, as the model may be
    sharded over them; one writes.

    Args:
        adapter: the adapter, whose `sampling(i)` sets a video's inputs beside the prompt.
        trained_frames: pixel frames that the model was trained on.
        shift: of the noise levels that are trained.
        prompts: the prompts as the pipeline takes them encoded; None for the text.
        pictures: function from a prompt's number to the picture that its video begins with, of a
            clip, and the one that it ends with, if there is one; None if videos are sampled from
            text alone.
        chunked: attention of a training over chunks, whose videos are streams; None: of another.
    """

    def __init__(
        self,
        config: TrainConfig,
        pipe: "DiffusionPipeline",
        folder: Path,
        accelerator: Accelerator,
        adapter: Adapter,
        *,
        trained_frames: int | None,
        shift: float,
        prompts: Sequence[Mapping[str, Tensor]] | None = None,
        pictures: Callable[[int], Sequence[np.ndarray]] | None = None,
        chunked: ChunkedAttention | None = None,
    ) -> None:
        self.config, self.pipe, self.folder = config, pipe, folder
        self.prompts, self.chunked, self.shift = prompts, chunked, shift
        self.accelerator, self.adapter = accelerator, adapter
        family = served_family(pipe)
        self.fps = config.fps or 16.0
        if config.fps is None and family.training.takes_fps:
            self.fps = float(family.sizes_of(first_transformer(pipe).config).fps)
        takes_length = arguments(pipe)["max_tokens"] in parameters(pipe)
        clip = Clip(
            frames=config.validation_frames or config.longest,
            height=config.height,
            width=config.width,
            steps=config.validation_steps,
            guidance_scale=(
                config.guidance_scale if family.generation.distilled else guidance_of(config)
            ),
            fps=self.fps,
            # Some pipelines take texts of any length.
            max_tokens=config.max_tokens if takes_length else None,
            **(_sampled(config, shift) if family.training.predicts == "flow" else {}),
        )
        self.begins = []  # arguments by which each video begins with a picture
        if pictures is not None:
            names = ("image", "last_image", "video")
            files = config.validation_images, config.validation_last_images
            files = (*files, config.validation_controls)
            for i in range(len(config.validation_prompts)):
                held = {n: expanded(one[i]) for n, one in zip(names, files, strict=True) if one}
                held = held or dict(zip(names, pictures(i), strict=False))
                first, last, video = map(held.get, names)
                given = ConditioningFiles(image=first, last_image=last, video=video)
                self.begins.append(fit(pipe, clip, open_files(given))[1])
        self.clip = filled(pipe, clip, self.begins[0].values if self.begins else ())
        assert clip.frames is not None
        is_longer = trained_frames is not None and clip.frames > trained_frames
        self.techniques = config.sample_with if is_longer else ()
        self.lengths = {"num_frames": clip.frames, "trained_frames": trained_frames}
        # Called with a prompt's number, the steps done and their total.
        self.tell: Callable[[int, int, int], None] = lambda prompt, step, steps: None

    @property
    def calls(self) -> int:
        """Number of forward passes of all prompts."""
        each = self.config.validation_steps * (2 if (self.clip.guidance_scale or 1) > 1 else 1)
        return each * len(self.config.validation_prompts)

    @torch.no_grad()
    def __call__(self, done: int) -> None:
        if self.accelerator.is_main_process:  # for the report of a run that samples no more
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / ASKED, [*self.config.validation_prompts])
        for i, prompt in enumerate(self.config.validation_prompts):
            clip = self.clip.model_copy(update={"seed": i})
            self.tell(i, 0, self.config.validation_steps)
            with ExitStack() as stack:
                stack.enter_context(self.accelerator.autocast())
                stack.enter_context(self.adapter.sampling(i))
                longer = None
                if self.techniques:
                    longer = stack.enter_context(
                        extend(self.pipe, self.techniques, **self.lengths)
                    )
                inputs = self.begins[i] if self.begins else None
                run = stack.enter_context(
                    sampling_on(
                        self.accelerator.device,
                        self.pipe,
                        getattr(self.pipe, self.config.part),
                        prompt=self.prompts[i] if self.prompts else None,
                        run=longer,
                        is_given=inputs is not None or self.chunked is not None,
                    )
                )
                tick = partial(self.tell, i)
                if self.chunked is None:
                    made = sample(self.pipe, prompt, clip, run=run, inputs=inputs, tick=tick)
                else:
                    made = self._streamed(self.chunked, prompt, clip, tick)
            if self.accelerator.is_main_process:
                self._write(i, made, done)
        self.accelerator.wait_for_everyone()

    def _streamed(self, chunked: ChunkedAttention, prompt: str, clip: Clip, tick: Tick) -> Sample:
        settings = StreamSettings(chunked.zones, context_level(self.config), self.shift)
        streamer = Streamer(self.pipe, clip, settings, parts_of(prompt), chunked)
        chunks = streamer.lengths.chunks
        frames = [*streamer.frames(kept=lambda chunk, _: tick(chunk + 1, chunks))]
        return Sample(np.concatenate(frames), 0.0, 0.0)

    def lacks(self, done: int) -> bool:
        """Whether a file of the call after `done` steps is missing, for all processes alike."""
        missing = False
        for i in range(len(self.config.validation_prompts)):
            start = self._place(0) / f"{i:02d}.mp4"
            last = BESIDE if done and start.exists() else STRIP
            missing |= not (self._place(done) / f"{i:02d}{last}").exists()
        [told] = broadcast_object_list([missing])
        return told

    def _place(self, done: int) -> Path:
        return self.folder / f"step-{done:06d}"

    def _write(self, i: int, made: Sample, done: int) -> None:
        place, video = self._place(done), made.video
        write_video(video, place / f"{i:02d}.mp4", fps=self.fps, sound=made.sound)
        write_strip(video, place / f"{i:02d}{STRIP}")
        start = self._place(0) / f"{i:02d}.mp4"
        if done and start.exists():
            both = side_by_side([read_video(start), video], ["step 0", f"step {done}"])
            write_video(both, place / f"{i:02d}{BESIDE}", fps=self.fps)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                # As pictures: TensorBoard's own videos need moviepy.
                shown = np.linspace(0, len(video) - 1, 5).astype(int)
                pictures = torch.from_numpy(video[shown]).permute(0, 3, 1, 2)
                tracker.writer.add_images(f"validation/{i:02d}", pictures, done)


def encoded_prompts(
    config: TrainConfig, encoders: Encoders, folder: Path, accelerator: Accelerator
) -> tuple[dict[str, Tensor], ...] | None:
    """Return the pipeline's arguments in place of each validation prompt, encoded if the cache
    lacks them; None if the family's pipelines take text alone.

    Device and precision are those of a pipeline in a validation, and the dtype that comes out is
    kept: videos are the same bit for bit.
    """
    family = family_of(encoders.transformer)
    if not family.serves("encoded prompts") or config.objective == CAUSAL:
        return None
    place = folder if os.access(folder, os.W_OK) else Path(config.out) / "prompts"
    clip = filled(encoders.pipe, Clip(max_tokens=config.max_tokens))
    options = {  # the same that the pipeline's call would have
        "is_guided": guidance_of(config) > 1,
        "negative": clip.negative_prompt,
        "max_tokens": clip.max_tokens,
    }
    common = [PROMPTS, encoders.states(*family.training.text_parts, "tokenizer"), options]
    common += [type(encoders.pipe).__name__, config.mixed_precision, accelerator.device.type]
    files = {
        prompt: place / f"prompt-{hash_of([*common, prompt])}.safetensors"
        for prompt in config.validation_prompts
    }

    @torch.no_grad()
    def encode() -> None:
        missing = {prompt: file for prompt, file in files.items() if not _is_whole(file)}
        if not missing:
            return
        place.mkdir(parents=True, exist_ok=True)
        with encoders.at_work(*family.training.text_parts), accelerator.autocast():
            for prompt, file in missing.items():
                found = _encoded(encoders.pipe, family.generation.prompt, prompt, **options)
                with replacing(file) as partial:
                    save_tensors({n: x.cpu() for n, x in found.items()}, partial)

    by_main(accelerator, encode)
    return tuple(load_file(files[prompt]) for prompt in config.validation_prompts)


def _encoded(
    pipe: "DiffusionPipeline",
    names: Sequence[str],
    prompt: str,
    *,
    is_guided: bool,
    negative: str | None,
    max_tokens: int,
) -> dict[str, Tensor]:
    """Encode the prompt, and with guidance the negative one, as the pipeline's call does.

    Args:
        names: arguments of the pipeline that take what comes out.
    """
    given = {"do_classifier_free_guidance": is_guided, "negative_prompt": negative}
    taken = signature(pipe.encode_prompt).parameters
    found = pipe.encode_prompt(
        prompt,
        max_sequence_length=max_tokens,
        device=text_device(pipe),
        **{name: value for name, value in given.items() if name in taken},
    )
    return {name: x for name, x in zip(names, found, strict=False) if x is not None}


def _is_whole(file: Path) -> bool:
    try:
        load_file(file)
    except (OSError, SafetensorError):
        return False
    return True


def write_strip(video: np.ndarray, path: Path) -> None:
    """Write some frames of a video, (F, H, W, 3) uint8, side by side as a JPEG. Its comment holds
    their numbers."""
    numbers = np.linspace(0, len(video) - 1, min(COLUMNS, len(video))).round().astype(int)
    height, width = video.shape[1:3]
    shrink = min(1.0, COLUMN / width)
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    strip = Image.new("RGB", ((size[0] + GAP) * len(numbers) - GAP, size[1]), (44, 46, 52))
    for i, number in enumerate(numbers):
        strip.paste(Image.fromarray(video[number]).resize(size), (i * (size[0] + GAP), 0))
    with replacing(path) as partial:
        strip.save(partial, quality=85, comment=",".join(map(str, numbers)))


def _sampled(config: TrainConfig, shift: float) -> dict[str, Any]:
    """Return the fields of a `Clip` that sample at the noise levels that are trained; none if all
    levels train."""
    levels = levels_of(config, shift)
    if not levels:
        return {}
    if len(levels) == config.validation_steps:
        return {"sampler": config.student_sampler, "levels": levels}
    return {"sampler": "euler", "shift": shift}


def steps_above(pipe: "DiffusionPipeline", clip: Clip, boundary: float) -> int:
    """Count the denoising steps of a pipeline's expert for high noise, from `boundary` on."""
    sampling = clip.sampling
    own: Any = pipe.scheduler
    scheduler = deepcopy(own) if sampling is None else sampling.scheduler(own)
    scheduler.set_timesteps(clip.steps)
    least = boundary * scheduler.config.num_train_timesteps
    return int((scheduler.timesteps >= least).sum())


def guidance_of(config: TrainConfig) -> float:
    """Guidance scale of the validation videos."""
    if config.guidance_scale is not None:
        return config.guidance_scale
    return 1.0 if config.student_steps is not None or held_guidance(config) > 1 else 5.0


@dataclass(frozen=True)
class Figures:
    """Losses at one step of a training: a line of `metrics.jsonl`.

    Args:
        after: steps done.
        fixed_loss: mean over clips and levels.
        levels: mean over clips for each noise level.
        frames: pixel frames of the longest clip.
        held_out: whether the clips are held out; else they train.
    """

    after: int
    fixed_loss: float
    levels: dict[str, float]
    clips: int
    frames: int
    held_out: bool


class FixedLoss:
    """Measure the loss of held-out clips, or of training clips if none is held out.

    Each clip is measured at the longest stage that it fills, so that the figures mean the same in
    all stages. All processes take part and get the same figures, on any number of processes.

    Attributes:
        levels: noise levels, the middles of four equal shares of the levels that train.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: ModelToTrain,
        cache: LatentCache,
        batches: Batches,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.model, self.cache = config, model, cache
        self.batches, self.accelerator = batches, accelerator
        self.levels = noise_levels(config, model)
        self.clips = _clips(config, model, cache)
        self._parts = [(*clip, level) for clip in self.clips for level in self.levels]

    @torch.no_grad()
    def __call__(
        self,
        after: int,
        wrapped: nn.Module,
        rule: Callable[[Stage], AbstractContextManager[None]],
        tell: Tell = lambda done, total: None,
    ) -> Figures:
        """Measure after `after` steps.

        Args:
            wrapped: the objective, as the training calls it.
            rule: applies a stage's rule on the rotary frequencies.
        """
        groups = ProcessGroups.of(self.config, self.accelerator)
        rounds = math.ceil(len(self._parts) / groups.count)
        table = torch.zeros(len(self._parts), device=self.accelerator.device)
        with evaluating(wrapped):
            for i in range(rounds):
                tell(i, rounds)
                place = i * groups.count + groups.number
                # FSDP needs all to call.
                clip, stage, level = self._parts[min(place, len(self._parts) - 1)]
                with rule(stage):
                    loss = wrapped(*self._batch(clip, stage, level))
                if place < len(self._parts) and groups.place == 0:  # the others have the same
                    table[place] = loss
        table = self.accelerator.reduce(table, "sum")
        assert isinstance(table, Tensor)
        losses: list[list[float]] = table.view(-1, len(self.levels)).T.tolist()
        means = [math.fsum(of_level) / len(of_level) for of_level in losses]
        return Figures(
            after=after,
            fixed_loss=math.fsum(means) / len(means),
            levels={f"{level:g}": x for level, x in zip(self.levels, means, strict=True)},
            clips=len(self.clips),
            frames=max(stage.frames for _, stage in self.clips),
            held_out=bool(self.config.held_out),
        )

    def _batch(self, clip: int, stage: Stage, level: float) -> Batch:
        latents = self.batches.latents(clip, self.model.frames(stage.frames))
        number = hash_of_name(self.cache.entries[clip].name)
        seed = seed_of(self.config.seed, NOT_A_STEP, number)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        sound, frames, fresh = (seed_of(seed, NOT_A_STEP, i) for i in range(3))
        drawn = Draw(noise, level, captioned=True, sound=sound, frames=frames, fresh=fresh)
        return self.batches.of([clip], [latents], [drawn])


def noise_levels(config: TrainConfig, model: ModelToTrain) -> tuple[float, ...]:
    """Return `LEVELS` quantiles of the noise levels that the training draws, from low to high."""
    about = {"shift": model.shift, "sigmas": sigmas_of(config, model)}
    drawn = sorted(draw(config, NOT_A_STEP, i, (), **about).sigma for i in range(DRAWS))
    middles = [drawn[DRAWS * (2 * i + 1) // (2 * LEVELS)] for i in range(LEVELS)]
    return tuple(dict.fromkeys(round(level, DIGITS) for level in middles))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation inside the context, and each into its own mode after."""
    modes = {one: one.training for one in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for one, mode in modes.items():
            one.training = mode


def _clips(
    config: TrainConfig, model: ModelToTrain, cache: LatentCache
) -> list[tuple[int, Stage]]:
    """Choose the clips to measure, by number, each with the longest stage that it fills."""
    held = held_out(config, cache)
    found: dict[str, tuple[int, Stage]] = {}
    # Of two stages of one length, the rule of the later stays.
    for stage in sorted(config.curriculum, key=lambda one: one.frames)[::-1]:
        buckets = cache.buckets(model.frames(stage.frames))
        fitting = [i for bucket in buckets.values() for i in bucket if i in held or not held]
        for i in sorted(fitting, key=lambda i: hash_of_name(cache.entries[i].name)):
            found.setdefault(cache.entries[i].name, (i, stage))
    if not found:
        raise ValueError(
            f"held_out {config.held_out:g}: none of the clips that are held out fills a stage of "
            f"{', '.join(config.stages)}: hold out more, or add clips"
        )
    chosen = list(found.values())
    return chosen if held else chosen[:CLIPS]
