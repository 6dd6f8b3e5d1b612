"""Boxes of the video whose tokens are alike, so that one mean stands for them well.

The variance of keys within boxes costs next to nothing and names the few boxes that are worth a
try. (On the demo model, the variance of values orders them wrongly.) The best of the few depends
on the method as well, and is measured.
"""

import math
from dataclasses import dataclass
from itertools import product
from statistics import mode
from typing import Any

import torch
from torch import Tensor

from gen_accel.attention_processors.attached.layer import Observed
from gen_accel.attention_processors.methods.blocks import Box, even_tile
from gen_accel.plan import widest
from gen_accel.video import VideoShape

PADDING = 1.125  # slots for each token, in boxes that pad little
FEW = 6  # boxes that are tried
HEADS = 4  # of a layer that are looked at, so that many boxes take less than the dense step
MULTIPLE = 16  # of the tokens of a box on GPUs, whose kernels multiply by such tiles


def boxes(video: VideoShape, tokens: int, device: torch.device) -> list[Box]:
    """Boxes of `tokens` to twice as many tokens that fit the grid, in order of padding: all that
    pad it little, and a few in any case."""
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
    """Number of slots of a grid that is cut into boxes."""
    return math.prod(-(-n // side) * side for n, side in zip(video.grid, box, strict=True))


def purest(k: Tensor, video: VideoShape, tokens: int) -> list[Box]:
    """Choose the few boxes within which keys vary least, and `even_tile` if it fits. None where no
    box does.

    Args:
        k: (B, H, N, D); some of the heads are read, one at a time.
        tokens: the least number in a box.
    """
    within = dict.fromkeys(boxes(video, tokens, k.device), 0.0)
    if not within:
        return []
    for head in k.split(1, 1)[:: -(-k.shape[1] // HEADS)]:
        purity = Purity(head, video)
        for box in within:
            within[box] += purity.within(box).mean().item()
    even = even_tile(video, tokens)
    more = [even] if fits(even, video) else []
    return [*dict.fromkeys([*sorted(within, key=lambda x: (within[x], x))[:FEW], *more])]


@dataclass(frozen=True)
class TileFit:
    """The boxes that were chosen. Printable.

    Args:
        tile: one, as (frames, rows, columns), or one for each layer where they differ. A layer
            that was not seen has the box that most others have.
        errors: by the number of a layer, relative L2 errors of the method's attention against
            dense, of the boxes that were tried, the best first.
    """

    tile: Box | tuple[Box, ...]
    errors: dict[int, tuple[tuple[Box, float], ...]]

    def __str__(self) -> str:
        lines = ["layer  relative L2 error by tile"]
        for layer, tried in self.errors.items():
            told = (f"{' x '.join(map(str, box))}: {error:.4f}" for box, error in tried)
            lines.append(f"{layer:<5}  {', '.join(told)}")
        return "\n".join(lines)


class TileErrors:
    """Errors of a method's attention with each of a few boxes, over the calls that are seen. The
    boxes of a layer are the `purest` of its first call.

    Args:
        tokens: the least number in a box.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.video: VideoShape | None = None  # of the first call; on a UNet, others differ
        self.squares: dict[int, dict[Box, float]] = {}  # by the number of a layer
        self.dense: dict[int, float] = {}

    def add(self, method: Any, seen: Observed) -> None:
        """Add a call. Calls on another grid than the first are left out."""
        layer, (q, k, v, dense, video, run) = seen.layer.number, seen[1:]
        self.video = self.video or video
        if video.grid != self.video.grid:
            return
        if layer not in self.squares:
            self.squares[layer] = dict.fromkeys(purest(k, video, self.tokens), 0.0)
        squares, wide = self.squares[layer], widest(dense.device)
        self.dense[layer] = self.dense.get(layer, 0.0) + dense.to(wide).square().sum().item()
        for box in squares:
            out = method.tiled(box)(q, k, v, video=video, kernel=run)
            squares[box] += (out - dense).to(wide).square().sum().item()

    def fit(self) -> TileFit | None:
        """Return the boxes that err least; None where none fits the grid."""
        errors: dict[int, tuple[tuple[Box, float], ...]] = {}
        for layer, squares in sorted(self.squares.items()):
            if not squares:
                continue
            by = {box: math.sqrt(total / self.dense[layer]) for box, total in squares.items()}
            errors[layer] = tuple(sorted(by.items(), key=lambda one: (one[1], one[0])))
        if not errors:
            return None
        best = {layer: tried[0][0] for layer, tried in errors.items()}
        usual = mode(best.values())
        if len(set(best.values())) == 1:
            return TileFit(usual, errors)
        return TileFit(tuple(best.get(n, usual) for n in range(max(best) + 1)), errors)


class Purity:
    """Prefix sums over the places of a grid, from which the sums of any box follow.

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
        """Variance about the means of boxes, as a share of the variance about the mean of all, (B,
        H): 0 where the tokens of each box are equal, 1 where boxes tell nothing."""
        sums, counts = self.before, torch.ones((), device=self.before.device)
        for axis, (size, side) in enumerate(zip(self.grid, box, strict=True)):
            cuts = torch.tensor([*range(0, size, side), size], device=sums.device)
            sums = sums.index_select(2 + axis, cuts).diff(dim=2 + axis)
            counts = counts[..., None] * cuts.diff()
        between = (sums.square().sum(-1) / counts).sum((2, 3, 4))
        return 1 - between / self.total.clamp_min(torch.finfo(self.total.dtype).tiny)
