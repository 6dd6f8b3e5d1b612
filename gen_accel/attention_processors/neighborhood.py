"""Neighborhood attention: each token sees a window about itself, along frames, rows and columns.

References:
    Hassani et al., "Neighborhood Attention Transformer", 2023, https://arxiv.org/abs/2204.07143;
    Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022,
    https://arxiv.org/abs/2209.15001; Hassani et al., "Generalized Neighborhood Attention", 2025,
    https://arxiv.org/abs/2504.16922. Semantics of NATTEN 0.21.7 (MIT), except that a window of 1
    is allowed and that text tokens may query: they see all and are seen by all.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gen_accel.plan import Plan, Windows, tile_slots
from gen_accel.video import VideoShape

Axes = tuple[int, int, int]
AXES = ("frames", "rows", "columns")

# Most tokens in a query and in a key tile: what block-sparse GPU kernels like.
TILE_Q, TILE_K = 128, 64


@dataclass(frozen=True)
class Neighborhood:
    """Windows over the token grid, each option given for (frames, rows, columns).

    Windows are shifted at the border, never cut: every token sees exactly `window` tokens along
    an axis, unless the axis is causal. An even window has one token more before than after.

    Args:
        window: tokens seen along each axis; -1 is the whole axis.
        stride: tokens that share the window of one of them; at most the window.
        dilation: step between the tokens of a window.
        is_causal: whether a token sees none after itself along that axis.
    """

    window: Axes = (-1, 8, 8)
    stride: Axes = (1, 1, 1)
    dilation: Axes = (1, 1, 1)
    is_causal: tuple[bool, bool, bool] = (False, False, False)

    def __post_init__(self) -> None:
        for name in ("window", "stride", "dilation", "is_causal"):
            if len(getattr(self, name)) != 3:
                raise ValueError(
                    f"{name} needs one value for each of {AXES}, got {getattr(self, name)}"
                )
        for axis, w, s, d in zip(AXES, self.window, self.stride, self.dilation, strict=True):
            if w != -1 and w < 1:
                raise ValueError(f"window along {axis} must be positive or -1, got {w}")
            if s < 1 or (w != -1 and s > w):
                raise ValueError(f"stride along {axis} must be from 1 to the window {w}, got {s}")
            if d < 1 or (w == -1 and d > 1):
                raise ValueError(
                    f"dilation along {axis} must be at least 1, and 1 for a whole axis, got {d}"
                )

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: Callable
    ) -> Tensor:
        return kernel(q, k, v, self.plan(video, q.device))

    def plan(self, video: VideoShape, device: torch.device | str = "cpu") -> Plan:
        """Raises ValueError where a window is larger than its axis."""
        return _plan(self, video, torch.device(device))

    def block_mask(self, video: VideoShape) -> Tensor:
        """(Kq, Kk) bool, which key blocks each query block touches."""
        return self.plan(video).keep[0, 0]

    def density(self, video: VideoShape) -> float:
        """Share of token pairs that are kept, in [0, 1]; 1 - density is the sparsity."""
        return self.plan(video).density


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a plan built while sampling must serve training too
def _plan(method: Neighborhood, video: VideoShape, device: torch.device) -> Plan:
    if device.type != "cpu":
        return _plan(method, video, torch.device("cpu")).to(device)
    axes = [
        _axis(name, size, *options)
        for name, size, *options in zip(
            AXES,
            video.grid,
            method.window,
            method.stride,
            method.dilation,
            method.is_causal,
            strict=True,
        )
    ]
    tile_k = _tile(video.grid, method.window, TILE_K)
    # Key tiles in a row along the frames make a query tile, so that both are runs of slots.
    in_a_row = min(TILE_Q // math.prod(tile_k), -(-video.frames // tile_k[0]))
    tile_q = (tile_k[0] * in_a_row, *tile_k[1:])
    # Tokens of one dilation group lie together, so that windows cover few blocks.
    orders = [
        torch.argsort(torch.arange(n) % d, stable=True)
        for n, d in zip(video.grid, method.dilation, strict=True)
    ]
    slots = tile_slots(video, tile_q, orders)
    block_q, block_k = math.prod(tile_q), math.prod(tile_k)

    free = slots >= video.video_tokens
    where = slots.clamp(0, video.video_tokens - 1)
    index = torch.stack(torch.unravel_index(where, video.grid))  # (3, S)
    first, last, place, seen = [], [], [], torch.ones_like(slots)
    for i, (low, high, group, count) in zip(index, axes, strict=True):
        # A dilated axis counts as two: the place in the group, and the group itself.
        first += [low[i], group[i]]
        last += [high[i], group[i]]
        place += [_position(group, i), group[i]]
        seen = seen * count[i]
    seen = torch.where(free, video.tokens, seen + video.text)
    first, last, place = (torch.stack(rows).int() for rows in (first, last, place))
    rule = Windows(first, last, place, free, seen)
    keep = rule.touched(slots >= 0, block_q, block_k)[None, None]
    return Plan(slots, keep, block_q, block_k, rule)


def _axis(
    name: str, size: int, window: int, stride: int, dilation: int, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and last place seen, dilation group and number of places seen, each of (size,).

    Places count within a dilation group: token i is place i // dilation of group i % dilation.
    """
    if window == -1:
        window = size
    if window * dilation > size:
        times = f" x dilation {dilation}" if dilation > 1 else ""
        raise ValueError(
            f"window {window}{times} is larger than the {size} {name} of the video; "
            f"use at most {size // dilation}, or -1 for the whole axis"
        )
    token = torch.arange(size)
    group, place = token % dilation, token // dilation
    length = (size - group + dilation - 1) // dilation
    if is_causal:
        leader = torch.minimum(place // stride * stride + stride - 1, length - 1)
        first, last = (leader - window + 1).clamp_min(0), place
    else:
        leader = torch.minimum(place // stride * stride + stride // 2, length - 1)
        first = torch.minimum((leader - window // 2).clamp_min(0), length - window)
        last = first + window - 1
    return first, last, group, last - first + 1


def _position(group: Tensor, index: Tensor) -> Tensor:
    """Place within its dilation group of each token `index` of an axis."""
    dilation = int(group.max()) + 1
    return index // dilation


def _tile(grid: Axes, window: Axes, most: int) -> Axes:
    """A box of at most `most` tokens, each side about as long beside its window as the others."""
    sides = [1, 1, 1]
    reach = [n if w == -1 else w for n, w in zip(grid, window, strict=True)]
    while True:
        options = [
            axis
            for axis in range(3)
            if sides[axis] < grid[axis]
            and math.prod(sides) // sides[axis] * sides[axis] * 2 <= most
        ]
        if not options:
            return sides[0], sides[1], sides[2]
        axis = min(options, key=lambda a: (sides[a] / reach[a], -a))
        sides[axis] = min(2 * sides[axis], grid[axis])
