"""Linear attention over sets of key blocks, in C++: see linear.cpp."""

import torch
from torch import Tensor

from gen_accel.kernels.base import Context, Values, alike
from gen_accel.kernels.native.arguments import NativeCall, blocks_of, check, shape_of

MAPS = ("softmax", "elu", "relu")


@torch.library.custom_op("gen_accel::native_linear", mutates_args=())
def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    sets: Tensor | None,
    block_q: int,
    block_k: int,
    feature_map: int,
    eps: float,
) -> Tensor:
    """Compute linear attention over sets, (B, H, N, D), in token order.

    Args:
        q, k, v: (B, H, N, D).
        slots: (S,), the token of each slot.
        sets: (B, H, Kq, Kk) bool, the key blocks of each query block; None for all.
        feature_map: index in `MAPS`.
    """
    call = _call(q, k, v, slots, sets, block_q, block_k, feature_map, eps)
    out = q.new_empty(q.shape)
    call.writes(o=out)
    call.run("linear_forward")
    return out


linear.register_fake(lambda q, *given: q.new_empty(q.shape))


@torch.library.custom_op("gen_accel::native_add_projected_linear", mutates_args=("base",))
def add_projected_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    sets: Tensor | None,
    block_q: int,
    block_k: int,
    feature_map: int,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    base: Tensor,
) -> None:
    """Add linear(...) weight^T + bias to `base`, without a gradient: one pass instead of four, and
    no new memory.

    Args:
        weight, bias: of a linear layer of the head dim.
        base: contiguous (B, H, N, D) in q's dtype.
    """
    call = _call(q, k, v, slots, sets, block_q, block_k, feature_map, eps)
    D = call.args.D
    check("weight", weight, None, (D, D))
    check("bias", bias, None, (D,))
    check("base", base, q.dtype, q.shape)
    if not base.is_contiguous():
        raise ValueError(f"base must be contiguous, got strides {base.stride()}")
    call.read("weight", weight.float().T, None, (D, D))
    call.read("bias", bias.float(), None, (D,))
    call.writes(o=base)
    call.run("linear_forward")


add_projected_linear.register_fake(lambda *given: None)


@torch.library.custom_op("gen_accel::native_linear_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    sets: Tensor | None,
    block_q: int,
    block_k: int,
    feature_map: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(q, k, v, slots, sets, block_q, block_k, feature_map, eps)
    call.grad(grad, q)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    call.writes(dq=dq, dk=dk, dv=dv)
    call.run("linear_backward")
    return dq, dk, dv


_backward.register_fake(alike(1))


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    sets: Tensor | None,
    block_q: int,
    block_k: int,
    feature_map: int,
    eps: float,
) -> NativeCall:
    call = NativeCall("linear", block_q=block_q, block_k=block_k, map=feature_map, eps=eps)
    (S,) = shape_of("slots", slots, 1)
    Kq, Kk = blocks_of(S, block_q, block_k)
    B, H, _, _ = call.rows(q=q, k=k, v=v)
    call.slots(slots, S, optional=False)
    call.read("sets", sets, torch.bool, (B, H, Kq, Kk), optional=True)
    return call


def _save(ctx: Context, inputs: Values, output: object) -> None:
    *tensors, ctx.block_q, ctx.block_k, ctx.feature_map, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Context, grad: Tensor) -> Values:
    sizes = ctx.block_q, ctx.block_k, ctx.feature_map, ctx.eps
    return *_backward(grad, *ctx.saved_tensors, *sizes), *[None] * 6


linear.register_autograd(_differentiate, setup_context=_save)
