"""Rotating anchors: each frame sees its neighbours, and frames all over the video in turn.

Glorian et al., "LVSA: Training-Free Sparse Attention for Long Video Diffusion", 2026,
https://arxiv.org/abs/2605.31057; public code JiusiServe/LongVideoSparseAttention. A query sees a
window of frames around its own, shifted inwards at both ends, the first frames, and anchors at
equal intervals. The anchors move by one frame with each denoising step, so that every frame is an
anchor once in as many steps as the interval is long.

Unlike the public code, the window is not widened by anchors inside it, anchors do not wrap around
the end, and the first and last steps are like all others. Visibility is by blocks: a block of keys
with one visible frame is visible as a whole. Blocks that the attached method leaves out stay out.
A query without any visible block sees its own block.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.attention_processors.attached.attachment import extend_attention
from gen_accel.attention_processors.attached.layer import AttentionExtension
from gen_accel.pipelines.long_video.technique import Remembered, Target, key_blocks, query_blocks
from gen_accel.plan import Plan, Route
from gen_accel.video import VideoShape


@dataclass(frozen=True)
class RotatingAnchors:
    """A window of frames, the first frames, and rotating anchors; in frames after patchify.

    Args:
        window: frames seen on each side. None: a sixth of the trained length, at least one.
        first: frames at the beginning that all see.
        interval: distance between anchors. None: chosen so that window, first frames and anchors
            are together about as many as the trained length.
    """

    window: int | None = None
    first: int = 1
    interval: int | None = None

    name: ClassVar[str] = "rotating_anchors"
    excludes: ClassVar[Mapping[str, str]] = {
        "window_noise": "it cuts the video into windows, outside of which there are no anchors"
    }

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 0:
            raise ValueError(f"window must not be negative, got {self.window}")
        if self.first < 0:
            raise ValueError(f"first must not be negative, got {self.first}")
        if self.interval is not None and self.interval < 1:
            raise ValueError(f"interval must be at least 1, got {self.interval}")

    def sizes(self, frames: int, trained: int) -> tuple[int, int]:
        """Return the window's frames on each side, and the interval, for a video of `frames`."""
        window = max(1, trained // 6) if self.window is None else self.window
        if self.interval is not None:
            return window, self.interval
        anchors = max(1, trained - (2 * window + 1) - self.first)
        return window, math.ceil(frames / anchors)

    def anchors(self, frames: int, trained: int, step: int) -> Tensor:
        """Mark the frames that all see at this step, (frames,) bool."""
        interval = self.sizes(frames, trained)[1]
        frame = torch.arange(frames)
        return (frame < self.first) | (frame % interval == step % interval)

    def adjusted(self, plan: Plan, video: VideoShape, trained: int, step: int) -> Plan:
        """Drop the blocks of a plan that are neither in the window nor visible to all."""
        frames, device = video.frames, plan.slots.device
        query, key = query_blocks(plan, video), key_blocks(plan, video)
        side = self.sizes(frames, trained)[0]
        last_start = max(frames - (2 * side + 1), 0)
        start = (query.first - side).clamp(0, last_start)
        stop = (query.last - side).clamp(0, last_start) + 2 * side
        window = (key.first <= stop[:, None]) & (key.last >= start[:, None])
        until = F.pad(self.anchors(frames, trained, step).long().cumsum(0), (1, 0)).to(device)
        anchor = until[key.last + 1] > until[key.first]
        allowed = window | anchor | query.text[:, None] | key.text
        return _within(plan, allowed)

    def extension(self, trained: int) -> AttentionExtension:
        """Return what it changes of attention, in a model that was trained at so many frames."""

        def adjusted(plan: Plan, video: VideoShape, step: int) -> Plan:
            return self.adjusted(plan, video, trained, step)

        adjust = Remembered(adjusted, by_step=True)
        return AttentionExtension(self.name, trained, adjust=adjust, needs_step=True)

    def apply(self, target: Target) -> Callable[[], None]:
        return extend_attention(target.subject, self.extension(target.trained))

    def describe(self, target: Target) -> str:
        if not target.longer:
            return f"{target.lengths}: off"
        window, interval = self.sizes(target.frames, target.trained)
        return (
            f"{target.frames} latent frames: {2 * window + 1} about each, the first {self.first}, "
            f"and every {interval}th in turn"
        )


def _within(plan: Plan, allowed: Tensor) -> Plan:
    """Restrict a plan to the allowed blocks, (Kq, Kk) bool; a query with none sees its own block.
    ValueError for a plan with a rest."""
    if plan.rest is not None:
        raise ValueError(
            "rotating_anchors hides frames, which a rest would bring back pooled: use rest=None "
            "of the method, or no rotating_anchors"
        )
    keep, own = plan.keep & allowed, _own_blocks(plan)
    if not isinstance(plan.partial, Route):
        empty = ~keep.any(-1, keepdim=True)
        return plan.changed(keep=keep | (empty & own))
    route = plan.partial
    groups = route.picks.shape[3]
    kept = keep.float() @ F.one_hot(route.group, groups).float() > 0  # a block of the group
    seen = kept.repeat_interleave(plan.block_q, 2)
    empty = ~(route.picks & seen).any(-1, keepdim=True)
    slot = torch.arange(len(plan.slots), device=plan.slots.device)
    mine = F.one_hot(route.group[slot // route.block], groups).bool()
    needy = empty.unflatten(2, (-1, plan.block_q)).any(3)
    picks = Route(route.picks | (empty & mine), route.group, route.block)
    return plan.changed(keep=keep | (needy & own), partial=picks)


def _own_blocks(plan: Plan) -> Tensor:
    """Mark pairs of blocks that share slots, (Kq, Kk) bool."""
    S, device = len(plan.slots), plan.slots.device
    first_q = torch.arange(0, S, plan.block_q, device=device)[:, None]
    first_k = torch.arange(0, S, plan.block_k, device=device)
    return (first_q < first_k + plan.block_k) & (first_k < first_q + plan.block_q)
