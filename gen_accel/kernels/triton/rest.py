"""Rest of a plan: the blocks that it does not keep, pooled, in the softmax of the kept keys.

`added` is `gen_accel.kernels.rest.added` for both centres. Around mean keys there is one set of
columns for a head. Around mean queries there is one for each pair of a head and a query block,
together more than the size of q. Pairs are processed in chunks that fill the card, see
`configs.groups_at_once`: one kernel writes the pooled keys and values, and the next one reads
them. The backward pass computes them again. No atomics: one program alone adds to each sum, in a
fixed order.
"""

import math
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from gen_accel.kernels.base import Context, Values
from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton import rest_launches as launches
from gen_accel.kernels.triton.launch import launch, rows, rowwise
from gen_accel.kernels.triton.pooling import spread_kernel
from gen_accel.kernels.triton.rest_columns import common_of
from gen_accel.plan import Plan, Slots

HELD = 1 << 30  # bytes of sums that the backward pass holds at once; at least one head's


def added(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    curve: tuple[Tensor, Tensor] | None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Merge the rest, without a slope, into attention over the kept keys.

    Args:
        out, lse: (B, H, N, D) and (B, H, N) fp32 of the kept keys.
        curve: for a rest of the second order, else None.

    Returns:
        Output and log-sum-exp over kept keys and rest, in fp32, differentiable in all tensors. A
        row that leaves nothing out is unchanged, bit for bit. Without a gradient the output is
        `out`, written over.
    """
    assert plan.rest is not None
    keep = plan.keep.expand(*q.shape[:2], -1, -1)
    around_queries = plan.rest.centre == "query"
    rise, weight = curve or (None, None)
    given = keep, plan.slots_int32, *plan.held, rise, weight
    numbers = plan.block_q, plan.block_k, around_queries, scale
    tensors = out, lse, q, k, v
    leaves = *tensors, *(curve or ())
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    if not grad and out.dtype == torch.float32 and out.stride(-1) == 1:
        return out, torch.ops.gen_accel.triton_rest_in_place(*tensors, *given, *numbers)
    return torch.ops.gen_accel.triton_rest(*tensors, *given, *numbers)


@torch.library.custom_op("gen_accel::triton_rest_in_place", mutates_args=("out",))
def rest_in_place(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    slots: Tensor,
    held_q: Tensor,
    held_k: Tensor,
    rise: Tensor | None,
    weight: Tensor | None,
    block_q: int,
    block_k: int,
    around_queries: bool,
    scale: float,
) -> Tensor:
    """Run `rest` with the output written over `out`; return the log-sum-exp."""
    call = _call(q, k, v, keep, slots, held_q, held_k, block_q, block_k, scale)
    return _merge(call, out, lse, out, rise, weight, around_queries)


@rest_in_place.register_fake
def _(out: Tensor, lse: Tensor, *given: object) -> Tensor:
    return lse.new_empty(lse.shape)


@torch.library.custom_op("gen_accel::triton_rest", mutates_args=())
def rest(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    slots: Tensor,
    held_q: Tensor,
    held_k: Tensor,
    rise: Tensor | None,
    weight: Tensor | None,
    block_q: int,
    block_k: int,
    around_queries: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the output, (B, H, N, D) fp32 laid out like `out`, and the log-sum-exp, (B, H, N)
    fp32.

    Args:
        keep: (B, H, Kq, Kk) bool.
        slots: (S,) int32, the token of each slot, -1 for padding.
        held_q, held_k: (Kq, 2) and (Kk, 2) fp32, tokens and slots of each block.
        rise, weight: fields of a `Curve`, around queries alone.
    """
    call = _call(q, k, v, keep, slots, held_q, held_k, block_q, block_k, scale)
    out = rowwise(out)
    joint = torch.empty_like(out, dtype=torch.float32)
    return joint, _merge(call, out, lse, joint, rise, weight, around_queries)


def _merge(
    call: launches.RestCall,
    out: Tensor,
    lse: Tensor,
    joint: Tensor,
    rise: Tensor | None,
    weight: Tensor | None,
    around_queries: bool,
) -> Tensor:
    """Write the output over kept keys and rest into `joint`, which may be `out`: one program reads
    and writes each row. Return the log-sum-exp."""
    lse = lse.contiguous()
    total = torch.empty_like(lse)
    if not around_queries:
        chunk, pooled = launches.around_keys(call)
        launches.forward(call, pooled, out, lse, joint, total)(chunk)
        return total
    if rise is not None and weight is not None:
        call = launches.with_curve(call, rise, weight)
    means = launches.means_of(call.q, call, call.block_q)
    pooled = launches.room(call)
    pool = launches.pool(call, means, pooled)
    forward = launches.forward(call, pooled, out, lse, joint, total)
    for chunk in launches.chunks(call):
        pool(chunk)
        forward(chunk)
    return total


@rest.register_fake
def _(out: Tensor, lse: Tensor, *given: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rowwise(out), dtype=torch.float32), lse.new_empty(lse.shape)


@torch.library.custom_op("gen_accel::triton_rest_backward", mutates_args=())
def rest_backward(
    grad: Tensor,
    grad_total: Tensor,
    joint: Tensor,
    total: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    slots: Tensor,
    held_q: Tensor,
    held_k: Tensor,
    rise: Tensor | None,
    weight: Tensor | None,
    block_q: int,
    block_k: int,
    around_queries: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of out, lse, q, k, v, rise and weight; empty where an input is
    None."""
    call = _call(q, k, v, keep, slots, held_q, held_k, block_q, block_k, scale)
    grad = rowwise(grad.to(q.dtype))
    dout, dlse, back = launches.shares(call, grad, grad_total, joint, total, rowwise(out), lse)
    dq, dk, dv = (torch.empty_like(x) for x in (call.q, call.k, call.v))
    drise, dweight = total.new_empty(_shape(rise)), total.new_empty(_shape(weight))
    if not around_queries:
        chunk, pooled = launches.around_keys(call)
        launches.dq_of(call, pooled, grad, None, dq, None, back)(chunk)
        launches.dkdv_of(call, pooled, grad, dk, dv, back)
        return dout, dlse, dq, dk, dv, drise, dweight
    if rise is not None and weight is not None:
        call = launches.with_curve(call, rise, weight)
    for some in _heads(call):
        own = launches.Shares(*(x[:, some].contiguous() for x in back))
        given = grad[:, some], dq[:, some], own
        (dk[:, some], dv[:, some]), curve = _backward(call.of_heads(some), *given)
        if curve is not None:
            drise[:, some], dweight[:, some] = curve.rise, curve.weight
    return dout, dlse, dq, dk, dv, drise, dweight


def _shape(x: Tensor | None) -> tuple[int, ...]:
    return (0,) if x is None else x.shape


@rest_backward.register_fake
def _(*given: Tensor) -> tuple[Tensor, ...]:
    out, lse, *inputs = given[4:9]
    dout, *grads = (torch.empty_like(rowwise(x)) for x in (out, *inputs))
    of_curve = (lse.new_empty(_shape(x)) for x in given[13:15])
    return dout, lse.new_empty(lse.shape), *grads, *of_curve


def _save(ctx: Context, inputs: Values, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block_q, ctx.block_k, ctx.around_queries, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Context, grad: Tensor, grad_total: Tensor) -> Values:
    numbers = ctx.block_q, ctx.block_k, ctx.around_queries, ctx.scale
    *grads, drise, dweight = rest_backward(grad, grad_total, *ctx.saved_tensors, *numbers)
    of_curve = (drise, dweight) if ctx.saved_tensors[-1] is not None else (None, None)
    return *grads, *[None] * 4, *of_curve, *[None] * 4


rest.register_autograd(_differentiate, setup_context=_save)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    slots: Tensor,
    held_q: Tensor,
    held_k: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> launches.RestCall:
    q, k, v = rowwise(q), rowwise(k), rowwise(v)
    held = slots, held_q, held_k
    return launches.RestCall(
        q, k, v, keep.view(torch.uint8), *held, common_of(k), block_q, block_k, scale
    )


def _heads(call: launches.RestCall) -> Iterator[slice]:
    """Yield as many heads at a time as fit their sums of gradients into HELD."""
    B, H, N, D = call.q.shape
    some = max(1, HELD // (8 * B * N * D))
    return (slice(first, first + some) for first in range(0, H, some))


def _backward(
    call: launches.RestCall, grad: Tensor, dq: Tensor, back: launches.Shares
) -> tuple[Tensor, launches.CurveGrads | None]:
    """Write dq, and return the gradients of k and v, (2, B, H, N, D) fp32, and of the curve."""
    means = launches.means_of(call.q, call, call.block_q)
    pooled, grads = launches.room(call), launches.room(call)
    (parts, dmeans), curve = launches.parts_of_means(call), launches.curve_grads(call)
    drise, of_tokens, of_pairs = curve or (None, None, None)
    sums = torch.zeros(2, *call.q.shape, dtype=torch.float32, device=call.q.device)
    pool = launches.pool(call, means, pooled)
    dpooled_of = launches.dpooled_of(call, means, pooled, grads, grad, of_pairs, back)
    pool_backward = launches.pool_backward(call, means, pooled, grads, parts, sums, of_tokens)
    dq_of = launches.dq_of(call, pooled, grad, dmeans, dq, drise, back)
    for chunk in launches.chunks(call):
        pool(chunk)
        dpooled_of(chunk)
        pool_backward(chunk)
        some = slice(chunk.pairs)
        torch.sum(parts[some], 1, dtype=torch.float32, out=dmeans[some])
        dq_of(chunk)
    return sums, curve


def spread(query_means: Tensor, k: Tensor, slots: Slots | Plan, *, scale: float) -> Tensor:
    """Compute ln sum_t exp(scale q_i . k_t) over the tokens t of each key block, (B, H, Kq, Kk)
    fp32, without a gradient; -inf where a block holds none.

    Args:
        query_means: (B, H, Kq, D) fp32, over blocks of `slots.block_q`.
        k: (B, H, N, D).
    """
    given = slots.slots_int32, slots.block_k, scale
    return torch.ops.gen_accel.triton_spread(query_means, k, *given)


@torch.library.custom_op("gen_accel::triton_spread", mutates_args=())
def _spread(query_means: Tensor, k: Tensor, slots: Tensor, block_k: int, scale: float) -> Tensor:
    k, query_means = rowwise(k), query_means.float().contiguous()
    B, H, Kq, D = query_means.shape
    Kk = slots.numel() // block_k
    made = query_means.new_empty(B, H, Kq, Kk)
    arch = configs.architecture(k.device)
    config = configs.pool(arch, "spread", D, k.dtype, block_k)
    size = configs.tile(Kq, config.tile_m)
    groups, blocks = triton.cdiv(Kq, size), configs.POOL_BLOCKS
    launch(
        spread_kernel,
        (groups * triton.cdiv(Kk, blocks), B * H),
        k,
        *(query_means, *rows(k), made, slots),
        *(groups, H, Kq, Kk, scale / math.log(2)),
        **configs.dims(D),
        BLOCK_K=block_k,
        GROUP=size,
        TILE_N=config.tile_n,
        BLOCKS=blocks,
        **config.stages,
    )
    return made


@_spread.register_fake
def _(query_means: Tensor, k: Tensor, slots: Tensor, block_k: int, scale: float) -> Tensor:
    shape = *query_means.shape[:3], slots.numel() // block_k
    return query_means.new_empty(shape, dtype=torch.float32)
