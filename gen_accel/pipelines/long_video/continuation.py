"""Continuation in latent space: a video in chunks of the trained length.

The first chunk is a plain call of the pipeline. Each further chunk holds the last latents of the
video so far while the rest is denoised, as inpainting does (Lugmayr et al., 2022,
https://arxiv.org/abs/2201.09865, without its resampling). After each step the held latents are set
to (1 - sigma) known + sigma noise at the noise level reached, and at the end to the known latents.
The latents after them are new. No chunk is decoded to pixels and encoded again, as this makes the
colours of chained clips drift; the latents are joined, and decoded once.

The first latent frame of a clip holds one pixel frame, all others several. A further chunk
therefore holds the known latents from its second place on. Its first place, where the model
expects a latent of a single pixel frame, is denoised freely and dropped. Every latent so stands
where the model has seen its kind, and the joined latents form a single clip.

Colours are matched by the mean and deviation of each latent channel (AdaIN, Huang and Belongie,
2017, https://arxiv.org/abs/1703.06868): new latents take the statistics of the latents before.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gen_accel.attention_processors.attached.attachment import one_generation
from gen_accel.attention_processors.families.sites import Model
from gen_accel.pipelines.generation.decode import is_streamed, streamed_families, unscaled
from gen_accel.pipelines.long_video.technique import Arguments, Target
from gen_accel.video import latent_frames

NEEDED = ("latents", "num_frames", "output_type", "callback_on_step_end")


@dataclass(frozen=True)
class Continuation:
    """Generate chunk after chunk, each from the last latents of the chunk before.

    A callback of the call runs in each chunk, with the steps of that chunk.

    Args:
        overlap: latent frames of the video so far that a chunk is given.
        chunk: pixel frames of a chunk. None: the trained length.
        color_match: strength of the matching, from 0, the model's own colours, to 1, the colours
            of the latents before. Lower it for a video whose colours are to change.
    """

    overlap: int = 4
    chunk: int | None = None
    color_match: float = 1.0

    name: ClassVar[str] = "continuation"
    excludes: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("riflex", "position_interpolation", "ultravico", "rotating_anchors", "window_noise"),
        "its chunks are no longer than what the model was trained at",
    )

    def __post_init__(self) -> None:
        if self.overlap < 1:
            raise ValueError(f"overlap must be at least 1, got {self.overlap}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if not 0 <= self.color_match <= 1:
            raise ValueError(f"color_match must be from 0 to 1, got {self.color_match}")

    def apply(self, target: Target) -> Callable[[], None]:
        pipe, kind = target.pipe, type(target.pipe).__name__
        if pipe is None:
            raise ValueError("continuation calls the pipeline: extend that, not a transformer")
        known = inspect.signature(type(pipe).__call__).parameters
        lacks = [name for name in NEEDED if name not in known]
        if lacks:
            raise ValueError(f"continuation needs {', '.join(lacks)}, which {kind} does not take")
        given = [name for name in ("image", "video") if name in known]
        if given:
            raise ValueError(
                f"continuation goes on from text alone: {kind} would begin each chunk from its "
                f"{' and '.join(given)} again"
            )
        if "ar_step" in known:
            raise ValueError(
                f"continuation is for pipelines that make a clip at once, got {kind}, which goes "
                "on part by part itself: give it num_frames and overlap_history"
            )
        if not is_streamed(pipe):
            known = ", ".join(streamed_families())
            raise ValueError(
                f"continuation joins latents of {known} alone, as pipelines of "
                f"others pack or scale theirs in ways of their own, got {kind}"
            )
        self._sizes(target)
        return lambda: None

    def runs(self, target: Target) -> int:
        """Number of chunks."""
        chunk, lead = self._sizes(target)
        frames, fresh = target.frames * target.temporal_patch, chunk - lead - self.overlap
        return 1 + max(0, -(-(frames - chunk) // fresh))

    def describe(self, target: Target) -> str:
        frames, trained = (n * target.temporal_patch for n in (target.frames, target.trained))
        return (
            f"{frames} latent frames, trained at {trained}: {self.runs(target)} chunks of "
            f"{self._sizes(target)[0]}, of which {self.overlap} are held"
        )

    def generate(self, target: Target, arguments: Arguments) -> object:
        """Return a result like a single call's. With `output_type="latent"` nothing is decoded."""
        pipe = target.pipe
        assert pipe is not None
        chunk, lead = self._sizes(target)
        factor = target.temporal_factor
        frames = latent_frames("num_frames", arguments["num_frames"], factor)
        if frames <= chunk:
            return pipe(**arguments)
        kind = type(pipe.scheduler).__name__
        flow = pipe.scheduler.config.get("prediction_type") == "flow_prediction"
        if not (flow or "FlowMatch" in kind):
            raise ValueError(f"continuation needs a flow matching scheduler, got {kind}")
        chunk_frames = (chunk - 1) * factor + 1
        first = arguments.get("latents")
        if first is not None and first.shape[2] != chunk:
            raise ValueError(
                f"latents must be noise for the first chunk, of {chunk} latent frames, got "
                f"{tuple(first.shape)}"
            )
        known = inspect.signature(type(pipe).__call__).parameters
        output_type = arguments.get("output_type", known["output_type"].default)
        common = arguments | {
            "num_frames": chunk_frames,
            "output_type": "latent",
            "return_dict": True,
        }
        with one_generation(pipe):
            output = pipe(**common)
            latents = output.frames
            while latents.shape[2] < frames and not getattr(pipe, "interrupt", False):
                held = latents[:, :, -self.overlap :]
                made = self._further(pipe, common, held, chunk, lead)
                fresh = made[:, :, lead + self.overlap :]
                before = latents[:, :, -fresh.shape[2] :]
                fresh = matched(fresh, before, self.color_match)
                latents = torch.cat((latents, fresh), dim=2)
        video = latents[:, :, :frames]
        if output_type != "latent":
            video = _decoded(pipe, video, output_type)
        return type(output)(frames=video) if arguments.get("return_dict", True) else (video,)

    def _further(
        self,
        pipe: Model,
        common: Arguments,
        known: Tensor,
        chunk: int,
        lead: int,
    ) -> Tensor:
        """Generate a chunk that holds `known` from place `lead` on, (B, C, chunk, h, w)."""
        from diffusers.utils.torch_utils import randn_tensor

        shape = (*known.shape[:2], chunk, *known.shape[3:])
        noise = randn_tensor(
            shape, generator=common.get("generator"), device=known.device, dtype=known.dtype
        )
        hold = LatentConstraint(known, noise, lead, common.get("callback_on_step_end"))
        names = getattr(hold.then, "tensor_inputs", None)
        if names is None:
            names = common.get("callback_on_step_end_tensor_inputs", ["latents"])
        own = {
            "latents": noise,
            "callback_on_step_end": hold,
            "callback_on_step_end_tensor_inputs": list(dict.fromkeys((*names, "latents"))),
        }
        return pipe(**(common | own)).frames

    def _sizes(self, target: Target) -> tuple[int, int]:
        """Return the latent frames of a chunk, and the number of its dropped first frames."""
        chunk = target.trained * target.temporal_patch
        if self.chunk is not None:
            chunk = latent_frames("chunk", self.chunk, target.temporal_factor)
        lead = int(target.temporal_factor > 1)
        most = chunk - lead - 1
        if self.overlap > most:
            raise ValueError(
                f"overlap must be at most {most}, so that a chunk of {chunk} latent frames has "
                f"new ones, got {self.overlap}"
            )
        return chunk, lead


class LatentConstraint:
    """A `callback_on_step_end` that holds a part of the latents at known values.

    Args:
        known: (B, C, f, h, w), clean.
        noise: (B, C, F, h, w) that the denoising starts from.
        place: index of the first known frame among F.
        then: a callback of the user, which runs first.
    """

    def __init__(
        self,
        known: Tensor,
        noise: Tensor,
        place: int,
        then: Callable[..., dict[str, Tensor]] | None = None,
    ) -> None:
        self.known, self.then = known, then
        self.part = slice(place, place + known.shape[2])
        self.noise = noise[:, :, self.part]

    def __call__(
        self, pipe: Model, step: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        latents = tensors["latents"]
        if self.then is not None:
            tensors = tensors | (self.then(pipe, step, timestep, dict(tensors)) or {})
            latents = tensors["latents"]
        scheduler, held = pipe.scheduler, self.known
        if step + 1 < len(scheduler.timesteps):
            reached = step + 1 if scheduler.step_index is None else scheduler.step_index
            held = noised(self.known, self.noise, scheduler.sigmas[reached])
        latents = latents.clone()
        latents[:, :, self.part] = held
        return tensors | {"latents": latents}


def noised(clean: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Mix (1 - sigma) clean + sigma noise: flow matching's sample at a noise level in [0, 1]."""
    sigma = torch.as_tensor(sigma).to(clean)
    return (1 - sigma) * clean + sigma * noise


def matched(latents: Tensor, reference: Tensor, strength: float = 1.0) -> Tensor:
    """Give `latents` the mean and standard deviation of `reference` by sample and channel.

    Args:
        latents, reference: (B, C, f, h, w) and (B, C, any, h, w).
        strength: 1 matches fully, 0 not at all; between them the result is the weighted mean.
    """
    if strength == 0:
        return latents
    over = (2, 3, 4)
    mean, std = latents.mean(over, keepdim=True), latents.std(over, keepdim=True, correction=0)
    to_mean = reference.mean(over, keepdim=True)
    to_std = reference.std(over, keepdim=True, correction=0)
    tiny = torch.finfo(latents.dtype).tiny
    full = (latents - mean) / std.clamp_min(tiny) * to_std + to_mean
    return torch.lerp(latents, full, strength)


@torch.no_grad()
def _decoded(pipe: Model, latents: Tensor, output_type: str) -> object:
    """Decode latents as the pipelines do at their end."""
    pixels = pipe.vae.decode(
        unscaled(pipe.vae, latents, pipe._execution_device), return_dict=False
    )[0]
    video = pipe.video_processor.postprocess_video(pixels, output_type=output_type)
    pipe.maybe_free_model_hooks()
    return video
