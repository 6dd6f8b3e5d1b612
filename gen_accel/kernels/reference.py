"""Dense masked attention: the meaning of a Plan. Slow, any device, any dtype, autograd."""

import torch
from torch import Tensor

from gen_accel.kernels.contract import Facts, Place
from gen_accel.plan import Plan, pack, unpack

FORWARD_MODE = True


def unsupported(facts: Facts) -> list[str]:
    return []


def place(facts: Facts) -> Place:
    return Place(100, "it computes every pair")


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> Tensor:
    # A row that sees nothing is zero; NaN and inf of q and k come out as NaN.
    sees = pairs(plan).any(-1, keepdim=True)
    weights = scores(q, k, plan, scale=scale).softmax(-1).where(sees, 0.0)
    out = weights @ pack(v, plan).to(weights.dtype)
    return unpack(out, plan).to(q.dtype)


def logsumexp(q: Tensor, k: Tensor, plan: Plan, *, scale: float) -> Tensor:
    """Natural logarithm of each row's softmax denominator, (B, H, N)."""
    return unpack(scores(q, k, plan, scale=scale).logsumexp(-1, keepdim=True), plan)[..., 0]


def scores(q: Tensor, k: Tensor, plan: Plan, *, scale: float) -> Tensor:
    """(B, H, S, S) scaled products in fp32 or wider, -inf where the plan keeps nothing."""
    compute = torch.promote_types(q.dtype, torch.float32)
    products = pack(q, plan).to(compute) @ pack(k, plan).to(compute).transpose(-1, -2) * scale
    if plan.gain is not None:
        products = torch.where(products > 0, products * by_pair(plan.gain, plan), products)
    return products.masked_fill(~pairs(plan), -torch.inf)


def by_pair(blocks: Tensor, plan: Plan) -> Tensor:
    """Pairs of blocks to pairs of slots, (B, H, Kq, Kk) to (B, H, S, S)."""
    return blocks.repeat_interleave(plan.block_q, -2).repeat_interleave(plan.block_k, -1)


def pairs(plan: Plan) -> Tensor:
    """(B or 1, H or 1, S, S) bool: which slots see which."""
    keep = by_pair(plan.keep, plan) & plan.real
    if plan.partial is None:
        return keep
    slot = torch.arange(plan.slots.numel(), device=plan.slots.device)
    return keep & plan.partial.allows(slot[:, None], slot)
