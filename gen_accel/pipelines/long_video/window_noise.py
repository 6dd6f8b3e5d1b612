"""FreeNoise: repeated noise of the trained length, and attention in windows of that length.

Qiu et al., "FreeNoise: Tuning-Free Longer Video Diffusion via Noise Rescheduling", 2023,
https://arxiv.org/abs/2310.15169; public code AILab-CVC/FreeNoise. Beyond the trained length, each
run of `stride` frames of noise repeats the run one trained length earlier, its frames shuffled.
Attention runs in windows of the trained length, `stride` frames apart. A frame gets the mean over
its windows, with weights that rise to the middle of a window and fall again.

Unlike the public code, attention is over space and time at once, the last window is shifted to end
with the video if the stride leaves a remainder, and a text token gets the plain mean over all
windows.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from typing import ClassVar

import torch
from torch import Tensor

from gen_accel.attention_processors.attached.attachment import extend_attention
from gen_accel.attention_processors.attached.layer import AttentionExtension
from gen_accel.pipelines.long_video.technique import Target
from gen_accel.video import VideoShape


@dataclass(frozen=True)
class WindowNoise:
    """Repeat the noise of the trained length, shuffled, and attend in windows.

    The pipeline draws the noise with its generator; latents that are given to a call stay as they
    are. With a list of generators, the first decides the order for all samples.

    Args:
        stride: frames after patchify between windows, and in each shuffled run of noise. None: a
            quarter of the trained length, at least one.
    """

    stride: int | None = None

    name: ClassVar[str] = "window_noise"
    excludes: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")

    def steps(self, trained: int) -> int:
        """Return the stride for a trained length; ValueError for a stride that skips frames."""
        stride = max(1, trained // 4) if self.stride is None else self.stride
        if stride > trained:
            raise ValueError(f"stride must be at most the trained length {trained}, got {stride}")
        return stride

    def starts(self, frames: int, trained: int) -> list[int]:
        """List the first frame of each window."""
        starts = list(range(0, frames - trained + 1, self.steps(trained)))
        return starts if starts[-1] + trained == frames else [*starts, frames - trained]

    def weights(self, frames: int, trained: int) -> Tensor:
        """Compute each window's share in each frame, (windows, frames) fp32; zero outside."""
        place = torch.arange(trained)
        triangle = torch.minimum(place + 1, trained - place).double()
        starts = self.starts(frames, trained)
        weights = torch.zeros(len(starts), frames, dtype=torch.float64)
        for row, start in zip(weights, starts, strict=True):
            row[start : start + trained] = triangle
        return (weights / weights.sum(0)).float()

    def order(self, frames: int, trained: int, generator: torch.Generator | None) -> Tensor:
        """Draw the frame of the noise that each frame takes, (frames,) int64."""
        stride, order = self.steps(trained), torch.arange(frames)
        device = "cpu" if generator is None else generator.device
        for start in range(trained, frames, stride):
            shuffled = torch.randperm(stride, generator=generator, device=device).cpu()
            run = order[start - trained :][:stride][shuffled]
            order[start : start + stride] = run[: frames - start]
        return order

    def fused(
        self, trained: int, attend: Callable, q: Tensor, k: Tensor, v: Tensor, video: VideoShape
    ) -> Tensor:
        """Compute the weighted mean of `attend(q, k, v, video)` over the windows, (B, H, N, D)."""
        frame = video.height * video.width
        window = VideoShape(trained, video.height, video.width, video.text)
        starts = self.starts(video.frames, trained)
        shares = self.weights(video.frames, trained).to(q.device)
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        for start, share in zip(starts, shares, strict=True):
            seen = slice(start * frame, (start + trained) * frame)
            part = attend(*(_cut(x, seen, video) for x in (q, k, v)), window).to(wide)
            weight = share[start : start + trained].to(wide).repeat_interleave(frame)[:, None]
            out[:, :, seen] += part[:, :, : window.video_tokens] * weight
            if video.text:
                out[:, :, video.video_tokens :] += part[:, :, window.video_tokens :] / len(starts)
        return out.to(q.dtype)

    def apply(self, target: Target) -> Callable[[], None]:
        self.steps(target.trained)
        pipe, trained = target.pipe, target.trained
        if pipe is None:
            raise ValueError("window_noise sets the noise of a pipeline: extend that instead")
        draws = getattr(pipe, "prepare_latents", None)
        takes = inspect.signature(draws).parameters if draws is not None else {}
        if draws is None or "latents" not in takes or "video" in takes:
            raise ValueError(
                f"window_noise needs a pipeline that begins with noise alone, got "
                f"{type(pipe).__name__}"
            )

        around = partial(self.fused, trained)
        undo = extend_attention(
            target.subject, AttentionExtension(self.name, trained, around=around)
        )
        before = vars(pipe).get("prepare_latents")
        pipe.prepare_latents = self._repeating(draws, target)

        def remove() -> None:
            undo()
            if before is None:
                del pipe.prepare_latents
            else:
                pipe.prepare_latents = before

        return remove

    def _repeating(self, draws: Callable, target: Target) -> Callable:
        """Wrap `prepare_latents` of the pipeline, and replace noise beyond the trained length."""
        takes = inspect.signature(draws)
        trained, patch = target.trained, target.temporal_patch

        @wraps(draws)
        def prepare_latents(*args: object, **kwargs: object) -> object:
            made = draws(*args, **kwargs)
            given = takes.bind(*args, **kwargs).arguments
            noise = made[0] if isinstance(made, tuple) else made
            frames = noise.shape[2] // patch
            if given.get("latents") is not None or frames <= trained:
                return made
            generator = given.get("generator")
            if isinstance(generator, (list, tuple)):
                generator = generator[0]
            order = self.order(frames, trained, generator)
            places = (order[:, None] * patch + torch.arange(patch)).flatten().to(noise.device)
            noise = noise.index_select(2, places)
            return (noise, *made[1:]) if isinstance(made, tuple) else noise

        return prepare_latents

    def describe(self, target: Target) -> str:
        if not target.longer:
            return f"{target.lengths}: off"
        windows = len(self.starts(target.frames, target.trained))
        return (
            f"{windows} windows of {target.trained} in {target.frames} latent frames, and the "
            f"noise of {target.trained} over and over"
        )


def _cut(x: Tensor, seen: slice, video: VideoShape) -> Tensor:
    """Select the tokens of a window, and the text."""
    part = x[:, :, seen]
    return torch.cat([part, x[:, :, video.video_tokens :]], 2) if video.text else part
