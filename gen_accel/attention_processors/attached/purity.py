"""Boxes of the video whose tokens are alike, so that one mean stands for them well.

The variance of keys within boxes costs next to nothing and names the few that are worth a try: on
the demo model, that of values orders them wrongly. Which of those is best depends on the method as
well, and is measured.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gen_accel.attention_processors.methods.blocks import Box, even_tile
from gen_accel.method import tiled
from gen_accel.plan import widest
from gen_accel.video import VideoShape

PADDING = 1.125  # slots for each token, in boxes that pad little
FEW = 6  # boxes that are tried
HEADS = 4  # of a layer that are looked at, so that many boxes take less than the dense step
MULTIPLE = 16  # of the tokens of a box on GPUs, whose kernels multiply by such tiles


def boxes(video: VideoShape, tokens: int, device: torch.device) -> list[Box]:
    """Boxes of so many tokens to twice as many that fit the grid, those that pad it least first:
    all that pad it little, and a few in any case."""
    F, H, W = (range(1, min(size, 2 * tokens) + 1) for size in video.grid)
    multiple = 1 if device.type == "cpu" else MULTIPLE
    found = [
        box
        for box in product(F, H, W)
        if tokens <= math.prod(box) <= 2 * tokens and not math.prod(box) % multiple
    ]
    found.sort(key=lambda box: (slots(box, video), box))
    little = sum(slots(box, video) <= PADDING * video.video_tokens for box in found)
    return found[: max(FEW, little)]


def fits(box: Box, video: VideoShape) -> bool:
    return all(side <= size for side, size in zip(box, video.grid, strict=True))


def slots(box: Box, video: VideoShape) -> int:
    """Number of slots that a grid takes, cut into boxes."""
    return math.prod(-(-n // side) * side for n, side in zip(video.grid, box, strict=True))


class Purest:
    """The boxes within which keys vary least, over the calls that are seen.

    Args:
        tokens: the least of a box.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.video: VideoShape | None = None  # of the first call; on a UNet, others differ
        self.within: dict[Box, float] = {}

    def add(self, k: Tensor, video: VideoShape) -> None:
        """The keys of a call, (B, H, N, D), of some of the heads, one at a time."""
        if self.video is None:
            self.video = video
            self.within = dict.fromkeys(boxes(video, self.tokens, k.device), 0.0)
        if video.grid == self.video.grid:
            for head in k.split(1, 1)[:: -(-k.shape[1] // HEADS)]:
                purity = Purity(head, video)
                for box in self.within:
                    self.within[box] += purity.within(box).mean().item()

    def found(self) -> list[Box]:
        """The purest few, and `even_tile` if it fits; none where no box does."""
        if self.video is None:
            return []
        few = sorted(self.within, key=lambda box: (self.within[box], box))[:FEW]
        even = even_tile(self.video, self.tokens)
        more = [even] if few and fits(even, self.video) else []
        return [*dict.fromkeys([*few, *more])]


@dataclass(frozen=True)
class TileFit:
    """The box that was chosen. Printable.

    Args:
        tile: it, as (frames, rows, columns).
        errors: relative L2 error of the method's attention against dense, of the boxes that were
            tried, the best first.
    """

    tile: Box
    errors: tuple[tuple[Box, float], ...]

    def __str__(self) -> str:
        tried = (f"{' x '.join(map(str, box))}: {error:.4f}" for box, error in self.errors)
        return f"relative L2 error by tile  {', '.join(tried)}"


class TileErrors:
    """Errors of a method's attention with each of some boxes, over the calls that are seen."""

    def __init__(self, tiles: Sequence[Box]) -> None:
        self.squares = dict.fromkeys(tiles, 0.0)
        self.dense = 0.0

    def add(
        self,
        method: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dense: Tensor,
        video: VideoShape,
        run: Callable,
    ) -> None:
        """A call, (B, H, N, D) each. One on a grid that some box does not fit is left out."""
        if not all(fits(box, video) for box in self.squares):
            return
        wide = widest(dense.device)
        self.dense += dense.to(wide).square().sum().item()
        for box in self.squares:
            out = tiled(method, box)(q, k, v, video=video, kernel=run)
            self.squares[box] += (out - dense).to(wide).square().sum().item()

    def fit(self) -> TileFit:
        errors = {box: math.sqrt(total / self.dense) for box, total in self.squares.items()}
        ranked = sorted(errors.items(), key=lambda one: (one[1], one[0]))
        return TileFit(ranked[0][0], tuple(ranked))


class Purity:
    """Sums over the tokens before each place of a grid, from which those of any box follow.

    Args:
        x: (B, H, N, D), the video first.
    """

    def __init__(self, x: Tensor, video: VideoShape) -> None:
        x = x[:, :, : video.video_tokens].to(widest(x.device))
        x = x - x.mean(2, keepdim=True)
        self.total = x.square().sum((2, 3))  # (B, H)
        self.grid = video.grid
        sums = x.unflatten(2, video.grid)
        for axis in (2, 3, 4):
            sums = sums.cumsum(axis)
        self.before = torch.nn.functional.pad(sums, (0, 0, 1, 0, 1, 0, 1, 0))

    def within(self, box: Box) -> Tensor:
        """Variance about the means of boxes, as a share of that about the mean of all, (B, H):
        0 where the tokens of each box are equal, 1 where boxes tell nothing."""
        sums, counts = self.before, torch.ones((), device=self.before.device)
        for axis, (size, side) in enumerate(zip(self.grid, box, strict=True)):
            cuts = torch.tensor([*range(0, size, side), size], device=sums.device)
            sums = sums.index_select(2 + axis, cuts).diff(dim=2 + axis)
            counts = counts[..., None] * cuts.diff()
        between = (sums.square().sum(-1) / counts).sum((2, 3, 4))
        return 1 - between / self.total.clamp_min(torch.finfo(self.total.dtype).tiny)
