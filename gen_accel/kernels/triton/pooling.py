"""Blocks of tokens pooled: summed, averaged, and around the mean queries of query blocks; prefixes
of names as in `tiles`.

With a_s = scale qmean_i . k_s in powers of two, the scores of block j's tokens for the mean query
of query block i, a pair (i, j) has l = log2 sum_s 2^a_s, weights p_s = 2^(a_s - l), a key sum p k
and a value sum p v. A program takes the mean queries of a group of query blocks as the rows of one
product. A query q_t has the score l + scale (q_t - qmean_i) . key for a pair, in powers of two.
The pair's bias is the part of the score that does not depend on t: l - scale qmean_i . key, or
-inf where query block i keeps j.

If CURVED, the score gains rise_t times the pair's variance, in powers of
two log2(e) (sum_s p_s e_s - sum_d w_d (key - kmean_j)_d^2). Here kmean_j is the mean key of block
j, on which the variance does not depend, and e_s = sum_d w_d (k_s - kmean_j)_d^2. Without
subtracting kmean_j most digits would cancel.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.triton.launch import launch_blocks, rows, rowwise
from gen_accel.kernels.triton.rest_columns import SIZES
from gen_accel.kernels.triton.tiles import (
    LN2,
    LOG2E,
    block_mean,
    dot,
    load_rows,
    of_head,
    off_mean,
    one_row,
    own_tile,
    store_rows,
)

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

# The kinds of `block_squares_kernel`.
PLAIN, WEIGHED, DEVIATION = (tl.constexpr(kind) for kind in range(3))


@triton.jit(do_not_specialize=("H", "K"))
def sums_kernel(
    x,
    common,
    out,
    slots,
    H,
    K,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    MEAN: tl.constexpr,
    LESS: tl.constexpr,
):
    """Sum, or average, the tokens of each block, zero where it holds none; if LESS, subtract
    `common` of the head."""
    i_block, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    x = of_head(x, i_head // H, i_head % H)
    o_d = tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    held = tl.full((), 0, tl.int32)
    for i_row in range(0, BLOCK, TILE):
        o_r = i_row + tl.arange(0, TILE)
        o_t = tl.load(slots + i_block * BLOCK + o_r, mask=o_r < BLOCK, other=-1)
        b_sum += tl.sum(load_rows(x, o_t, D, BLOCK_D, True).to(tl.float32), 0)
        held += tl.sum((o_t >= 0).to(tl.int32), 0)
    if MEAN:
        b_sum = b_sum / tl.maximum(held, 1).to(tl.float32)
    if LESS:
        b_sum -= one_row(common, i_head, D, BLOCK_D)
    tl.store(out + (i_head * K + i_block) * D + o_d, b_sum, mask=o_d < D)


@torch.library.custom_op("gen_accel::triton_block_sums", mutates_args=())
def block_sums(x: Tensor, slots: Tensor, block: int, mean: bool) -> Tensor:
    """Sum x (B, H, N, D) over blocks: (B, H, S / block, D) fp32; without a gradient.

    Args:
        slots: (S,) int32, the token of each slot, -1 for padding.
        mean: divide by the number of tokens of each block.
    """
    B, H, _, D = x.shape
    out = x.new_empty((B, H, len(slots) // block, D), dtype=torch.float32)
    launch_sums(rowwise(x), slots, block, out, mean=mean)
    return out


@block_sums.register_fake
def _(x: Tensor, slots: Tensor, block: int, mean: bool) -> Tensor:
    B, H, _, D = x.shape
    return x.new_empty((B, H, len(slots) // block, D), dtype=torch.float32)


@triton.jit
def counted_tokens(slots, i_block, tokens, b_held, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Return the number of tokens of a block if all are among the first `tokens`, else 0."""
    b_last = tl.full((), -1, tl.int32)
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_last = tl.maximum(b_last, tl.max(o_t, 0))
    return tl.where((b_last >= 0) & (b_last < tokens), b_held, 0.0)


@triton.jit
def deviation(b_squares, b_mean, b_held):
    """Compute ln of the root of the mean squared offset of a block's tokens from their mean."""
    b_apart = tl.sum(b_squares, 0) / b_held
    b_apart = tl.maximum(b_apart, 1e-6 * (b_apart + tl.sum(b_mean * b_mean, 0)))
    return 0.5 * tl.log(tl.maximum(b_apart, TINY))


@triton.jit(do_not_specialize=("H", "N", "K", "tokens"))
def block_squares_kernel(
    x,
    drise,
    wide_means,
    squares,
    counted,
    slots,
    H,
    N,
    K,
    tokens,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
):
    """Sum the squared offsets of each block's tokens from their mean. If PLAIN, write the mean
    and the `counted_tokens` too; if WEIGHED, multiply the squares of a token by its `drise`; if
    DEVIATION, write the `deviation` alone, to `squares`."""
    i_block, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x = of_head(x, i_head // H, i_head % H)
    o_d = tl.arange(0, BLOCK_D)
    b_mean, b_held = block_mean(x, slots, i_block, o_d, D, BLOCK, TILE)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_off = off_mean(x, o_t, o_d, b_mean, D)
        b_square = b_off * b_off
        if KIND == WEIGHED:
            b_g = tl.load(drise + i_head * N + o_t, mask=o_t >= 0, other=0.0)
            b_square *= b_g[:, None]
        b_sum += tl.sum(b_square, 0)
    i_row = i_head * K + i_block
    if KIND == DEVIATION:
        tl.store(squares + i_row, deviation(b_sum, b_mean, b_held))
    else:
        tl.store(squares + i_row * D + o_d, b_sum, mask=o_d < D)
    if KIND == PLAIN:
        tl.store(wide_means + i_row * D + o_d, b_mean, mask=o_d < D)
        if i_head == 0:
            b_count = counted_tokens(slots, i_block, tokens, b_held, BLOCK, TILE)
            tl.store(counted + i_block, b_count)


class BlockSquares(NamedTuple):
    """Numbers of the blocks of queries or of keys, fp32.

    Args:
        means: (B, H, K, D).
        squares: (B, H, K, D), sums of the squared offsets of tokens from these means.
        counted: (K,), the `counted_tokens`.
    """

    means: Tensor
    squares: Tensor
    counted: Tensor


def room_of_squares(x: Tensor, slots: Tensor, block: int) -> BlockSquares:
    """Allocate the numbers of x (B, H, N, D), uninitialised."""
    B, H, _, D = x.shape
    means = x.new_empty(B, H, len(slots) // block, D, dtype=torch.float32)
    return BlockSquares(means, torch.empty_like(means), means.new_empty(means.shape[2]))


def block_squares(x: Tensor, slots: Tensor, block: int, tokens: int) -> BlockSquares:
    """Compute the numbers of x (B, H, N, D), see `rowwise`; blocks of the first `tokens` count."""
    made = room_of_squares(x, slots, block)
    launch_squares(PLAIN, x, slots, block, made.means, *made, tokens=tokens)
    return made


def weighed_squares(x: Tensor, slots: Tensor, block: int, drise: Tensor) -> Tensor:
    """Sum squared offsets from means of blocks times `drise`, (B, H, N) fp32, over each block:
    (B, H, S / block, D) fp32."""
    B, H, _, D = x.shape
    made = drise.new_empty(B, H, len(slots) // block, D)
    launch_squares(WEIGHED, x, slots, block, drise, made, made, made)
    return made


@torch.library.custom_op("gen_accel::triton_block_deviations", mutates_args=())
def block_deviations(x: Tensor, slots: Tensor, block: int) -> Tensor:
    """Compute `choosing.block_deviations`, (B, H, S / block) fp32, in one pass over x; arguments
    as in `block_sums`."""
    x = rowwise(x)
    made = x.new_empty((*x.shape[:2], len(slots) // block), dtype=torch.float32)
    launch_squares(DEVIATION, x, slots, block, made, made, made, made)
    return made


@block_deviations.register_fake
def _(x: Tensor, slots: Tensor, block: int) -> Tensor:
    return x.new_empty((*x.shape[:2], len(slots) // block), dtype=torch.float32)


def launch_squares(
    kind: tl.constexpr,
    x: Tensor,
    slots: Tensor,
    block: int,
    *tensors: Tensor,
    tokens: int = 0,
) -> None:
    """Launch a `kind` of the kernel over `tensors`, which hold anything where it skips them."""
    sizes = *x.shape[1:3], len(slots) // block, tokens
    launch_blocks(
        block_squares_kernel, x, slots, block, (*rows(x), *tensors), *sizes, KIND=kind.value
    )


def launch_sums(
    x: Tensor,
    slots: Tensor,
    block: int,
    out: Tensor,
    *,
    mean: bool,
    common: Tensor | None = None,
) -> None:
    """Write the sums or means into `out`, (B, H, S / block, D) of any dtype.

    Args:
        x: (B, H, N, D), see `rowwise`.
        common: (B, H, D) fp32, subtracted from each.
    """
    tensors, sizes = (*rows(x), out if common is None else common, out), out.shape[1:3]
    flags = {"MEAN": mean, "LESS": common is not None}
    launch_blocks(sums_kernel, x, slots, block, tensors, *sizes, **flags)


@triton.jit
def _renewed(b_s, b_max, b_sum):
    """Compute the weights of a further tile of scores, and the sums of all, by the new maximum."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_shift[:, None])
    b_decay = tl.exp2(b_max - b_shift)
    return b_p, b_decay, b_sum * b_decay + tl.sum(b_p, 1), b_new


@triton.jit
def _total(b_max, b_sum):
    return tl.where(
        b_sum == 0.0, -float("inf"), b_max + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum))
    )


@triton.jit
def pool_blocks(
    means,
    k,
    v,
    pooled_k,
    pooled_v,
    bias,
    spreads,
    curves,
    common,
    squares,
    key_means,
    weight,
    keep,
    slots,
    keep_b,
    keep_h,
    keep_r,
    keep_c,
    i_group,
    i_pair,
    i_first,
    groups,
    H,
    N,
    R,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    CURVED: tl.constexpr,
    SPREADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Pool BLOCKS key blocks from `i_first` on for one group of query blocks, whose pairs are rows
    from `i_pair` on: write their keys, values and biases; if CURVED also their variances, and if
    SPREADS l."""
    TILES: tl.constexpr = (BLOCK_K + TILE_N - 1) // TILE_N
    i_head = (i_group // groups).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    o_i = i_group % groups * GROUP + tl.arange(0, GROUP)
    o_i = tl.where(o_i < R, o_i, -1)
    b_mean = load_rows((means + i_head * R * D, D), o_i, D, BLOCK_D, True)
    o_p = i_pair.to(tl.int64) + tl.arange(0, GROUP)
    o_in = tl.where(o_i >= 0, o_p, -1)
    k = of_head(k, i_b, i_h)
    v = of_head(v, i_b, i_h)
    keep += i_b * keep_b + i_h * keep_h + o_i * keep_r
    squares += i_head * N
    key_means += i_head * C * D
    weight += i_head * D
    for i_c in range(i_first, tl.minimum(i_first + BLOCKS, C)):
        b_key = tl.zeros([GROUP, BLOCK_D], tl.float32)
        b_value = tl.zeros([GROUP, BLOCK_D], tl.float32)
        b_own = tl.zeros([GROUP], tl.float32)
        b_square = tl.zeros([GROUP], tl.float32)
        b_sum = tl.zeros([GROUP], tl.float32)
        b_all = tl.zeros([GROUP], tl.float32)
        b_max = tl.full([GROUP], -float("inf"), tl.float32)
        for i_tile in tl.range(0, TILES, num_stages=STAGES):
            _, o_t = own_tile(slots, i_c, i_tile, BLOCK_K, TILE_N)
            b_k = load_rows(k, o_t, D, BLOCK_D, True)
            b_v = load_rows(v, o_t, D, BLOCK_D, True)
            # [GROUP, TILE_N]
            b_s = dot(b_mean, tl.trans(b_k)) * scale
            b_s = tl.where((o_t >= 0)[None, :], b_s, -float("inf"))
            b_p, b_decay, b_sum, b_max = _renewed(b_s, b_max, b_sum)
            # scale qmean . key is the mean of the scores by the weights
            b_s = tl.where((o_t >= 0)[None, :], b_s, 0.0)
            b_low = b_p.to(b_v.dtype)
            b_p = b_low.to(tl.float32)
            b_all = b_all * b_decay + tl.sum(b_p, 1)
            b_own = b_own * b_decay + tl.sum(b_p * b_s, 1)
            if CURVED:
                b_e = tl.load(squares + o_t, mask=o_t >= 0, other=0.0)
                b_square = b_square * b_decay + tl.sum(b_p * b_e[None, :], 1)
            b_key = dot(b_low, b_k, b_key * b_decay[:, None])
            b_value = dot(b_low, b_v, b_value * b_decay[:, None])
        # Weights as the products read them: rounded to 16 bits, they have another sum.
        b_safe = tl.where(b_all == 0.0, 1.0, b_all)
        store_rows((pooled_v + i_c * D, C * D), o_in, b_value / b_safe[:, None], D, BLOCK_D)
        b_common = one_row(common, i_head, D, BLOCK_D)
        b_key = b_key / b_safe[:, None] - b_common[None, :]
        store_rows((pooled_k + i_c * D, C * D), o_in, b_key, D, BLOCK_D)
        b_l = _total(b_max, b_sum)
        if SPREADS:
            tl.store(spreads + o_p * C + i_c, b_l, mask=o_i >= 0)
        b_kept = tl.load(keep + i_c * keep_c, mask=o_i >= 0, other=1)
        b_bias = tl.where(b_kept != 0, -float("inf"), b_l - b_own / b_safe)
        tl.store(bias + o_p * C + i_c, b_bias, mask=o_i >= 0)
        if CURVED:
            tl.debug_barrier()  # keys are read again, so that fewer registers hold them
            b_key = load_rows((pooled_k + i_c * D, C * D), o_in, D, BLOCK_D, True).to(tl.float32)
            b_mid = one_row(key_means, i_c, D, BLOCK_D)
            b_apart = b_key + (b_common - b_mid)[None, :]
            b_weight = one_row(weight, 0, D, BLOCK_D)
            b_off = tl.sum(b_apart * b_apart * b_weight[None, :], 1)
            b_curve = tl.maximum(b_square / b_safe - b_off, 0.0)  # a rise may be vast
            tl.store(curves + o_p * C + i_c, b_curve * LOG2E, mask=o_i >= 0)


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(
    means,
    k,
    v,
    pooled_k,
    pooled_v,
    bias,
    spreads,
    curves,
    common,
    squares,
    key_means,
    weight,
    keep,
    slots,
    keep_b,
    keep_h,
    keep_r,
    keep_c,
    first,
    groups,
    H,
    N,
    R,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    CURVED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Run `pool_blocks` for the groups of a chunk, from `first` on."""
    pool_blocks(
        means,
        k,
        v,
        pooled_k,
        pooled_v,
        bias,
        spreads,
        curves,
        common,
        squares,
        key_means,
        weight,
        keep,
        slots,
        keep_b,
        keep_h,
        keep_r,
        keep_c,
        first + tl.program_id(1),
        tl.program_id(1) * GROUP,
        tl.program_id(0) * BLOCKS,
        groups,
        H,
        N,
        R,
        C,
        scale,
        D,
        BLOCK_D,
        BLOCK_K,
        GROUP,
        TILE_N,
        BLOCKS,
        CURVED,
        True,
        STAGES,
    )


@triton.jit(do_not_specialize=SIZES)
def pool_backward_kernel(
    means,
    k,
    v,
    pooled_dk,
    pooled_dv,
    dbias,
    shifts,
    dcurves,
    spreads,
    common,
    squares,
    key_means,
    weight,
    dk_sums,
    dv_sums,
    dmean_parts,
    dweight_sums,
    slots,
    first,
    last,
    groups,
    H,
    N,
    R,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    CURVED: tl.constexpr,
):
    """Add the parts of groups `first` to `last` of one head to the gradients of a tile of keys and
    values, and write for each of their pairs its part of the gradient of the mean query. If
    CURVED, also add the part of the tile's squares to the gradient of w."""
    TILES: tl.constexpr = (BLOCK_K + TILE_N - 1) // TILE_N
    i_part = tl.program_id(0)
    i_c, i_tile = i_part // TILES, i_part % TILES
    i_head = (first // groups + tl.program_id(1)).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    means += i_head * R * D
    _, o_t = own_tile(slots, i_c, i_tile, BLOCK_K, TILE_N)
    b_k = load_rows(of_head(k, i_b, i_h), o_t, D, BLOCK_D, True)
    b_v = load_rows(of_head(v, i_b, i_h), o_t, D, BLOCK_D, True)
    b_dk = load_rows((dk_sums + i_head * N * D, D), o_t, D, BLOCK_D, True)
    b_dv = load_rows((dv_sums + i_head * N * D, D), o_t, D, BLOCK_D, True)
    b_own = (b_k.to(tl.float32) - one_row(common, i_head, D, BLOCK_D)[None, :]).to(b_k.dtype)
    b_e = tl.zeros([TILE_N], tl.float32)
    b_de = tl.zeros([TILE_N], tl.float32)
    if CURVED:
        b_e = tl.load(squares + i_head * N + o_t, mask=o_t >= 0, other=0.0)
    pooled_dk += i_c * D
    pooled_dv += i_c * D
    dmean_parts += i_part * D
    i_own = (first // groups + tl.program_id(1)) * groups  # the first group of the head
    start = tl.maximum(first, i_own) * GROUP
    stop = tl.minimum(last, i_own + groups) * GROUP
    for i_row in range(start, stop, TILE_M):
        o_i = i_row - i_own * GROUP + tl.arange(0, TILE_M)
        o_p = (i_row - first * GROUP + tl.arange(0, TILE_M)).to(tl.int64)
        o_in = tl.where(o_i < R, o_p, -1)
        b_mean = load_rows((means, D), tl.where(o_i < R, o_i, -1), D, BLOCK_D, True)
        b_dkey = load_rows((pooled_dk, C * D), o_in, D, BLOCK_D, True)
        b_dvalue = load_rows((pooled_dv, C * D), o_in, D, BLOCK_D, True)
        p_pair = o_p * C + i_c
        b_l = tl.load(spreads + p_pair, mask=o_i < R, other=float("inf"))
        b_shift = tl.load(shifts + p_pair, mask=o_i < R, other=0.0)
        b_dl = tl.load(dbias + p_pair, mask=o_i < R, other=0.0)
        # [TILE_N, TILE_M]
        b_s = dot(b_k, tl.trans(b_mean)) * scale
        b_p = tl.where((o_t >= 0)[:, None], tl.exp2(b_s - b_l[None, :]), 0.0)
        b_x = dot(b_v, tl.trans(b_dvalue), dot(b_k, tl.trans(b_dkey)))
        if CURVED:
            b_dcurve = tl.load(dcurves + p_pair, mask=o_i < R, other=0.0)
            b_x += b_e[:, None] * b_dcurve[None, :]
            b_de += tl.sum(b_p * b_dcurve[None, :], 1)
        b_x = b_p * (b_x - b_shift[None, :])
        b_da = ((b_x + b_p * b_dl[None, :]) * (scale * LN2)).to(b_mean.dtype)
        b_x = (b_x * (scale * LN2)).to(b_k.dtype)
        b_p = b_p.to(b_k.dtype)
        b_dv = dot(b_p, b_dvalue, b_dv)
        b_dk = dot(b_p, b_dkey, b_dk)
        b_dk = dot(b_da, b_mean, b_dk)
        # The mean of the keys cancels exactly between the terms from l and from the bias. Columns
        # of b_x sum up to 0, so that the common part of keys adds rounding alone.
        store_rows((dmean_parts, C * TILES * D), o_in, dot(tl.trans(b_x), b_own), D, BLOCK_D)
    if CURVED:
        o_d = tl.arange(0, BLOCK_D)
        b_weight = one_row(weight, i_head, D, BLOCK_D)
        b_mid = one_row(key_means, i_head * C + i_c, D, BLOCK_D)
        b_off = b_k.to(tl.float32) - b_mid[None, :]
        b_dk += 2 * b_de[:, None] * b_weight[None, :] * b_off
        p_sum = dweight_sums + (i_head * C * TILES + i_part) * D + o_d
        b_sum = tl.load(p_sum, mask=o_d < D, other=0.0)
        b_sum += tl.sum(b_de[:, None] * b_off * b_off, 0)
        tl.store(p_sum, b_sum, mask=o_d < D)
    store_rows((dk_sums + i_head * N * D, D), o_t, b_dk, D, BLOCK_D)
    store_rows((dv_sums + i_head * N * D, D), o_t, b_dv, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def spread_kernel(
    wide_means,
    k,
    spreads,
    slots,
    groups,
    H,
    R,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write ln sum_s exp(a_s) of BLOCKS key blocks and one group of mean queries, in fp32. With 16
    bits the means are split in two parts, the second being the remainder of the first."""
    TILES: tl.constexpr = (BLOCK_K + TILE_N - 1) // TILE_N
    i_head = tl.program_id(1).to(tl.int64)
    k = of_head(k, i_head // H, i_head % H)
    o_i = tl.program_id(0) % groups * GROUP + tl.arange(0, GROUP)
    o_in = tl.where(o_i < R, o_i, -1)
    b_wide = load_rows((wide_means + i_head * R * D, D), o_in, D, BLOCK_D, True)
    kind: tl.constexpr = k[0].dtype.element_ty
    b_mean = b_wide.to(kind)
    b_more = (b_wide - b_mean.to(tl.float32)).to(kind)
    spreads += i_head * R * C + o_i.to(tl.int64) * C
    i_first = tl.program_id(0) // groups * BLOCKS
    for i_c in range(i_first, tl.minimum(i_first + BLOCKS, C)):
        b_sum = tl.zeros([GROUP], tl.float32)
        b_max = tl.full([GROUP], -float("inf"), tl.float32)
        for i_tile in range(TILES):
            _, o_t = own_tile(slots, i_c, i_tile, BLOCK_K, TILE_N)
            b_k = load_rows(k, o_t, D, BLOCK_D, True)
            b_s = dot(b_mean, tl.trans(b_k))
            if kind != tl.float32:
                b_s = dot(b_more, tl.trans(b_k), b_s)
            b_s = tl.where((o_t >= 0)[None, :], b_s * scale, -float("inf"))
            _, _, b_sum, b_max = _renewed(b_s, b_max, b_sum)
        tl.store(spreads + i_c, _total(b_max, b_sum) * LN2, mask=o_i < R)
