"""Frames in the blocks of a plan, for techniques that decide by frames."""

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gen_accel.plan import Plan
from gen_accel.video import VideoShape


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
        adjusted: takes a plan, its grid and the step.
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
