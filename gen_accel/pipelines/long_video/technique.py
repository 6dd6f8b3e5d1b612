"""Interface of a technique for longer video, its target, and frames in the blocks of a plan."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families import Family
from gen_accel.plan import Plan
from gen_accel.video import VideoShape

Arguments = dict[str, Any]  # of a call of the pipeline, by name


@dataclass(frozen=True, eq=False)
class Target:
    """Pipeline to extend, and its lengths in latent frames after patchify (tokens along time).

    Args:
        pipe: the pipeline; None if only a transformer was given.
        transformers: one or two transformers, by their names in the pipeline.
        families: family of each transformer, by the same names.
        frames: length of the video asked for. The live grid may differ between calls: a technique
            reads the grid from the call, and does nothing unless it is longer than `trained`.
        trained: length that the model was trained at.
        temporal_factor: pixel frames in a latent frame, except in the first, which holds one.
        temporal_patch: latent frames in one token.
    """

    pipe: Any | None
    transformers: Mapping[str, nn.Module]
    families: Mapping[str, Family]
    frames: int
    trained: int
    temporal_factor: int = 4
    temporal_patch: int = 1

    @property
    def subject(self) -> Any:
        """The pipeline, or the transformer if only that was given."""
        return next(iter(self.transformers.values())) if self.pipe is None else self.pipe

    @property
    def longer(self) -> bool:
        """Whether the video asked for is longer than the trained length."""
        return self.frames > self.trained

    @property
    def lengths(self) -> str:
        """Both lengths in words."""
        return f"{self.frames} latent frames, trained at {self.trained}"

    def pixel_frames(self, frames: int) -> int:
        """Number of pixel frames that `frames` latent frames after patchify decode to."""
        return (frames * self.temporal_patch - 1) * self.temporal_factor + 1


class Technique(Protocol):
    """A frozen dataclass of options.

    `apply` checks the target, puts the technique on the live model, and returns a function that
    takes the technique off and leaves the model bit-identical. Both functions are called once.

    A technique that needs several calls of the pipeline, or acts only during a call, also has
    `generate(target, arguments)`. It runs the pipeline with the keyword arguments of its call,
    `num_frames` filled in, and returns the result of a single call. `runs(target)` says how many
    calls follow one another; without it that is one.

    Args:
        name: entry of the technique in `TECHNIQUES`.
        excludes: names of techniques that cannot be combined with this one, each with the reason.
    """

    name: ClassVar[str]
    excludes: ClassVar[Mapping[str, str]]

    def apply(self, target: Target) -> Callable[[], None]: ...

    def describe(self, target: Target) -> str:
        """Describe the effect on a video of the length asked for, in one line."""
        ...


class FrameBlocks(NamedTuple):
    """First and last frame of each block, and whether the block holds text, (K,) each.

    In a block without video tokens, `first` is after the last frame and `last` before the first.
    """

    first: Tensor
    last: Tensor
    text: Tensor


def query_blocks(plan: Plan, video: VideoShape) -> FrameBlocks:
    return _blocks(plan.slots, plan.block_q, video)


def key_blocks(plan: Plan, video: VideoShape) -> FrameBlocks:
    return _blocks(plan.slots, plan.block_k, video)


def _blocks(slots: Tensor, block: int, video: VideoShape) -> FrameBlocks:
    outside = (slots < 0) | (slots >= video.video_tokens)
    frame = torch.div(slots, video.height * video.width, rounding_mode="floor")
    first = frame.masked_fill(outside, video.frames).view(-1, block).amin(-1)
    last = frame.masked_fill(outside, -1).view(-1, block).amax(-1)
    return FrameBlocks(first, last, (slots >= video.video_tokens).view(-1, block).any(-1))


class Remembered:
    """An `adjust` for `AttentionExtension` that keeps its results.

    A static plan is adjusted once, or once a step, so that kernels prepare each result only once.
    Dynamic plans are adjusted at each call.

    Args:
        by_step: whether the result depends on the step. The result of the last step is kept.
    """

    def __init__(self, adjusted: Callable[[Plan, VideoShape, int], Plan], by_step: bool) -> None:
        self._adjusted, self._by_step = adjusted, by_step
        self._known: WeakKeyDictionary[Plan, tuple[int, Plan]] = WeakKeyDictionary()

    def __call__(self, plan: Plan, video: VideoShape, step: int, steps: int | None) -> Plan:
        if plan.dynamic:
            return self._adjusted(plan, video, step)
        step = step if self._by_step else 0
        if plan not in self._known or self._known[plan][0] != step:
            with torch.inference_mode(False):  # made while sampling, it must serve training too
                self._known[plan] = step, self._adjusted(plan, video, step)
        return self._known[plan][1]
