"""The kept blocks of a plan as index lists, which several kernels read; what a CPU is good at."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gen_accel.plan import Plan, Route

FAR = 1e9  # farther than any token from any other, along any axis


class Lists(NamedTuple):
    """The kept blocks of a plan as index lists, with what else the operator needs of the plan.

    Args:
        order: (S,) int64, the token of each slot, and `back` (N,), the slot of each token; None
            where nothing is reordered or padded.
        index: (B', H', Kq, most) int64 for the B' x H' patterns of `keep`, the key blocks of each
            query block: first those that need a mask, then the whole ones; the rest is unused.
        counts: (2, B', H', Kq) on the CPU: key blocks in all, and those that need a mask.
        rule: what hides a key from a query, see `rule`.
        gain: of the plan.
    """

    order: Tensor | None
    back: Tensor | None
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
    order = None if plan.is_raster else plan.slots.clamp_min(0)
    back = None if plan.is_raster else plan.places
    index, counts = kept_blocks(plan)
    return Lists(order, back, index, counts, rule(plan), plan.gain, plan.block_q, plan.block_k)


def kept_blocks(plan: Plan) -> tuple[Tensor, Tensor]:
    """`index` and `counts` of `Lists`."""
    if plan.runs is not None:
        return blocks_of_runs(plan, torch.int64)
    whole = plan.whole
    rank = 2 - 2 * plan.keep.int() + whole.int()
    index = rank.sort(dim=-1, stable=True).indices
    counts = torch.stack([plan.keep.sum(-1), (plan.keep & ~whole).sum(-1)]).cpu()
    return index[..., : max(int(counts[0].max()), 1)].contiguous(), counts


def blocks_of_runs(plan: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`kept_blocks` of a plan of runs, without its mask, the numbers in `dtype`."""
    assert plan.runs is not None
    totals = plan.runs.counts
    masked = torch.zeros_like(totals)
    most = max(int(totals.max()), 1)
    # Not filled: of one long list among short ones most is never touched, and takes no memory.
    index = torch.empty(len(totals), most, dtype=dtype, device=totals.device)
    for rows, row, column, whole in plan.slices():
        places, masked[rows] = masked_first(row, whole, totals[rows])
        index[rows].view(-1)[row * most + places] = column.to(dtype)
    return index[None, None], torch.stack([totals, masked])[:, None, None].cpu()


def masked_first(row: Tensor, whole: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Places in its row's list of each kept pair, (P,), pairs that need a mask before the whole
    ones and else in the order given; and how many need one in each row, (rows,).

    Args:
        row: (P,) in ascending order.
        whole: (P,) bool.
        totals: (rows,) int64, how many pairs lie in each row.
    """
    start = pad(totals.cumsum(0), (1, 0))
    masked = pad((~whole).cumsum(0), (1, 0))  # before each pair
    before = masked[start]
    place = torch.arange(len(row), device=row.device) - start[row]
    earlier = masked[:-1] - before[row]
    counts = before.diff()
    return torch.where(whole, counts[row] + place - earlier, earlier), counts


def left_packed(blocks: Tensor, *, cut: bool = False) -> tuple[Tensor, Tensor]:
    """Counts (..., K) and numbers (..., K, most) of the columns that hold in each row, both int32.

    Args:
        blocks: (..., K, columns) bool.
        cut: shorten the lists to the longest one, which waits for the device.

    Returns:
        Numbers ascend; those past the count of a row are unused.
    """
    counts = blocks.sum(-1, dtype=torch.int32)
    ones = blocks.to(torch.uint8, memory_format=torch.contiguous_format)
    index = ones.sort(dim=-1, descending=True, stable=True).indices.int()
    if cut:
        index = index[..., : max(int(counts.max()), 1)].contiguous()
    return counts, index


def rule(plan: Plan) -> list[Tensor]:
    """What decides whether a slot sees another, as numbers to subtract: a fraction of the time of
    comparisons, whose results are not of the scores' type.

    A query sees a key if no `abs(place - center) - half` of any axis exceeds the key's slack; with
    a route, if what hides the key's group from it, 0 or 1, does not.

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
    """Whether products of bf16 matrices run several times as fast as those of fp32 (AMX)."""
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device.type == "cpu" and known is not None and known()
