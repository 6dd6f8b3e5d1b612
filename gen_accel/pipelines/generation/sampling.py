"""Sampling of one clip from any diffusers video pipeline, with timing."""

import inspect
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.families import Family, family_of
from gen_accel.attention_processors.lengths import PIXELS, nearest, patch_of, vae_factor
from gen_accel.attention_processors.methods.mixed import Mixed
from gen_accel.memory import check_room
from gen_accel.method import Method, check_grid
from gen_accel.pipelines.generation.config import Clip as Clip
from gen_accel.pipelines.generation.decode import (
    as_uint8,
    decode_stream,
    is_streamed,
)
from gen_accel.pipelines.generation.progress import Tick
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from typing_extensions import Unpack

AnyClip = TypeVar("AnyClip", bound=Clip)

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

    values: Mapping[str, Any] = field(default_factory=dict, repr=False)
    shortened: float = 1.0
    told: tuple[str, ...] = ()


class Hooks(TypedDict, total=False):
    """Options of a run of a pipeline, beside its clip.

    Args:
        tick: takes the steps that are done, and their total.
        watch: takes the latents after each step, before `tick`.
        run: called in place of the pipeline, with its arguments; see `long_video.extend`.
        inputs: pictures and video, see `inputs.fit`.
    """

    tick: Tick | None
    watch: Callable[[Tensor], None] | None
    run: Callable[..., Any] | None
    inputs: CallArguments | None


@dataclass(frozen=True)
class Denoised:
    """A clip before it is decoded.

    Args:
        latents: (1, C, f, h, w).
        seconds: time of denoising, the text encoder included.
    """

    latents: Tensor = field(repr=False)
    seconds: float


@dataclass(frozen=True)
class Sample:
    """A generated clip.

    Args:
        video: (F, H, W, 3) uint8.
        denoise_seconds: time of denoising, the text encoder included. Decoding is included too if
            the pipeline does not report the end of a step.
        decode_seconds: time of decoding.
    """

    video: np.ndarray = field(repr=False)
    denoise_seconds: float
    decode_seconds: float

    @property
    def seconds(self) -> float:
        return self.denoise_seconds + self.decode_seconds


def parameters(pipe: "DiffusionPipeline") -> dict[str, inspect.Parameter]:
    """Parameters of the pipeline's `__call__`, by name."""
    known = dict(inspect.signature(type(pipe).__call__).parameters)
    del known["self"]
    return known


def arguments(pipe: "DiffusionPipeline") -> dict[str, str]:
    """Map the fields of a `Clip` to this pipeline's names for them."""
    rate = rate_argument(pipe)
    frames = {"frames": frames_argument(pipe)}
    return ARGUMENTS | frames | ({} if rate is None else {"fps": rate})


def default_of(pipe: "DiffusionPipeline", name: str) -> Any:
    """Default of an argument of the pipeline's `__call__`; None without one."""
    known = parameters(pipe).get(name)
    return None if known is None or known.default is known.empty else known.default


def frames_argument(pipe: "DiffusionPipeline") -> str:
    return served_family(pipe).generation.frames_argument


def rate_argument(pipe: "DiffusionPipeline") -> str | None:
    """Name of the argument for the frame rate; None for most pipelines, which have none."""
    known = parameters(pipe)
    return next((name for name in ("frame_rate", "fps") if name in known), None)


def served_family(pipe: "DiffusionPipeline") -> Family:
    """Return the family of the first transformer."""
    module = first_transformer(pipe)
    return family_of(getattr(module, "_orig_mod", module))


def first_transformer(pipe: "DiffusionPipeline") -> Any:
    return next(iter(served_transformers(pipe).values()))


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
            raise ValueError(f"{kind} takes no {argument}, got {value!r}")
        if value is None and argument in known:
            value = known[argument].default
        values[name] = value
    return clip.model_copy(update=values | {"fps": frame_rate(pipe, clip.fps)})


def check_clip(pipe: "DiffusionPipeline", clip: Clip, method: Method) -> None:
    """Refuse, by a ValueError, frames and sizes that the pipeline would round or that `method`
    cannot be planned at.

    Pipelines that decode by themselves are checked for memory only; they check sizes when called.
    """
    if is_streamed(pipe):
        video = token_grid(pipe, clip)
        _check_room(pipe, clip, video)
        check_fits(method, video)
    elif clip.frames and clip.height and clip.width:  # decoded as a whole, in float32
        pixels = 12 * clip.frames * clip.height * clip.width
        check_room(_size(clip), pixels, "ask for fewer frames or pixels")


def _check_room(pipe: "DiffusionPipeline", clip: Clip, video: VideoShape) -> None:
    """Refuse a clip whose tokens do not fit into memory for even one block of the model."""
    module = first_transformer(pipe)
    sites = served_family(pipe).self_attentions(module)
    width = max(site.heads * site.dim for site in sites)
    check_room(
        f"{_size(clip)}, {video.tokens} tokens,",
        ACTIVATIONS * video.tokens * width * module.dtype.itemsize,
        "ask for fewer frames or pixels",
        pipe._execution_device,
    )


def _size(clip: Clip) -> str:
    return f"{clip.frames} frames of {clip.height} x {clip.width}"


def token_grid(pipe: "DiffusionPipeline", clip: Clip) -> VideoShape:
    """Compute the grid of the video's tokens, without text.

    Only for a pipeline that `is_streamed`, as other pipelines round in their own ways. Raises
    ValueError for frames and sizes that the pipeline would round, naming the nearest.
    """
    frames, height, width = clip.frames, clip.height, clip.width
    assert frames is not None
    assert height is not None
    assert width is not None
    patch = patch_of(first_transformer(pipe).config)
    temporal, spatial = _vae_factor(pipe, "temporal"), _vae_factor(pipe, "spatial")
    wrong = []
    if (frames - 1) % temporal:
        near = _nearest(frames, temporal, 1)
        wrong.append(f"frames must be 1 more than a multiple of {temporal}, got {frames}{near}")
    for name, size, p in (("height", height, patch[1]), ("width", width, patch[2])):
        step = math.lcm(PIXELS, spatial * p)
        if size % step:
            near = _nearest(size, step, step)
            wrong.append(f"{name} must be a multiple of {step}, got {size}{near}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return VideoShape(
        -(-((frames - 1) // temporal + 1) // patch[0]),
        height // (spatial * patch[1]),
        width // (spatial * patch[2]),
    )


def check_fits(method: Method, video: VideoShape) -> None:
    """Refuse, by a ValueError, a method that cannot be planned on `video`."""
    if isinstance(method, Mixed):
        for rule in method.rules:
            check_grid(rule.method, video)
    elif method.defines("plan"):
        method.planned(video)


def denoise(
    pipe: "DiffusionPipeline", prompt: str, clip: Clip, **hooks: "Unpack[Hooks]"
) -> Denoised:
    """Run the pipeline for one prompt, as far as the latents.

    The noise is drawn on the CPU, so that a seed gives the same noise on every device.

    Args:
        pipe: a pipeline that `is_streamed`.
        clip: a result of `filled`.

    Raises:
        ValueError: latents that are not finite.
    """
    latents, seconds = _run(pipe, prompt, clip, "latent", hooks)
    if not torch.isfinite(latents).all():
        raise ValueError(
            f"the model made values that are not finite, in {first_transformer(pipe).dtype}; try "
            "dtype float32 or bfloat16"
        )
    return Denoised(latents, seconds)


def sample(pipe: "DiffusionPipeline", prompt: str, clip: Clip, **hooks: "Unpack[Hooks]") -> Sample:
    """Run the pipeline for one prompt, and decode the whole video in memory.

    Pipelines that are not `is_streamed` decode by themselves, and `watch` takes their latents in
    whatever order of axes they report them.

    Raises:
        ValueError: latents or pixels that are not finite.
    """
    start = _now(pipe)
    if is_streamed(pipe):
        taken = denoise(pipe, prompt, clip, **hooks)
        video, seconds = np.concatenate([*decode_stream(pipe, taken.latents)]), taken.seconds
    else:
        frames, seconds = _run(pipe, prompt, clip, "np", hooks)
        video = np.stack([as_uint8(frame, pipe) for frame in frames[0]])
    return Sample(video, seconds, _now(pipe) - start - seconds)


def pixel_frames(pipe: "DiffusionPipeline", latents: Tensor) -> int:
    """Number of pixel frames that `latents`, (B, C, f, h, w), are decoded to."""
    return (latents.shape[2] - 1) * _vae_factor(pipe, "temporal") + 1


def _run(
    pipe: "DiffusionPipeline", prompt: str, clip: Clip, output_type: str, hooks: Hooks
) -> tuple[Any, float]:
    """Run the pipeline. Returns a batch of one sample, and the seconds until its last step."""
    inputs, known = hooks.get("inputs") or CallArguments(), parameters(pipe)
    tick, watch = hooks.get("tick"), hooks.get("watch")
    given = {
        argument: getattr(clip, name)
        for name, argument in arguments(pipe).items()
        if getattr(clip, name) is not None and argument in known
    }
    given |= inputs.values
    marks: list[float] = []

    def on_step_end(
        pipe: "DiffusionPipeline", step: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        total = max(1, int(len(pipe.scheduler.timesteps) * inputs.shortened))
        if step == total - 1:
            marks.append(_now(pipe))
        if watch is not None:
            watch(tensors["latents"])
        if tick is not None:
            tick(step + 1, total)
        return tensors

    if "callback_on_step_end" in known:
        given["callback_on_step_end"] = on_step_end
    start = _now(pipe)
    with _seeded(pipe, clip.seed) if inputs.values else nullcontext():
        call: Any = hooks.get("run") or pipe
        made = call(
            prompt=prompt,
            generator=torch.Generator().manual_seed(clip.seed),
            output_type=output_type,
            **given,
        )
    end = marks[-1] if marks else _now(pipe)
    return made.frames if hasattr(made, "frames") else [made.video], end - start


@contextmanager
def _seeded(pipe: "DiffusionPipeline", seed: int) -> Iterator[None]:
    """Seed torch's own generators, from which some pipelines draw when they encode a picture."""
    device = pipe._execution_device
    kind = device.type if device.type != "cpu" else "cuda"
    devices = [] if device.type == "cpu" else [device.index or 0]
    with torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(seed)
        yield


def frame_rate(pipe: "DiffusionPipeline", given: float | None) -> float:
    """Return the frame rate as the pipeline takes it: the given one, or its default, or the frame
    rate that the model was published at."""
    argument, fps = rate_argument(pipe), given
    if fps is None and argument is not None:
        fps = default_of(pipe, argument)
    if fps is None:
        fps = served_family(pipe).sizes_of(first_transformer(pipe).config).fps
    if argument is None or parameters(pipe)[argument].annotation not in (int, "int"):
        return float(fps)
    if fps % 1:
        near = _nearest(int(fps), 1, 1)
        raise ValueError(f"fps must be whole with {type(pipe).__name__}, got {fps:g}{near}")
    return int(fps)


def _vae_factor(pipe: "DiffusionPipeline", axis: str) -> int:
    factor = vae_factor(pipe, axis)
    if factor is None:
        raise ValueError(f"{type(pipe).__name__} does not say how its autoencoder scales")
    return factor


def _nearest(size: int, step: int, least: int) -> str:
    return f"; nearest: {' and '.join(map(str, nearest(size, step, least)))}"


def _now(pipe: "DiffusionPipeline") -> float:
    device = pipe._execution_device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
