"""Rest of a plan, added to attention over the kept blocks, in C++: see rest.cpp. And the spread,
by which the blocks of such a plan are chosen: see spread.cpp."""

from typing import Any

import torch
from torch import Tensor

from gen_accel.kernels.curve import Curve
from gen_accel.kernels.native import build, multiplies_bf16
from gen_accel.kernels.native.arguments import Pointers, RestArgs, SpreadArgs
from gen_accel.kernels.native.bounds import (
    DTYPES,
    blocks_of,
    check,
    check_alike,
    check_if_given,
    check_rows,
    check_slots,
    shape_of,
)
from gen_accel.kernels.native.slope import gradients as slope_gradients
from gen_accel.kernels.native.slope import slope_of
from gen_accel.plan import MOST_GAINED, Plan, Slots


def added(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    curve: Curve | None = None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run `kernels.rest.added`: (B, H, N, D) in q's dtype and (B, H, N) fp32."""
    assert plan.rest is not None
    slots = None if plan.is_raster else plan.slots
    # Factor of the slope of the first order; 0 where there is none.
    factor = 0.0 if plan.rest.order == "zeroth" else scale / plan.tokens
    how = plan.block_q, plan.block_k, plan.rest.centre == "query", factor
    bend = (None, None) if curve is None else (curve.rise.float(), curve.weight.float())
    given = q, k, v, *bend, slots, plan.keep
    return _added(out.float(), lse.float(), *given, *how, scale)[:2]


@torch.library.custom_op("gen_accel::native_rest", mutates_args=())
def _added(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rise: Tensor | None,
    weight: Tensor | None,
    slots: Tensor | None,
    keep: Tensor,
    block_q: int,
    block_k: int,
    around_queries: bool,
    factor: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute (B, H, N, D) in q's dtype and (B, H, N); and, empty where `factor` is 0, the slope
    (B, H, D, D) and each query's weight on the rest, (B, H, N). All but the first are fp32."""
    call = _call(
        out, lse, q, k, v, rise, weight, slots, keep, block_q, block_k, around_queries, scale
    )
    joint, total, slope, shares = _results(q, factor)
    if factor:
        slope = slope_of(k, v, slots, call.args.S, block_q, block_k)
        call.args.factor = factor
        call.filled(slope=slope, shares=shares)
    call.filled(o=joint, total=total)
    _run("gen_accel_rest_forward", call, q.dtype)
    return joint, total, slope, shares


def _results(q: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, N, D = q.shape
    shapes = (B, H, N), (B, H, D, D) if factor else 0, (B, H, N) if factor else 0
    total, slope, shares = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return q.new_empty(q.shape), total, slope, shares


@_added.register_fake
def _(out: Tensor, lse: Tensor, q: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, factor, _ = given
    return _results(q, factor)


@torch.library.custom_op("gen_accel::native_rest_backward", mutates_args=())
def _backward(
    grad: Tensor,
    of_total: Tensor,
    joint: Tensor,
    total: Tensor,
    slope: Tensor,
    shares: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rise: Tensor | None,
    weight: Tensor | None,
    slots: Tensor | None,
    keep: Tensor,
    block_q: int,
    block_k: int,
    around_queries: bool,
    factor: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of out, lse, q, k, v, rise and weight from the gradients of the two
    results; a missing tensor has an empty one."""
    call = _call(
        out, lse, q, k, v, rise, weight, slots, keep, block_q, block_k, around_queries, scale
    )
    grads = _empty(out, lse, q, k, v, rise, weight)
    check("grad", grad, q.dtype, q.shape)
    check("of_total", of_total, torch.float32, q.shape[:3])
    check("joint", joint, q.dtype, q.shape)
    check("total", total, torch.float32, q.shape[:3])
    sloped = ()
    if factor:
        blocks = call.args.S, block_q, block_k
        dlse, more, *sloped = slope_gradients(
            grad, slope, shares, q, k, v, slots, *blocks, around_queries, factor
        )
        of_total = of_total - dlse
        call.whole(gained=more)
        sloped = dlse, *sloped
    call.strided(grad=grad)
    call.whole(of_total=of_total, o=joint, total=total)
    names = "dout", "dlse", "dq", "dk", "dv", "drise", "dweight"
    call.filled(**dict(zip(names, grads, strict=True)))
    _run("gen_accel_rest_backward", call, q.dtype)
    for whole, part in zip(grads[1:5], sloped, strict=False):
        whole += part
    return grads


def _empty(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Allocate tensors of the same shapes; for None, an empty one."""
    there = next(x for x in tensors if x is not None)
    return tuple(there.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


@_backward.register_fake
def _(
    grad: Tensor, of_total: Tensor, joint: Tensor, total: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    return _empty(*given[2:9])


def _call(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rise: Tensor | None,
    weight: Tensor | None,
    slots: Tensor | None,
    keep: Tensor,
    block_q: int,
    block_k: int,
    around_queries: bool,
    scale: float,
) -> Pointers:
    check_alike("native", q, k, v)
    B, H, N, D = q.shape
    PB, PH, Kq, _ = shape_of("keep", keep, 4)
    wide_float = torch.float32
    Kk = blocks_of(Kq * block_q, block_q, block_k)[1]
    check("keep", keep, torch.bool, ((1, B), (1, H), Kq, Kk))
    check_slots(slots, Kq * block_q, N)
    check("out", out, wide_float, q.shape)
    check("lse", lse, wide_float, (B, H, N))
    if (rise is None) != (weight is None):
        raise ValueError("a curve has a rise and a weight, got one of them")
    check_if_given("rise", rise, wide_float, (B, H, N))
    check_if_given("weight", weight, wide_float, (B, H, D))
    args = RestArgs(B=B, H=H, N=N, D=D, S=Kq * block_q, block_q=block_q, block_k=block_k)
    args.PB, args.PH, args.scale, args.most = PB, PH, scale, MOST_GAINED
    args.around_queries = around_queries
    call = Pointers(args)
    call.strided(q=q, k=k, v=v)
    call.whole(out=out, lse=lse, rise=rise, weight=weight, slots=slots, keep=keep)
    return call


def _run(name: str, call: Pointers, dtype: torch.dtype) -> None:
    build.run(name, call.args, DTYPES[dtype], int(multiplies_bf16()))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.block_q, ctx.block_k, ctx.around_queries, ctx.factor, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Any, grad: Tensor, of_total: Tensor, *of_more: Tensor) -> tuple[Any, ...]:
    sizes = ctx.block_q, ctx.block_k, ctx.around_queries, ctx.factor, ctx.scale
    *grads, drise, dweight = _backward(grad, of_total, *ctx.saved_tensors, *sizes)
    bend = (drise, dweight) if drise.numel() else (None, None)
    return *grads, *bend, *[None] * 7


_added.register_autograd(_differentiate, setup_context=_save)


def spread(query_means: Tensor, k: Tensor, slots: Slots, *, scale: float) -> Tensor:
    """Compute `kernels.spread.block_spread`."""
    order = None if slots.is_raster else slots.slots
    return _spread(query_means, k, order, len(slots.slots), slots.block_k, scale)


@torch.library.custom_op("gen_accel::native_spread", mutates_args=())
def _spread(
    query_means: Tensor, k: Tensor, slots: Tensor | None, count: int, block: int, scale: float
) -> Tensor:
    """Compute the spread, (B, H, Kq, count / block) fp32."""
    check_rows("native", k)
    (B, H, N, D), Kq = k.shape, shape_of("query means", query_means, 4)[2]
    check("query means", query_means, None, (B, H, Kq, D))
    Kk = blocks_of(count, block, block)[1]
    check_slots(slots, count, N)
    out = k.new_empty(B, H, Kq, Kk, dtype=torch.float32)
    call = Pointers(SpreadArgs(B=B, H=H, N=N, D=D, S=count, Kq=Kq, block=block))
    call.args.scale = scale
    call.whole(means=query_means.float(), slots=slots)
    call.strided(k=k)
    call.filled(out=out)
    build.run("gen_accel_spread", call.args, DTYPES[k.dtype])
    return out


@_spread.register_fake
def _(
    query_means: Tensor, k: Tensor, slots: Tensor | None, count: int, block: int, scale: float
) -> Tensor:
    B, H, Kq, _ = query_means.shape
    return k.new_empty(B, H, Kq, count // block, dtype=torch.float32)
