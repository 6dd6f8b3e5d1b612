"""Curve of a rest of the second order, forward and backward; prefixes of names as in `tiles`.

For queries, and likewise for keys, let e_t be the offset of token t from the mean of its block,
n_i the number of tokens in block i, and l_i 1 if the block counts, else 0: see `Rest.tokens`.
With w of queries, u of keys and s = CURVATURE scale^2:

    w_d = sum_i l_i sum_{t in i} e_td^2 / sum_i l_i n_i
    rise_t = c sum_d u_d e_td^2, over queries, with c = s / (w . u), 0 where w . u is

`block_facts` has the kernels of the forward pass. Here a program processes one block of one head.
It reads the block's rows once for the mean and, from the cache, twice more. No atomics: each sum
is written by one program, in a fixed order.

Backward, with g_t the gradient of rise_t and a_d = sum_t g_t e_td^2 over queries, w gains
-c (u . a) / (w . u) u, and u has c a - c (u . a) / (w . u) w. A token has 2 e_t times what its
square is worth, less the mean over its block.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.base import Context, Values
from gen_accel.kernels.triton.block_facts import factors, head_facts, weigh_squares
from gen_accel.kernels.triton.launch import laid_out_alike, launch_blocks, operate, rows, rowwise
from gen_accel.kernels.triton.pooling import block_squares, weighed_squares
from gen_accel.kernels.triton.tiles import (
    block_mean,
    of_head,
    off_mean,
    one_row,
    own_tile,
    store_rows,
)
from gen_accel.plan import CURVATURE, Plan

SIZES = ("H", "N")


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
    counted,
    totals,
    dx,
    slots,
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
    b_w, b_u, b_safe, b_c = factors(weight, by, i_head, scale, D, BLOCK_D)
    b_a = one_row(sums, i_head, D, BLOCK_D)
    b_less = b_c * tl.sum(b_u * b_a, 0) / b_safe
    if QUERIES:
        b_all = one_row(dweight, i_head, D, BLOCK_D) - b_less * b_u
    else:
        b_all = b_c * b_a - b_less * b_w
    b_all *= tl.where(tl.load(counted + i_block) > 0.0, 1.0 / tl.load(totals), 0.0)
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
    assert plan.rest is not None
    tokens = plan.tokens if plan.rest.tokens is None else plan.rest.tokens
    numbers = tokens, plan.block_q, plan.block_k, scale
    return operate(curve, q, k, plan.slots_int32, *numbers)[:4]


@torch.library.custom_op("gen_accel::triton_curve", mutates_args=())
def curve(
    q: Tensor,
    k: Tensor,
    slots: Tensor,
    tokens: int,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute in fp32 the rise, (B, H, N), and w, (B, H, D); and without a gradient the means of
    query and of key blocks, (B, H, Kq, D) and (B, H, Kk, D), u, (B, H, D), the number of tokens of
    each query and key block that counts, else 0, (Kq,) and (Kk,), and their sums, at least 1,
    (2,).

    Args:
        slots: (S,) int32, the token of each slot, -1 for padding.
        tokens: blocks of tokens from the first to this one count.
        scale: factor of q k^T.
    """
    q, k = rowwise(q), rowwise(k)
    blocks = block_q, block_k
    queries, keys = (
        block_squares(x, slots, block, tokens) for x, block in zip((q, k), blocks, strict=True)
    )
    rise, totals = (queries.means.new_empty(shape) for shape in (q.shape[:3], 2))
    weight, by = (rise.new_empty(*q.shape[:2], q.shape[3]) for _ in range(2))
    head_facts(queries, keys, weight, by, totals)
    means = queries.means, keys.means
    given = q, k, slots, blocks, *means, weight, by, rise, rise
    weigh_squares(*given, scale=scale, of_keys=False)
    return rise, weight, *means, by, queries.counted, keys.counted, totals


@curve.register_fake
def _(
    q: Tensor, k: Tensor, slots: Tensor, tokens: int, block_q: int, block_k: int, scale: float
) -> tuple[Tensor, ...]:
    B, H, N, D = q.shape
    Kq, Kk = (len(slots) // block for block in (block_q, block_k))
    shapes = (B, H, N), (B, H, D), (B, H, Kq, D), (B, H, Kk, D), (B, H, D), (Kq,), (Kk,), (2,)
    return tuple(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("gen_accel::triton_curve_backward", mutates_args=())
def curve_backward(
    drise: Tensor,
    dweight: Tensor,
    weight: Tensor,
    by: Tensor,
    counted_q: Tensor,
    counted_k: Tensor,
    totals: Tensor,
    q: Tensor,
    k: Tensor,
    slots: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of q and k."""
    drise, dweight = drise.contiguous(), dweight.contiguous()
    q, k = rowwise(q), rowwise(k)
    sums = weighed_squares(q, slots, block_q, drise).sum(2)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    for x, dx, block, counted, total in (
        (q, dq, block_q, counted_q, totals[0]),
        (k, dk, block_k, counted_k, totals[1]),
    ):
        tensors = *rows(x), drise, weight, by, dweight, sums, counted, total, *rows(dx)
        numbers = *q.shape[1:3], CURVATURE * scale**2
        flags = {"QUERIES": x is q}
        launch_blocks(off_means_backward_kernel, x, slots, block, tensors, *numbers, **flags)
    return dq, dk


curve_backward.register_fake(laid_out_alike(7, 2))


def _save(ctx: Context, inputs: Values, output: tuple[Tensor, ...]) -> None:
    q, k, slots, _, *ctx.numbers = inputs
    _, weight, _, _, *of_blocks = output
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(weight, *of_blocks, q, k, slots)


def _differentiate(ctx: Context, drise: Tensor, dweight: Tensor, *unused: object) -> Values:
    grads = curve_backward(drise, dweight, *ctx.saved_tensors, *ctx.numbers)
    return *grads, *[None] * 5


curve.register_autograd(_differentiate, setup_context=_save)
