"""Second order of a rest in the form that its kernel takes, in C++: see curve.cpp."""

import torch
from torch import Tensor

from gen_accel.kernels.base import Context, Values, alike
from gen_accel.kernels.native.arguments import NativeCall, blocks_of
from gen_accel.plan import CURVATURE, Plan


def curve_of(q: Tensor, k: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """Compute rise and weight of `kernels.rest.Curve`, in fp32."""
    of_q, of_k = (x.expand(*q.shape[:2], -1) for x in plan.counted_blocks())
    slots = None if plan.is_raster else plan.slots
    blocks = plan.block_q, plan.block_k
    counts = of_q.contiguous(), of_k.contiguous()
    rise, weight, _ = _curve(q, k, *counts, slots, len(plan.slots), *blocks, scale)
    return rise, weight


@torch.library.custom_op("gen_accel::native_curve", mutates_args=())
def _curve(
    q: Tensor,
    k: Tensor,
    of_q: Tensor,
    of_k: Tensor,
    slots: Tensor | None,
    count: int,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute rise (B, H, N), and weight and mean squares of k, (B, H, D), all fp32.

    Args:
        of_q, of_k: (B, H, Kq) and (B, H, Kk) fp32, how often each block counts.
    """
    call = _call(q, k, of_q, of_k, slots, count, block_q, block_k, scale)
    rise, weight, by = _results(q)
    call.writes(rise=rise, weight=weight, by=by)
    call.run("curve_forward")
    return rise, weight, by


def _results(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, D = q.shape
    rise = q.new_empty(B, H, N, dtype=torch.float32)
    weight = q.new_empty(B, H, D, dtype=torch.float32)
    return rise, weight, torch.empty_like(weight)


_curve.register_fake(lambda q, *given: _results(q))


@torch.library.custom_op("gen_accel::native_curve_backward", mutates_args=())
def _backward(
    of_rise: Tensor,
    of_weight: Tensor,
    weight: Tensor,
    by: Tensor,
    q: Tensor,
    k: Tensor,
    of_q: Tensor,
    of_k: Tensor,
    slots: Tensor | None,
    count: int,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of q and k."""
    call = _call(q, k, of_q, of_k, slots, count, block_q, block_k, scale)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    (B, H, N, D), wide = q.shape, torch.float32
    call.read("of_rise", of_rise, wide, (B, H, N))
    call.read("of_weight", of_weight, wide, (B, H, D))
    call.read("weight", weight, wide, (B, H, D))
    call.read("by", by, wide, (B, H, D))
    call.writes(dq=dq, dk=dk)
    call.run("curve_backward")
    return dq, dk


_backward.register_fake(alike(4, 2))


def _call(
    q: Tensor,
    k: Tensor,
    of_q: Tensor,
    of_k: Tensor,
    slots: Tensor | None,
    count: int,
    block_q: int,
    block_k: int,
    scale: float,
) -> NativeCall:
    factor = CURVATURE * (scale * scale)
    call = NativeCall("curve", block_q=block_q, block_k=block_k, factor=factor)
    Kq, Kk = blocks_of(count, block_q, block_k)
    B, H, _, _ = call.rows(q=q, k=k)
    call.slots(slots, count)
    call.read("of_q", of_q, torch.float32, (B, H, Kq))
    call.read("of_k", of_k, torch.float32, (B, H, Kk))
    return call


def _save(ctx: Context, inputs: Values, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.count, ctx.block_q, ctx.block_k, ctx.scale = inputs
    ctx.save_for_backward(*output[1:], *tensors)


def _differentiate(ctx: Context, of_rise: Tensor, of_weight: Tensor, of_by: Tensor) -> Values:
    sizes = ctx.count, ctx.block_q, ctx.block_k, ctx.scale
    return *_backward(of_rise, of_weight, *ctx.saved_tensors, *sizes), *[None] * 7


_curve.register_autograd(_differentiate, setup_context=_save)
