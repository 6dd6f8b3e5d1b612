"""Picking of chunks by scores: the definition in torch, which the C++ code must match.

Weights are added up in bins as whole units, so that threads that add to one bin may come in any
order: picks are the same from run to run. Nothing waits for the device.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gen_accel.kernels import selection
from gen_accel.plan import widest

Select = Literal["threshold", "topk"]
Scope = Literal["query_head", "head_global", "overall", "block"]

SCOPES_OVER_HEADS = ("overall", "block")  # what a head picks depends on the other heads
SORTED = 1 << 16  # entries of a scope up to which they are sorted: as many as there are bins
# Scores handled at once: about 1.3 GB, at some 40 bytes each, or at 5 where a kernel counts in
# place.
AT_ONCE = 1 << 25
AT_ONCE_IN_PLACE = 1 << 28
UNITS = 1 << 30  # in a weight of 1; as many entries of a scope as an int64 has room for besides


class Rule(NamedTuple):
    """Rule by which rows pick.

    Args:
        topk: chunks of a row, fewer than there are; 0 where `threshold` decides.
        threshold: share of a scope's weights, below 1.
    """

    scope: Scope
    topk: int
    threshold: float


def pick(
    rows: Tensor,
    means: Tensor,
    at_home: Tensor,
    rule: Rule,
    out: Tensor,
    kernel: str = "auto",
) -> None:
    """Write the picks of rows by their products with the chunks' means. A row's own chunk is
    always picked.

    Args:
        rows: (B, H, R, D), queries or their means, each of which counts.
        means: (B, H, C, D) fp32.
        at_home: (R, C) bool, the own chunk of each row.
        out: (B, H, R, C) bool, of any strides.
        kernel: the name of the kernel for attention, which decides what runs here: see
            `kernels.helpers`.
    """
    B, H, R, C = out.shape
    size = C if rule.scope == "query_head" else H * R if rule.scope == "block" else R * C
    in_place = size > SORTED and selection.cuts_in_place(means, kernel)
    most = AT_ONCE_IN_PLACE if in_place else AT_ONCE
    heads = H if rule.scope in SCOPES_OVER_HEADS else max(1, most // (B * R * C))
    by = _by_topk if rule.topk else _by
    parts = zip(*(x.split(heads, 1) for x in (rows, means, out)), strict=True)
    for some, of_chunks, found in parts:
        scores = some.float() @ of_chunks.transpose(-1, -2)
        keys, cut = by(scores, at_home, rule, in_place)
        torch.ge(keys, cut, out=found)
    out |= at_home


def _by(scores: Tensor, at_home: Tensor, rule: Rule, in_place: bool) -> tuple[Tensor, Tensor]:
    """Return sort keys of the scores, which are overwritten, and the least key taken in each
    scope."""
    low, high = _together(scores, rule.scope).aminmax(dim=-1, keepdim=True)
    low, high = (_apart(x, scores, rule.scope) for x in (low, high))
    weight = scores.sub_(low).div_(high - low).nan_to_num_(1.0)  # 1 where all scores are equal
    weight *= UNITS  # exactly
    total = _together(weight, rule.scope).sum(-1, dtype=widest(scores.device))
    slack = (total - rule.threshold * total).long()
    weight.masked_fill_(at_home, 0.0)
    keys = weight.view(torch.int32)  # ordered like the floats, as none is negative
    of_scope = _together(keys, rule.scope)
    if in_place:
        cut = selection.least_taken(of_scope, slack, True)
    else:
        cut = least_taken(of_scope, _together(weight, rule.scope).long(), slack, keys_from=0)
    cut = torch.minimum(cut, of_scope.amax(-1))  # at least one
    return keys, _apart(cut[..., None], scores, rule.scope)


def _by_topk(scores: Tensor, at_home: Tensor, rule: Rule, in_place: bool) -> tuple[Tensor, Tensor]:
    _, H, R, C = scores.shape
    keys = ordered(scores).masked_fill_(at_home, 0x7FFFFFFF)  # own chunks come first
    rows = {"query_head": 1, "head_global": R, "overall": H * R}[rule.scope]
    of_scope = _together(keys, rule.scope)
    slack = of_scope.new_full(of_scope.shape[:-1], rows * (C - rule.topk), dtype=torch.int64)
    if in_place:
        cut = selection.least_taken(of_scope, slack, False)
    else:
        cut = least_taken(of_scope, torch.ones_like(of_scope, dtype=torch.int64), slack)
    return keys, _apart(cut[..., None], scores, rule.scope)


def _together(x: Tensor, scope: Scope) -> Tensor:
    """View (B, H, R, C) as scopes by entries."""
    if scope == "query_head":
        return x
    if scope == "block":
        return x.permute(0, 3, 1, 2).flatten(2)
    return x.flatten(1 if scope == "overall" else 2)


def _apart(x: Tensor, scores: Tensor, scope: Scope) -> Tensor:
    """Expand a number of each scope, (..., 1), to broadcast with (B, H, R, C)."""
    B, H, R, C = scores.shape
    shape = {
        "query_head": (B, H, R, 1),
        "head_global": (B, H, 1, 1),
        "overall": (B, 1, 1, 1),
        "block": (B, 1, 1, C),
    }[scope]
    return x.view(shape)


def ordered(x: Tensor) -> Tensor:
    """Return int32 that sort like the fp32 `x`."""
    bits = x.contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def least_taken(keys: Tensor, mass: Tensor, slack: Tensor, keys_from: int = -(2**31)) -> Tensor:
    """Return the greatest key below which no more than `slack` of the mass lies. Where all keys
    together hold no more, this is one above all keys.

    Short rows are sorted. In long ones the mass is counted by the upper half of the keys, then
    within the decisive half by the lower: two passes, where sorting takes dozens.

    Args:
        keys: (..., n) int32.
        mass: (..., n) int64, not negative.
        slack: (...) int64, not negative.
        keys_from: the least that a key can be.

    Returns:
        (...) int64.
    """
    if keys.shape[-1] <= SORTED:
        in_order, index = keys.sort(dim=-1)
        held = mass.gather(-1, index).cumsum(-1)
        first = torch.searchsorted(held, slack[..., None], right=True)[..., 0]
        past = first == keys.shape[-1]
        first = first.clamp_max(keys.shape[-1] - 1)
        cut = in_order.gather(-1, first[..., None])[..., 0].long()
        return cut.masked_fill(past, 1 << 31)
    rank = keys.long()
    rank = rank - keys_from if keys_from else rank
    high = rank >> 16
    below = _below(high, mass)
    upper = _last_within(below, slack)
    mass = mass.masked_fill(high != upper, 0)
    slack = slack[..., None] - below.gather(-1, upper)
    rank &= 0xFFFF
    lower = _last_within(_below(rank, mass), slack[..., 0])
    cut = torch.add(lower, upper, alpha=1 << 16)[..., 0]
    return cut + keys_from if keys_from else cut


def _below(bins: Tensor, mass: Tensor) -> Tensor:
    """Return (..., 2^16 + 1): the mass in the bins below each of 2^16, and in all."""
    count = mass.new_zeros(*bins.shape[:-1], (1 << 16) + 1)
    count[..., 1:].scatter_add_(-1, bins, mass)
    return count.cumsum(-1)


def _last_within(below: Tensor, slack: Tensor) -> Tensor:
    """Return (..., 1): the last bin below which no more than `slack` lies."""
    return torch.searchsorted(below, slack[..., None], right=True) - 1
