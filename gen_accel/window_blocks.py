"""Pairs of blocks that windows touch, or see whole: all at once, or some query blocks at a time.

Letters as in `gen_accel.plan`: S slots, Kq and Kk query and key blocks, A axes of a grid.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class WindowBlocks:
    """Bounds of blocks that decide which pairs pass: on an axis, a pair passes if the query
    block's `first` is at most the key block's `after`, and `before` at most its `last`.

    Args:
        first, last: (A, Kq), of query blocks.
        after, before: (A, Kk), of key blocks.
        free_q, free_k: (Kq,) and (Kk,) bool, blocks of text, which pass with every block.
    """

    first: Tensor
    last: Tensor
    after: Tensor
    before: Tensor
    free_q: Tensor
    free_k: Tensor

    def mask(self) -> Tensor:
        """Make the mask over pairs of blocks, (Kq, Kk) bool."""
        inside = self.free_q[:, None] | self.free_k
        meet = ~inside
        for axis, ends in enumerate(zip(self.first, self.last, strict=True)):
            meet = meet & self._along(axis, *ends)
        return meet | inside

    def rows(self, some: slice) -> Tensor:
        """Make some rows of `mask`, (some Kq, Kk) bool, with fewer comparisons, since neighbours
        along an axis are alike. Waits for the device."""
        inside = None
        for axis, ends in enumerate(zip(self.first[:, some], self.last[:, some], strict=True)):
            (first, last), kind = torch.stack(ends).unique(dim=1, return_inverse=True)
            passes = self._along(axis, first, last)[kind]
            inside = passes if inside is None else inside.logical_and_(passes)
        assert inside is not None  # a grid has an axis
        return inside.logical_or_(self.free_k).logical_or_(self.free_q[some, None])

    def _along(self, axis: int, first: Tensor, last: Tensor) -> Tensor:
        return (first[:, None] <= self.after[axis]) & (self.before[axis] <= last[:, None])


def extremes(values: Tensor, real: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Least and greatest value of the real slots of each block, (A, S) to two of (A, K)."""
    limits = torch.iinfo(values.dtype)
    low = values.masked_fill(~real, limits.max).unflatten(-1, (-1, block)).amin(-1)
    high = values.masked_fill(~real, limits.min).unflatten(-1, (-1, block)).amax(-1)
    return low, high
