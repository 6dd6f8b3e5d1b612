"""Batched matrix products over gathered key blocks. Autograd on any device, no compiler.

Query blocks are sorted by how many key blocks they see and worked off in groups: one gather, two
products and one softmax for a group. The backward pass gathers again and recomputes the softmax,
so that nothing of the size of the scores is kept between the passes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gen_accel.plan import Plan, Windows

# Scores in one group, in elements. Small enough that they stay in the cache between the two
# products, large enough to keep the products busy. In a sweep on a 2-core AMD EPYC, 2^18 to 2^21,
# radial at 9,360 tokens in fp32 and bf16, 2^19 and 2^20 lay within 10 % of each other.
GROUP = 1 << 19


def unsupported(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> list[str]:
    return []


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> Tensor:
    return compute(q, k, v, prepare(plan), scale=scale)


def compute(q: Tensor, k: Tensor, v: Tensor, prepared: "Lists", *, scale: float) -> Tensor:
    order, back, *lists = prepared
    if order is not None:
        q, k, v = (x.index_select(2, order) for x in (q, k, v))
    out = _attention(q, k, v, *lists, scale)
    return out if back is None else out.index_select(2, back)


class Lists(NamedTuple):
    """The kept blocks of a plan as index lists, with what else the operator needs of the plan.

    Args:
        order: (S,) int64, the token of each slot, and `back` (N,), the slot of each token; None
            where nothing is reordered or padded.
        index: (B', H', Kq, most) int64 for the B' x H' patterns of `keep`, the key blocks of each
            query block: first those that need a mask, then the whole ones; the rest is unused.
        counts: (2, B', H', Kq) on the CPU: key blocks in all, and those that need a mask.
        real: (S,) bool, slots that hold a token.
        rule: the tensors of `plan.partial`, empty without.
    """

    order: Tensor | None
    back: Tensor | None
    index: Tensor
    counts: Tensor
    real: Tensor
    rule: list[Tensor]
    block_q: int
    block_k: int


_cache: "WeakKeyDictionary[Plan, Lists]" = WeakKeyDictionary()


@torch.inference_mode(False)
def prepare(plan: Plan) -> Lists:
    if plan not in _cache:
        order = None if plan.is_raster else plan.slots.clamp_min(0)
        back = None if plan.is_raster else plan.places
        rank = 2 - 2 * plan.keep.int() + plan.whole.int()
        counts = torch.stack([plan.keep.sum(-1), (plan.keep & ~plan.whole).sum(-1)]).cpu()
        most = max(int(counts[0].max()), 1)
        index = rank.sort(dim=-1, stable=True).indices[..., :most].contiguous()
        windows = plan.partial
        rule = [] if windows is None else [getattr(windows, f.name) for f in fields(windows)]
        _cache[plan] = Lists(
            order, back, index, counts, plan.real, rule, plan.block_q, plan.block_k
        )
    return _cache[plan]


@torch.library.custom_op("gen_accel::gather_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    counts: Tensor,
    real: Tensor,
    rule: list[Tensor],
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    """Attention in slot order, (B, H, S, D). One opaque operator: a compiler sees no loop."""
    work = _Work(q, k, v, index, counts, real, rule, block_q, block_k, scale)
    out = torch.zeros_like(work.q)
    for group in work.groups():
        out.index_copy_(0, group.rows, group.weights @ group.v)
    return out.view(q.shape)


@_attention.register_fake
def _(q, k, v, index, counts, real, rule, block_q, block_k, scale):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("gen_accel::gather_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    counts: Tensor,
    real: Tensor,
    rule: list[Tensor],
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    work = _Work(q, k, v, index, counts, real, rule, block_q, block_k, scale)
    grads = grad.reshape(work.q.shape)
    wide = torch.promote_types(q.dtype, torch.float32)  # many query blocks add into one key block
    dq = torch.zeros_like(work.q)
    dk, dv = (torch.zeros_like(x, dtype=wide) for x in (work.k, work.v))
    for group in work.groups():
        d_out = grads.index_select(0, group.rows)
        p = group.weights
        dp = d_out @ group.v.transpose(1, 2)
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype) * scale
        dq.index_copy_(0, group.rows, ds @ group.k)
        for total, part in (
            (dk, ds.transpose(1, 2) @ group.q),
            (dv, p.transpose(1, 2) @ d_out),
        ):
            total.index_add_(0, group.blocks, part.reshape(-1, *total.shape[1:]).to(wide))
    return dq.view(q.shape), dk.to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape)


@_backward.register_fake
def _(grad, q, k, v, index, counts, real, rule, block_q, block_k, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, index, counts, real, rule, *ctx.sizes = inputs
    ctx.save_for_backward(q, k, v, index, counts, real, *rule)


def _differentiate(ctx, grad):
    q, k, v, index, counts, real, *rule = ctx.saved_tensors
    grads = _backward(grad, q, k, v, index, counts, real, rule, *ctx.sizes)
    return *grads, None, None, None, [None] * len(rule), None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


@dataclass(frozen=True, eq=False)
class _Group:
    """Query blocks that see the same number of key blocks; G of them, n key blocks each."""

    rows: Tensor  # (G,) of all B x H x Kq query blocks
    blocks: Tensor  # (G * n,) of all B x H x Kk key blocks
    q: Tensor  # (G, block_q, D)
    k: Tensor  # (G, n * block_k, D)
    v: Tensor
    weights: Tensor  # (G, block_q, n * block_k), the softmax


class _Work:
    def __init__(
        self, q, k, v, index, counts, real, rule, block_q: int, block_k: int, scale: float
    ) -> None:
        B, H, S, D = q.shape
        self.q = q.reshape(-1, block_q, D)
        self.k, self.v = (x.reshape(-1, block_k, D) for x in (k, v))
        self.real, self.scale = real, scale
        self.rule = Windows(*rule) if rule else None
        Kq, Kk = S // block_q, S // block_k
        # One row for every query block of every head, sorted so that a group has one length.
        totals, masked = counts.expand(2, B, H, Kq).flatten(1)
        self.order = torch.argsort(totals * (Kk + 1) + masked)
        self.totals, self.masked = totals[self.order].tolist(), masked[self.order].tolist()
        self.order = self.order.to(q.device)
        first = torch.arange(B * H, device=q.device).view(B, H, 1, 1) * Kk
        self.index = (index + first).flatten(0, 2).index_select(0, self.order)
        self.Kq, self.Kk, self.block_q, self.block_k = Kq, Kk, block_q, block_k

    def groups(self) -> Iterator[_Group]:
        row, end = 0, len(self.totals)
        while row < end:
            total = self.totals[row]
            room = GROUP // max(1, total * self.block_q * self.block_k)
            stop = row + 1
            while stop < min(end, row + room) and self.totals[stop] == total:
                stop += 1
            if total:
                yield self._group(row, stop, total)
            row = stop

    def _group(self, row: int, stop: int, total: int) -> _Group:
        rows = self.order[row:stop]
        blocks = self.index[row:stop, :total].flatten()
        q = self.q.index_select(0, rows)
        k, v = (
            x.index_select(0, blocks).view(len(rows), -1, x.shape[-1]) for x in (self.k, self.v)
        )
        scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=self.scale)
        masked = self.masked[stop - 1]
        if masked:
            hidden = ~self._allowed(rows, self.index[row:stop, :masked])
            scores[..., : masked * self.block_k].masked_fill_(hidden, -torch.inf)
        weights = scores.softmax(-1)
        if masked == total:
            weights = weights.nan_to_num_(0.0)  # a query that sees nothing gets zeros
        return _Group(rows, blocks, q, k, v, weights)

    def _allowed(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """(G, block_q, masked * block_k) bool."""
        key = (blocks % self.Kk)[..., None] * self.block_k
        key = (key + torch.arange(self.block_k, device=key.device)).flatten(1)[:, None]
        if self.rule is None:
            return self.real[key].expand(-1, self.block_q, -1)
        query = (rows % self.Kq)[:, None] * self.block_q
        query = (query + torch.arange(self.block_q, device=key.device))[..., None]
        return self.real[key] & self.rule.allows(query, key)
