"""Batches of a training: the clips of each step, their random draws, the part of a process."""

import hashlib
import math
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.families.latents import (
    FIRST_FRAME,
    IS_GIVEN,
    LAST_FRAME,
    LAST_IS_GIVEN,
)
from gen_accel.lora.caching.inputs import TEXT
from gen_accel.lora.caching.latents import LatentCache, held_out
from gen_accel.lora.config import CAUSAL, Stage, TrainConfig
from gen_accel.lora.data.clips import refuse_parts
from gen_accel.lora.model import ModelToTrain
from gen_accel.lora.processes import ProcessGroups
from gen_accel.pipelines.generation.stream import Lengths
from gen_accel.pipelines.sampler import equal_steps, shifted
from gen_accel.registry import needed_for
from gen_accel.video import temporal_patch

with needed_for("training", extra="train"):
    from accelerate import Accelerator

MOST_DRAWS = 10_000
SIGMAS = (1e-3, 1 - 1e-3)  # lowest and highest noise level; beyond, there is nothing to learn


class Draw(NamedTuple):
    """Random draws for one clip of one step.

    Args:
        noise: shaped like the latents.
        sigma: noise level, 0 to 1.
        captioned: whether its caption is shown.
        pictured: whether its image is shown.
        text: number of its text, of a clip that has several.
        framed: whether its first frame is given, under condition first_frame.
        ended: whether its last frame is given, under condition last_frame.
        sound: seed of the noise of its sound.
        frames: seed of the noise of its given frames.
        fresh: seed of the noise that is drawn in the steps of a student.
        chunks: seed of the noise levels of its chunks, and of what they see; None: all chunks have
            `sigma`, after clean ones.
    """

    noise: Tensor
    sigma: float
    captioned: bool
    pictured: bool = True
    text: int = 0
    framed: bool = True
    ended: bool = True
    sound: int = 0
    frames: int = 0
    fresh: int = 0
    chunks: int | None = None


class Batch(NamedTuple):
    """A batch of one process: arguments of `Objective`, by name.

    Args:
        clean, noise: (B, C, f, h, w).
        sigma: noise levels, (B,).
        conditions: arguments of the transformer, batch first; under objective causal (B, chunks)
            first, as a caption may change from chunk to chunk.
        teacher_conditions: conditions of the teacher; None for `conditions`.
        uncond_conditions: conditions of the empty caption, if the teacher is guided.
        mask: how much each latent counts, (B, 1, f, h, w); None for 1 everywhere.
        shown: inputs of the adapter.
        sound, sound_noise: (B, tokens, D); None for clips without sound.
        chunks: seeds of the clips' chunks, (B,) int64; None: see `Draw.chunks`.
        fresh: seeds of the noise that is drawn in the steps of a student, (B,) int64; None for a
            training without them.
    """

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    conditions: dict[str, Tensor]
    teacher_conditions: dict[str, Tensor] | None = None
    uncond_conditions: dict[str, Tensor] | None = None
    mask: Tensor | None = None
    shown: tuple[Tensor, ...] = ()
    sound: Tensor | None = None
    sound_noise: Tensor | None = None
    chunks: Tensor | None = None
    fresh: Tensor | None = None

    def fresh_noise(self) -> Callable[[], Tensor]:
        """Return a function that draws noise shaped like `noise`, other noise at each call."""
        seeds = [0] * len(self.noise) if self.fresh is None else self.fresh.tolist()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = self.noise.shape[1:]

        def drawn() -> Tensor:
            each = [torch.randn(shape, generator=generator) for generator in generators]
            return torch.stack(each).to(self.noise.device)

        return drawn


def captioned(cache: LatentCache, clip: int, drawn: Draw) -> dict[str, Tensor]:
    """Conditions of a clip's caption, or of the empty one."""
    return cache.conditions(clip, drawn.text) if drawn.captioned else cache.empty


class Adapter:
    """Base of what trains on a model, made after the attention method is attached."""

    FOLDER = ""  # folder of OUT that the trained adapter is written to

    def __init__(self) -> None:
        self.modules: dict[str, nn.Module] = {}  # outside of the transformer, that train

    def inputs(
        self, cache: LatentCache, clips: Sequence[int], draws: Sequence[Draw]
    ) -> tuple[Tensor, ...]:
        """Inputs of the adapter in a batch, beside clips and captions."""
        return ()

    def teacher_conditions(
        self, cache: LatentCache, clips: Sequence[int], draws: Sequence[Draw]
    ) -> list[dict[str, Tensor]] | None:
        """Conditions of the teacher for each clip; None: the clips' own."""
        return None

    def showing(self, *inputs: Tensor) -> AbstractContextManager[object]:
        """Let forward passes inside the context see the inputs."""
        return nullcontext()

    def teaching(self) -> AbstractContextManager[object]:
        """Let the model be the teacher inside the context."""
        raise NotImplementedError

    def sampling(self, index: int) -> AbstractContextManager[object]:
        """Set the inputs of a validation video inside the context."""
        return nullcontext()

    def writer(self, whole: Callable[[Tensor], Tensor]) -> Callable[[Path], object]:
        """Return a function that writes the present weights into a folder.

        Args:
            whole: gathers a parameter from all processes.
        """
        raise NotImplementedError


def draw(
    config: TrainConfig,
    step: int,
    place: int,
    shape: Sequence[int],
    *,
    shift: float,
    sigmas: tuple[float, float] = SIGMAS,
) -> Draw:
    """Draw noise, noise level and dropouts for one clip of one step.

    The draw depends only on the seed, the step and the clip's place in the global batch. It is
    the same on any number of processes and after any interruption.

    Args:
        shape: shape of the latents, (C, f, h, w).
        sigmas: lowest and highest noise level of a draw.
    """
    generator = torch.Generator().manual_seed(seed_of(config.seed, step, place))
    sigma = noise_level(config, generator, shift, sigmas)
    captioned = torch.rand((), generator=generator).item() >= config.caption_dropout
    noise = torch.randn(tuple(shape), generator=generator)
    share = torch.rand((), generator=generator, dtype=torch.float64).item()
    if config.adapter == "lora":
        ended = torch.rand((), generator=generator, dtype=torch.float64).item()
        return Draw(
            noise,
            sigma,
            captioned,
            framed=share >= config.first_frame_dropout,
            ended=ended >= config.last_frame_dropout,
        )
    return Draw(noise, sigma, captioned, share >= config.image_dropout)


def noise_level(
    config: TrainConfig,
    generator: torch.Generator,
    shift: float,
    sigmas: tuple[float, float] = SIGMAS,
) -> float:
    """Draw a noise level, as `draw` does."""
    if levels := levels_of(config, shift, sigmas):
        return levels[int(torch.randint(len(levels), (), generator=generator))]
    for _ in range(MOST_DRAWS):
        if config.timestep_sampling == "logit_normal":
            at = torch.randn((), generator=generator) * config.logit_std + config.logit_mean
            level = at.double().sigmoid().item()
        else:
            level = torch.rand((), generator=generator, dtype=torch.float64).item()
        sigma = shifted(level, shift)
        if sigmas[0] <= sigma <= sigmas[1]:
            return sigma
    raise ValueError(
        f"no noise level from {sigmas[0]:g} to {sigmas[1]:g} in {MOST_DRAWS} draws: change "
        f"logit_mean {config.logit_mean:g}, logit_std {config.logit_std:g} or shift {shift:g}"
    )


def levels_of(
    config: TrainConfig, shift: float, sigmas: tuple[float, float] = SIGMAS
) -> tuple[float, ...]:
    """Return the only noise levels that are trained, falling; empty if all levels train.

    `sampled_steps` and `student_steps` give the levels of pipelines that shift n equal steps from
    1 down to 1 / n.

    Args:
        sigmas: lowest and highest noise level of an expert; above `SIGMAS`, 1 belongs to it.
            ValueError if it has none of the levels.
    """
    levels = tuple(sorted({*config.noise_levels}, reverse=True))
    count = config.student_steps or config.sampled_steps
    if count is not None and not levels:
        levels = equal_steps(count, shift)
    low = 0.0 if sigmas[0] == SIGMAS[0] else sigmas[0]
    high = 1.0 if sigmas[1] == SIGMAS[1] else sigmas[1]
    kept = tuple(level for level in levels if low <= level <= high)
    if levels and not kept:
        shown = ", ".join(f"{level:g}" for level in levels)
        raise ValueError(
            f"no noise level of {shown} is of part {config.part}, which is for {low:g} to "
            f"{high:g}: train the other part, or give other levels"
        )
    return kept


def order(
    buckets: Sequence[Sequence[int]],
    steps: int,
    batch: int,
    seed: int,
) -> list[list[int]]:
    """Choose the clips of each step.

    A step takes its clips from one bucket, as clips of two sizes do not fit into one batch.
    Buckets are drawn in proportion to their number of clips. Within a bucket no clip is shown
    again before all were, each as often as it is there. More steps begin with the same clips as
    fewer.

    Args:
        buckets: numbers of the clips of each size; a clip may be there several times.
        batch: clips a step, over all processes.
    """
    if not steps:
        return []
    generator = torch.Generator().manual_seed(seed_of(seed, -1, 0))
    weights = torch.tensor([float(len(bucket)) for bucket in buckets])
    waiting: list[list[int]] = [[] for _ in buckets]
    plan: list[list[int]] = []
    while len(plan) < steps:
        number = int(torch.multinomial(weights, 1, replacement=True, generator=generator))
        clips, queue = buckets[number], waiting[number]
        while len(queue) < batch:
            queue += [clips[i] for i in torch.randperm(len(clips), generator=generator).tolist()]
        plan.append(queue[:batch])
        del queue[:batch]
    return plan


def seed_of(seed: int, step: int, place: int) -> int:
    digest = hashlib.sha256(f"{seed} {step} {place}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# Places of other draws than the clips' in a step.
TEXTS, PICTURES, SOUNDS, CHUNKS, FRAMES, FRESH = (n * 10**8 for n in range(1, 7))


def plan_clips(
    config: TrainConfig, model: ModelToTrain, cache: LatentCache, processes: int
) -> list[list[list[int]]]:
    """Choose the clips of all processes, by number, for each step of each stage.

    A stage of more steps begins with the clips of fewer. Clips that are held out never train.

    Args:
        processes: number of processes; a group that shares its clips counts as one.

    With `sound`, the clips of a step all have sound, or none has.

    Raises ValueError if no clip is long enough for a stage, all of them are held out, pictures are
    asked for and there are none, a caption changes with time under another objective than causal,
    or clips without sound go with the model or with several processes not.
    """
    if config.objective != CAUSAL:
        refuse_parts(cache.entries)
    held = held_out(config, cache)
    silent = sum(entry.sound_key is None for entry in cache.entries) if config.sound else 0
    if silent:
        family = family_of(model.transformer)
        told = f"{silent} of {len(cache.entries)} clips have no sound"
        if family.training.needs_sound:
            raise ValueError(
                f"{told}, without which {family.models} does not train: leave these clips out, or "
                "give them a silent track (ffmpeg -i clip.mp4 -f lavfi -i "
                "anullsrc=r=32000:cl=stereo -shortest -c:v copy out.mp4)"
            )
        if processes > 1:
            raise ValueError(
                f"{told}, which several processes cannot train beside others: leave these clips "
                "out, or take one process"
            )
    batch = config.batch_size * config.gradient_accumulation * processes
    plans, pictures = [], dict[tuple[int, int], list[int]]()
    for i, entry in enumerate(cache.entries):
        if entry.is_picture:
            pictures.setdefault((entry.height, entry.width), []).append(i)
    for number, stage in enumerate(config.curriculum):
        trains = _trained(config, model, cache, stage, held)
        seed = seed_of(config.seed, number, 0)
        share = config.images * 2**63
        shown = [i for i in range(stage.steps) if seed_of(seed, i, PICTURES) < share]
        plan = order(trains, stage.steps - len(shown), batch, seed)
        shows = _repeated([some for _, some in sorted(pictures.items())], cache, held)
        if shown and not shows:
            raise ValueError(f"images is {config.images:g}, and the cache holds no pictures")
        added = order(shows, len(shown), batch, seed_of(seed, PICTURES, 0))
        for step, clips in zip(shown, added, strict=True):
            plan.insert(step, clips)
        plans.append(plan)
    return plans


def epoch_steps(
    config: TrainConfig, model: ModelToTrain, cache: LatentCache, processes: int
) -> list[int]:
    """Count the steps of an epoch of each stage, in which each of its clips is shown once, or as
    often as it repeats. The last step is filled with clips of the next epoch, and steps that show
    pictures come on top.

    Raises as `plan_clips` does.
    """
    held = held_out(config, cache)
    batch = config.batch_size * config.gradient_accumulation * processes
    clips = (
        sum(map(len, _trained(config, model, cache, stage, held))) for stage in config.curriculum
    )
    return [math.ceil(count / batch / (1 - config.images)) for count in clips]


def _trained(
    config: TrainConfig, model: ModelToTrain, cache: LatentCache, stage: Stage, held: Set[int]
) -> list[list[int]]:
    """Return the clips that a stage trains on, by size, each as often as it repeats."""
    buckets = cache.buckets(model.frames(stage.frames))
    if not buckets:
        longest = max((entry.pixel_frames for entry in cache.entries), default=0)
        raise ValueError(
            f"no clip is long enough for stage {stage}: {stage.frames} frames are needed, the "
            f"longest of {len(cache)} has {longest}"
        )
    groups = [clips for _, clips in sorted(buckets.items())]
    if config.sound:
        groups = [
            [i for i in some if (cache.entries[i].sound_key is None) == is_silent]
            for some in groups
            for is_silent in (False, True)
        ]
    if trains := _repeated(groups, cache, held):
        return trains
    raise ValueError(
        f"held_out {config.held_out:g} leaves no clip for stage {stage}: lower it, or add clips"
    )


def _repeated(groups: Sequence[list[int]], cache: LatentCache, held: Set[int]) -> list[list[int]]:
    """Clips of some groups that are not held out, each as often as it repeats."""
    found = [
        [i for i in some if i not in held for _ in range(cache.entries[i].repeats or 1)]
        for some in groups
    ]
    return [bucket for bucket in found if bucket]


class Batches:
    """Batches of one process, or of the processes that share its clips.

    They depend on the step alone, so a resumed run draws the same.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: ModelToTrain,
        cache: LatentCache,
        adapter: Adapter,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.model, self.cache = config, model, cache
        self.adapter, self.accelerator = adapter, accelerator
        self._groups = ProcessGroups.of(config, accelerator)
        family = family_of(model.transformer)
        self._fps = config.fps or family.sizes_of(model.transformer.config).fps
        self._tells_fps = family.training.takes_fps
        self._chunk = 0  # latent frames before patchify; 0: the model makes no chunks
        if config.objective == CAUSAL:
            self._chunk = config.zones.frames * temporal_patch(model.transformer)

    def frames_of(self, stage: Stage, clips: list[int]) -> int:
        """Return the pixel frames of a step, which is one for pictures."""
        return 1 if self.cache.entries[clips[0]].is_picture else stage.frames

    def __call__(self, step: int, clips: list[int], frames: int, micro: int) -> Batch:
        """Build this process's batch of a micro-step.

        Args:
            clips: clips of the step, over all processes and micro-steps.
            frames: latent frames.
        """
        config, size, groups = self.config, self.config.batch_size, self._groups
        first = (micro * groups.count + groups.number) * size
        numbers = clips[first : first + size]
        latents = [self.latents(number, frames) for number in numbers]
        about = {"shift": self.model.shift, "sigmas": sigmas_of(config, self.model)}
        is_causal = config.objective == CAUSAL
        draws = [
            draw(config, step, place, clean.shape, **about)._replace(
                text=self._text(clips[place], step, place),
                sound=seed_of(config.seed, step, SOUNDS + place),
                frames=seed_of(config.seed, step, FRAMES + place),
                fresh=seed_of(config.seed, step, FRESH + place),
                chunks=seed_of(config.seed, step, CHUNKS + place) if is_causal else None,
            )
            for place, clean in enumerate(latents, first)
        ]
        if config.student_steps is not None:  # all processes take the same step, by turns
            levels = levels_of(config, self.model.shift)
            turn = (step * config.gradient_accumulation + micro) % len(levels)
            draws = [drawn._replace(sigma=levels[turn]) for drawn in draws]
        return self.of(numbers, latents, draws)

    def latents(self, clip: int, frames: int) -> Tensor:
        """Read a clip's first latents, (C, f, h, w); zeros where no clip trains."""
        if self.config.needs_clips:
            return self.cache.latents(clip, frames)
        entry, transformer = self.cache.entries[clip], self.model.transformer
        channels = family_of(transformer).latent_channels(transformer.config)
        return torch.zeros(channels, frames, entry.height, entry.width)

    def of(self, clips: list[int], latents: list[Tensor], draws: list[Draw]) -> Batch:
        """Build the batch of some clips with draws that are given."""
        config, cache, frames = self.config, self.cache, latents[0].shape[1]
        pairs = zip(clips, draws, strict=True)
        conditions = self._together([self._said(clip, frames, drawn) for clip, drawn in pairs])
        given: dict[str, Tensor] = {}
        if self.model.condition != TEXT:
            pairs = zip(clips, draws, strict=True)
            given = self._together([self._given(clip, frames, drawn) for clip, drawn in pairs])
            shown: dict[str, list[bool]] = {}
            if config.first_frame_dropout:
                shown[IS_GIVEN] = [drawn.framed for drawn in draws]
            if config.last_frame_dropout:
                shown[LAST_IS_GIVEN] = [drawn.ended for drawn in draws]
            for name, each in shown.items():
                given[name] = self._put(torch.tensor(each, dtype=torch.float32))
        taught = uncond = mask = None
        seeds = [drawn.chunks for drawn in draws]
        sound, sound_noise = self._sound(clips, draws, frames) if config.sound else (None, None)
        if config.objective not in ("flow", CAUSAL):
            taught = self.adapter.teacher_conditions(cache, clips, draws)
        if config.teacher_guidance > 1:
            uncond = self._together([self._each_chunk(cache.empty, frames)] * len(clips)) | given
        if config.masks:
            white = torch.stack([cache.mask(clip, frames) for clip in clips])
            mask = self._put(config.mask_floor + (1 - config.mask_floor) * white)
        return Batch(
            clean=self._put(torch.stack(latents)),
            noise=self._put(torch.stack([drawn.noise for drawn in draws])),
            sigma=self._put(torch.tensor([drawn.sigma for drawn in draws])),
            conditions=conditions | given,
            teacher_conditions=None if taught is None else self._together(taught),
            uncond_conditions=uncond,
            mask=mask,
            shown=tuple(map(self._put, self.adapter.inputs(cache, clips, draws))),
            sound=sound,
            sound_noise=sound_noise,
            chunks=None if None in seeds else self._put(torch.tensor(seeds)),
            fresh=self._put(torch.tensor([drawn.fresh for drawn in draws]))
            if config.student_steps is not None
            else None,
        )

    def _said(self, clip: int, frames: int, drawn: Draw) -> dict[str, Tensor]:
        """Read the conditions of a clip's caption, or of the empty one; see `Batch.conditions`."""
        entry = self.cache.entries[clip]
        if not self._chunk or entry.starts is None or not drawn.captioned:
            return self._each_chunk(captioned(self.cache, clip, drawn), frames)
        factor = (entry.pixel_frames - 1) // (entry.frames - 1)
        lengths = Lengths(entry.pixel_frames, self._chunk, factor)
        parts = {start: number for number, start in enumerate(entry.starts)}
        said = [lengths.prompt(parts, chunk) for chunk in range(frames // self._chunk)]
        each = [self.cache.conditions(clip, number) for number in said]
        return {name: torch.stack([one[name] for one in each]) for name in each[0]}

    def _each_chunk(self, told: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
        """Repeat conditions for each chunk, if there are any."""
        if not self._chunk:
            return told
        return {name: x.expand(frames // self._chunk, *x.shape) for name, x in told.items()}

    def _given(self, clip: int, frames: int, drawn: Draw) -> dict[str, Tensor]:
        """Read what a clip is given beside its text, its frames as noisy as the model has them."""
        found = self.cache.first_frame(clip, frames)
        if level := family_of(self.model.transformer).training.frame_noise:
            generator, keep = torch.Generator().manual_seed(drawn.frames), torch.tensor(1 - level)
            shown = {FIRST_FRAME: drawn.framed, LAST_FRAME: drawn.ended}
            for name in (name for name, is_shown in shown.items() if is_shown and name in found):
                noise = torch.randn(found[name].shape, generator=generator)
                found[name] = keep * found[name] + (1 - keep) * noise
        return found

    def _sound(
        self, clips: list[int], draws: list[Draw], frames: int
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Read the sound of some clips, and draw its noise; None for clips without sound."""
        family, transformer = family_of(self.model.transformer), self.model.transformer
        length = family.sizes.coding().frames_of(frames)
        tokens = family.sound_tokens(transformer.config, length, self._fps)
        held = [self.cache.sound(clip, tokens) for clip in clips]
        found = [x for x in held if x is not None]
        if not found:
            return None, None
        noise = [
            torch.randn(x.shape, generator=torch.Generator().manual_seed(drawn.sound))
            for x, drawn in zip(found, draws, strict=True)
        ]
        return self._put(torch.stack(found)), self._put(torch.stack(noise))

    def _text(self, clip: int, step: int, place: int) -> int:
        """Draw which of a clip's texts is shown, by the seed, the step and the place alone."""
        entry = self.cache.entries[clip]
        keys = entry.text_keys if entry.starts is None else None
        return 0 if keys is None else seed_of(self.config.seed, step, TEXTS + place) % len(keys)

    def _together(self, each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        found = {name: self._put(torch.stack([one[name] for one in each])) for name in each[0]}
        if self._tells_fps:
            shape = next(iter(found.values())).shape[: 2 if self._chunk else 1]
            found["fps"] = self._put(torch.full(shape, float(self._fps)))
        return found

    def _put(self, x: Tensor) -> Tensor:
        return x.to(self.accelerator.device)


def sigmas_of(config: TrainConfig, model: ModelToTrain) -> tuple[float, float]:
    """Return the lowest and highest noise level that the part trains at."""
    if model.boundary is None:
        return SIGMAS
    if config.part == "transformer":
        return model.boundary, SIGMAS[1]
    return SIGMAS[0], model.boundary
