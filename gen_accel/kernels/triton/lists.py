"""What the kernels read of a plan: index lists of blocks, and the rule on token pairs as numbers.

Made of torch operations on the plan's device; only a static plan, whose lists are made once and
kept, waits for the device.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gen_accel.plan import Plan, Route


class Lists(NamedTuple):
    """The arguments of the operator `gen_accel::triton_attention` between v and scale.

    Args:
        slots: (S,) int32, the token of each slot, -1 for padding.
        rows: (B', H', Kq, most) int32 for the B' x H' patterns of `keep`, the key blocks of each
            query block: first those that need a mask, then the whole ones; the rest is unused.
        row_counts: (B', H', Kq, 2) int32, key blocks that need a mask, and key blocks in all.
        columns, column_counts: the same for each key block, with the query blocks that see it.
            None where no gradient can be asked for.
        rule: empty, or for windows (3, A, S) int32 with first, last and place and (S,) int8 with
            the free tokens, or for a route (B', H', S, C) int8 picks and (Kk,) int32 groups.
        gain: of the plan, contiguous fp32; None where it has none.
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


_cache: "WeakKeyDictionary[Plan, Lists]" = WeakKeyDictionary()


def prepare(plan: Plan) -> Lists:
    """Made anew for a dynamic plan, without waiting for the device; else made once and kept."""
    if plan.dynamic:
        return _lists(plan, backward=torch.is_grad_enabled(), cut=False)
    if plan not in _cache:
        _cache[plan] = _lasting_lists(plan)
    return _cache[plan]


def listed(first: Tensor, second: Tensor, cut: bool) -> tuple[Tensor, Tensor]:
    """Numbers of the columns where `first` holds, then of those where only `second` does.

    Args:
        first, second: (..., K) bool.
        cut: shorten the lists to the longest one, which waits for the device.

    Returns:
        (..., most) int32, with unused numbers at the end, and (..., 2) int32: how many are in
        `first`, and in all.
    """
    either = first | second
    rank = 2 - either.to(torch.uint8) - first.to(torch.uint8)
    index = rank.sort(dim=-1, stable=True).indices.int()
    counts = torch.stack([first.sum(-1), either.sum(-1)], dim=-1).int()
    if cut:
        index = index[..., : max(int(counts.max()), 1)]
    return index.contiguous(), counts


@torch.inference_mode(False)
def _lasting_lists(plan: Plan) -> Lists:
    """Lists that serve training too when they are first needed while sampling."""
    return _lists(plan, backward=True, cut=True)


def _lists(plan: Plan, backward: bool, cut: bool) -> Lists:
    masked = plan.keep & ~plan.whole
    rows = listed(masked, plan.keep, cut)
    columns = None, None
    if backward:
        columns = listed(masked.transpose(-1, -2), plan.keep.transpose(-1, -2), cut)
    gain = None if plan.gain is None else plan.gain.float().contiguous()
    rest = _rule(plan), gain, plan.block_q, plan.block_k
    return Lists(plan.slots.int(), *rows, *columns, *rest)


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
