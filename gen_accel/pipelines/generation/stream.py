"""Videos without end: chunk after chunk, each decoded as it comes, at constant memory.

A chunk is denoised like a short clip, from noise of its own, while its self-attention sees what
`ChunkedAttention` keeps of the chunks before. A last pass over it, with a little noise, puts it
into that cache. The noise of a chunk is a function of the seed and the chunk's number, so that a
stream that was stopped goes on as if it had not been: the chunks that are there pass through the
cache once more, a forward pass each, and are not denoised again.

Its file grows meanwhile, and plays if it is cut off:

clip.mp4                                at the end, the whole film
clip.stream/film.mp4                    in parts, each of which plays once it is written
clip.stream/chunk-00000.safetensors     latents of each chunk
clip.stream/stream.json                 what decides them
"""

import hashlib
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gen_accel.attention_processors.attached.attachment import attachments_of, one_generation
from gen_accel.attention_processors.attached.clock import first_transformer
from gen_accel.attention_processors.attached.recipe import Recipe, recipes_of
from gen_accel.attention_processors.families.decoders import endless_parts_of
from gen_accel.attention_processors.families.pipelines import choose
from gen_accel.io import read_fields, replacing, save_tensors, write_json
from gen_accel.measure.video_io import count_frames, encode, finish
from gen_accel.parsing import shown
from gen_accel.paths import ABOUT, FILM
from gen_accel.pipelines.generation.config import Clip
from gen_accel.pipelines.generation.decode import decode_chunks, load_latents
from gen_accel.pipelines.generation.progress import Progress
from gen_accel.pipelines.generation.sampling import check_latents, filled, token_grid
from gen_accel.pipelines.long_video.chunks import ChunkedAttention, streaming_family
from gen_accel.pipelines.sampler import Sampler, equal_steps, own_shift
from gen_accel.pipelines.zones import STEPS, Zones, read_zones
from gen_accel.process import locked
from gen_accel.video import patch_of, temporal_patch, vae_factor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Prompts = str | Mapping[int, str]  # a text, or texts by the frame from which each holds
T = TypeVar("T")
Kept = Callable[[int, Tensor], None]  # takes a chunk's number and its latents
NOISE = 0.1  # of a chunk in the cache, where nothing is said
COND, UNCOND = "cond", "uncond"  # caches


class NotTrained(UserWarning):
    """A model makes a video chunk by chunk that was not trained to."""


@dataclass(frozen=True)
class StreamSettings:
    """How a model makes a video chunk by chunk.

    Args:
        noise: noise level of the chunks that are seen.
        shift: of the noise levels; None: the scheduler's.
    """

    zones: Zones = field(default_factory=Zones)
    noise: float = NOISE
    shift: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise of zones must be from 0 to below 1, got {self.noise:g}")

    def changed(self, words: Sequence[str]) -> "StreamSettings":
        """Set the zones and the noise that words say, see `read_zones`."""
        values = read_zones(words)
        noise = values.pop("noise", self.noise)
        return replace(self, zones=replace(self.zones, **values), noise=noise)

    @classmethod
    def of(cls, recipe: Recipe) -> "StreamSettings | None":
        """Take what a LoRA was trained with; None if it was not trained for chunks. ValueError for
        fields that this version does not write."""
        held: dict[str, Any] = dict(recipe.stream or {})
        if not held:
            return None
        known = {one.name for one in fields(Zones)}
        zones = {name: held.pop(name) for name in known & held.keys()}
        if held.keys() > {"noise", "shift"} or not all(map(_is_number, held.values())):
            raise ValueError(f"the stream of a LoRA cannot be read: {shown(recipe.stream)}")
        return cls(Zones(**zones), **held)

    @classmethod
    def of_pipe(cls, pipe: "DiffusionPipeline", words: Sequence[str] = ()) -> "StreamSettings":
        """Take what a LoRA on a pipeline was trained with, or the defaults, which are warned of
        unless there are words; see `changed`."""
        found = map(cls.of, recipes_of(first_transformer(pipe)).values())
        own = next((one for one in found if one is not None), None)
        if own is None and not words:
            warnings.warn(
                "no LoRA here was trained to make a video chunk by chunk (objective causal): the "
                "model's own weights soon lose what they showed, unless they were; then say with "
                "what, as --zones window=6,noise=0",
                NotTrained,
                stacklevel=3,
            )
        return (own or cls()).changed(words)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _checked(prompts: Prompts) -> dict[int, str]:
    found = {0: prompts} if isinstance(prompts, str) else dict(prompts)
    if 0 not in found or any(frame < 0 for frame in found):
        told = ", ".join(map(str, found)) or "none"
        raise ValueError(f"prompts of a stream begin at frame 0, got frames {told}")
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Lengths:
    """Chunks of a stream in frames.

    Args:
        frames: asked for.
        latents: latent frames of a chunk.
        factor: frames of a latent frame, except for the first, which has one.
    """

    frames: int
    latents: int
    factor: int

    @property
    def chunks(self) -> int:
        """Number of chunks that hold the frames."""
        latents = 1 + math.ceil((self.frames - 1) / self.factor)
        return math.ceil(latents / self.latents)

    def first(self, chunk: int) -> int:
        """Number of a chunk's first frame."""
        return max(0, 1 + (chunk * self.latents - 1) * self.factor)

    def prompt(self, prompts: Mapping[int, T], chunk: int) -> T:
        """Return the prompt of a chunk: the last that holds from one of its frames, or before."""
        end = self.first(chunk + 1)
        return prompts[max(frame for frame in prompts if frame < end)]


class Streamer:
    """Maker of the chunks of one video, in order. While `latents` or `frames` run, the model sees
    earlier chunks and its scheduler counts the steps of one.

    Args:
        clip: a result of `filled`; its frames are not read.
        settings: see `StreamSettings.of_pipe`.
        attention: that is on the model already, with these zones, and stays there; None: none is.

    Raises:
        ValueError: a model that does not stream or needs more than a text, sizes that it would
            round, a sampler that is not euler or lcm, or prompts beyond the end.
    """

    def __init__(
        self,
        pipe: "DiffusionPipeline",
        clip: Clip,
        settings: StreamSettings,
        prompts: Prompts,
        attention: ChunkedAttention | None = None,
    ) -> None:
        transformer = first_transformer(pipe)
        if getattr(pipe, "transformer_2", None) is not None:
            raise ValueError(
                f"{type(pipe).__name__} has two transformers, each for some noise levels, and a "
                "stream keeps the cache of one: take a model of one"
            )
        self.pipe, self.clip, self.settings = pipe, clip, settings
        self.prompts = _checked(prompts)
        self.transformer, self.family = transformer, streaming_family(transformer)
        kind = type(pipe).__name__
        index = {**pipe.config, "_class_name": kind}
        model = pipe.name_or_path or kind
        choose(index, transformer.config, (), model)  # refuses what begins with a picture
        if self.family.needs_control(transformer.config):
            raise ValueError(f"a stream is made from text alone, and {kind} needs a control video")
        if endless_parts_of(pipe.vae) is None:
            raise ValueError(
                f"{type(pipe.vae).__name__}, as it is set, decodes latents together with all "
                "later ones, and a video without end has no last one"
            )
        latents = settings.zones.frames * temporal_patch(transformer)
        factor = vae_factor(pipe, "temporal")
        assert factor is not None
        assert clip.frames is not None
        self.lengths = Lengths(clip.frames, latents, factor)
        if (late := max(self.prompts)) >= clip.frames:
            raise ValueError(f"a prompt holds from frame {late}, and the video has {clip.frames}")
        one = clip.model_copy(update={"frames": 1 + (latents - 1) * factor})
        self.grid = token_grid(pipe, one)  # refuses sizes that the model would round
        for owner in attachments_of(transformer):
            settings.zones.check_method(owner.method)
        self.levels = self._levels()
        self._given, self._attention = attention, attention
        self._texts: dict[str, dict[str, Tensor]] = {}
        told = self.family.training.takes_fps
        self._fps = torch.full((1,), float(clip.fps or 0)) if told else None
        self._takes_scale = getattr(transformer.config, "guidance_embeds", False)
        # Schedules and methods count steps by the scheduler, here those of a chunk and the pass
        # into the cache.
        levels, noise = self.levels[:-1], settings.noise
        self._steps = Sampler("euler", (*levels, noise) if 0 < noise < levels[-1] else levels)

    def _levels(self) -> tuple[float, ...]:
        clip = self.clip
        if clip.sampler not in (None, "euler", "lcm"):
            raise ValueError(f"a stream is sampled by euler or lcm, got sampler {clip.sampler}")
        if clip.levels:
            return (*clip.levels, 0.0)
        scheduler: Any = self.pipe.scheduler
        shift = clip.shift or self.settings.shift or own_shift(scheduler.config)
        return (*equal_steps(clip.steps or STEPS, shift), 0.0)

    @property
    def is_guided(self) -> bool:
        return not self._takes_scale and (self.clip.guidance_scale or 1.0) > 1

    @property
    def cached(self) -> int:
        """Bytes of the caches, which are there while `latents` or `frames` run."""
        return self.attention.numbers * self.transformer.dtype.itemsize

    @property
    def attention(self) -> ChunkedAttention:
        assert self._attention is not None, "at work"
        return self._attention

    @torch.no_grad()
    def make(self, chunk: int) -> Tensor:
        """Denoise the next chunk, put it into the cache and return its latents, float32 (1, C, f,
        h, w). ValueError for latents that are not finite."""
        generator = self._generator(chunk)
        x = self._noise(generator)
        self._begin_steps()
        for high, low in itertools.pairwise(self.levels):
            velocity = self._velocity(x, high, chunk)
            if self.clip.sampler == "lcm" and low:
                x = (1 - low) * (x - high * velocity) + low * self._noise(generator)
            else:
                x = x + (low - high) * velocity
        check_latents(x, self.transformer.dtype)
        self._keep(chunk, x)
        return x

    @torch.no_grad()
    def keep(self, chunk: int, latents: Tensor) -> None:
        """Put the next chunk, which is there, into the cache."""
        self._begin_steps()
        self._keep(chunk, latents)

    def _begin_steps(self) -> None:
        scheduler: Any = self.pipe.scheduler
        scheduler.set_timesteps(len(self._steps.levels), device=self.pipe._execution_device)

    def _keep(self, chunk: int, latents: Tensor) -> None:
        noise, level = self._noise(self._generator(chunk, "kept")), self.settings.noise
        x = (1 - level) * latents.to(noise) + level * noise
        for branch, text in self._branches(chunk):
            with self.attention.chunk(branch, keeps=True):
                self._predict(x, level, text)

    def _branches(self, chunk: int) -> list[tuple[str, str]]:
        found = [(COND, self.lengths.prompt(self.prompts, chunk))]
        return [*found, (UNCOND, self.clip.negative_prompt or "")] if self.is_guided else found

    def _velocity(self, x: Tensor, level: float, chunk: int) -> Tensor:
        made = []
        for branch, text in self._branches(chunk):
            with self.attention.chunk(branch):
                made.append(self._predict(x, level, text).float())
        if len(made) == 1:
            return made[0]
        cond, uncond = made
        return uncond + (self.clip.guidance_scale or 1.0) * (cond - uncond)

    def _predict(self, x: Tensor, level: float, text: str) -> Tensor:
        if text not in self._texts:
            self._texts[text] = self._encoded(text)
        sigma = x.new_full((len(x),), level)
        conditions = self._texts[text]
        return self.family.predict(
            self.transformer, x.to(self.transformer.dtype), sigma, conditions
        )

    def _encoded(self, text: str) -> dict[str, Tensor]:
        found = self.family.encode_prompt(self.pipe, [text], self.clip.max_tokens)
        device, dtype = self.pipe._execution_device, self.transformer.dtype
        put = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in found.items()
        }
        if self._fps is not None:
            put["fps"] = self._fps.to(device)
        if self._takes_scale:
            scale = 1000 * (self.clip.guidance_scale or 1.0)
            put["guidance"] = torch.full((1,), scale, device=device, dtype=dtype)
        return put

    def _generator(self, chunk: int, what: str = "made") -> torch.Generator:
        digest = hashlib.sha256(f"{self.clip.seed} {chunk} {what}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def _noise(self, generator: torch.Generator) -> Tensor:
        """(1, C, f, h, w) float32, drawn on the CPU."""
        patch = patch_of(self.transformer.config)
        sides = (n * p for n, p in zip(self.grid.grid, patch, strict=True))
        channels = self.family.latent_channels(self.transformer.config)
        noise = torch.randn((1, channels, *sides), generator=generator)
        return noise.to(self.pipe._execution_device)

    def latents(
        self, earlier: Sequence[Tensor] = (), kept: Kept | None = None
    ) -> Generator[Tensor, None, None]:
        """Yield the latents of all chunks, which fill the frames asked for.

        Args:
            earlier: latents of the first chunks, which are not made again.
            kept: called with each chunk that is made.
        """
        own = self.pipe.scheduler
        attention = self._given or ChunkedAttention(self.transformer, self.settings.zones)
        attention.fps = self._fps
        self._attention, self.pipe.scheduler = attention, self._steps.scheduler(own)
        try:
            for chunk in range(self.lengths.chunks):
                if chunk < len(earlier):
                    x = earlier[chunk].to(self.pipe._execution_device, torch.float32)
                    self.keep(chunk, x)
                else:
                    x = self.make(chunk)
                    if kept is not None:
                        kept(chunk, x)
                yield x
        finally:
            self.pipe.scheduler = own
            attention.forget()
            if self._given is None:
                attention.remove()

    def frames(
        self, earlier: Sequence[Tensor] = (), kept: Kept | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the frames as they are decoded, (f, H, W, 3) uint8 each; see `latents`."""
        left = self.lengths.frames
        with one_generation(self.pipe), closing(self.latents(earlier, kept)) as latents:
            for pixels in decode_chunks(self.pipe, latents):
                yield pixels[:left]
                left -= len(pixels)
                if left <= 0:
                    return


def stream_clip(pipe: "DiffusionPipeline", clip: Clip) -> Clip:
    """Fill the open values of a clip that streams with the pipeline's own, `STEPS`, and guidance 1
    with a LoRA that holds it."""
    given: dict[str, Any] = {"steps": clip.steps or len(clip.levels) or STEPS}
    held = any(one.holds_guidance for one in recipes_of(first_transformer(pipe)).values())
    scale = 1.0 if clip.guidance_scale is None and held else clip.guidance_scale
    guider: Any = getattr(pipe, "guider", None)  # has the scale, in the place of the call
    if guider is None:
        return filled(pipe, clip.model_copy(update={**given, "guidance_scale": scale}))
    found = filled(pipe, clip.model_copy(update={**given, "guidance_scale": None}))
    own = getattr(guider, "guidance_scale", 1.0)
    return found.model_copy(update={"guidance_scale": own if scale is None else scale})


class StreamFolder:
    """The chunks of a stream, and the film of them that grows.

    Args:
        path: of the folder.
        asked: what decides the chunks, as JSON holds it. Prompts are compared by chunk.
        resume: go on with the chunks that are there; else they are removed.

    Raises ValueError for nothing to go on with, or a stream of other settings.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], *, resume: bool) -> None:
        self.path, self.asked = path, json.loads(json.dumps(asked))
        if not resume:
            for file in (*path.glob("chunk-*.safetensors"), path / FILM, path / ABOUT):
                file.unlink(missing_ok=True)
            return
        if not (path / ABOUT).is_file():
            raise ValueError(
                f"nothing to resume: {path} holds no stream; leave --resume out to begin one"
            )
        self._check(read_fields(path / ABOUT))

    def _check(self, held: Mapping[str, Any]) -> None:
        for name, value in self.asked.items():
            if name != "prompts" and held.get(name) != value:
                told = f"{name} {shown(held.get(name))}, this one {shown(value)}"
                raise ValueError(
                    f"{self.path} holds a stream of {told}: give the same again, or another --out"
                )
        made = len(self.chunks())
        before, now = (one.get("prompts", [])[:made] for one in (held, self.asked))
        for chunk, (old, new) in enumerate(zip(before, now, strict=False)):
            if old != new:
                raise ValueError(
                    f"{self.path} holds chunk {chunk} of the prompt {shown(old)}, this stream has "
                    f"{shown(new)} there: change prompts after chunk {made - 1} alone"
                )

    def chunks(self) -> list[Path]:
        """Files of the first chunks without a gap."""
        found: list[Path] = []
        while (path := self._chunk(len(found))).is_file():
            found.append(path)
        return found

    def earlier(self) -> list[Tensor]:
        """Latents of the chunks that are there."""
        return [load_latents(path)[0] for path in self.chunks()]

    def keep(self, chunk: int, latents: Tensor) -> None:
        path = self._chunk(chunk)
        with replacing(path) as partial:
            save_tensors({"latents": latents.cpu().contiguous()}, partial, {})

    def write(self, frames: Iterator[np.ndarray], *, fps: float, every: int) -> None:
        """Write the film, which plays up to each `every` frames."""
        write_json(self.path / ABOUT, self.asked)
        encode(frames, self.path / FILM, fps=fps, growing=every)

    def finish(self, target: Path, about: Mapping[str, str]) -> Path:
        """Write the whole film to its place."""
        made = finish(self.path / FILM, target, about)
        (self.path / FILM).unlink()
        return made

    def _chunk(self, number: int) -> Path:
        return self.path / f"chunk-{number:05d}.safetensors"


def write_streamed(
    streamer: Streamer,
    target: Path,
    folder: Path,
    asked: Mapping[str, Any],
    about: Callable[[], Mapping[str, str]],
    *,
    fps: float,
    resume: bool = False,
) -> Path:
    """Make a stream in its folder, and then its film at `target`. A stopped one can be resumed.

    Args:
        asked: see `StreamFolder`.
        about: returns the texts that the film keeps, at the end.

    Raises as `StreamFolder`; ValueError for fewer frames than the film has; OSError if the disk
    or the encoder failed.
    """
    lengths = streamer.lengths
    if resume and target.exists() and (has := count_frames(target)) > lengths.frames:
        raise ValueError(
            f"{target} has {has} frames, and a stream only goes on: give --frames {has} or more, "
            f"got {lengths.frames}"
        )
    chunks = [lengths.prompt(streamer.prompts, i) for i in range(lengths.chunks)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder), Progress() as bar:
        place = StreamFolder(folder, {**asked, "prompts": chunks}, resume=resume)
        earlier = place.earlier()[: lengths.chunks]
        bar.say(
            f"streaming {lengths.frames} frames, {lengths.chunks} chunks of "
            f"{lengths.latents * lengths.factor}; each plays in {folder / FILM} once it is made"
        )
        if earlier:
            bar.say(f"{len(earlier)} chunks are there and pass through the cache once more")
        task = bar.add_task(target.name, lengths.frames, unit="frames")

        def frames() -> Iterator[np.ndarray]:
            done, began, start = 0, 0.0, 0
            opened = time.perf_counter()
            for pixels in streamer.frames(earlier, place.keep):
                yield from pixels
                done += len(pixels)
                if not began and done > lengths.first(len(earlier)):
                    began, start = time.perf_counter(), done
                words = f"{target.name}, cache {streamer.cached / 1e6:,.1f} MB"
                left = None
                if began and done > start:
                    speed = (done - start) / (time.perf_counter() - began)
                    words += f", {speed:.1f} a second"
                    left = (lengths.frames - done) / speed
                elif not earlier:  # all of the first chunk is made before its first frame is here
                    left = (lengths.chunks - 1) * (time.perf_counter() - opened)
                bar.update(task, completed=done, description=words, left=left)

        place.write(frames(), fps=fps, every=lengths.latents * lengths.factor)
        return place.finish(target, about())
