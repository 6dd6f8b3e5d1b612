"""Gradients of the softmax over columns, see `rest_columns`; prefixes of names as in `tiles`.

`lse` is the log-sum-exp without the score of the common key, `delta` as in `sparse_backward`. The
gradients of a query's scores sum to the gradient of its log-sum-exp.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from gen_accel.kernels.triton.rest_columns import (
    MOST,
    SIZES,
    column_bias,
    pair_at,
)
from gen_accel.kernels.triton.sparse_backward import statistics
from gen_accel.kernels.triton.tiles import (
    LN2,
    dot,
    load_rows,
    of_head,
    one_row,
    own_tile,
    store_rows,
)


@triton.jit(do_not_specialize=SIZES)
def columns_dq_kernel(
    q,
    grad,
    pooled_k,
    pooled_v,
    bias,
    curves,
    rise,
    common,
    grad_lse,
    dmeans,
    held,
    dq,
    drise,
    lse,
    delta,
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
    BLOCK_Q: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    CENTRED: tl.constexpr,
    CURVED: tl.constexpr,
):
    """Write the gradient of queries; if CENTRED with their part of the gradient of the mean, and
    if CURVED the gradient of their rise."""
    TILES: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    i_pair, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_head, i_block = pair_at(first, groups, i_pair, GROUP)
    if i_block >= R:
        return
    i_b, i_h = i_head // H, i_head % H
    keep += i_b * keep_b + i_h * keep_h + i_block * keep_r
    if CENTRED:
        i_set = i_pair.to(tl.int64)
        bias += i_set * C
        curves += i_set * C
    else:
        i_set = i_head
    pooled_k += i_set * C * D
    pooled_v += i_set * C * D

    _, o_t = own_tile(slots, i_block, i_tile, BLOCK_Q, TILE_M)
    b_q = load_rows(of_head(q, i_b, i_h), o_t, D, BLOCK_D, True)
    b_grad = load_rows(of_head(grad, i_b, i_h), o_t, D, BLOCK_D, True)
    b_lse, b_delta = statistics(lse + i_head * N, delta + i_head * N, o_t)
    b_dq = tl.zeros([TILE_M, BLOCK_D], tl.float32)
    b_drise = tl.zeros([TILE_M], tl.float32)
    if CURVED:
        b_rise = tl.load(rise + i_head * N + o_t, mask=o_t >= 0, other=0.0)
    for i_c in range(0, C, TILE_N):
        o_c = i_c + tl.arange(0, TILE_N)
        o_in = tl.where(o_c < C, o_c, -1)
        b_k = load_rows((pooled_k, D), o_in, D, BLOCK_D, True)
        b_v = load_rows((pooled_v, D), o_in, D, BLOCK_D, True)
        b_bias = column_bias(bias, keep, keep_c, o_c, C, CENTRED)
        # [TILE_M, TILE_N]
        b_s = dot(b_q, tl.trans(b_k)) * scale + b_bias[None, :]
        if CURVED:
            b_curve = tl.load(curves + o_c, mask=o_c < C, other=0.0)
            b_gain = b_rise[:, None] * b_curve[None, :]
            b_s += tl.minimum(b_gain, MOST)
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_ds = b_p * (dot(b_grad, tl.trans(b_v)) - b_delta[:, None])
        if CURVED:
            b_drise += tl.sum(tl.where(b_gain < MOST, b_ds * b_curve[None, :], 0.0), 1)
        b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
    b_given = tl.load(grad_lse + i_head * N + o_t, mask=o_t >= 0, other=0.0)
    b_given = tl.where(b_lse < float("inf"), b_given, 0.0)  # whatever is given to no columns
    b_dq += b_given[:, None] * one_row(common, i_head, D, BLOCK_D)[None, :]
    b_dq *= scale * LN2
    if CENTRED:
        b_dmean = one_row(dmeans, i_set, D, BLOCK_D)
        b_dq += b_dmean[None, :] / tl.maximum(tl.load(held + 2 * i_block), 1.0)
    if CURVED:
        tl.store(drise + i_head * N + o_t, b_drise * LN2, mask=o_t >= 0)
    store_rows(of_head(dq, i_b, i_h), o_t, b_dq, D, BLOCK_D)


@triton.jit
def _columns_sums(
    b_k,
    b_v,
    o_c,
    rows,
    columns,
    lists,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    CENTRED: tl.constexpr,
    CURVED: tl.constexpr,
):
    """Sum over tiles of query blocks from `start` to `stop`: for each column, queries weighed by
    the gradient of its scores, and gradients of outputs weighed by its weights. If CENTRED, sum
    also the gradient of its bias, and if CURVED the gradient of its variance.

    Args:
        rows: of the head, q, grad, rise, lse and delta.
        columns: of the set, bias and curves; keep of the head with two strides.
        lists: slots, and the tiles to start and to stop at.
    """
    q, grad, rise, lse, delta = rows
    bias, curves, keep, keep_r, keep_c = columns
    slots, start, stop = lists
    TILES: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    b_dk = tl.zeros([TILE_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([TILE_N, BLOCK_D], tl.float32)
    b_dbias = tl.zeros([TILE_N], tl.float32)
    b_dcurve = tl.zeros([TILE_N], tl.float32)
    if CURVED:
        b_curve = tl.load(curves + o_c, mask=o_c < C, other=0.0)
    # Places are fetched one tile ahead, so that loads depend on no load of the same turn.
    _, o_t = own_tile(slots, start // TILES, start % TILES, BLOCK_Q, TILE_M)
    for i in range(start, stop):
        b_q = load_rows(q, o_t, D, BLOCK_D, True)
        b_grad = load_rows(grad, o_t, D, BLOCK_D, True)
        b_lse, b_delta = statistics(lse, delta, o_t)
        row = keep + i // TILES * keep_r
        b_bias = column_bias(bias, row, keep_c, o_c, C, CENTRED)
        # [TILE_N, TILE_M]
        b_s = dot(b_k, tl.trans(b_q)) * scale + b_bias[:, None]
        if CURVED:
            b_rise = tl.load(rise + o_t, mask=o_t >= 0, other=0.0)
            b_gain = b_curve[:, None] * b_rise[None, :]
            b_s += tl.minimum(b_gain, MOST)
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_dv = dot(b_p.to(b_grad.dtype), b_grad, b_dv)
        b_ds = b_p * (dot(b_v, tl.trans(b_grad)) - b_delta[None, :])
        b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
        if CENTRED:
            b_dbias += tl.sum(b_ds, 1)
        if CURVED:
            b_dcurve += tl.sum(tl.where(b_gain < MOST, b_ds * b_rise[None, :], 0.0), 1)
        i_next = tl.minimum(i + 1, stop - 1)
        _, o_t = own_tile(slots, i_next // TILES, i_next % TILES, BLOCK_Q, TILE_M)
    return b_dk, b_dv, b_dbias, b_dcurve


@triton.jit(do_not_specialize=SIZES)
def columns_dkdv_kernel(
    q,
    grad,
    pooled_k,
    pooled_v,
    bias,
    dk,
    dv,
    lse,
    delta,
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
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Write the gradients of mean keys and values, in equal parts to the tokens of their
    blocks."""
    TILES: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    i_head = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    o_c = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    o_in = tl.where(o_c < C, o_c, -1)
    b_k = load_rows((pooled_k + i_head * C * D, D), o_in, D, BLOCK_D, True)
    b_v = load_rows((pooled_v + i_head * C * D, D), o_in, D, BLOCK_D, True)
    q = of_head(q, i_b, i_h)
    grad = of_head(grad, i_b, i_h)
    keep += i_b * keep_b + i_h * keep_h
    # No rise and no curves: in their places anything.
    rows = (q, grad, lse, lse + i_head * N, delta + i_head * N)
    b_dk, b_dv, _, _ = _columns_sums(
        *(b_k, b_v, o_c, rows, (bias, bias, keep, keep_r, keep_c), (slots, 0, R * TILES)),
        *(C, scale, D, BLOCK_D, BLOCK_Q, TILE_M, TILE_N, False, False),
    )
    b_part = tl.exp2(-tl.maximum(tl.load(bias + o_c, mask=o_c < C, other=0.0), 0.0))
    b_dk *= (b_part * (scale * LN2))[:, None]
    b_dv *= b_part[:, None]
    dk = of_head(dk, i_b, i_h)
    dv = of_head(dv, i_b, i_h)
    for i_r in range(BLOCK_K):
        o_t = tl.load(slots + o_c * BLOCK_K + i_r, mask=o_c < C, other=-1)
        store_rows(dk, o_t, b_dk, D, BLOCK_D)
        store_rows(dv, o_t, b_dv, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def columns_dpooled_kernel(
    q,
    grad,
    means,
    pooled_k,
    pooled_v,
    bias,
    curves,
    rise,
    common,
    key_means,
    weight,
    pooled_dk,
    pooled_dv,
    dbias,
    shifts,
    dcurves,
    dweight_parts,
    lse,
    delta,
    slots,
    first,
    groups,
    H,
    N,
    R,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    CURVED: tl.constexpr,
):
    """Write the gradients of CENTRED keys, values and log-sum-exps (from which the bias is made),
    and `shifts`, which the softmax over the tokens of a block subtracts from each token's
    gradient. If CURVED, write also the gradients of variances, and their terms in the gradient of
    the weight by the pooled keys."""
    TILES: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    i_pair = tl.program_id(1)
    i_head, i_block = pair_at(first, groups, i_pair, GROUP)
    if i_block >= R:
        return
    i_b, i_h = i_head // H, i_head % H
    i_set = i_pair.to(tl.int64)
    o_c = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    o_in = tl.where(o_c < C, o_c, -1)
    b_k = load_rows((pooled_k + i_set * C * D, D), o_in, D, BLOCK_D, True)
    b_v = load_rows((pooled_v + i_set * C * D, D), o_in, D, BLOCK_D, True)
    q = of_head(q, i_b, i_h)
    grad = of_head(grad, i_b, i_h)
    rise, lse, delta = rise + i_head * N, lse + i_head * N, delta + i_head * N
    # The bias hides columns; in place of `keep` anything.
    columns = (bias + i_set * C, curves + i_set * C, slots, 0, 0)
    b_dk, b_dv, b_dbias, b_dcurve = _columns_sums(
        *(b_k, b_v, o_c, (q, grad, rise, lse, delta), columns),
        *((slots, i_block * TILES, i_block * TILES + TILES), C, scale),
        *(D, BLOCK_D, BLOCK_Q, TILE_M, TILE_N, True, CURVED),
    )
    o_d = tl.arange(0, BLOCK_D)
    b_mean = one_row(means, i_head * R + i_block, D, BLOCK_D)
    b_dk -= b_dbias[:, None] * b_mean.to(tl.float32)[None, :]
    b_dk *= scale * LN2
    p_pair = i_set * C + o_c
    # Rounded as stored, so that a token's gradient is shifted by exactly their mean. Pooled values
    # and keys are read again, so that no register holds them throughout the loop.
    b_dv = b_dv.to(b_v.dtype)
    store_rows((pooled_dv + i_set * C * D, D), o_in, b_dv, D, BLOCK_D)
    b_v = load_rows((pooled_v + i_set * C * D, D), o_in, D, BLOCK_D, True)
    b_shift = tl.sum(b_dv.to(tl.float32) * b_v.to(tl.float32), 1)
    b_common = one_row(common, i_head, D, BLOCK_D)
    if CURVED:
        b_key = load_rows((pooled_k + i_set * C * D, D), o_in, D, BLOCK_D, True).to(tl.float32)
        b_mid = load_rows((key_means + i_head * C * D, D), o_in, D, BLOCK_D, True).to(tl.float32)
        b_apart = b_key + (b_common[None, :] - b_mid)
        p_part = (i_head * R + i_block) * tl.num_programs(0) + tl.program_id(0)
        b_part = tl.sum(b_dcurve[:, None] * b_apart * b_apart, 0)
        tl.store(dweight_parts + p_part * D + o_d, b_part, mask=o_d < D)
        b_weight = one_row(weight, i_head, D, BLOCK_D)
        b_square = tl.sum(b_apart * b_apart * b_weight[None, :], 1)
        b_square += tl.load(curves + i_set * C + o_c, mask=o_c < C, other=0.0) * LN2
        b_shift += b_dcurve * b_square
        tl.store(dcurves + p_pair, b_dcurve, mask=o_c < C)
        b_dk -= b_dcurve[:, None] * (2 * b_apart * b_weight[None, :])
    b_dk = b_dk.to(b_k.dtype)
    store_rows((pooled_dk + i_set * C * D, D), o_in, b_dk, D, BLOCK_D)
    b_k = load_rows((pooled_k + i_set * C * D, D), o_in, D, BLOCK_D, True)
    b_shift += tl.sum(b_dk.to(tl.float32) * (b_k.to(tl.float32) + b_common[None, :]), 1)
    tl.store(dbias + p_pair, b_dbias, mask=o_c < C)
    tl.store(shifts + p_pair, b_shift, mask=o_c < C)
