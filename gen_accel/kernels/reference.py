"""Dense masked attention: the definition of a Plan. Slow, any device, any dtype, autograd."""

from typing import NamedTuple

import torch
from torch import Tensor

from gen_accel.kernels.base import AutoPlace, Facts, Kernel
from gen_accel.plan import CURVATURE, MOST_GAINED, Plan, pack, unpack


class Reference(Kernel):
    """Dense masked attention, the meaning of a plan."""

    has_forward_mode = True
    takes_rest = True

    def unsupported(self, facts: Facts) -> list[str]:
        return []

    def place(self, facts: Facts) -> AutoPlace:
        return AutoPlace(100, "it computes every pair")

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        exact = scores(q, k, plan, scale=scale)
        rest = None if plan.rest is None else pooled(q, k, v, plan, scale=scale)
        every = exact if rest is None else torch.cat([exact, rest.scores], -1)
        lse = every.logsumexp(-1, keepdim=True)
        # A row that sees nothing is zero; NaN and inf of q and k come out as NaN.
        sees = (pairs(plan) if rest is None else ~every.isneginf()).any(-1, keepdim=True)
        weights = every.softmax(-1).where(sees, 0.0)
        values = pack(v, plan).to(weights.dtype)
        out = weights[..., : exact.shape[-1]] @ values
        if rest is not None:
            by_rest = weights[..., exact.shape[-1] :].unflatten(2, (-1, plan.block_q))
            out = out + (by_rest @ rest.values).flatten(2, 3)
            if rest.slope is not None:
                share = by_rest.sum(-1).flatten(2, 3)[..., None]
                out = out + share * (rest.off.flatten(2, 3) @ rest.slope) * scale / plan.tokens
        return unpack(out, plan).to(out.dtype if wide else q.dtype), unpack(lse, plan)[..., 0]


kernel = Reference()


def logsumexp(q: Tensor, k: Tensor, plan: Plan, *, scale: float) -> Tensor:
    """Natural logarithm of each row's softmax denominator over the kept keys, (B, H, N)."""
    return unpack(scores(q, k, plan, scale=scale).logsumexp(-1, keepdim=True), plan)[..., 0]


def scores(q: Tensor, k: Tensor, plan: Plan, *, scale: float) -> Tensor:
    """Compute scaled products, (B, H, S, S) in fp32 or wider, -inf where the plan keeps
    nothing."""
    compute = torch.promote_types(q.dtype, torch.float32)
    products = pack(q, plan).to(compute) @ pack(k, plan).to(compute).transpose(-1, -2) * scale
    if plan.gain is not None:
        products = torch.where(products > 0, products * by_pair(plan.gain, plan), products)
    return products.masked_fill(~pairs(plan), -torch.inf)


class Pooled(NamedTuple):
    """Rest of a plan, see `Rest`.

    Args:
        scores: (B, H, S, Kk), -inf for blocks that are kept or empty.
        values: (B, H, 1 or Kq, Kk, D), for all query blocks or for each.
        off: (B, H, Kq, block_q, D), the offset x of each query in `Rest`.
        slope: (B, H, D, D), H of `Rest`; None in zeroth order.
    """

    scores: Tensor
    values: Tensor
    off: Tensor
    slope: Tensor | None


def pooled(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> Pooled:
    """Pool the keys and values of all blocks, in fp32 or wider."""
    assert plan.rest is not None
    compute = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (pack(x, plan).to(compute) for x in (q, k, v))
    queries, real_q = q.unflatten(2, (-1, plan.block_q)), plan.real.view(-1, plan.block_q, 1)
    keys, values = (x.unflatten(2, (-1, plan.block_k)) for x in (k, v))
    real_k = plan.real.view(-1, plan.block_k, 1)
    count = real_k.sum(1)  # (Kk, 1)
    kmean, vmean = ((x * real_k).sum(3) / count.clamp_min(1) for x in (keys, values))
    if plan.rest.centre == "key":
        off, value = queries, vmean[:, :, None]
        weighed = off @ kmean.mT[:, :, None] * scale + count[:, 0].to(compute).log()
    else:
        query = (queries * real_q).sum(3) / real_q.sum(1).clamp_min(1)  # (B, H, Kq, D)
        off = queries - query[:, :, :, None]
        score = torch.einsum("bhid,bhjtd->bhijt", query, keys) * scale
        score = score.masked_fill(~real_k[..., 0], -torch.inf)
        lse, weight = score.logsumexp(-1), score.softmax(-1).where(real_k[..., 0], 0.0)
        key, value = (torch.einsum("bhijt,bhjtd->bhijd", weight, x) for x in (keys, values))
        weighed = off @ key.mT * scale + lse[:, :, :, None]
        if plan.rest.order == "second":
            both = ~plan.keep & (real_q[..., 0].sum(1) > 0)[:, None] & (count[:, 0] > 0)
            a, w = bend(queries, keys, both, plan, scale)
            apart = (keys[:, :, None] - key[:, :, :, :, None]).square()
            s = torch.einsum("bhijt,bhijtd,bhd->bhij", weight, apart, w)
            gained = CURVATURE * a[..., None] * s[:, :, :, None]
            # At the bound clamp_max still has a gradient; `Rest` has none.
            weighed = weighed + gained.masked_fill(gained >= MOST_GAINED, MOST_GAINED)
    slope = None
    if plan.rest.order != "zeroth":
        slope = ((keys - kmean[:, :, :, None]) * real_k).flatten(2, 3).mT @ v
    left_out = ~plan.keep & (count[:, 0] > 0)
    left_out = left_out.repeat_interleave(plan.block_q, 2)
    return Pooled(weighed.flatten(2, 3).masked_fill(~left_out, -torch.inf), value, off, slope)


def bend(
    queries: Tensor, keys: Tensor, left_out: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute a_t, (..., Kq, block_q), and w, (..., D), of the second order of `Rest`.

    Args:
        queries, keys: (..., Kq, block_q, D) and (..., Kk, block_k, D) of slots.
        left_out: (..., Kq, Kk) bool, left-out pairs of blocks that both hold tokens.
    """
    sides = []
    for x, count in ((queries, left_out.sum(-1)), (keys, left_out.sum(-2))):
        real = plan.real.view(-1, x.shape[-2], 1)
        mean = (x * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True).clamp_min(1)
        off = ((x - mean) * real).square()
        tokens = (count * real.sum((-1, -2))).sum(-1, keepdim=True).clamp_min(1)
        sides.append((off, (off * count[..., None, None]).sum((-2, -3)) / tokens))
    (off, w), (_, u) = sides
    a = scale**2 * (off * u[..., None, None, :]).sum(-1)
    both = (w * u).sum(-1)[..., None, None]
    return (a / both.where(both > 0, 1.0)).where(both > 0, 0.0), w


def by_pair(blocks: Tensor, plan: Plan) -> Tensor:
    """Expand pairs of blocks to pairs of slots, (B, H, Kq, Kk) to (B, H, S, S)."""
    return blocks.repeat_interleave(plan.block_q, -2).repeat_interleave(plan.block_k, -1)


def pairs(plan: Plan) -> Tensor:
    """Mask over pairs of slots, (B or 1, H or 1, S, S) bool, true where a query sees a key."""
    keep = by_pair(plan.keep, plan) & plan.real
    if plan.partial is None:
        return keep
    slot = torch.arange(plan.slots.numel(), device=plan.slots.device)
    return keep & plan.partial.allows(slot[:, None], slot)
