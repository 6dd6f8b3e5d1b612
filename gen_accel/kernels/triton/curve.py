"""Curve of a rest of the second order, forward and backward; prefixes of names as in `tiles`.

For queries, and likewise for keys, let e_t be the offset of token t from the mean of its block,
n_i the number of tokens in block i, and l_i how often it is in a pair of blocks that is left out.
With w of queries, u of keys and s = CURVATURE scale^2:

    w_d = sum_i l_i sum_{t in i} e_td^2 / sum_i l_i n_i
    rise_t = c sum_d u_d e_td^2, over queries, with c = s / (w . u), 0 where w . u is

A program processes one block of one head. It reads the block's rows once for the mean and, from
the cache, once or twice more. No atomics: each sum is written by one program, in a fixed order.

Backward, with g_t the gradient of rise_t and a_d = sum_t g_t e_td^2 over queries, w gains
-c (u . a) / (w . u) u, and u has c a - c (u . a) / (w . u) w. A token has 2 e_t times what its
square is worth, less the mean over its block.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.base import Context, Values
from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.launch import (
    TILE,
    WARPS,
    laid_out_alike,
    launch,
    launch_blocks,
    operate,
    rows,
    rowwise,
)
from gen_accel.kernels.triton.tiles import (
    block_mean,
    load_rows,
    of_head,
    off_mean,
    one_row,
    own_tile,
    store_rows,
)
from gen_accel.plan import CURVATURE, Plan

SIZES = ("H", "N", "K", "times_b", "times_h")


@triton.jit
def _block(
    x,
    slots,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Locate the program's block and head and their start in x, and compute the mean of the
    block's tokens, [BLOCK_D] fp32, with their number, at least 1."""
    i_block, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x = of_head(x, i_head // H, i_head % H)
    o_d = tl.arange(0, BLOCK_D)
    b_mean, b_held = block_mean(x, slots, i_block, o_d, D, BLOCK, TILE)
    return i_block, i_head, x, b_mean, b_held


@triton.jit
def _factors(weight, by, i_head, scale, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return w, u, w . u with 1 in place of 0, and c."""
    b_w, b_u = one_row(weight, i_head, D, BLOCK_D), one_row(by, i_head, D, BLOCK_D)
    b_both = tl.sum(b_w * b_u, 0)
    b_safe = tl.where(b_both > 0.0, b_both, 1.0)
    return b_w, b_u, b_safe, tl.where(b_both > 0.0, scale / b_safe, 0.0)


@triton.jit(do_not_specialize=SIZES)
def block_squares_kernel(
    x,
    drise,
    means,
    squares,
    slots,
    H,
    N,
    K,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WEIGHED: tl.constexpr,
):
    """Sum the squared offsets of each block's tokens from their mean, if WEIGHED by drise; else
    write the mean, too."""
    i_block, i_head, x, b_mean, _held = _block(x, slots, H, D, BLOCK_D, BLOCK, TILE)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_off = off_mean(x, o_t, tl.arange(0, BLOCK_D), b_mean, D)
        b_square = b_off * b_off
        if WEIGHED:
            b_g = tl.load(drise + i_head * N + o_t, mask=o_t >= 0, other=0.0)
            b_square *= b_g[:, None]
        b_sum += tl.sum(b_square, 0)
    o_d = tl.arange(0, BLOCK_D)
    p_block = (i_head * K + i_block) * D + o_d
    tl.store(squares + p_block, b_sum, mask=o_d < D)
    if not WEIGHED:
        tl.store(means + p_block, b_mean, mask=o_d < D)


@triton.jit(do_not_specialize=SIZES)
def mean_squares_kernel(
    squares,
    times,
    held,
    mean,
    totals,
    times_b,
    times_h,
    H,
    K,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the mean of the squares of one head over its tokens, each as often as its block is
    counted, and the total count, at least 1."""
    i_head = tl.program_id(0).to(tl.int64)
    times += i_head // H * times_b + i_head % H * times_h
    squares += i_head * K * D
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    b_total = tl.full((), 0.0, tl.float32)
    for i_row in range(0, K, TILE):
        o_k = i_row + tl.arange(0, TILE)
        b_times = tl.load(times + o_k, mask=o_k < K, other=0.0)
        b_total += tl.sum(b_times * tl.load(held + 2 * o_k, mask=o_k < K, other=0.0), 0)
        b_squares = load_rows((squares, D), tl.where(o_k < K, o_k, -1), D, BLOCK_D, True)
        b_sum += tl.sum(b_times[:, None] * b_squares, 0)
    b_total = tl.maximum(b_total, 1.0)
    o_d = tl.arange(0, BLOCK_D)
    tl.store(mean + i_head * D + o_d, b_sum / b_total, mask=o_d < D)
    tl.store(totals + i_head, b_total)


@triton.jit(do_not_specialize=SIZES)
def rise_kernel(
    x,
    weight,
    by,
    rise,
    slots,
    H,
    N,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the rise of the queries of each block. `scale` is s."""
    i_block, i_head, x, b_mean, _held = _block(x, slots, H, D, BLOCK_D, BLOCK, TILE)
    _w, b_u, _safe, b_c = _factors(weight, by, i_head, scale, D, BLOCK_D)
    b_u *= b_c
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_off = off_mean(x, o_t, tl.arange(0, BLOCK_D), b_mean, D)
        b_rise = tl.sum(b_off * b_off * b_u[None, :], 1)
        tl.store(rise + i_head * N + o_t, b_rise, mask=o_t >= 0)


@triton.jit
def _slope(drise, o_t, b_own, b_all, QUERIES: tl.constexpr):
    """Gradient by the squares of tokens o_t: `b_all`, the same for a block, and for QUERIES
    `b_own` times the gradient of the token's rise."""
    if QUERIES:
        b_g = tl.load(drise + o_t, mask=o_t >= 0, other=0.0)
        return b_g[:, None] * b_own[None, :] + b_all[None, :]
    else:
        return b_all[None, :]


@triton.jit(do_not_specialize=SIZES)
def off_means_backward_kernel(
    x,
    drise,
    weight,
    by,
    dweight,
    sums,
    times,
    totals,
    dx,
    slots,
    times_b,
    times_h,
    H,
    N,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Write the gradients of the QUERIES, or of the keys, of each block. `sums` holds a."""
    i_block, i_head, x, b_mean, b_held = _block(x, slots, H, D, BLOCK_D, BLOCK, TILE)
    b_w, b_u, b_safe, b_c = _factors(weight, by, i_head, scale, D, BLOCK_D)
    b_a = one_row(sums, i_head, D, BLOCK_D)
    b_less = b_c * tl.sum(b_u * b_a, 0) / b_safe
    if QUERIES:
        b_all = one_row(dweight, i_head, D, BLOCK_D) - b_less * b_u
    else:
        b_all = b_c * b_a - b_less * b_w
    times += i_head // H * times_b + i_head % H * times_h
    b_all *= tl.load(times + i_block) / tl.load(totals + i_head)
    b_own = b_c * b_u
    drise += i_head * N
    dx = of_head(dx, i_head // H, i_head % H)
    # Without a rise this is 0 but for the rounding of the mean, which thus leaves the gradient.
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_off = off_mean(x, o_t, tl.arange(0, BLOCK_D), b_mean, D)
        b_sum += tl.sum(b_off * _slope(drise, o_t, b_own, b_all, QUERIES), 0)
    b_sum /= b_held
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_off = off_mean(x, o_t, tl.arange(0, BLOCK_D), b_mean, D)
        b_dx = b_off * _slope(drise, o_t, b_own, b_all, QUERIES) - b_sum[None, :]
        store_rows(dx, o_t, 2 * b_dx, D, BLOCK_D)


def curve_of(q: Tensor, k: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """Compute rise and weight of a `kernels.rest.Curve`, in fp32, differentiable in q and k."""
    rise, weight, *_ = with_means(q, k, plan, scale)
    return rise, weight


def with_means(q: Tensor, k: Tensor, plan: Plan, scale: float) -> tuple[Tensor, ...]:
    """Compute rise and weight and, without a gradient, the means of query blocks, (B, H, Kq, D)
    fp32, and of key blocks, (B, H, Kk, D) fp32."""
    times = (x.contiguous().expand(*q.shape[:2], -1) for x in plan.counted_blocks())
    numbers = plan.block_q, plan.block_k, scale
    given = plan.slots_int32, *times, *plan.held, *numbers
    rise, weight, _, _, *means = operate(curve, q, k, *given)
    return rise, weight, *means


class CurveSide(NamedTuple):
    """Side of a call: its queries or its keys.

    Args:
        x: (B, H, N, D), rows of one stride.
        slots: (S,) int32.
        times: (B, H, K) fp32, how often each block is in a pair that is left out.
        block: slots in a block.
    """

    x: Tensor
    slots: Tensor
    times: Tensor
    block: int


@torch.library.custom_op("gen_accel::triton_curve", mutates_args=())
def curve(
    q: Tensor,
    k: Tensor,
    slots: Tensor,
    times_q: Tensor,
    times_k: Tensor,
    held_q: Tensor,
    held_k: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute in fp32 the rise, (B, H, N), and w, (B, H, D); and without a gradient u, (B, H, D),
    the number of tokens that w and u are means of, at least 1, (2, B, H), and the means of query
    and of key blocks, (B, H, Kq, D) and (B, H, Kk, D).

    Args:
        slots: (S,) int32, the token of each slot, -1 for padding.
        times_q, times_k: (B, H, Kq) and (B, H, Kk) fp32, how often each block is in a pair that is
            left out; contiguous rows.
        held_q, held_k: (Kq, 2) and (Kk, 2) fp32, tokens and slots of each block.
        scale: factor of q k^T.
    """
    queries = CurveSide(rowwise(q), slots, times_q, block_q)
    keys = CurveSide(rowwise(k), slots, times_k, block_k)
    rise, weight, by, totals, query_means, key_means = _like(q, times_q, times_k)
    _mean_squares(queries, held_q, weight, totals[0], query_means)
    _mean_squares(keys, held_k, by, totals[1], key_means)
    tensors, sizes = (*rows(queries.x), weight, by, rise), (*q.shape[1:3], CURVATURE * scale**2)
    launch_blocks(rise_kernel, queries.x, slots, block_q, tensors, *sizes)
    return rise, weight, by, totals, query_means, key_means


def _like(q: Tensor, times_q: Tensor, times_k: Tensor) -> tuple[Tensor, ...]:
    """Allocate the results of a call, uninitialised."""
    B, H, N, D = q.shape
    blocks = ((B, H, x.shape[2], D) for x in (times_q, times_k))
    shapes = (B, H, N), (B, H, D), (B, H, D), (2, B, H), *blocks
    return tuple(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


curve.register_fake(lambda q, k, slots, *times: _like(q, *times[:2]))


@torch.library.custom_op("gen_accel::triton_curve_backward", mutates_args=())
def curve_backward(
    drise: Tensor,
    dweight: Tensor,
    weight: Tensor,
    by: Tensor,
    totals: Tensor,
    q: Tensor,
    k: Tensor,
    slots: Tensor,
    times_q: Tensor,
    times_k: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of q and k."""
    drise, dweight = drise.contiguous(), dweight.contiguous()
    queries = CurveSide(rowwise(q), slots, times_q, block_q)
    keys = CurveSide(rowwise(k), slots, times_k, block_k)
    sums = _block_squares(queries, drise=drise).sum(2)
    made = []
    for side, total in zip((queries, keys), totals, strict=True):
        dx = torch.empty_like(side.x)
        tensors = drise, weight, by, dweight, sums, side.times, total, *rows(dx)
        numbers = *side.times.stride()[:2], *q.shape[1:3], CURVATURE * scale**2
        launch_blocks(
            off_means_backward_kernel,
            *(side.x, slots, side.block, (*rows(side.x), *tensors), *numbers),
            QUERIES=side is queries,
        )
        made.append(dx)
    return made[0], made[1]


curve_backward.register_fake(laid_out_alike(5, 2))


def _save(ctx: Context, inputs: Values, output: tuple[Tensor, ...]) -> None:
    q, k, slots, times_q, times_k, _, _, *ctx.numbers = inputs
    _, *of_heads = output[:4]
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*of_heads, q, k, slots, times_q, times_k)


def _differentiate(ctx: Context, drise: Tensor, dweight: Tensor, *unused: object) -> Values:
    grads = curve_backward(drise, dweight, *ctx.saved_tensors, *ctx.numbers)
    return *grads, *[None] * 8


curve.register_autograd(_differentiate, setup_context=_save)


def _mean_squares(
    side: CurveSide, held: Tensor, weight: Tensor, totals: Tensor, means: Tensor
) -> None:
    """Write the mean squares, the number of tokens in them, and the means of blocks."""
    squares = _block_squares(side, means)
    heads, (H, K) = side.x.shape[:2].numel(), side.times.shape[1:]
    launch(
        mean_squares_kernel,
        (heads, 1),
        side.x,
        *(squares, side.times, held, weight, totals),
        *(*side.times.stride()[:2], H, K),
        **configs.dims(side.x.shape[3]),
        TILE=TILE,
        num_warps=WARPS,
    )


def _block_squares(
    side: CurveSide, means: Tensor | None = None, drise: Tensor | None = None
) -> Tensor:
    """Sum the squares of each block, (B, H, K, D) fp32, and write the `means`, or weigh the
    squares by `drise`."""
    H, N, D = side.x.shape[1:]
    squares = side.x.new_empty(*side.times.shape, D, dtype=torch.float32)
    given = (squares if x is None else x for x in (drise, means))  # not touched if None
    tensors = *rows(side.x), *given, squares
    launch_blocks(
        block_squares_kernel,
        *(side.x, side.slots, side.block, tensors, H, N, side.times.shape[2]),
        WEIGHED=drise is not None,
    )
    return squares
