"""Data of a plan that the kernels read: index lists of blocks, and the rule on token pairs.

Made by torch operations on the plan's device. Only a static plan, whose lists are made once and
kept, waits for the device. Its windows become one bit for each pair of slots in the blocks that
need a mask: a kernel then tests a bit instead of comparing places on each axis of the grid.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gen_accel.kernels.lists import masked_first
from gen_accel.plan import PAIRS, Plan, Route, Windows

WORD = 32  # pairs in one number
# Bytes of all plans together, of rows and of columns. Where a plan would take more, kernels
# compare places pair by pair: 115 thousand tokens in windows of 18 x 24 x 24 take 0.3 GB.
MOST = 1 << 30

_sizes: "WeakKeyDictionary[Plan, int]" = WeakKeyDictionary()


class TritonLists(NamedTuple):
    """Arguments of the operator `gen_accel::triton_attention` between v and scale.

    Args:
        slots: (S,) int32, the token of each slot, -1 for padding.
        rows: (B', H', entries) int32 for the B' x H' patterns of `keep`, the key blocks of each
            query block, one list after the other: blocks that need a mask first, then the whole
            ones; what lies between and after them is unused.
        row_counts: (B', H', Kq, 4) int32 of each query block: key blocks that need a mask, key
            blocks in all, and where its list starts. The last number, of the i-th, is the block
            that has the i-th turn, the longest first where known.
        columns, column_counts: the same for each key block, with the query blocks that see it.
            None where no gradient can be needed.
        rule: empty; or for windows (3, A, S) int32 with first, last and place and (S,) int8 with
            the free tokens, or instead the bits of `bits_of`; or for a route
            (B', H', S, C) int8 picks and (Kk,) int32 groups.
        gain: of the plan, contiguous fp32; None where it has none.
        raster: whether slots are in the order of the tokens, without padding.
    """

    slots: Tensor
    rows: Tensor
    row_counts: Tensor
    columns: Tensor | None
    column_counts: Tensor | None
    rule: list[Tensor]
    gain: Tensor | None
    block_q: int
    block_k: int
    raster: bool


def prepare(plan: Plan) -> TritonLists:
    """Make the lists: each time for a dynamic plan, without waiting for the device; else once."""
    if plan.dynamic:
        return _counted(plan, backward=torch.is_grad_enabled())
    return plan.prepared(TritonLists, lambda: _sorted(plan))


def listed(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """List the numbers of the columns where `first` holds, then where only `second` does, for each
    row; `listing.block_lists` makes the same by counting. Waits for the device.

    Args:
        first, second: (B', H', R, C) bool.

    Returns:
        (B', H', entries) int32, one row's list after the other, as long as the longest of a
        pattern; and (B', H', R, 4) int32: the number in `first`, the number in all, where the list
        starts, and which row has the i-th turn, the longest first.
    """
    found, R = [], first.shape[2]
    for one, either in zip(first.flatten(0, 1), (first | second).flatten(0, 1), strict=True):
        row, column = either.nonzero(as_tuple=True)
        found.append(listed_pairs(row, column, ~one[row, column], R))
    lists, counts = zip(*found, strict=True)
    index = torch.nn.utils.rnn.pad_sequence([x[0, 0] for x in lists], batch_first=True)
    return index.unflatten(0, first.shape[:2]), torch.cat(counts).view(*first.shape[:3], 4)


def _sorted(plan: Plan) -> TritonLists:
    """Make the lists of a static plan. Waits for the device."""
    if plan.runs is not None:
        return _of_runs(plan)
    masked = plan.keep & ~plan.whole
    rows = listed(masked, plan.keep)
    columns = listed(masked.transpose(-1, -2), plan.keep.transpose(-1, -2))
    made = _as_lists(plan, rows, columns)
    if not masked.any():
        return made._replace(rule=[])
    rule = bits_of(plan, masked)
    return made if rule is None else made._replace(rule=rule)


def _of_runs(plan: Plan) -> TritonLists:
    """Make the lists of a plan of runs, without its mask."""
    found = [(row + rows.start, *pair) for rows, row, *pair in plan.slices()]
    row, column, whole = (torch.cat(parts) for parts in zip(*found, strict=True))
    *_, Kq, Kk = plan.blocks.shape
    rows = listed_pairs(row, column, whole, Kq)
    order = column.sort(stable=True).indices
    made = _as_lists(plan, rows, listed_pairs(column[order], row[order], whole[order], Kk))
    if whole.all():
        return made._replace(rule=[])
    rule = None
    if bytes_of_bits(plan, ~whole) <= MOST:
        rule = bits_of(plan, plan.keep & ~plan.whole)
    return made if rule is None else made._replace(rule=rule)


def listed_pairs(row: Tensor, column: Tensor, whole: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """List the kept pairs of blocks as `listed` does: pairs that need a mask, then the whole ones.

    Args:
        row, column: (P,) int64, row by row.
        whole: (P,) bool.
        rows: R.
    """
    total = torch.bincount(row, minlength=rows)
    places, masked = masked_first(row, whole, total)
    starts = total.cumsum(0) - total
    index = torch.zeros(max(1, len(row)), dtype=torch.int32, device=row.device)
    index[starts[row] + places] = column.int()
    turns = total.argsort(descending=True, stable=True)
    counts = torch.stack([masked, total, starts.masked_fill(total == 0, 0), turns], dim=-1)
    return index[None, None], counts[None, None].int()


def _counted(plan: Plan, backward: bool) -> TritonLists:
    from gen_accel.kernels.triton.launch import operate
    from gen_accel.kernels.triton.listing import block_lists  # imports triton

    keep, whole = plan.keep, plan.maskless().expand(plan.keep.shape)
    entries = plan.entries or keep.shape[2] * keep.shape[3]
    if plan.listed is None:
        rows = operate(block_lists, keep, whole, entries)
    else:
        rows = plan.listed[0].contiguous(), plan.listed[1].contiguous()
    columns = None, None
    if backward:
        columns = operate(block_lists, keep.mT, whole.mT, entries)
    return _as_lists(plan, rows, columns)


def _as_lists(
    plan: Plan,
    rows: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor] | tuple[None, None],
) -> TritonLists:
    gain = None if plan.gain is None else plan.gain.float().contiguous()
    rest = _rule(plan), gain, plan.block_q, plan.block_k, plan.is_raster
    return TritonLists(plan.slots_int32, rows[0], rows[1], columns[0], columns[1], *rest)


def _rule(plan: Plan) -> list[Tensor]:
    rule = plan.partial
    if rule is None:
        return []
    if isinstance(rule, Route):
        return [rule.picks.contiguous().view(torch.int8), rule.group.int()]
    limits = torch.iinfo(torch.int32)
    first = rule.first.masked_fill(rule.free, limits.min)
    last = rule.last.masked_fill(rule.free, limits.max)
    return [torch.stack([first, last, rule.place]).int(), rule.free.to(torch.int8)]


def bits_of(plan: Plan, masked: Tensor) -> list[Tensor] | None:
    """Make the `rule` of `TritonLists` as bits: words and firsts of the rows, then of the columns;
    None where they do not fit. Waits for the device.

    Padding of keys is in the bits of the rows, and padding of queries in the bits of the columns.

    Args:
        masked: (B', H', Kq, Kk) bool, the pairs of blocks that need a mask.
    """
    aligned = plan.block_q % WORD == plan.block_k % WORD == 0
    if not isinstance(plan.partial, Windows) or not aligned:
        return None
    size = bytes_of_bits(plan, masked)
    if sum(_sizes.values()) + size > MOST:
        return None
    _sizes[plan] = size
    rows = _words(plan, masked, plan.block_q, plan.block_k, by_key=False)
    return [*rows, *_words(plan, masked.mT, plan.block_k, plan.block_q, by_key=True)]


def bytes_of_bits(plan: Plan, masked: Tensor) -> int:
    """Bytes that the bits take. Waits for the device."""
    return 2 * int(masked.sum()) * plan.block_q * plan.block_k // 8


def _words(
    plan: Plan, masked: Tensor, own: int, listed: int, *, by_key: bool
) -> tuple[Tensor, Tensor]:
    """Bits in the order of lists of the masked blocks of each row.

    Args:
        masked: (B', H', R, C) bool.
        own, listed: slots in a block of a row and of a column.
        by_key: rows are of keys, columns of queries.

    Returns:
        (pairs, listed / WORD, own) int32: for the own block's i-th slot, bit b of word w is for
        the listed block's slot 32 w + b; and (B', H', R) int32, the first pair of each row.
    """
    device = masked.device
    pairs = masked.nonzero()[:, 2:]
    words = torch.empty((len(pairs), listed // WORD, own), dtype=torch.int32, device=device)
    in_own, in_listed = (torch.arange(block, device=device) for block in (own, listed))
    bit = torch.ones((), dtype=torch.int32, device=device) << in_listed[:WORD].int()
    rule, step = plan.partial, max(1, PAIRS // (own * listed))
    assert isinstance(rule, Windows)
    for some, out in zip(pairs.split(step), words.split(step), strict=True):
        rows = (some[:, :1] * own + in_own)[:, :, None]
        columns = (some[:, 1:] * listed + in_listed)[:, None]
        seen = rule.allows(columns, rows) if by_key else rule.allows(rows, columns)
        seen = (seen & plan.real[columns]).unflatten(2, (-1, WORD))
        out.copy_((seen * bit).sum(-1, dtype=torch.int32).mT)
    held = masked.sum(-1).flatten()
    first = (held.cumsum(0) - held).view(masked.shape[:3])
    return words, first.int()
