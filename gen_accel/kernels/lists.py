"""Kept blocks of a plan as index lists, which several kernels read, and whether a CPU has AMX."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gen_accel.memory import in_words
from gen_accel.plan import Plan, Route

# Bytes of `Split` lists of a plan of runs. All lists are as long as the longest, so that one block
# that sees all can make them many times larger than their content.
MOST = 1 << 31
FAR = 1e9  # farther than any token from any other, along any axis


class Lists(NamedTuple):
    """Kept blocks of a plan as index lists, with the other data of the plan that the operator
    needs.

    Args:
        slots: slots of the plan; None where every slot holds the token of its own number.
        index: (B', H', Kq, most) int64 for the B' x H' patterns of `keep`, the key blocks of each
            query block: blocks that need a mask first, then the whole ones; the rest is unused.
        counts: (2, B', H', Kq) on the CPU: key blocks in all, and the number that need a mask.
        rule: additive mask in parts, see `rule`.
        gain: gain of the plan.
    """

    slots: Tensor | None
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    counts: Tensor
    rule: list[Tensor]
    gain: Tensor | None
    block_q: int
    block_k: int


@torch.inference_mode(False)
def prepare(plan: Plan) -> Lists:
    if plan.dynamic:
        return _lists(plan)
    return plan.prepared(Lists, lambda: _lists(plan))


def _lists(plan: Plan) -> Lists:
    slots = None if plan.is_raster else plan.slots
    return Lists(slots, *kept_blocks(plan), rule(plan), plan.gain, plan.block_q, plan.block_k)


def kept_blocks(plan: Plan) -> tuple[Tensor, Tensor]:
    """Make `index` and `counts` of `Lists`."""
    if plan.runs is not None:
        return blocks_of_runs(plan, torch.int64)
    whole = plan.whole
    rank = 2 - 2 * plan.keep.int() + whole.int()
    index = rank.sort(dim=-1, stable=True).indices
    counts = torch.stack([plan.keep.sum(-1), (plan.keep & ~whole).sum(-1)]).cpu()
    return index[..., : max(int(counts[0].max()), 1)].contiguous(), counts


def blocks_of_runs(plan: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Make `kept_blocks` of a plan of runs, without its mask, the numbers in `dtype`."""
    assert plan.runs is not None
    totals = plan.runs.counts
    masked = torch.zeros_like(totals)
    most = max(int(totals.max()), 1)
    # Left unfilled: of one long list among short ones most is never touched, and takes no memory.
    index = torch.empty(len(totals), most, dtype=dtype, device=totals.device)
    for rows, row, column, whole in plan.slices():
        places, masked[rows] = masked_first(row, whole, totals[rows])
        index[rows].view(-1)[row * most + places] = column.to(dtype)
    return index[None, None], torch.stack([totals, masked])[:, None, None].cpu()


def masked_first(row: Tensor, whole: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each kept pair in its row's list, (P,), pairs that need a mask before the whole
    ones and otherwise in the order given; and the number that need a mask in each row, (rows,).

    Args:
        row: (P,) in ascending order.
        whole: (P,) bool.
        totals: (rows,) int64, the number of pairs in each row.
    """
    start = pad(totals.cumsum(0), (1, 0))
    masked = pad((~whole).cumsum(0), (1, 0))  # before each pair
    before = masked[start]
    place = torch.arange(len(row), device=row.device) - start[row]
    earlier = masked[:-1] - before[row]
    counts = before.diff()
    return torch.where(whole, counts[row] + place - earlier, earlier), counts


class Split(NamedTuple):
    """Lists of blocks of the other side for each block of one side, in ascending order, named as
    FlashAttention-4 does. Entries past a count are unused.

    Args:
        mask_block_cnt, mask_block_idx: (B', H', K) and (B', H', K, most) int32, the blocks that
            need a mask.
        full_block_cnt, full_block_idx: the same for blocks that are seen whole.
    """

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor


def split_of_runs(plan: Plan) -> tuple[Split, Split]:
    """Make the lists of the query blocks and of the key blocks of a plan of runs, without its
    mask. Waits for the device."""
    by_row, by_column = ([_Filling(one) for one in side] for side in _kinds_of_runs(plan))
    for some, row, column, whole in plan.slices():
        for kind, held in enumerate((~whole, whole)):
            query, key = row[held] + some.start, column[held]
            by_row[kind].add(query, key)
            order = key.sort(stable=True).indices
            by_column[kind].add(key[order], query[order])
    rows, columns = (Split(*side[0].lists(), *side[1].lists()) for side in (by_row, by_column))
    return rows, columns


def why_too_long(plan: Plan | None) -> list[str]:
    """List the reasons against `split_of_runs`; none for a plan with a mask. Waits for the device
    the first time."""
    if plan is None or plan.runs is None:
        return []

    def needed() -> int:
        sides = _kinds_of_runs(plan)
        return sum(4 * side.shape[1] * int(side.amax(1).clamp_min(1).sum()) for side in sides)

    size = plan.prepared(why_too_long, needed)
    if size <= MOST:
        return []
    return [
        f"its lists of blocks, all as long as the longest, would take {in_words(size)}, more than "
        f"{in_words(MOST)}"
    ]


def _kinds_of_runs(plan: Plan) -> tuple[Tensor, Tensor]:
    """Count for each block the blocks of the other side that need a mask, and the ones that are
    seen whole: (2, Kq) and (2, Kk) int64."""
    return plan.prepared(_kinds_of_runs, lambda: _counted_kinds(plan))


def _counted_kinds(plan: Plan) -> tuple[Tensor, Tensor]:
    *_, Kq, Kk = plan.blocks.shape
    rows, columns = (plan.slots.new_zeros(2, K) for K in (Kq, Kk))
    for some, row, column, whole in plan.slices():
        for kind, held in enumerate((~whole, whole)):
            rows[kind, some] = torch.bincount(row[held], minlength=some.stop - some.start)
            columns[kind] += torch.bincount(column[held], minlength=Kk)
    return rows, columns


class _Filling:
    """Lists that are filled part by part.

    Args:
        counts: (K,) int64, the final length of each.
    """

    def __init__(self, counts: Tensor) -> None:
        self.counts, self.most = counts, max(int(counts.max()), 1)
        self.index = counts.new_zeros(len(counts) * self.most, dtype=torch.int32)
        self.filled = torch.zeros_like(counts)

    def add(self, line: Tensor, number: Tensor) -> None:
        """Append numbers, (P,), to the lists whose own numbers, (P,), ascend."""
        more = torch.bincount(line, minlength=len(self.counts))
        before = self.filled - more.cumsum(0) + more
        place = before[line] + torch.arange(len(line), device=line.device)
        self.index[line * self.most + place] = number.int()
        self.filled += more

    def lists(self) -> tuple[Tensor, Tensor]:
        """Return counts and numbers as in `Split`."""
        return self.counts.int()[None, None], self.index.view(1, 1, -1, self.most)


def left_packed(blocks: Tensor, *, cut: bool = False) -> tuple[Tensor, Tensor]:
    """Counts (..., K) and numbers (..., K, most) of the columns that are set in each row, int32.

    Args:
        blocks: (..., K, columns) bool.
        cut: shorten the lists to the longest one, which waits for the device.

    Returns:
        Numbers ascend; entries past the count of a row are unused.
    """
    counts = blocks.sum(-1, dtype=torch.int32)
    ones = blocks.to(torch.uint8, memory_format=torch.contiguous_format)
    index = ones.sort(dim=-1, descending=True, stable=True).indices.int()
    if cut:
        index = index[..., : max(int(counts.max()), 1)].contiguous()
    return counts, index


def rule(plan: Plan) -> list[Tensor]:
    """Additive mask in parts, fp32: cheaper than comparisons, whose results are boolean.

    A query sees a key if no `abs(place - center) - half` of any axis exceeds the key's slack; and
    with a route, if the query's 0 or 1 for the key's group does not exceed it either.

    Returns:
        slack (S,); with windows also center, half and place, all (A, S) fp32; with a route also
        (B', H', S, C) fp32, 1 where a query does not see a group, and (Kk,) the groups.
    """
    slack = torch.zeros(plan.slots.shape, device=plan.slots.device)
    windows = plan.partial
    if windows is None:
        return [slack.masked_fill_(~plan.real, -FAR)]
    if isinstance(windows, Route):
        return [slack.masked_fill_(~plan.real, -FAR), (~windows.picks).float(), windows.group]
    slack[windows.free] = 2 * FAR
    slack[~plan.real] = -2 * FAR
    center = (windows.first + windows.last) / 2
    half = ((windows.last - windows.first) / 2).masked_fill(windows.free, FAR)
    return [slack, center, half, windows.place.float()]


def has_tiles(device: torch.device) -> bool:
    """Whether products of bf16 matrices run several times as fast as fp32 products (AMX)."""
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device.type == "cpu" and known is not None and known()
