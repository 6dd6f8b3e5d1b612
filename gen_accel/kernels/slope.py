"""First order of a rest in torch, for kernels without one of their own: see `Rest`."""

from typing import Any

import torch
from torch import Tensor

from gen_accel.kernels.packed import Packed
from gen_accel.plan import Plan, unpack


def added(
    joint: Tensor,
    lse: Tensor,
    total: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
) -> Tensor:
    """Add the slope of the rest's values to attention over kept keys and rest, in the dtype of
    `joint`, differentiable in all six tensors.

    Args:
        joint: (B, H, N, D) fp32 or wider, without the slope.
        lse, total: (B, H, N), log-sum-exps over the kept keys, and over kept keys and rest.
    """
    assert plan.rest is not None
    q, k, v = (x.to(total.dtype) for x in (q, k, v))
    k, v = (Packed.apply(x, plan) for x in (k, v))
    if plan.rest.centre == "query":
        q = unpack(_off_means(Packed.apply(q, plan), plan.real, plan.block_q), plan)
    # Where nothing is left out there is no gradient either.
    share = -torch.expm1((lse - total).where(total > lse, 0.0))
    made = _Products.apply(q, _off_means(k, plan.real, plan.block_k), v)
    return joint + (share * (scale / plan.tokens))[..., None] * made


def _off_means(x: Tensor, real: Tensor, block: int) -> Tensor:
    """Subtract the mean of each block from x, (B, H, S, D) of slots; padding is 0."""
    real = real.view(-1, block, 1)
    x = x.unflatten(2, (-1, block)) * real
    mean = x.sum(3, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    return ((x - mean) * real).flatten(2, 3)


class _Products(torch.autograd.Function):
    """q (k^T v), both passes in the dtype of the tensors: `backward` may be called inside
    autocast."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            slope = k.mT @ v
            ctx.save_for_backward(q, k, v, slope)
            return q @ slope

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, slope = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            back = q.mT @ grad
            return grad @ slope.mT, v @ back.mT, k @ back
