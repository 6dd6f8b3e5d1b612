"""Rest of a plan in C++: added to attention over the kept blocks, see rest.cpp, slope.cpp for its
first order and curve.cpp for its second; or in one pass with the choice and the kept blocks, see
piecewise.cpp. And shares and spreads, by which the blocks of other plans are chosen: see
piecewise.cpp and spread.cpp."""

from typing import Any, get_args

import torch
from torch import Tensor

from gen_accel.kernels.base import Context, Values, alike
from gen_accel.kernels.native import build, multiplies_bf16
from gen_accel.kernels.native.arguments import NativeCall, blocks_of, check, shape_of
from gen_accel.plan import CURVATURE, MOST_GAINED, Plan, RestOrder, Slots

Results = tuple[Tensor, Tensor, Tensor]
SCORES = ("spread", "loss", "pooled")
MOST_BLOCK = 256  # slots of a block in one pass
LEAST_SCALE = 1e-20  # in one pass; below, differences of scores are no numbers


def in_one_pass(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, kernel: str) -> bool:
    """Whether `attention` serves a call that `dispatch.native_serves`."""
    if kernel == "int8" and build.lacks_bytes():
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    return chooses(plan, scale)


def chooses(plan: Plan, scale: float) -> bool:
    """Whether `choosing` and `shares` serve a plan, in a call that `dispatch.native_serves`."""
    blocks = max(plan.block_q, plan.block_k) <= MOST_BLOCK and scale > LEAST_SCALE
    whole = plan.partial is None and plan.gain is None
    return blocks and whole and plan.rest is not None and plan.rest.centre == "query"


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """Compute attention over the kept keys and the rest without a gradient: (B, H, N, D) in q's
    dtype, and the log-sum-exps (B, H, N) fp32.

    Args:
        kernel: "int8" computes the kept keys by products of 8 bits.
    """
    asked = None, None, SCORES[0], scale, True, kernel == "int8"
    return _one_pass(q, k, v, plan.keep, *_given(plan), *asked)[:2]


def choosing(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    ranked: Tensor,
    counts: Tensor,
    *,
    score: str,
    scale: float,
    kernel: str,
    attends: bool = True,
) -> tuple[Tensor, Tensor]:
    """Choose key blocks, and compute attention over them and the rest, without a gradient.

    Args:
        plan: what is kept in any case, (1, 1, Kq, Kk), and the rest.
        ranked: (Kk,) bool, the key blocks that may be chosen.
        counts: (H,) int64, how many each query block takes.
        score: one of `SCORES`, see `Piecewise`.
        kernel: "int8" computes the kept keys by products of 8 bits.
        attends: whether the answer is asked for, too.

    Returns:
        (B, H, N, D) in q's dtype, or an empty tensor, and (B, H, Kq, Kk) bool, the kept blocks.
    """
    asked = ranked, counts, score, scale, attends, kernel == "int8"
    out, _, keep = _one_pass(q, k, v, plan.keep, *_given(plan), *asked)
    return out, keep


def shares(q: Tensor, k: Tensor, plan: Plan, *, scale: float) -> Tensor:
    """Compute `kernels.rest.pooled_shares`, (B, H, Kq, Kk) fp32, without a gradient."""
    of_q, of_k, slots, *how = _given(plan)
    return _shares(q, k, of_q, of_k, slots, len(plan.slots), *how, scale)


def _given(plan: Plan) -> tuple[Tensor | None, Tensor | None, Tensor | None, int, int, int]:
    """Arguments of `_one_pass` and `_shares` that a plan decides."""
    assert plan.rest is not None
    order = get_args(RestOrder).index(plan.rest.order)
    of_q, of_k = plan.counted_blocks() if order > 1 else (None, None)
    return of_q, of_k, None if plan.is_raster else plan.slots, plan.block_q, plan.block_k, order


@torch.library.custom_op("gen_accel::native_one_pass", mutates_args=())
def _one_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    of_q: Tensor | None,
    of_k: Tensor | None,
    slots: Tensor | None,
    block_q: int,
    block_k: int,
    order: int,
    ranked: Tensor | None,
    counts: Tensor | None,
    score: str,
    scale: float,
    attends: bool,
    by_bytes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (B, H, N, D) in q's dtype, log-sum-exps (B, H, N) fp32, and with counts the kept
    blocks, (B, H, Kq, Kk) bool, else an empty tensor. What is not asked for is empty.

    Args:
        order: number of the order of the rest, from 0.
        by_bytes: whether the kept keys are computed by products of 8 bits, as kernel "int8" does.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    PB, PH, Kq, Kk = shape_of("keep", keep, 4)
    how = slots, Kq * block_q, block_q, block_k, order, scale
    call = _one_pass_call(how, of_q, of_k, q=q, k=k, v=v)
    B, H = q.shape[:2]
    check("keep", keep, torch.bool, ((1, B), (1, H), Kq, call.args.S // block_k))
    call.args.PB, call.args.PH, call.args.bytes = PB, PH, by_bytes
    results = _one_pass_results(q, keep, counts, attends)
    if attends:
        call.writes(o=results[0], total=results[1])
    if counts is None:
        call.read("keep", keep, torch.bool, keep.shape)
    else:
        call.args.score = SCORES.index(score)
        call.read("always", keep, torch.bool, (1, 1, Kq, Kk))
        call.read("ranked", ranked, torch.bool, (Kk,))
        call.read("counts", counts, torch.int64, (H,))
        call.writes(chosen=results[2])
    call.run("one_pass", int(multiplies_bf16()))
    return results


@torch.library.register_fake("gen_accel::native_one_pass")
def _fake_one_pass(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *given: object) -> Results:
    return _one_pass_results(q, keep, given[-5], bool(given[-2]))


def _one_pass_results(q: Tensor, keep: Tensor, counts: object, attends: bool) -> Results:
    out, total = (q.shape, q.shape[:3]) if attends else ((0,), (0,))
    kept = (0,) if counts is None else (*q.shape[:2], *keep.shape[2:])
    log_sums = q.new_empty(total, dtype=torch.float32)
    return q.new_empty(out), log_sums, q.new_empty(kept, dtype=torch.bool)


@torch.library.custom_op("gen_accel::native_shares", mutates_args=())
def _shares(
    q: Tensor,
    k: Tensor,
    of_q: Tensor | None,
    of_k: Tensor | None,
    slots: Tensor | None,
    count: int,
    block_q: int,
    block_k: int,
    order: int,
    scale: float,
) -> Tensor:
    how = slots, count, block_q, block_k, order, scale
    call = _one_pass_call(how, of_q, of_k, q=q, k=k)
    out = _shares_results(q, count, block_q, block_k)
    call.writes(shares=out)
    call.run("one_pass", int(multiplies_bf16()))
    return out


def _shares_results(q: Tensor, count: int, block_q: int, block_k: int) -> Tensor:
    blocks = count // block_q, count // block_k
    return q.new_empty(*q.shape[:2], *blocks, dtype=torch.float32)


_shares.register_fake(lambda q, *given: _shares_results(q, *given[4:7]))


def _one_pass_call(
    how: tuple[Tensor | None, int, int, int, int, float],
    of_q: Tensor | None,
    of_k: Tensor | None,
    **rows: Tensor,
) -> NativeCall:
    """Begin a call of piecewise.cpp.

    Args:
        how: slots and their number, block_q, block_k, order and scale.
        rows: q, k and, where an answer or a choice needs it, v, (B, H, N, D).
    """
    slots, count, block_q, block_k, order, scale = how
    call = NativeCall("one_pass", block_q=block_q, block_k=block_k, order=order, scale=scale)
    call.args.most, call.args.curvature = MOST_GAINED, CURVATURE
    call.rows(**rows)
    call.slots(slots, count)
    Kq, Kk = blocks_of(count, block_q, block_k)
    if order > 1:
        call.read("of_q", of_q, torch.float32, (Kq,))
        call.read("of_k", of_k, torch.float32, (Kk,))
    return call


def added(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    curve: tuple[Tensor, Tensor] | None = None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run `kernels.rest.added`: (B, H, N, D) in q's dtype and (B, H, N) fp32."""
    assert plan.rest is not None
    slots = None if plan.is_raster else plan.slots
    # Factor of the slope of the first order; 0 without it.
    factor = 0.0 if plan.rest.order == "zeroth" else scale / plan.tokens
    how = plan.block_q, plan.block_k, plan.rest.centre == "query", factor
    bend = (None, None) if curve is None else (x.float() for x in curve)
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
        slope = _slope_of(k, v, slots, call.args.S, block_q, block_k)
        call.args.factor = factor
        call.writes(slope=slope, shares=shares)
    call.writes(o=joint, total=total)
    call.run("rest_forward", int(multiplies_bf16()))
    return joint, total, slope, shares


def _results(q: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, N, D = q.shape
    total = q.new_empty(B, H, N, dtype=torch.float32)
    slope = q.new_empty((B, H, D, D) if factor else 0, dtype=torch.float32)
    shares = q.new_empty((B, H, N) if factor else 0, dtype=torch.float32)
    return q.new_empty(q.shape), total, slope, shares


_added.register_fake(lambda *given: _results(given[2], given[-2]))


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
    call.grad(grad, q)
    check("of_total", of_total, torch.float32, q.shape[:3])
    call.read("o", joint, q.dtype, q.shape)
    call.read("total", total, torch.float32, q.shape[:3])
    sloped = ()
    if factor:
        blocks = call.args.S, block_q, block_k
        dlse, more, *sloped = _slope_gradients(
            grad, slope, shares, q, k, v, slots, *blocks, around_queries, factor
        )
        of_total = of_total - dlse
        call.read("gained", more, torch.float32, q.shape[:3])
        sloped = dlse, *sloped
    call.read("of_total", of_total, torch.float32, q.shape[:3])
    names = "dout", "dlse", "dq", "dk", "dv", "drise", "dweight"
    call.writes(**dict(zip(names, grads, strict=True)))
    call.run("rest_backward", int(multiplies_bf16()))
    for whole, part in zip(grads[1:5], sloped, strict=False):
        whole += part
    return grads


def _empty(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Allocate tensors of the same shapes; for None, an empty one."""
    there = next(x for x in tensors if x is not None)
    return tuple(there.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


_backward.register_fake(lambda *given: _empty(*given[6:13]))


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
) -> NativeCall:
    PB, PH, Kq, _ = shape_of("keep", keep, 4)
    call, wide = NativeCall("rest", block_q=block_q, block_k=block_k, PB=PB, PH=PH), torch.float32
    call.args.scale, call.args.most, call.args.around_queries = scale, MOST_GAINED, around_queries
    _, Kk = blocks_of(Kq * block_q, block_q, block_k)
    B, H, N, D = call.rows(q=q, k=k, v=v)
    call.slots(slots, Kq * block_q)
    call.read("keep", keep, torch.bool, ((1, B), (1, H), Kq, Kk))
    call.read("out", out, wide, q.shape)
    call.read("lse", lse, wide, (B, H, N))
    if (rise is None) != (weight is None):
        raise ValueError("a curve has a rise and a weight, got one of them")
    call.read("rise", rise, wide, (B, H, N), optional=True)
    call.read("weight", weight, wide, (B, H, D), optional=True)
    return call


def _save(ctx: Context, inputs: Values, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.block_q, ctx.block_k, ctx.around_queries, ctx.factor, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Context, grad: Tensor, of_total: Tensor, *of_more: Tensor) -> Values:
    sizes = ctx.block_q, ctx.block_k, ctx.around_queries, ctx.factor, ctx.scale
    *grads, drise, dweight = _backward(grad, of_total, *ctx.saved_tensors, *sizes)
    bend = (drise, dweight) if drise.numel() else (None, None)
    return *grads, *bend, *[None] * 7


_added.register_autograd(_differentiate, setup_context=_save)


def _slope_of(
    k: Tensor, v: Tensor, slots: Tensor | None, count: int, block_q: int, block_k: int
) -> Tensor:
    """Compute H of `Rest`, (B, H, D, D) fp32.

    Args:
        k, v: (B, H, N, D).
        slots: (count,) int64; None where each slot holds the token of its own number.
    """
    call = NativeCall("slope", block_q=block_q, block_k=block_k)
    B, H, _, D = call.rows(k=k, v=v)
    call.slots(slots, count)
    made = k.new_empty(B, H, D, D, dtype=torch.float32)
    call.writes(slope=made)
    call.run("slope_forward")
    return made


def _slope_gradients(
    grad: Tensor,
    slope: Tensor,
    shares: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor | None,
    count: int,
    block_q: int,
    block_k: int,
    around_queries: bool,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute five gradients: of lse (the gradient of total is its negative); y . grad, where y is
    what the slope adds to the output and grad the gradient of the output; of q, k and v.

    Args:
        grad: (B, H, N, D) in q's dtype.
        shares: (B, H, N) fp32, each query's weight on the rest.
        factor: scale / N.
    """
    call = NativeCall("slope", block_q=block_q, block_k=block_k, factor=factor)
    call.args.around_queries = around_queries
    B, H, N, D = call.rows(q=q, k=k, v=v, grad=grad)
    call.slots(slots, count)
    call.read("slope", slope, torch.float32, (B, H, D, D))
    call.read("shares", shares, torch.float32, (B, H, N))
    dlse, more = shares.new_empty(shares.shape), shares.new_empty(shares.shape)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    call.writes(dlse=dlse, more=more, dq=dq, dk=dk, dv=dv)
    call.run("slope_backward")
    return dlse, more, dq, dk, dv


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
    call = _curve_call(q, k, of_q, of_k, slots, count, block_q, block_k, scale)
    rise, weight, by = _curve_results(q)
    call.writes(rise=rise, weight=weight, by=by)
    call.run("curve_forward")
    return rise, weight, by


def _curve_results(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, D = q.shape
    rise = q.new_empty(B, H, N, dtype=torch.float32)
    weight = q.new_empty(B, H, D, dtype=torch.float32)
    return rise, weight, torch.empty_like(weight)


_curve.register_fake(lambda q, *given: _curve_results(q))


@torch.library.custom_op("gen_accel::native_curve_backward", mutates_args=())
def _curve_gradients(
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
    call = _curve_call(q, k, of_q, of_k, slots, count, block_q, block_k, scale)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    (B, H, N, D), wide = q.shape, torch.float32
    call.read("of_rise", of_rise, wide, (B, H, N))
    call.read("of_weight", of_weight, wide, (B, H, D))
    call.read("weight", weight, wide, (B, H, D))
    call.read("by", by, wide, (B, H, D))
    call.writes(dq=dq, dk=dk)
    call.run("curve_backward")
    return dq, dk


_curve_gradients.register_fake(alike(4, 2))


def _curve_call(
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


def _save_curve(ctx: Context, inputs: Values, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.count, ctx.block_q, ctx.block_k, ctx.scale = inputs
    ctx.save_for_backward(*output[1:], *tensors)


def _derive_curve(ctx: Context, of_rise: Tensor, of_weight: Tensor, of_by: Tensor) -> Values:
    sizes = ctx.count, ctx.block_q, ctx.block_k, ctx.scale
    return *_curve_gradients(of_rise, of_weight, *ctx.saved_tensors, *sizes), *[None] * 7


_curve.register_autograd(_derive_curve, setup_context=_save_curve)


def spread(query_means: Tensor, k: Tensor, slots: Slots, *, scale: float) -> Tensor:
    """Compute `kernels.choosing.block_spread`."""
    order = None if slots.is_raster else slots.slots
    return _spread(query_means, k, order, len(slots.slots), slots.block_k, scale)


@torch.library.custom_op("gen_accel::native_spread", mutates_args=())
def _spread(
    query_means: Tensor, k: Tensor, slots: Tensor | None, count: int, block: int, scale: float
) -> Tensor:
    """Compute the spread, (B, H, Kq, count / block) fp32."""
    call = NativeCall("spread", block=block, scale=scale)
    B, H, _, D = call.rows(k=k)
    Kq, Kk = shape_of("query means", query_means, 4)[2], blocks_of(count, block, block)[1]
    call.args.Kq = Kq
    check("query means", query_means, None, (B, H, Kq, D))
    call.read("means", query_means.float(), torch.float32, (B, H, Kq, D))
    call.slots(slots, count)
    out = k.new_empty(B, H, Kq, Kk, dtype=torch.float32)
    call.writes(out=out)
    call.run("spread")
    return out


@_spread.register_fake
def _(
    query_means: Tensor, k: Tensor, slots: Tensor | None, count: int, block: int, *given: object
) -> Tensor:
    return k.new_empty(*query_means.shape[:3], count // block, dtype=torch.float32)
