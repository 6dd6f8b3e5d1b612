"""Attention of queries that pick key groups for themselves, group by group.

A block kernel computes every group that any query of a block picked. Where the picks of neighbours
differ, that is nearly everything. This kernel computes the picked pairs alone: one product of the
queries that picked a group with its keys, merged into their earlier groups by log-sum-exp. Queries
are fetched for one group at a time and not kept; the backward pass fetches and computes them
again.

Counting who picked a group waits for the device, so this kernel is for the CPU.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from gen_accel.kernels.base import AutoPlace, Context, Facts, Kernel, Values, alike
from gen_accel.plan import Plan, Route


class Routed(Kernel):
    """One product for each group of keys and the queries that picked it."""

    def unsupported(self, facts: Facts) -> list[str]:
        reasons, where = [], facts.device.type
        if facts.pattern != "route":
            reasons.append("it is for plans in which each query picks its key blocks")
        if facts.gain:
            reasons.append("it takes no gain on scores")
        if where != "cpu":
            reasons.append(f"it waits for the device once a group; for the CPU, got {where}")
        if not reasons and facts.plan is not None and facts.plan.leaves_out_picks:
            reasons.append("the plan leaves out blocks that its queries picked")
        return reasons

    def place(self, facts: Facts) -> AutoPlace | None:
        if facts.device.type != "cpu":
            return None
        if facts.pattern == "route":
            return AutoPlace(15, "it fetches the queries of each group")
        return AutoPlace(30, "it is for patterns that each query picks")

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        return _routed(q, k, v, *_groups_of(plan), scale, wide)


kernel = Routed()


class Groups(NamedTuple):
    """Groups of keys and who picked them, in token order.

    Args:
        picks: (B', H', N, C) bool, whether a query sees a group.
        tokens: (N,) int64, keys sorted by group.
        sizes: (C,) int64, number of keys in each group.
    """

    picks: Tensor
    tokens: Tensor
    sizes: Tensor


@torch.inference_mode(False)
def _groups_of(plan: Plan) -> Groups:
    route = plan.partial
    assert isinstance(route, Route)
    group = route.group.repeat_interleave(plan.block_k)[plan.places]
    sizes = torch.bincount(group, minlength=route.groups)
    picks = route.picks.index_select(2, plan.places)
    return Groups(picks, torch.argsort(group, stable=True), sizes)


@torch.library.custom_op("gen_accel::routed_attention", mutates_args=())
def _routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    picks: Tensor,
    tokens: Tensor,
    sizes: Tensor,
    scale: float,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """Compute (B, H, N, D) and the log-sum-exp (B, H, N), both in fp32 or wider; without `wide`,
    the output is rounded to q's dtype."""
    compute = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=compute, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=compute, device=q.device)
    for b, h in product(*map(range, q.shape[:2])):
        Q, K, V = (x[b, h].to(compute) for x in (q, k, v))
        o, total = out[b, h], lse[b, h]
        for rows, keys in _groups(picks, b, h, tokens, sizes):
            scores = torch.mm(Q[rows] * scale, K[keys].T)
            highest = scores.amax(-1)
            weights = torch.softmax(scores, -1, out=scores)
            part = highest - weights.amax(-1).log()  # the largest weight is exp(highest - part)
            before = total[rows]
            both = torch.logaddexp(before, part)
            kept, new = (before - both).exp_(), (part - both).exp_()
            o[rows] = o[rows] * kept[:, None] + torch.mm(weights, V[keys]) * new[:, None]
            total[rows] = both
    return out if wide else out.to(q.dtype), lse


@_routed.register_fake
def _(q: Tensor, *given: object) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(q.shape, dtype=compute if given[-1] else q.dtype)
    return out, q.new_empty(q.shape[:3], dtype=compute)


@torch.library.custom_op("gen_accel::routed_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    picks: Tensor,
    tokens: Tensor,
    sizes: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = lse.dtype
    delta = (grad.to(wide) * out.to(wide)).sum(-1) - grad_lse
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for b, h in product(*map(range, q.shape[:2])):
        Q, K, V, G = (x[b, h].to(wide) for x in (q, k, v, grad))
        for rows, keys in _groups(picks, b, h, tokens, sizes):
            queries, upper = Q[rows] * scale, G[rows]
            weights = torch.mm(queries, K[keys].T).sub_(lse[b, h, rows, None]).exp_()
            dv[b, h, keys] = torch.mm(weights.T, upper)
            ds = torch.mm(upper, V[keys].T).sub_(delta[b, h, rows, None]).mul_(weights)
            dk[b, h, keys] = torch.mm(ds.T, queries)
            dq[b, h, rows] += torch.mm(ds, K[keys]) * scale
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


_backward.register_fake(alike(2))


def _save(ctx: Context, inputs: Values, output: tuple[Tensor, ...]) -> None:
    q, k, v, *groups, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, *output, *groups)


def _differentiate(ctx: Context, grad: Tensor, grad_lse: Tensor) -> Values:
    with torch.autocast(grad.device.type, enabled=False):  # `backward` may be called inside it
        grads = _backward(grad, grad_lse, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None, None, None


_routed.register_autograd(_differentiate, setup_context=_save)


def _groups(
    picks: Tensor, b: int, h: int, tokens: Tensor, sizes: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the queries and the keys of each group in one head, each group once."""
    mine = picks[b if len(picks) > 1 else 0, h if picks.shape[1] > 1 else 0]
    for picked, keys in zip(mine.T.contiguous(), tokens.split(sizes.tolist()), strict=True):
        rows = picked.nonzero()[:, 0]
        if len(rows) and len(keys):
            yield rows, keys
