"""Dense masked attention: the definition of a Plan. Slow, any device, any dtype, autograd."""

from typing import NamedTuple

import torch
from torch import Tensor

from gen_accel.kernels.base import AutoPlace, Facts, Kernel
from gen_accel.plan import CURVATURE, MOST_GAINED, Plan, pack, unpack


class Reference(Kernel):
    """Dense masked attention, the meaning of a plan."""

    takes_rest = True

    def place(self, facts: Facts) -> AutoPlace:
        return AutoPlace(100, "it computes every pair")

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        out, lse, _ = attend(q, k, v, plan, scale=scale)
        return unpack(out, plan).to(out.dtype if wide else q.dtype), unpack(lse, plan)[..., 0]


kernel = Reference()


class Queries(NamedTuple):
    """Queries to answer: of one sample and head, in the slots (R,); or all, in the order of slots.

    They lie in n groups of r that share a query block: a group for each block, or each query in a
    group alone.
    """

    slots: Tensor | None = None
    sample: int = 0
    head: int = 0

    def size(self, plan: Plan) -> int:
        """Number of queries in a group, r."""
        return plan.block_q if self.slots is None else 1

    def rows(self, x: Tensor, slots: int = 1) -> Tensor:
        """Select what belongs to the queries from x, (B, H, S / slots, ...): rows of slots, or of
        blocks of `slots` slots."""
        return x if self.slots is None else x[:, :, self.slots // slots]

    def pattern(self, x: Tensor) -> Tensor:
        """Select the head from B' x H' patterns, where 1 stands for all."""
        if self.slots is None:
            return x
        x = x[self.sample if len(x) > 1 else 0, self.head if x.shape[1] > 1 else 0]
        return x[None, None]

    def keep(self, plan: Plan) -> Tensor:
        """Key blocks that each group keeps, (B', H', n, Kk) bool."""
        if self.slots is None:
            return plan.keep
        return plan.keep_of(self.sample, self.head, self.slots // plan.block_q)[None, None]


ALL = Queries()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    asked: Queries = ALL,
    *,
    scale: float,
    rounded: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Answer some queries, in fp32 or wider.

    Args:
        q, k, v: (B, H, N, D); of one head if `asked` is.
        rounded: dtype to which weights, and keys and values of the rest, are rounded, as tensor
            cores take them.

    Returns:
        Output (B, H, R, D), log-sum-exp (B, H, R, 1), and the weights of the kept keys,
        (B, H, R, S), which sum to less than 1 beside a rest.
    """
    exact, rest = scores(q, k, plan, asked, scale=scale), None
    if plan.rest is not None:
        rest = pooled(q, k, v, plan, asked, scale=scale, rounded=rounded)
    both = exact if rest is None else torch.cat([exact, rest.scores], -1)
    lse = both.logsumexp(-1, keepdim=True)
    # A row that sees nothing is zero; NaN and inf of q and k come out as NaN.
    sees = (pairs(plan, asked) if rest is None else ~both.isneginf()).any(-1, keepdim=True)
    weights = _low(both.softmax(-1).where(sees, 0.0), rounded)
    values = pack(v, plan).to(weights.dtype)
    kept = weights[..., : exact.shape[-1]]
    out = kept @ values
    if rest is not None:
        by_rest = weights[..., exact.shape[-1] :].unflatten(2, (-1, asked.size(plan)))
        out = out + (by_rest @ rest.values).flatten(2, 3)
        if rest.slope is not None:
            share = by_rest.sum(-1).flatten(2, 3)[..., None]
            out = out + share * (rest.off.flatten(2, 3) @ rest.slope) * scale / plan.tokens
    return out, lse, kept


def _low(x: Tensor, rounded: torch.dtype | None) -> Tensor:
    """Round x to a dtype, and return it in its own."""
    return x if rounded is None else x.to(rounded).to(x.dtype)


def logsumexp(q: Tensor, k: Tensor, plan: Plan, *, scale: float) -> Tensor:
    """Natural logarithm of each row's softmax denominator over the kept keys, (B, H, N)."""
    return unpack(scores(q, k, plan, scale=scale).logsumexp(-1, keepdim=True), plan)[..., 0]


def scores(q: Tensor, k: Tensor, plan: Plan, asked: Queries = ALL, *, scale: float) -> Tensor:
    """Compute scaled products, (B, H, R, S) in fp32 or wider, -inf where the plan keeps
    nothing."""
    compute = torch.promote_types(q.dtype, torch.float32)
    queries, keys = asked.rows(pack(q, plan)).to(compute), pack(k, plan).to(compute)
    products = queries @ keys.transpose(-1, -2) * scale
    if plan.gain is not None:
        gain = by_pair(asked.rows(asked.pattern(plan.gain), plan.block_q), plan, asked)
        products = torch.where(products > 0, products * gain, products)
    return products.masked_fill(~pairs(plan, asked), -torch.inf)


class Pooled(NamedTuple):
    """Rest of a plan, see `Rest`.

    Args:
        scores: (B, H, R, Kk), -inf for blocks that are kept or empty.
        values: (B, H, 1 or n, Kk, D), for all groups of queries or for each.
        off: (B, H, n, r, D), the offset x of each query in `Rest`.
        slope: (B, H, D, D), H of `Rest`; None in zeroth order.
    """

    scores: Tensor
    values: Tensor
    off: Tensor
    slope: Tensor | None


def pooled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    asked: Queries = ALL,
    *,
    scale: float,
    rounded: torch.dtype | None = None,
) -> Pooled:
    """Pool the keys and values of all blocks, in fp32 or wider; the arguments are those of
    `attend`."""
    assert plan.rest is not None
    compute = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (pack(x, plan).to(compute) for x in (q, k, v))
    whole = q.unflatten(2, (-1, plan.block_q))
    queries = whole if asked.slots is None else asked.rows(q)[:, :, :, None]
    keys, values = (x.unflatten(2, (-1, plan.block_k)) for x in (k, v))
    real_k = plan.real.view(-1, plan.block_k, 1)
    count = real_k.sum(1)  # (Kk, 1)
    kmean, vmean = ((x * real_k).sum(3) / count.clamp_min(1) for x in (keys, values))
    if plan.rest.centre == "key":
        off, value = queries, vmean[:, :, None]
        weighed = off @ _low(kmean, rounded).mT[:, :, None] * scale
        weighed = weighed + count[:, 0].to(compute).log()
    else:
        real_q = plan.real.view(-1, plan.block_q, 1)
        query = (whole * real_q).sum(3) / real_q.sum(1).clamp_min(1)  # (B, H, Kq, D)
        query = asked.rows(query, plan.block_q)  # (B, H, n, D)
        off = queries - query[:, :, :, None]
        score = torch.einsum("bhid,bhjtd->bhijt", query, keys) * scale
        score = score.masked_fill(~real_k[..., 0], -torch.inf)
        lse, weight = score.logsumexp(-1), score.softmax(-1).where(real_k[..., 0], 0.0)
        key, value = (torch.einsum("bhijt,bhjtd->bhijd", weight, x) for x in (keys, values))
        weighed = off @ _low(key, rounded).mT * scale + lse[:, :, :, None]
        if plan.rest.order == "second":
            a, w = bend(whole, keys, plan, scale)
            a = asked.rows(a.flatten(2)).unflatten(2, (-1, asked.size(plan)))
            step = query.shape[2] if asked.slots is None else 1  # a group has S D numbers
            parts = []
            for one, share in zip(key.split(step, 2), weight.split(step, 2), strict=True):
                apart = (keys[:, :, None] - one[:, :, :, :, None]).square()
                parts.append(torch.einsum("bhijt,bhijtd,bhd->bhij", share, apart, w))
            s = torch.cat(parts, dim=2)
            gained = CURVATURE * a[..., None] * s[:, :, :, None]
            # At the bound clamp_max still has a gradient; `Rest` has none.
            weighed = weighed + gained.masked_fill(gained >= MOST_GAINED, MOST_GAINED)
    slope = None
    if plan.rest.order != "zeroth":
        slope = ((keys - kmean[:, :, :, None]) * real_k).flatten(2, 3).mT @ v
    left_out = (~asked.keep(plan) & (count[:, 0] > 0)).repeat_interleave(asked.size(plan), 2)
    weighed = weighed.flatten(2, 3).masked_fill(~left_out, -torch.inf)
    return Pooled(weighed, _low(value, rounded), off, slope)


def bend(queries: Tensor, keys: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """Compute a_t, (..., Kq, block_q), and w, (..., D), of the second order of `Rest`.

    Args:
        queries, keys: (..., Kq, block_q, D) and (..., Kk, block_k, D) of slots.
    """
    sides = []
    for x, count in zip((queries, keys), plan.counted_blocks(), strict=True):
        real = plan.real.view(-1, x.shape[-2], 1)
        mean = (x * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True).clamp_min(1)
        off = ((x - mean) * real).square()
        tokens = (count * real.sum((-1, -2))).sum().clamp_min(1)
        sides.append((off, (off * count[:, None, None]).sum((-2, -3)) / tokens))
    (off, w), (_, u) = sides
    a = scale**2 * (off * u[..., None, None, :]).sum(-1)
    both = (w * u).sum(-1)[..., None, None]
    return (a / both.where(both > 0, 1.0)).where(both > 0, 0.0), w


def by_pair(blocks: Tensor, plan: Plan, asked: Queries = ALL) -> Tensor:
    """Expand pairs of a group and a block to pairs of slots, (B, H, n, Kk) to (B, H, R, S)."""
    return blocks.repeat_interleave(asked.size(plan), -2).repeat_interleave(plan.block_k, -1)


def pairs(plan: Plan, asked: Queries = ALL) -> Tensor:
    """Mask over pairs of slots, (B or 1, H or 1, R, S) bool, true where a query sees a key."""
    keep = by_pair(asked.keep(plan), plan, asked) & plan.real
    if plan.partial is None:
        return keep
    key = torch.arange(plan.slots.numel(), device=plan.slots.device)
    query = key if asked.slots is None else asked.slots
    allowed = plan.partial.allows(query[:, None], key)
    return keep & (asked.pattern(allowed) if allowed.ndim == 4 else allowed)
