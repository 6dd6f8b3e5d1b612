"""Rest of a plan: attention over the blocks that it does not keep, pooled.

`pooled` gives its output and log-sum-exp. The kernels of `sparse_forward` begin with them: the
softmax goes on over the kept keys, and nothing in fp32 lies between. With a gradient, and beside
other kernels, both outputs are merged. Around mean keys there is one set of columns for a head.
Around mean queries there is one for each pair of a head and a query block, together more than the
size of q. One launch writes and reads them, see `rest_turns`. The backward pass computes them
again, in chunks that fill the card: one kernel writes the pooled keys and values, and the next
ones read them. One program alone adds to each sum, in a fixed order.
"""

import math
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from gen_accel.kernels.base import BlockFacts, Context, Kernel, Values
from gen_accel.kernels.triton import configs, slope
from gen_accel.kernels.triton import curve as curves
from gen_accel.kernels.triton import rest_launches as launches
from gen_accel.kernels.triton.block_facts import facts_of
from gen_accel.kernels.triton.launch import launch, operate, results, rows, rowwise
from gen_accel.kernels.triton.pooling import spread_kernel
from gen_accel.kernels.triton.rest_columns import common_of
from gen_accel.kernels.triton.sparse_backward import delta_of
from gen_accel.plan import Plan, Slots

HELD = 1 << 30  # bytes of sums that the backward pass holds at once; at least one head's


def pooled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    curve: tuple[Tensor, Tensor] | None = None,
    facts: BlockFacts | None = None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute attention over the left-out blocks alone, as the plan's rest has them.

    Args:
        q, k, v: (B, H, N, D).
        curve: of a rest of the second order; made here without.
        facts: of the call, for a rest of the second order without a gradient; made here without.

    Returns:
        Output, (B, H, N, D) laid out like q, and log-sum-exp, (B, H, N) fp32, differentiable in
        all tensors. With a gradient the output is fp32, else of q's dtype. A row that leaves
        nothing out has the log-sum-exp -inf, and an output without meaning.
    """
    assert plan.rest is not None
    keep = plan.keep.expand(*q.shape[:2], -1, -1)
    around_queries, sloped = plan.rest.centre == "query", plan.rest.order != "zeroth"
    leaves = q, k, v, *(curve or ())
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    query_means = key_means = state = common = squares = None
    rise, weight = curve or (None, None)
    if plan.rest.order == "second" and curve is None and not grad:
        facts = facts or facts_of(q, k, v, plan, plan.rest, scale=scale)
        query_means, key_means, _, rise, weight, squares, common, state = facts
    elif plan.rest.order == "second" and curve is None:
        rise, weight, query_means, key_means = curves.with_means(q, k, plan, scale)
    if sloped and not grad and state is None:
        state = slope.state_of(k, v, plan)
    out, lse, _ = operate(
        rest,
        *(q, k, v, keep, plan.slots_int32, *plan.held),
        *(rise, weight, query_means, key_means, state, common, squares),
        *(plan.block_q, plan.block_k, around_queries, scale, scale / plan.tokens),
        wide=grad,
    )
    return slope.added(out, q, k, v, plan, scale=scale) if sloped and grad else out, lse


def attention(
    chosen: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    facts: BlockFacts | None = None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute attention over the kept keys, by a kernel that takes no rest, and the rest; `facts`
    as in `pooled`.

    Returns:
        (B, H, N, D) in q's dtype, and the log-sum-exp of all, (B, H, N) fp32.
    """
    made = pooled(q, k, v, plan, facts=facts, scale=scale)
    if not made[0].requires_grad and chosen.continued(q, k, v, plan.kept, made, scale=scale):
        return made
    kept = chosen.forward_lse(q, k, v, plan.kept, scale=scale, wide=True)
    joint, total = _merged(*kept, *made)
    return joint.to(q.dtype), total


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
    """Run `gen_accel.kernels.rest.added`; arguments as in `pooled`."""
    return _merged(out, lse, *pooled(q, k, v, plan, curve, scale=scale))


def _merged(out: Tensor, lse: Tensor, rest: Tensor, rest_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two parts of a softmax. Where the second log-sum-exp is -inf, the first part stays bit
    for bit, whatever the second one holds."""
    alone = rest_lse == -torch.inf
    other = rest_lse.masked_fill(alone, 0.0)
    joint = torch.logaddexp(lse, other)
    # Not exp(other - joint), whose error grows with the size of these.
    share = torch.sigmoid((other - lse).masked_fill(alone, 0.0))[..., None]
    mixed = torch.lerp(out, rest.to(out.dtype), share)
    return out.where(alone[..., None], mixed), lse.where(alone, joint)


@torch.library.custom_op("gen_accel::triton_rest", mutates_args=())
def rest(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    slots: Tensor,
    held_q: Tensor,
    held_k: Tensor,
    rise: Tensor | None,
    weight: Tensor | None,
    query_means: Tensor | None,
    key_means: Tensor | None,
    state: Tensor | None,
    common: Tensor | None,
    squares: Tensor | None,
    block_q: int,
    block_k: int,
    around_queries: bool,
    scale: float,
    factor: float,
    *,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the output, (B, H, N, D) laid out like q, the log-sum-exp, and without a gradient
    the same without the score of the common key, (B, H, N) fp32.

    Args:
        keep: (B, H, Kq, Kk) bool.
        slots: (S,) int32, the token of each slot, -1 for padding.
        held_q, held_k: (Kq, 2) and (Kk, 2) fp32, tokens and slots of each block.
        rise, weight: fields of a `Curve`, around queries alone.
        query_means, key_means: (B, H, Kq, D) and (B, H, Kk, D) fp32 where they are known.
        state: H of `slope`, whose slope is added; None for none, and where there is a gradient.
        common, squares: see `launches.RestCall` and `launches.Curved`; made here if None.
        factor: of the slope.
        wide: return the output in fp32.
    """
    q, k, v = (rowwise(x) for x in (q, k, v))
    of_plan = keep.view(torch.uint8), slots, held_q, held_k
    common = common_of(k) if common is None else common
    call = launches.RestCall(q, k, v, *of_plan, common, block_q, block_k, scale, factor)
    out, lse = results(q, wide=wide)
    low_lse = torch.empty_like(lse)
    if not around_queries:
        _, pooled = launches.around_keys(call)
        launches.attend_to_means(call, pooled, state, out, lse, low_lse)
        return out, lse, low_lse
    if rise is not None and weight is not None:
        call = launches.with_curve(call, rise, weight, key_means, squares)
    means = launches.query_means(call, query_means)
    launches.in_turns(call, means, state, out, lse, low_lse)
    return out, lse, low_lse


@rest.register_fake
def _(q: Tensor, *given: object, wide: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = results(q, wide=wide)
    return out, lse, torch.empty_like(lse)


@torch.library.custom_op("gen_accel::triton_rest_backward", mutates_args=())
def rest_backward(
    grad: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    low_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    slots: Tensor,
    held_q: Tensor,
    held_k: Tensor,
    rise: Tensor | None,
    weight: Tensor | None,
    query_means: Tensor | None,
    key_means: Tensor | None,
    block_q: int,
    block_k: int,
    around_queries: bool,
    scale: float,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v, rise and weight; empty where an input is None."""
    q, k, v = (rowwise(x) for x in (q, k, v))
    of_plan = keep.view(torch.uint8), slots, held_q, held_k
    call = launches.RestCall(q, k, v, *of_plan, common_of(k), block_q, block_k, scale, factor)
    grad, grad_lse = rowwise(grad.to(q.dtype)), grad_lse.contiguous()
    delta = delta_of(out, grad, low_lse, grad_lse)
    back = launches.RestGrads(grad, grad_lse, low_lse, delta)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    drise, dweight = delta.new_empty(_shape(rise)), delta.new_empty(_shape(weight))
    if not around_queries:
        chunk, pooled = launches.around_keys(call)
        launches.dq_of(call, pooled, back, None, dq, None)(chunk)
        launches.dkdv_of(call, pooled, back, dk, dv)
        return dq, dk, dv, drise, dweight
    if rise is not None and weight is not None:
        call = launches.with_curve(call, rise, weight, key_means)
    means = launches.query_means(call, query_means).to(q.dtype)
    for some in _heads(call):
        given = back.of_heads(some), means[:, some].contiguous(), dq[:, some]
        (dk[:, some], dv[:, some]), curve = _backward(call.of_heads(some), *given)
        if curve is not None:
            drise[:, some], dweight[:, some] = curve.rise, curve.weight
    return dq, dk, dv, drise, dweight


def _shape(x: Tensor | None) -> tuple[int, ...]:
    return (0,) if x is None else x.shape


@rest_backward.register_fake
def _(*given: Tensor) -> tuple[Tensor, ...]:
    of_curve = (given[3].new_empty(_shape(x)) for x in given[11:13])
    return *(torch.empty_like(rowwise(x)) for x in given[4:7]), *of_curve


def _save(
    ctx: Context, inputs: Values, keyword_only_inputs: object, output: tuple[Tensor, ...]
) -> None:
    *tensors, _, _, _, ctx.block_q, ctx.block_k, ctx.around_queries, ctx.scale, ctx.factor = inputs
    out, _, low_lse = output
    ctx.mark_non_differentiable(low_lse)
    ctx.save_for_backward(out, low_lse, *tensors)


def _differentiate(ctx: Context, grad: Tensor, grad_lse: Tensor, _: object) -> Values:
    numbers = ctx.block_q, ctx.block_k, ctx.around_queries, ctx.scale, ctx.factor
    *grads, drise, dweight = rest_backward(grad, grad_lse, *ctx.saved_tensors, *numbers)
    of_curve = (drise, dweight) if ctx.saved_tensors[-3] is not None else (None, None)
    return *grads, *[None] * 4, *of_curve, *[None] * 10


rest.register_autograd(_differentiate, setup_context=_save)


def _heads(call: launches.RestCall) -> Iterator[slice]:
    """Yield as many heads at a time as fit their sums of gradients into HELD."""
    B, H, N, D = call.q.shape
    some = max(1, HELD // (8 * B * N * D))
    return (slice(first, first + some) for first in range(0, H, some))


def _backward(
    call: launches.RestCall, back: launches.RestGrads, means: Tensor, dq: Tensor
) -> tuple[Tensor, launches.CurveGrads | None]:
    """Write dq, and return the gradients of k and v, (2, B, H, N, D) fp32, and of the curve."""
    pairs = launches.most_pairs(call)
    pooled, grads = launches.room(call, pairs), launches.room(call, pairs)
    (parts, dmeans), curve = launches.parts_of_means(call), launches.curve_grads(call)
    drise, of_tokens, of_pairs = curve or (None, None, None)
    sums = torch.zeros(2, *call.q.shape, dtype=torch.float32, device=call.q.device)
    pool = launches.pool(call, means, pooled)
    dpooled_of = launches.dpooled_of(call, means, pooled, grads, back, of_pairs)
    pool_backward = launches.pool_backward(call, means, pooled, grads, parts, sums, of_tokens)
    dq_of = launches.dq_of(call, pooled, back, dmeans, dq, drise)
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
    return operate(_spread, query_means, k, *given)


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
