"""Sampling of one clip from any diffusers video pipeline, with timing."""

import inspect
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gen_accel.attention_processors.attached.clock import first_transformer
from gen_accel.attention_processors.families import Family, family_of
from gen_accel.attention_processors.methods.mixed import Mixed
from gen_accel.measure.video_io import Sound
from gen_accel.memory import check_room
from gen_accel.method import Method, check_grid
from gen_accel.parsing import shown
from gen_accel.pipelines.generation.config import Clip as Clip
from gen_accel.pipelines.generation.decode import as_uint8, decode_stream, is_streamed
from gen_accel.pipelines.generation.progress import Tick, counted
from gen_accel.pipelines.sampler import wasted_step
from gen_accel.video import VideoShape, grid_of, nearest, patch_of, vae_factor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

AnyClip = TypeVar("AnyClip", bound=Clip)
Run = Callable[..., Any]  # a pipeline, or what is called in its place with its arguments

ACTIVATIONS = 5  # activations that a block holds at once: its input, q, k, v and the output
FPS = 16.0  # frame rate of latents that state none
# Fields of a `Clip`, and diffusers' names for them.
ARGUMENTS = {
    "frames": "num_frames",
    "height": "height",
    "width": "width",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "negative_prompt": "negative_prompt",
    "max_tokens": "max_sequence_length",
}


@dataclass(frozen=True)
class CallArguments:
    """Arguments of a pipeline besides its clip.

    Args:
        values: of the call, by argument.
        shortened: share of the steps that are run, for a video that is remade in part.
        told: lines about what was changed to fit.
    """

    values: Mapping[str, object] = field(default_factory=dict, repr=False)
    shortened: float = 1.0
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class Denoised:
    """A clip after its last step.

    Args:
        made: latents, (1, C, f, h, w); (F, H, W, 3) uint8 of a pipeline that decodes by itself.
        seconds: time of denoising, the text encoder included.
        sound: of the video; None without one.
    """

    made: Tensor | np.ndarray = field(repr=False)
    seconds: float
    sound: Sound | None = field(default=None, repr=False)

    @property
    def latents(self) -> Tensor:
        """Latents of a pipeline that `is_streamed`, (1, C, f, h, w)."""
        assert isinstance(self.made, Tensor)
        return self.made

    def decoded(self, pipe: "DiffusionPipeline", tick: Tick | None = None) -> Iterator[np.ndarray]:
        """Decode it in chunks of (f, H, W, 3) uint8, see `decode_stream`.

        Args:
            tick: takes the decoded frames, and how many there are.
        """
        if not isinstance(self.made, Tensor):
            return iter([self.made])
        chunks = decode_stream(pipe, self.made)
        if tick is None:
            return chunks
        total = (self.made.shape[2] - 1) * _vae_factor(pipe, "temporal") + 1
        return counted(chunks, tick, total)


@dataclass(frozen=True)
class Sample:
    """A generated clip.

    Args:
        video: (F, H, W, 3) uint8.
        denoise_seconds: time of denoising, the text encoder included. Decoding is included too if
            the pipeline does not report the end of a step.
        decode_seconds: time of decoding.
        sound: of the video; None without one.
    """

    video: np.ndarray = field(repr=False)
    denoise_seconds: float
    decode_seconds: float
    sound: Sound | None = field(default=None, repr=False)

    @property
    def seconds(self) -> float:
        return self.denoise_seconds + self.decode_seconds


def parameters(pipe: "DiffusionPipeline") -> dict[str, inspect.Parameter]:
    """Parameters of the pipeline's `__call__`, by name."""
    known = dict(inspect.signature(type(pipe).__call__).parameters)
    del known["self"]
    return known


def arguments(pipe: "DiffusionPipeline") -> dict[str, str]:
    """Map the fields of a `Clip` to this pipeline's names for them. Most pipelines have no name
    for the frame rate."""
    known, found = parameters(pipe), dict(ARGUMENTS)
    found["frames"] = served_family(pipe).generation.frames_argument
    if rate := next((name for name in ("frame_rate", "fps") if name in known), None):
        found["fps"] = rate
    return found


def default_of(pipe: "DiffusionPipeline", name: str) -> Any:
    """Default of a field of a `Clip`, or of another argument of the pipeline's `__call__`; None
    without one."""
    known = parameters(pipe).get(arguments(pipe).get(name, name))
    return None if known is None or known.default is known.empty else known.default


def served_family(pipe: "DiffusionPipeline") -> Family:
    """Return the family of the first transformer."""
    module = first_transformer(pipe)
    return family_of(getattr(module, "_orig_mod", module))


def filled(pipe: "DiffusionPipeline", clip: AnyClip, inputs: Collection[str] = ()) -> AnyClip:
    """Fill the open values of `clip` with the pipeline's own defaults.

    A value stays None if its default depends on the model, except `fps`, which gets a number.

    Args:
        inputs: names of the arguments that the pipeline gets besides the clip. With them it may
            have no argument for the frames, which a video then decides.

    Raises:
        ValueError: the pipeline does not take a value of `clip`, or cannot run from a prompt
            alone.
    """
    known, kind = parameters(pipe), type(pipe).__name__
    required = [
        name
        for name, one in known.items()
        if one.default is one.empty
        and one.kind is one.POSITIONAL_OR_KEYWORD
        and name not in ("prompt", *inputs)
    ]
    if required:
        raise ValueError(f"{kind} needs {', '.join(required)} besides a prompt; call it in Python")
    values = {}
    for name, argument in arguments(pipe).items():
        value = getattr(clip, name)
        if argument not in known and value is not None and not (name == "frames" and inputs):
            raise ValueError(f"{kind} takes no {argument}, got {shown(value)}")
        if value is None and argument in known:
            value = known[argument].default
        values[name] = value
    if clip.sampling is not None:
        clip.sampling.scheduler(pipe.scheduler)  # refuses what does not step by flow matching
    return clip.model_copy(update=values | {"fps": frame_rate(pipe, clip.fps)})


def check_clip(pipe: "DiffusionPipeline", clip: Clip, method: Method) -> None:
    """Refuse, by a ValueError, frames and sizes that the pipeline would round or that `method`
    cannot be planned at, and a clip that does not fit into memory for even one block of the model.

    Pipelines that decode by themselves are checked for memory only; they check sizes when called.
    """
    size, fewer = f"{clip.frames} frames of {clip.height} x {clip.width}", "fewer frames or pixels"
    if is_streamed(pipe):
        video, module = token_grid(pipe, clip), first_transformer(pipe)
        sites = served_family(pipe).self_attentions(module)
        width = max(site.heads * site.dim for site in sites)
        needed = ACTIVATIONS * video.tokens * width * module.dtype.itemsize
        what = f"{size}, {video.tokens} tokens,"
        check_room(what, needed, f"ask for {fewer}", pipe._execution_device)
        check_fits(method, video)
    elif clip.frames and clip.height and clip.width:  # decoded as a whole, in float32
        check_room(size, 12 * clip.frames * clip.height * clip.width, f"ask for {fewer}")


def token_grid(pipe: "DiffusionPipeline", clip: Clip) -> VideoShape:
    """Compute the grid of the video's tokens, without text.

    Only for a pipeline that `is_streamed` or trains, as others round in their own ways. Raises
    ValueError for frames and sizes that the pipeline would round, naming the nearest.
    """
    patch = patch_of(first_transformer(pipe).config)
    sizes, spatial = served_family(pipe).sizes, _vae_factor(pipe, "spatial")
    coding = sizes.coding(None if sizes.chunks else _vae_factor(pipe, "temporal"))
    asked = {name: getattr(clip, name) for name in ("frames", "height", "width")}
    return grid_of(asked, coding, spatial, patch)


def check_fits(method: Method, video: VideoShape) -> None:
    """Refuse, by a ValueError, a method that cannot be planned on `video`."""
    if isinstance(method, Mixed):
        for rule in method.rules:
            check_grid(rule.method, video)
    elif method.defines("plan"):
        method.planned(video)


def denoise(
    pipe: "DiffusionPipeline",
    prompt: str,
    clip: Clip,
    *,
    tick: Tick | None = None,
    watch: Callable[[Tensor], None] | None = None,
    run: Run | None = None,
    inputs: CallArguments | None = None,
) -> Denoised:
    """Run the pipeline for one prompt, as far as the latents if it `is_streamed`.

    The noise is drawn on the CPU, so that a seed gives the same noise on every device.

    Args:
        clip: a result of `filled`.
        tick: takes the steps that are done, and their total.
        watch: takes the latents after each step, before `tick`, in whatever order of axes the
            pipeline reports them.
        run: called in place of the pipeline, with its arguments; see `long_video.extend`.
        inputs: pictures and video, see `inputs.fit`.

    Raises:
        ValueError: latents or pixels that are not finite.
    """
    streamed, known, inputs = is_streamed(pipe), parameters(pipe), inputs or CallArguments()
    given: dict[str, object] = {
        argument: getattr(clip, name)
        for name, argument in arguments(pipe).items()
        if getattr(clip, name) is not None and argument in known
    }
    if clip.guidance_scale == 1:
        unguided = served_family(pipe).generation.unguided
        given |= {name: value for name, value in unguided.items() if name in known}
    given |= inputs.values
    marks: list[float] = []

    def on_step_end(
        pipe: "DiffusionPipeline", step: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        total = max(1, int(len(pipe.scheduler.timesteps) * inputs.shortened))
        if step == 0 and (said := wasted_step(pipe.scheduler)):
            warnings.warn(said, stacklevel=2)
        if step >= total - 1:  # diffusion forcing makes more than the scheduler has
            marks.append(_now(pipe))
        if watch is not None:
            watch(tensors["latents"])
        if tick is not None:
            tick(min(step + 1, total), total)
        return tensors

    if "callback_on_step_end" in known:
        given["callback_on_step_end"] = on_step_end
    call: Any = run or pipe
    device, has_inputs = pipe._execution_device, bool(inputs.values)
    on_cpu = device.type == "cpu"
    generator = torch.Generator().manual_seed(clip.seed)
    start = _now(pipe)
    own = nullcontext() if clip.sampling is None else clip.sampling.at_work(pipe, generator)
    forked = torch.random.fork_rng(
        [] if on_cpu else [device.index or 0],
        enabled=has_inputs,
        device_type="cuda" if on_cpu else device.type,
    )
    with own, forked:
        if has_inputs:  # from torch's own generators some pipelines draw when they encode them
            torch.manual_seed(clip.seed)
        made = call(
            prompt=prompt,
            generator=generator,
            output_type="latent" if streamed else "np",
            **given,
        )
    seconds = (marks[-1] if marks else _now(pipe)) - start
    if not streamed:
        frames = made.frames[0] if hasattr(made, "frames") else made.video
        video = np.stack([as_uint8(frame, pipe) for frame in frames])
        return Denoised(video, seconds, sound_of(pipe, made))
    check_latents(made.frames, first_transformer(pipe).dtype)
    return Denoised(made.frames, seconds)


def check_latents(latents: Tensor, dtype: torch.dtype) -> None:
    """Refuse, by a ValueError, latents that are not finite, of a model of this dtype."""
    if not torch.isfinite(latents).all():
        raise ValueError(
            f"the model made values that are not finite, in {dtype}; try dtype float32 or bfloat16"
        )


def sample(
    pipe: "DiffusionPipeline",
    prompt: str,
    clip: Clip,
    *,
    tick: Tick | None = None,
    watch: Callable[[Tensor], None] | None = None,
    run: Run | None = None,
    inputs: CallArguments | None = None,
    decoding: Callable[[], Tick] | None = None,
) -> Sample:
    """Run the pipeline for one prompt as `denoise` does, and decode the whole video in memory.

    Args:
        decoding: called when decoding begins; returns what takes the decoded frames.
    """
    start = _now(pipe)
    taken = denoise(pipe, prompt, clip, tick=tick, watch=watch, run=run, inputs=inputs)
    frames = None if decoding is None else decoding()
    video = np.concatenate([*taken.decoded(pipe, frames)])
    return Sample(video, taken.seconds, _now(pipe) - start - taken.seconds, taken.sound)


def sound_of(pipe: "DiffusionPipeline", made: Any) -> Sound | None:
    """Return the sound of what a call of a pipeline made; None for one without sound, or of which
    nothing says its rate. ValueError for samples that are not finite."""
    audio = getattr(made, "audio", None)
    said = getattr(made, "sampling_rate", None), getattr(pipe, "audio_sample_rate", None)
    vocoder: Any = getattr(getattr(pipe, "vocoder", None), "config", {})
    said = vocoder.get("output_sampling_rate"), *said  # which is not that of its input
    rate = next((one for one in said if one is not None), None)
    if audio is None or rate is None:
        return None
    samples = np.asarray(torch.as_tensor(audio)[0].float().cpu())
    samples = np.atleast_2d(samples)  # some are mono, without the axis of channels
    if not np.isfinite(samples).all():
        raise ValueError(
            f"{type(pipe).__name__} made sound that is not finite, in {pipe.dtype}; try dtype "
            "float32 or bfloat16"
        )
    return Sound(samples, int(rate))


def frame_rate(pipe: "DiffusionPipeline", given: float | None) -> float:
    """Return the frame rate as the pipeline takes it: the given one, or its default, or the frame
    rate that the model was published at."""
    fps = default_of(pipe, "fps") if given is None else given
    if fps is None:
        fps = served_family(pipe).sizes_of(first_transformer(pipe).config).fps
    taken = parameters(pipe).get(arguments(pipe).get("fps", ""))
    if taken is None and given is not None and served_family(pipe).generation.sound:
        own = served_family(pipe).sizes_of(first_transformer(pipe).config).fps
        if fps != own:
            raise ValueError(
                f"{type(pipe).__name__} makes {own:g} frames a second, with sound that lasts as "
                f"long, got fps {fps:g}: leave it out"
            )
    if taken is None or taken.annotation not in (int, "int"):
        return float(fps)
    if fps % 1:
        near = " or ".join(map(str, nearest(int(fps), 1, 1)))
        kind = type(pipe).__name__
        raise ValueError(f"fps must be whole with {kind}, got {fps:g}; nearest: {near}")
    return int(fps)


def _vae_factor(pipe: "DiffusionPipeline", axis: str) -> int:
    factor = vae_factor(pipe, axis)
    if factor is None:
        raise ValueError(f"{type(pipe).__name__} does not say how its autoencoder scales")
    return factor


def _now(pipe: "DiffusionPipeline") -> float:
    device = pipe._execution_device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
