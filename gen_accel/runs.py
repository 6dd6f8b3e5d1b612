"""Masks over pairs of blocks: as runs of neighbours if a mask would be too large, and of the
pairs that windows touch or see whole, all at once or some query blocks at a time.

Letters as in `gen_accel.plan`: S slots, Kq and Kk query and key blocks, A axes of a grid. R runs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# Pairs of blocks from which on a plan holds runs instead of a mask. Below, the mask is small and
# faster to read.
DENSE = 1 << 24
# Pairs of blocks in a slice of a mask: as many bytes as stay in a cache.
SLICE = 1 << 21
# Kept pairs of blocks that are listed at once.
LISTED = 1 << 19
RUNS = 1 << 19  # runs that are added up at once


@dataclass(frozen=True, eq=False)
class Runs:
    """Key blocks that each query block sees, as runs of neighbours.

    Args:
        edges: (R, 2) int32, the first key block of each run and the one past its last, in
            ascending order, query block by query block. No two runs touch.
        starts: (Kq + 1,) int64, the first run of each query block, then R.
        columns: Kk.
    """

    edges: Tensor
    starts: Tensor
    columns: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the mask, (1, 1, Kq, Kk)."""
        return 1, 1, len(self.starts) - 1, self.columns

    def to(self, device: torch.device) -> "Runs":
        return Runs(self.edges.to(device), self.starts.to(device), self.columns)

    def mask(self) -> Tensor:
        """Make the mask, (1, 1, Kq, Kk) bool."""
        made = torch.zeros(self.shape, dtype=torch.bool, device=self.edges.device)
        for rows in self.slices():
            row, column = self.pairs(rows)
            made[0, 0, rows][row, column] = True
        return made

    @cached_property
    def counts(self) -> Tensor:
        """Number of key blocks that each query block sees, (Kq,) int64."""
        return self.sums()

    def rows(self, numbers: Tensor) -> Tensor:
        """Mask of the key blocks that some query blocks see, (n, Kk) bool. Waits for the device.

        Args:
            numbers: (n,) int64.
        """
        some, which = numbers.unique(return_inverse=True)
        made = some.new_zeros(len(some), self.columns, dtype=torch.bool)
        for keep, number in zip(made, some.tolist(), strict=True):
            keep[self.pairs(slice(number, number + 1))[1]] = True
        return made[which]

    def slices(self) -> Iterator[slice]:
        """Yield query blocks in order, in slices of about `LISTED` kept pairs and at least one
        query block. Waits for the device."""
        yield from _slices(self.counts.cumsum(0).cpu(), LISTED)

    def pairs(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the kept pairs of some query blocks in ascending order, (P,) int64 each: the
        query block, counted from the first one, and the key block. Waits for the device."""
        starts = self.starts[rows.start : rows.stop + 1]
        first, last = self.edges[int(starts[0]) : int(starts[-1])].long().unbind(1)
        lengths = last - first
        ends = lengths.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        # A key block is its number among the pairs, plus an offset that all of a run share.
        of_run = torch.stack([torch.repeat_interleave(starts.diff()), first - ends + lengths])
        row, shift = of_run.repeat_interleave(lengths, 1, output_size=total)
        return row, shift + torch.arange(total, device=shift.device)

    def sums(self, weight: Tensor | None = None) -> Tensor:
        """Sum the weights of the key blocks that each query block sees, (Kq,) int64.

        Args:
            weight: (Kk,) int64; by default 1 each.
        """
        below = None if weight is None else pad(weight.cumsum(0), (1, 0))
        made = []
        for rows, edges in self._parts():
            first, last = edges if below is None else (below[edges[0]], below[edges[1]])
            total = pad((last - first).cumsum(0, dtype=torch.int64), (1, 0))
            made.append(total[self.starts[rows] - self.starts[rows.start]].diff())
        return torch.cat(made)

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield query blocks of about `RUNS` runs at a time: the slice of their `starts`, and
        their (2, some R) edges. Waits for the device."""
        ends = self.starts[1:].cpu()
        for rows in _slices(ends, RUNS):
            begin, end = (int(ends[i - 1]) if i else 0 for i in (rows.start, rows.stop))
            yield slice(rows.start, rows.stop + 1), self.edges[begin:end].T


def _slices(ends: Tensor, most: int) -> Iterator[slice]:
    """Yield slices of entries in order, each holding at most `most` together, or one larger entry.

    Args:
        ends: (n,) on the CPU, cumulative sums of the sizes of the entries.
    """
    begin, before = 0, 0
    while begin < len(ends):
        end = int(torch.searchsorted(ends, before + most, right=True))
        yield slice(begin, end := max(begin + 1, end))
        begin, before = end, int(ends[end - 1])


def is_large(rows: int, columns: int) -> bool:
    """Whether a mask of this size is held as runs."""
    return rows * columns > DENSE


def slices_of(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of the rows of a mask in order, one slice if it is not large."""
    some = max(1, SLICE // columns) if is_large(rows, columns) else rows
    return (slice(first, min(first + some, rows)) for first in range(0, rows, some))


def mask_or_runs(slices: Iterable[Tensor], rows: int, columns: int) -> Any:
    """Make `keep` of a plan: (1, 1, rows, columns) bool, or `Runs` if that is large.

    Args:
        slices: (some rows, columns) bool each, on the CPU, in order.
    """
    if is_large(rows, columns):
        return runs_of(slices, columns)
    made = [*slices]
    return (made[0] if len(made) == 1 else torch.cat(made))[None, None]


def runs_of(slices: Iterable[Tensor], columns: int) -> Runs:
    """Make runs of a mask that comes in slices, as in `mask_or_runs`."""
    edges, counts = bytearray(), []  # grows in place; a list of parts would be held twice
    for some in slices:
        # A column that is never kept ends the runs of each row.
        padded = pad(some, (0, 1)).flatten()
        changes = padded ^ pad(padded[:-1], (1, 0))
        found = torch.from_numpy(changes.numpy().nonzero()[0]).view(-1, 2)
        row = found[:, 0] // (columns + 1)
        edges += (found - (row * (columns + 1))[:, None]).int().numpy().data
        counts.append(torch.bincount(row, minlength=len(some)))
    starts = pad(torch.cat(counts).cumsum(0), (1, 0))
    held = torch.frombuffer(edges, dtype=torch.int32) if edges else torch.empty(0).int()
    return Runs(held.view(-1, 2), starts, columns)


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
