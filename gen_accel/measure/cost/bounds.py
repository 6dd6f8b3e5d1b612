"""Bound on the speed-up of neighborhood attention on a grid, for one choice of stride and tiles.

A block kernel computes whole tiles of keys for a tile of queries, and its slowest query tile sets
the pace. With N keys, of which the query tile that visits most computes `most` tiles of T keys:

    speed-up bound  =  N / (most x T)  <=  1 / density

Nothing is run: window, stride, dilation and causality act on each axis alone, so the tiles that a
query tile visits are a box, and counts multiply over the axes.

References:
    The simulator described in Hassani et al., "Generalized Neighborhood Attention", 2025,
    https://arxiv.org/abs/2504.16922, appendix B. Unlike there, dense attention is counted without
    the padding of tiles that stick out of the grid, since it needs none; where tiles divide the
    grid the two are equal.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from heapq import nsmallest
from itertools import product
from typing import NamedTuple

import torch

from gen_accel.attention_processors.methods.neighborhood import AXES, Axes, Neighborhood, spans
from gen_accel.measure.cost.figures import WIDTH, aligned, wrapped
from gen_accel.memory import check_room
from gen_accel.video import VideoShape

# Query and key tiles of NATTEN 0.21.7 on Hopper (128 queries) and Blackwell (256 queries) at head
# dim 128, for videos, images and sequences.
TILES: tuple[tuple[Axes, Axes], ...] = (
    *product(
        [(8, 4, 8), (2, 8, 16), (4, 8, 8), (2, 16, 8), (4, 4, 16)],
        [(4, 4, 8), (2, 8, 8), (2, 4, 16)],
    ),
    ((4, 4, 8), (4, 4, 8)),
    ((2, 8, 8), (2, 8, 8)),
    ((1, 16, 16), (1, 16, 8)),
    ((1, 16, 8), (1, 16, 8)),
    ((1, 1, 256), (1, 1, 128)),
    ((1, 1, 128), (1, 1, 128)),
)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Bound for one choice.

    Args:
        tile_q, tile_k: tokens along (frames, rows, columns); with a dilation, of one dilation
            group.
        dynamic: whether key tiles start at the first key of each query tile, not on a fixed grid.
        query_tiles: how many there are.
        key_tiles: how many would hold all keys without padding.
        most, mean: key tiles that a query tile visits.
        whole: share of the visited tiles in which every query sees every key, so that they need
            no mask, in [0, 1].
        density: share of the token pairs that are kept, in [0, 1].
    """

    video: VideoShape
    method: Neighborhood
    tile_q: Axes
    tile_k: Axes
    dynamic: bool
    query_tiles: int
    key_tiles: float
    most: int
    mean: float
    whole: float
    density: float

    @property
    def speedup(self) -> float:
        """Speed-up over dense attention, if the kernel runs at the same rate."""
        return self.key_tiles / self.most

    @property
    def flop_speedup(self) -> float:
        """Speed-up that the kept pairs alone would allow."""
        return 1 / self.density

    def to_dict(self) -> dict[str, object]:
        return {
            "grid": list(self.video.grid),
            **asdict(self.method),
            "tile_q": self.tile_q,
            "tile_k": self.tile_k,
            "dynamic": self.dynamic,
            "query_tiles": self.query_tiles,
            "key_tiles": self.key_tiles,
            "most_visited": self.most,
            "mean_visited": self.mean,
            "whole": self.whole,
            "density": self.density,
            "speedup_bound": self.speedup,
            "flop_bound": self.flop_speedup,
        }


def tile_bound(
    video: VideoShape, method: Neighborhood, *, tile_q: Axes, tile_k: Axes, dynamic: bool = False
) -> Bound:
    """Compute the bound. It equals counting, on the exact mask, the key tiles that each query tile
    touches.

        method = Neighborhood((18, 24, 24), stride=(16, 8, 8))
        tile_bound(VideoShape(30, 48, 80), method, tile_q=(2, 8, 8), tile_k=(2, 8, 8)).speedup

    Args:
        video: without text, whose keys every query tile visits beside these.
        tile_q, tile_k: tokens along (frames, rows, columns). A dilation lays the tokens of each
            dilation group together, and tiles lie within one group.
        dynamic: key tiles start at the first key that a query tile sees, as in kernels that slice
            their keys, and not on a fixed grid.

    Raises:
        ValueError: text tokens, an invalid tile, or a window larger than its axis.
    """
    _check(video, ((tile_q, tile_k),))
    axes = zip(method.by_axis(video), tile_q, tile_k, strict=True)
    counts = _product(_count(*along, *tiles, dynamic) for along, *tiles in axes)
    return Bound(
        video=video,
        method=method,
        tile_q=tile_q,
        tile_k=tile_k,
        dynamic=dynamic,
        query_tiles=counts.query_tiles,
        key_tiles=video.tokens / math.prod(tile_k),
        most=counts.most,
        mean=counts.visited / counts.query_tiles,
        whole=counts.whole / counts.visited,
        density=counts.seen / video.tokens**2,
    )


def best_tiles(
    video: VideoShape,
    method: Neighborhood,
    *,
    tiles: Sequence[tuple[Axes, Axes]] = TILES,
    dynamic: bool = False,
    top: int = 10,
) -> list[Bound]:
    """The strides and tiles with the largest bounds for a method's window, best first.

    Choices with equal bounds are ordered by the smallest stride, which is closest to neighborhood
    attention without a stride, and then by the number of tiles that need no mask. Along an axis, a
    stride is tried only if it brings more than every smaller one.

    Args:
        method: its own stride is not read.
        tiles: pairs of a query and a key tile.
        top: number of choices, at least 1.

    Raises:
        ValueError: an argument out of its range.
    """
    _check(video, tiles)
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    axes = list(
        zip(AXES, video.grid, method.window, method.dilation, method.is_causal, strict=True)
    )
    choices = []
    for tile_q, tile_k in tiles:
        along = (
            _strides(*axis, *sides, dynamic)
            for axis, *sides in zip(axes, tile_q, tile_k, strict=True)
        )
        for steps in product(*along):
            counts = _product(found for _, found in steps)
            stride = tuple(step for step, _ in steps)
            computed = counts.most * math.prod(tile_k)
            rank = computed, math.prod(stride), -counts.whole / counts.visited
            choices.append((rank, replace(method, stride=stride), tile_q, tile_k))
    return [
        tile_bound(video, chosen, tile_q=tile_q, tile_k=tile_k, dynamic=dynamic)
        for _, chosen, tile_q, tile_k in nsmallest(top, choices, key=lambda choice: choice[0])
    ]


def _check(video: VideoShape, tiles: Sequence[tuple[Axes, Axes]]) -> None:
    longest = max(video.grid)
    check_room(f"an axis of {longest} tokens", 80 * longest, "ask for a smaller grid")
    if video.text:
        raise ValueError(f"video must be without text tokens, got {video}")
    for pair in tiles:
        for name, tile in zip(("tile_q", "tile_k"), pair, strict=True):
            if len(tile) != 3 or min(tile) < 1:
                raise ValueError(
                    f"{name} needs a side of at least 1 for each of {AXES}, got {tile}"
                )


class _Counts(NamedTuple):
    """Counts along one axis or over the grid: query tiles; the most key tiles that one of them
    visits; all visits, and the visits that need no mask; and keys seen, summed over all tokens."""

    query_tiles: int
    most: int
    visited: int
    whole: int
    seen: int


def _product(axes: Iterable[_Counts]) -> _Counts:
    """Multiply counts to the whole grid: the visited tiles of a query tile form a box, and so do
    the tiles without a mask."""
    return _Counts(*(math.prod(values) for values in zip(*axes, strict=True)))


@lru_cache(maxsize=16384)
def _count(
    name: str,
    size: int,
    window: int,
    stride: int,
    dilation: int,
    is_causal: bool,
    side_q: int,
    side_k: int,
    dynamic: bool,
) -> _Counts:
    """Count along an axis. The windows of a query tile cover one run of places: only its ends
    count."""
    group, place, first, last = spans(name, size, window, stride, dilation, is_causal)
    _, tile = torch.unique(group * size + place // side_q, return_inverse=True)
    count = int(tile.max()) + 1

    def extreme(values: torch.Tensor, which: str) -> torch.Tensor:
        return values.new_zeros(count).scatter_reduce(0, tile, values, which, include_self=False)

    begin, end = extreme(first, "amin"), extreme(last, "amax")
    origin = begin if dynamic else torch.zeros_like(begin)
    visited = (end - origin) // side_k - (begin - origin) // side_k + 1
    # Seen by all of the tile's queries: from the last of the firsts to the first of the lasts.
    inner = -((origin - extreme(first, "amax")) // side_k)
    outer = (extreme(last, "amin") + 1 - origin) // side_k
    return _Counts(
        count,
        int(visited.max()),
        int(visited.sum()),
        int((outer - inner).clamp_min(0).sum()),
        int((last - first + 1).sum()),
    )


@lru_cache(maxsize=16384)
def _strides(
    name: str,
    size: int,
    window: int,
    dilation: int,
    is_causal: bool,
    side_q: int,
    side_k: int,
    dynamic: bool,
) -> list[tuple[int, _Counts]]:
    """List the strides with which a query tile visits fewer tiles than with every smaller
    stride."""
    front: list[tuple[int, _Counts]] = []
    for stride in range(1, (size if window == -1 else window) + 1):
        counts = _count(name, size, window, stride, dilation, is_causal, side_q, side_k, dynamic)
        if not front or counts.most < front[-1][1].most:
            front.append((stride, counts))
    return front


def bound_lines(bounds: Sequence[Bound], width: int = WIDTH) -> list[str]:
    """Lines of a table of choices, after the meaning of its columns.

    Args:
        width: characters of a line of text at most.
    """
    video = bounds[0].video
    rows = [("window", "stride", "tile-q", "tile-k", "bound", "FLOPs", "visited", "unmasked")]
    for bound in bounds:
        window, stride, tile_q, tile_k = (
            ",".join(map(str, sides))
            for sides in (bound.method.window, bound.method.stride, bound.tile_q, bound.tile_k)
        )
        gains = f"{bound.speedup:.2f}x", f"{bound.flop_speedup:.2f}x"
        visited = f"{bound.most}/{bound.key_tiles:g}"
        rows.append((window, stride, tile_q, tile_k, *gains, visited, f"{bound.whole:.0%}"))
    meaning = (
        "bound: the most speed-up of attention, as whole tiles of keys are computed; FLOPs: the "
        "speed-up by the kept pairs alone; visited: key tiles that a query tile visits at most, "
        "of all; unmasked: share of them that need no mask. Best first."
    )
    grid = f"{video} = {video.tokens} tokens; sides are frames,rows,columns"
    return [*wrapped([grid, meaning], width), "", *aligned(rows, left=4)]
