"""Softmax of queries over columns, what a rest has for left-out blocks; prefixes of names as in
`tiles`.

A column stands for a key block. It has a key, stored off the common key of the head, a value and a
bias in powers of two. A set of columns serves a whole head (the mean keys, with the log2 of their
number of tokens as bias), or, if CENTRED, one query block of a head: a pair. Columns of blocks
that the query block keeps, or of empty blocks, are hidden. If CURVED, the score of a query gains
its rise times the curve of the column, a variance in powers of two.

The common key c of a head adds scale q_t . c to all scores of query t, kept and pooled, and
changes no weight. In 16 bits it costs digits of the differences of pooled keys. So pooled keys are
stored off c, and scale q_t . c is added to the log-sum-exp of the columns: both are exact for any
c. The nearer c is to the keys, the better; it need not be their mean.

The slope, see `slope`, adds factor x_t H to the output of the columns. By its share in the softmax
over kept keys and columns it weighs there what `Rest` says.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.launch import launch, rows
from gen_accel.kernels.triton.tiles import (
    INTERPRETED,
    LN2,
    dot,
    load_columns,
    load_rows,
    matrix,
    of_head,
    one_row,
    own_tile,
    store_rows,
)
from gen_accel.plan import MOST_GAINED

WARPS = 4
# Sizes that change from clip to clip, and the strides of `keep`.
SIZES = ("keep_b", "keep_h", "keep_r", "keep_c", "first", "last", "groups", "H", "N", "R", "C")

MOST = tl.constexpr(MOST_GAINED / math.log(2))  # the most that a curve adds to a score


@triton.jit
def common_scores(b_q, b_common, scale):
    """Compute the scores of queries for c."""
    return scale * tl.sum(b_q.to(tl.float32) * b_common[None, :], 1)


@triton.jit(do_not_specialize=("H", "N"))
def common_kernel(
    k,
    common,
    H,
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOME: tl.constexpr,
):
    """Write the mean of SOME keys of one head, spread over its tokens."""
    i_head = tl.program_id(0).to(tl.int64)
    k = of_head(k, i_head // H, i_head % H)
    o_t = tl.arange(0, SOME).to(tl.int64) * N // SOME
    b_k = load_rows(k, o_t, D, BLOCK_D, False).to(tl.float32)
    o_d = tl.arange(0, BLOCK_D)
    tl.store(common + i_head * D + o_d, tl.sum(b_k, 0) / SOME, mask=o_d < D)


def common_of(k: Tensor) -> Tensor:
    """Compute c of each head, (B, H, D) fp32, from keys (B, H, N, D), rows of one stride."""
    B, H, N, D = k.shape
    made = k.new_empty(B, H, D, dtype=torch.float32)
    launch(
        common_kernel,
        (B * H, 1),
        k,
        *(*rows(k), made),
        *(H, N),
        **configs.dims(D),
        SOME=configs.SOME,
        num_warps=WARPS,
    )
    return made


@triton.jit
def pair_at(first, groups, i_pair, GROUP: tl.constexpr):
    """Return the head of all samples and the query block of a pair, perhaps past the last: pairs
    come in groups of query blocks of one head, numbered from `first` on."""
    i_group = first + i_pair // GROUP
    return (i_group // groups).to(tl.int64), i_group % groups * GROUP + i_pair % GROUP


@triton.jit
def column_bias(bias, keep, keep_c, o_c, C, CENTRED: tl.constexpr):
    """Load the bias in powers of two; -inf for hidden columns, and past the last.

    Args:
        keep: the row of a query block. Not read if CENTRED, where the bias hides columns.
    """
    b_bias = tl.load(bias + o_c, mask=o_c < C, other=-float("inf"))
    if not CENTRED:
        b_kept = tl.load(keep + o_c.to(tl.int64) * keep_c, mask=o_c < C, other=1)
        b_bias = tl.where(b_kept != 0, -float("inf"), b_bias)
    return b_bias


@triton.jit
def _sloped(
    b_acc,
    q,
    o_t,
    mean,
    state,
    factor,
    o_c,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Compute acc + factor x H for columns o_c of H, in whose dtype x is multiplied. Queries are
    read again, and in parts, so that no register holds them until here."""
    PART: tl.constexpr = BLOCK_D if BLOCK_D < 32 else 32
    exact: tl.constexpr = q[0].dtype.element_ty == tl.float32
    for i_d in range(0, BLOCK_D, PART):
        o_d = i_d + tl.arange(0, PART)
        b_x = load_columns(q, o_t, o_d, D).to(tl.float32)
        if CENTRED:
            b_x -= tl.load(mean + o_d, mask=o_d < D, other=0.0)[None, :]
        b_h = matrix(state, o_d, o_c, D)
        b_x = (b_x * factor).to(b_h.dtype)
        if INTERPRETED:  # it would multiply the bits of bf16
            b_x, b_h = b_x.to(tl.float32), b_h.to(tl.float32)
        b_acc = tl.dot(b_x, b_h, b_acc, input_precision="ieee" if exact else "tf32")
    return b_acc


@triton.jit
def attend_columns(
    q,
    pooled_k,
    pooled_v,
    bias,
    curves,
    rise,
    common,
    wide_means,
    state,
    out,
    lse,
    low_lse,
    keep,
    slots,
    keep_b,
    keep_h,
    keep_r,
    keep_c,
    i_set,
    i_head,
    i_block,
    i_tile,
    H,
    N,
    R,
    C,
    factor,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    WIDTH: tl.constexpr,
    CENTRED: tl.constexpr,
    CURVED: tl.constexpr,
    SLOPED: tl.constexpr,
):
    """Write, for a tile of a query block, the softmax over all columns of a set, its log-sum-exp,
    and this without the score of the common key; zeros and -inf without a column. If SLOPED add
    the slope, whose H is `state`."""
    FIRST: tl.constexpr = D if D < WIDTH else WIDTH
    i_b, i_h = i_head // H, i_head % H
    keep += i_b * keep_b + i_h * keep_h + i_block * keep_r
    if CENTRED:
        bias += i_set * C
        curves += i_set * C
    pooled_k += i_set * C * D
    pooled_v += i_set * C * D

    _, o_t = own_tile(slots, i_block, i_tile, BLOCK_Q, TILE_M)
    b_q = load_rows(of_head(q, i_b, i_h), o_t, D, BLOCK_D, True)
    b_acc = tl.zeros([TILE_M, WIDTH], tl.float32)
    b_high = b_acc
    b_less = common_scores(b_q, one_row(common, i_head, D, BLOCK_D), scale)
    if CURVED:
        b_rise = tl.load(rise + i_head * N + o_t, mask=o_t >= 0, other=0.0)
    b_max = tl.full([TILE_M], -float("inf"), tl.float32)
    b_sum = tl.zeros([TILE_M], tl.float32)
    for i_c in range(0, C, TILE_N):
        o_c = i_c + tl.arange(0, TILE_N)
        o_in = tl.where(o_c < C, o_c, -1)
        b_k = load_rows((pooled_k, D), o_in, D, BLOCK_D, True)
        b_bias = column_bias(bias, keep, keep_c, o_c, C, CENTRED)
        # [TILE_M, TILE_N]
        b_s = dot(b_q, tl.trans(b_k)) * scale + b_bias[None, :]
        if CURVED:
            b_curve = tl.load(curves + o_c, mask=o_c < C, other=0.0)
            b_s += tl.minimum(b_rise[:, None] * b_curve[None, :], MOST)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)  # nothing seen so far
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_v = load_rows((pooled_v, D), o_in, FIRST, WIDTH, True)
        b_acc = dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None])
        if WIDTH < BLOCK_D:
            b_v = load_rows((pooled_v + WIDTH, D), o_in, D - WIDTH, WIDTH, True)
            b_high = dot(b_p.to(b_v.dtype), b_v, b_high * b_decay[:, None])
        b_max = b_new
    b_safe = tl.where(b_sum == 0.0, 1.0, b_sum)
    q, out = of_head(q, i_b, i_h), of_head(out, i_b, i_h)
    mean = wide_means + (i_head * R + i_block) * D
    state += i_head * D * D
    o_c = tl.arange(0, WIDTH)
    b_acc /= b_safe[:, None]
    if SLOPED:
        b_acc = _sloped(b_acc, q, o_t, mean, state, factor, o_c, D, BLOCK_D, CENTRED)
    store_rows(out, o_t, b_acc, FIRST, WIDTH)
    if WIDTH < BLOCK_D:
        b_high /= b_safe[:, None]
        if SLOPED:
            o_c += WIDTH
            b_high = _sloped(b_high, q, o_t, mean, state, factor, o_c, D, BLOCK_D, CENTRED)
        store_rows((out[0] + WIDTH, out[1]), o_t, b_high, D - WIDTH, WIDTH)
    b_low = tl.where(b_sum == 0.0, -float("inf"), b_max + tl.log2(b_safe))
    tl.store(low_lse + i_head * N + o_t, b_low * LN2, mask=o_t >= 0)
    tl.store(lse + i_head * N + o_t, (b_low + b_less) * LN2, mask=o_t >= 0)


@triton.jit(do_not_specialize=SIZES)
def columns_forward_kernel(
    q,
    pooled_k,
    pooled_v,
    bias,
    common,
    state,
    out,
    lse,
    low_lse,
    keep,
    slots,
    keep_b,
    keep_h,
    keep_r,
    keep_c,
    H,
    N,
    R,
    C,
    factor,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOPED: tl.constexpr,
):
    """Run `attend_columns` around mean keys, one set for each head."""
    TILES: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    i_row, i_head = tl.program_id(0) // TILES, tl.program_id(1).to(tl.int64)
    attend_columns(
        q,
        pooled_k,
        pooled_v,
        bias,
        bias,
        bias,
        common,
        common,
        state,
        out,
        lse,
        low_lse,
        keep,
        slots,
        keep_b,
        keep_h,
        keep_r,
        keep_c,
        i_head,
        i_head,
        i_row,
        tl.program_id(0) % TILES,
        H,
        N,
        R,
        C,
        factor,
        scale,
        D,
        BLOCK_D,
        BLOCK_Q,
        TILE_M,
        TILE_N,
        WIDTH,
        False,
        False,
        SLOPED,
    )
