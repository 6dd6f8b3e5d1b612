"""Which frames the blocks of a plan hold, for techniques that decide by frames."""

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gen_accel.plan import Plan
from gen_accel.video import VideoShape


class Blocks(NamedTuple):
    """Of each block, (K,): its first and last frame, and whether it holds text.

    Without a token of the video `first` is after the last frame and `last` before the first.
    """

    first: Tensor
    last: Tensor
    text: Tensor


def query_blocks(plan: Plan, video: VideoShape) -> Blocks:
    return _blocks(plan.slots, plan.block_q, video)


def key_blocks(plan: Plan, video: VideoShape) -> Blocks:
    return _blocks(plan.slots, plan.block_k, video)


def _blocks(slots: Tensor, block: int, video: VideoShape) -> Blocks:
    outside = (slots < 0) | (slots >= video.video_tokens)
    frame = torch.div(slots, video.height * video.width, rounding_mode="floor")
    first = frame.masked_fill(outside, video.frames).view(-1, block).amin(-1)
    last = frame.masked_fill(outside, -1).view(-1, block).amax(-1)
    return Blocks(first, last, (slots >= video.video_tokens).view(-1, block).any(-1))


class Remembered:
    """An `adjust` for `AttentionExtension` that changes a plan that stays once, or once a step, so
    that kernels prepare what it makes only once.

    Args:
        adjusted: takes a plan, its grid and the step.
        by_step: whether the step makes a difference. The last one is remembered.
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
