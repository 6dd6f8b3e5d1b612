"""Neighborhood attention: each token sees a window about itself, along frames, rows and columns.

References:
    Hassani et al., "Neighborhood Attention Transformer", 2023, https://arxiv.org/abs/2204.07143;
    Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022,
    https://arxiv.org/abs/2209.15001; Hassani et al., "Generalized Neighborhood Attention", 2025,
    https://arxiv.org/abs/2504.16922. Semantics of NATTEN 0.21.7 (MIT), except that a window of 1
    is allowed and that text tokens may query: they see all and are seen by all.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

from gen_accel.attention_processors.methods.blocks import Pool, rest_of
from gen_accel.method import Method, plan_once
from gen_accel.parsing import check_options
from gen_accel.plan import Boxes, Centre, Plan, Windows
from gen_accel.runs import mask_or_runs, slices_of
from gen_accel.video import VideoShape

Axes = tuple[int, int, int]
AXES = ("frames", "rows", "columns")

# Most tokens in a query and in a key tile: usual block sizes of GPU kernels.
TILE_Q, TILE_K = 128, 64
LEAST_K = 32  # on a CPU, so that lists of blocks stay short
# Cost of a pair in a block that needs a mask, relative to one that needs none; and cost of
# fetching a key for a query block, relative to one pair. Rough figures from a CPU. By the
# instructions of a GPU kernel's loops they are much the same (546 and 443 on sm_90). They only
# choose tiles.
MASKED, FETCH = 1.25, 12


@dataclass(frozen=True)
class Neighborhood(Method):
    """Windows over the token grid, each option given for (frames, rows, columns).

    Windows are shifted at the border, never cut: every token sees exactly `window` tokens along
    an axis, unless the axis is causal. An even window has one token more before than after.

    Args:
        window: tokens seen along each axis; -1 is the whole axis.
        stride: tokens that share the window of one of them; at most the window.
        dilation: step between the tokens of a window.
        is_causal: whether a token sees no token after itself along that axis.
        rest, centre: "means" adds the remaining keys to the softmax, pooled around the mean
            "query" of each query block or the mean "key" of each key block: see
            `gen_accel.plan.Rest`. Blocks that a window touches are then kept whole, which is more
            than the window.
    """

    window: Axes = (-1, 8, 8)
    stride: Axes = (1, 1, 1)
    dilation: Axes = (1, 1, 1)
    is_causal: tuple[bool, bool, bool] = (False, False, False)
    rest: Pool | None = None
    centre: Centre = "query"

    def __post_init__(self) -> None:
        check_options(self)
        if rest_of(self.rest, self.centre) is not None and any(self.is_causal):
            raise ValueError(
                "rest='means' pools what is left out, later tokens too, got "
                f"is_causal={self.is_causal}"
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

    @property
    def least_grid(self) -> Axes:
        """Least grid: a window must fit into its axis."""
        frames, rows, columns = (
            max(1, w * d) for w, d in zip(self.window, self.dilation, strict=True)
        )
        return frames, rows, columns

    @classmethod
    def candidates(
        cls, video: VideoShape, *, tile: object = None, profile: str = ""
    ) -> Sequence["Neighborhood"]:
        F, H, W = video.grid
        return [
            *(cls((-1, max(1, -(-H // n)), max(1, -(-W // n)))) for n in (4, 3, 2)),
            *(cls((max(1, -(-F // n)), H, W)) for n in (4, 2)),
        ]

    @classmethod
    def keeping(cls, share: float, video: VideoShape) -> "Neighborhood":
        """Return windows over all frames, and the same share of rows and of columns."""
        side = math.sqrt(share)
        return cls((-1, max(1, round(side * video.height)), max(1, round(side * video.width))))

    def within(self, video: VideoShape, whole: VideoShape) -> "Neighborhood":
        """Return the method with the whole of each axis that is shorter in `video` than in
        `whole`, and shorter than `window` x `dilation`."""
        axes = zip(self.window, self.stride, self.dilation, strict=True)
        kept = [
            (-1, 1, 1) if size < most and axis[0] * axis[2] > size else axis
            for size, most, axis in zip(video.grid, whole.grid, axes, strict=True)
        ]
        window, stride, dilation = zip(*kept, strict=True)
        return replace(self, window=window, stride=stride, dilation=dilation)

    def by_axis(self, video: VideoShape) -> Iterator[tuple[str, int, int, int, int, bool]]:
        """Yield for each axis its name, the video's size, window, stride, dilation and
        causality."""
        options = self.window, self.stride, self.dilation, self.is_causal
        return zip(AXES, video.grid, *options, strict=True)

    @plan_once
    def plan(self, video: VideoShape, device: torch.device) -> Plan:
        """Plan of a video; ValueError for a window larger than its axis."""
        return plan_for_device(self, video, gpu=device.type != "cpu").to(device)


def plan_for_device(method: Neighborhood, video: VideoShape, *, gpu: bool) -> Plan:
    """The plan in blocks that suit the kernels of GPUs or of CPUs, made on the CPU."""
    axes = [_axis(*along) for along in method.by_axis(video)]
    tile_q, tile_k = _tiles(axes, gpu=gpu)
    block_k = _power(math.prod(tile_k)) if gpu else math.prod(tile_k)
    block_q = math.prod(tile_q) // math.prod(tile_k) * block_k
    slots = _slots(video, tile_q, tile_k, block_k, [axis.order for axis in axes])

    free = slots >= video.video_tokens
    index = torch.unravel_index(slots.clamp(0, video.video_tokens - 1), video.grid)
    inside = torch.stack([axis.seen[i] for axis, i in zip(axes, index, strict=True)]).prod(0)
    seen = torch.where(free, video.tokens, inside + video.text)
    limits = torch.cat([axis.limits.int()[:, :, i] for axis, i in zip(axes, index, strict=True)])
    window = [n if w == -1 else w for n, w in zip(video.grid, method.window, strict=True)]
    options = method.stride, method.dilation, method.is_causal
    boxes = Boxes(video.grid, video.text, (window[0], window[1], window[2]), *options)
    rule = replace(_windows(limits, free, seen), boxes=boxes)
    touched = rule.blocks_touched(slots >= 0, block_q, block_k)
    size = len(slots) // block_q, len(slots) // block_k
    keep = mask_or_runs(map(touched.rows, slices_of(*size)), *size)
    rest = rest_of(method.rest, method.centre, tokens=video.video_tokens)
    return Plan(slots, keep, block_q, block_k, rule if rest is None else None, rest=rest)


def _slots(
    video: VideoShape, tile_q: Axes, tile_k: Axes, block_k: int, orders: Sequence[Tensor]
) -> Tensor:
    """Lay out query tiles cut into key tiles, each padded to a key block, and text after them."""
    counts = [-(-size // step) for size, step in zip(video.grid, tile_q, strict=True)]
    padded = torch.full([n * t for n, t in zip(counts, tile_q, strict=True)], -1)
    tokens = torch.arange(video.video_tokens).view(video.grid)
    for axis, order in enumerate(orders):
        tokens = tokens.index_select(axis, order)
    padded[: video.frames, : video.height, : video.width] = tokens
    inner = [q // k for q, k in zip(tile_q, tile_k, strict=True)]
    cut = padded.view([n for sides in zip(counts, inner, tile_k, strict=True) for n in sides])
    tiles = cut.permute(0, 3, 6, 1, 4, 7, 2, 5, 8).reshape(-1, math.prod(tile_k))
    blocks = torch.nn.functional.pad(tiles, (0, block_k - tiles.shape[1]), value=-1).flatten()
    text = torch.arange(video.video_tokens, video.tokens)
    padding = torch.full((-video.text % (math.prod(inner) * block_k),), -1)
    return torch.cat([blocks, text, padding])


@dataclass(frozen=True, eq=False)
class _Axis:
    """Windows of the tokens along one axis.

    Args:
        limits: (A, 3, size), first and last place seen and own place, for rules that exclude a
            token. A dilated axis counts as two: the place in the dilation group, and the group.
        seen: (size,), how many tokens.
        order: (size,), tokens of one dilation group together, so that windows cover few blocks.
    """

    limits: Tensor
    seen: Tensor
    order: Tensor

    def pairs(self, side_q: int, side_k: int) -> tuple[int, int]:
        """Numbers of (query, key) pairs in blocks of these sides: pairs computed, and of them
        pairs without a mask."""
        padding = torch.full((-len(self.order) % side_q,), -1)
        slots = torch.cat([self.order, padding])
        limits, none = self.limits[:, :, slots], torch.zeros_like(slots)
        rule, real = _windows(limits, none.bool(), none), slots >= 0
        touched = rule.touched(real, side_q, side_k)
        whole = touched & rule.whole(real, side_q, side_k) & real.view(-1, side_k).all(-1)
        return int(touched.sum()) * side_q * side_k, int(whole.sum()) * side_q * side_k


def _axis(name: str, size: int, window: int, stride: int, dilation: int, is_causal: bool) -> _Axis:
    group, place, first, last = spans(name, size, window, stride, dilation, is_causal)
    limits = torch.stack([torch.stack([first, last, place]), group.expand(3, -1)])
    excludes = (limits[:, 0].amax(1) > limits[:, 2].amin(1)) | (
        limits[:, 1].amin(1) < limits[:, 2].amax(1)
    )
    return _Axis(limits[excludes], last - first + 1, torch.argsort(group, stable=True))


def spans(
    name: str, size: int, window: int, stride: int, dilation: int, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dilation group, place, first and last place seen of each token along an axis, (size,)
    each. ValueError, which calls it by `name`, for a window larger than the axis.

    Token i is place i // dilation of group i % dilation, and sees the places from first to last of
    its own group. Both never fall from place to place, and the windows of neighbours meet, so that
    the windows of a run of places cover one run.
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
        return group, place, (leader - window + 1).clamp_min(0), place
    leader = torch.minimum(place // stride * stride + stride // 2, length - 1)
    first = torch.minimum((leader - window // 2).clamp_min(0), length - window)
    return group, place, first, first + window - 1


def _windows(limits: Tensor, free: Tensor, seen: Tensor) -> Windows:
    """Make windows of `limits` (A, 3, S). Where A is 0, the rule excludes nothing."""
    if not len(limits):
        limits = limits.new_zeros(1, 3, len(free))
    first, last, place = limits.int().unbind(1)
    return Windows(first, last, place, free, seen)


def _tiles(axes: Sequence[_Axis], *, gpu: bool) -> tuple[Axes, Axes]:
    """Choose the query and key tile with the least work for a kernel. A query tile is some key
    tiles in a row: on a CPU along the frames, so that both are runs of slots; on GPUs, whose
    blocks have as many slots as kernels prefer, some of them padding, two along any axis."""
    sizes = [len(axis.order) for axis in axes]
    volume = math.prod(sizes)
    least, block_k = min(LEAST_K, volume), min(TILE_K, _power(volume))
    pairs = [cache(axis.pairs) for axis in axes]

    def work(tile_q: Axes, tile_k: Axes) -> float:
        counts = [count(*shape) for count, *shape in zip(pairs, tile_q, tile_k, strict=True)]
        computed, whole = (math.prod(numbers) for numbers in zip(*counts, strict=True))
        block = math.prod(tile_k)
        if gpu and _power(block) > block:
            computed, whole = computed * (_power(block) / block) ** 2, 0
        return (MASKED * computed - (MASKED - 1) * whole) * (1 + FETCH / math.prod(tile_q))

    tiles: list[tuple[Axes, Axes]] = []
    # Sides that cut an axis as evenly as possible.
    sides = (sorted({-(-size // n) for n in range(1, size + 1)}) for size in sizes)
    for tile in product(*sides):
        tokens, rows = math.prod(tile), []
        if gpu and _power(tokens) == block_k:
            rows = [(axis, 2 if volume > TILE_K else 1) for axis in range(3)]
        elif not gpu and least <= tokens <= TILE_Q:
            rows = [(0, 1)]
            rows += [(0, n) for n in (2, 4) if n * tokens <= TILE_Q and n * tile[0] < 2 * sizes[0]]
        for axis, in_a_row in rows:
            wide = [*tile]
            wide[axis] *= in_a_row
            tiles.append(((wide[0], wide[1], wide[2]), (tile[0], tile[1], tile[2])))
    return min(tiles, key=lambda both: work(*both))


def _power(number: int) -> int:
    """Return the least power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
