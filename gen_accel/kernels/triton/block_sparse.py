"""Attention over lists of blocks, in the manner of FlashAttention-2, forward and backward.

Dao, 2023, https://arxiv.org/abs/2307.08691. Unlike there, keys come from a list of blocks, tokens
are addressed through the plan's slots, so that nothing is reordered or copied, and the lengths of
blocks and tiles are independent: the blocks of a list are laid end to end and cut into tiles.

Prefixes: i_ index of a program, block or place, o_ offsets, m_ masks, b_ tiles of values.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from gen_accel.kernels.triton import configs

LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))

# The kinds of rule on token pairs.
NONE, WINDOWS, ROUTE = (tl.constexpr(kind) for kind in range(3))


@triton.jit
def _own(slots, i_block, i_tile, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Slots and tokens of one tile of one block; token -1 for padding and past the block."""
    o_r = i_tile * TILE + tl.arange(0, TILE)
    o_s = i_block * BLOCK + tl.minimum(o_r, BLOCK - 1)
    return o_s, tl.where(o_r < BLOCK, tl.load(slots + o_s), -1)


INTERPRETED = tl.constexpr(not isinstance(_own, JITFunction))


@triton.jit
def _dot(b_x, b_y, b_acc=None):
    """x y + acc in fp32."""
    if INTERPRETED:  # the interpreter would multiply the bits of bf16
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_acc, input_precision="ieee")


@triton.jit
def _listed(index, slots, i_p, stop, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Slots and tokens of a tile that starts at place i_p of the listed blocks, laid end to end.

    Token -1 for padding and from place `stop` on. A tile past the end is read, never used.
    """
    if BLOCK % TILE == 0:
        i_p = tl.maximum(tl.minimum(i_p, stop - TILE), 0)
        o_s = tl.load(index + i_p // BLOCK) * BLOCK + i_p % BLOCK + tl.arange(0, TILE)
        o_t = tl.load(slots + o_s)
    else:
        o_p = i_p + tl.arange(0, TILE)
        o_in = tl.maximum(tl.minimum(o_p, stop - 1), 0)
        o_s = tl.load(index + o_in // BLOCK) * BLOCK + o_in % BLOCK
        o_t = tl.where(o_p < stop, tl.load(slots + o_s), -1)
    return o_s, o_t


@triton.jit
def _rows(x, stride, o_t, D: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr):
    """[tile, BLOCK_D] rows of tokens o_t; zeros for token -1, which only a PADDED tile holds."""
    o_d = tl.arange(0, BLOCK_D)
    p_x = x + o_t.to(tl.int64)[:, None] * stride + o_d[None, :]
    if PADDED and D < BLOCK_D:
        return tl.load(p_x, mask=(o_t >= 0)[:, None] & (o_d < D)[None, :], other=0.0)
    elif PADDED:
        return tl.load(p_x, mask=(o_t >= 0)[:, None], other=0.0)
    elif D < BLOCK_D:
        return tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(p_x)


@triton.jit
def _store_rows(x, stride, o_t, b_x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    p_x = x + o_t.to(tl.int64)[:, None] * stride + o_d[None, :]
    mask = (o_t >= 0)[:, None] & (o_d < D)[None, :]
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _obey(b_s, o_q, o_k, o_block, rule, more, S, C, RULE: tl.constexpr, AXES: tl.constexpr):
    """Scores, -inf where the rule hides a key.

    o_q and o_k have the two axes of the scores, one of them of size 1; o_block is the key block
    of all keys, a scalar, or of each, like o_k.
    """
    if RULE == ROUTE:
        o_c = tl.load(more + o_block)
        m_s = tl.load(rule + o_q.to(tl.int64) * C + o_c) != 0
        b_s = tl.where(m_s, b_s, -float("inf"))
    if RULE == WINDOWS:
        m_k = tl.load(more + o_k) != 0
        # Twice for the first axis, so as to start from a mask in the shape of the scores.
        m_s = tl.load(rule + o_q) <= tl.load(rule + 2 * AXES * S + o_k)
        for a in tl.static_range(AXES):
            b_place = tl.load(rule + (2 * AXES + a) * S + o_k)
            m_s &= tl.load(rule + a * S + o_q) <= b_place
            m_s &= b_place <= tl.load(rule + (AXES + a) * S + o_q)
        b_s = tl.where(m_s | m_k, b_s, -float("inf"))
    return b_s


@triton.jit
def _listed_block(index, o_s, i_p, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The block of the tile at place i_p if it is one, else that of each column."""
    if BLOCK % TILE == 0:
        return tl.load(index + i_p // BLOCK)
    else:
        return o_s[None, :] // BLOCK


@triton.jit
def _forward_phase(
    b_acc,
    b_sum,
    b_max,
    b_q,
    o_q,
    k,
    v,
    stride_k,
    stride_v,
    slots,
    index,
    start,
    stop,
    rule,
    more,
    gain,
    S,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_N: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
    MASKED: tl.constexpr,
):
    PADDED: tl.constexpr = MASKED or BLOCK_K % TILE_N != 0
    # Places are fetched one tile ahead, so that loads of keys depend on no load of their own turn.
    o_k, o_t = _listed(index, slots, start, stop, BLOCK_K, TILE_N)
    for i_p in range(start, stop, TILE_N):
        b_k = _rows(k, stride_k, o_t, D, BLOCK_D, PADDED)
        # [TILE_M, TILE_N]
        b_s = _dot(b_q, tl.trans(b_k)) * scale
        if GAIN:
            b_gain = tl.load(gain + _listed_block(index, o_k, i_p, BLOCK_K, TILE_N))
            b_s = tl.where(b_s > 0, b_s * b_gain, b_s)
        if PADDED:
            b_s = tl.where((o_t >= 0)[None, :], b_s, -float("inf"))
        if MASKED:
            o_block = _listed_block(index, o_k, i_p, BLOCK_K, TILE_N)
            b_s = _obey(b_s, o_q[:, None], o_k[None, :], o_block, rule, more, S, C, RULE, AXES)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = b_new
        if MASKED:
            b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)  # nothing seen so far
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_v = _rows(v, stride_v, o_t, D, BLOCK_D, PADDED)
        b_acc = b_acc * b_decay[:, None]
        b_acc = _dot(b_p.to(b_v.dtype), b_v, b_acc)
        b_max = b_new
        o_k, o_t = _listed(index, slots, i_p + TILE_N, stop, BLOCK_K, TILE_N)
    return b_acc, b_sum, b_max


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    slots,
    index,
    counts,
    rule,
    more,
    gain,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
    pattern_b,
    pattern_h,
    route_b,
    route_h,
    gain_b,
    gain_h,
    width,
    H,
    N,
    S,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
):
    TILES: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    i_block, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_row = (i_b * pattern_b + i_h * pattern_h) * (S // BLOCK_Q) + i_block
    index += i_row * width
    masked = tl.load(counts + 2 * i_row) * BLOCK_K
    total = tl.load(counts + 2 * i_row + 1) * BLOCK_K
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    rule += (i_b * route_b + i_h * route_h) * S * C
    if GAIN:
        gain += ((i_b * gain_b + i_h * gain_h) * (S // BLOCK_Q) + i_block) * (S // BLOCK_K)

    o_q, o_t = _own(slots, i_block, i_tile, BLOCK_Q, TILE_M)
    b_q = _rows(q + i_b * stride_qb + i_h * stride_qh, stride_qn, o_t, D, BLOCK_D, True)
    b_acc = tl.zeros([TILE_M, BLOCK_D], tl.float32)
    b_sum = tl.zeros([TILE_M], tl.float32)
    b_max = tl.full([TILE_M], -float("inf"), tl.float32)
    for MASKED in tl.static_range(1, -1, -1):
        b_acc, b_sum, b_max = _forward_phase(
            b_acc,
            b_sum,
            b_max,
            b_q,
            o_q,
            k,
            v,
            stride_kn,
            stride_vn,
            slots,
            index,
            0 if MASKED else masked,
            masked if MASKED else total,
            rule,
            more,
            gain,
            S,
            C,
            scale,
            D,
            BLOCK_D,
            BLOCK_K,
            TILE_N,
            RULE,
            AXES,
            GAIN,
            MASKED,
        )
    b_safe = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_acc / b_safe[:, None]
    _store_rows(out + i_b * stride_ob + i_h * stride_oh, stride_on, o_t, b_out, D, BLOCK_D)
    b_lse = tl.where(b_sum == 0.0, -float("inf"), (b_max + tl.log2(b_safe)) * LN2)
    tl.store(lse + (i_b * H + i_h) * N + o_t, b_lse, mask=o_t >= 0)


@triton.jit
def delta_kernel(
    out,
    grad,
    lse,
    grad_lse,
    delta,
    stride_ob,
    stride_oh,
    stride_on,
    stride_gb,
    stride_gh,
    stride_gn,
    H,
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """What the softmax takes from every gradient of a row's scores: sum(grad * out) - grad_lse."""
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o_t = tl.where(o_n < N, o_n, -1)
    b_out = _rows(out + i_b * stride_ob + i_h * stride_oh, stride_on, o_t, D, BLOCK_D, True)
    b_grad = _rows(grad + i_b * stride_gb + i_h * stride_gh, stride_gn, o_t, D, BLOCK_D, True)
    o_row = (i_b * H + i_h) * N + o_n
    b_lse = tl.load(lse + o_row, mask=o_n < N, other=0.0)
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    b_delta -= tl.load(grad_lse + o_row, mask=o_n < N, other=0.0)
    # Whatever gradient arrives at the -inf of a row that sees nothing goes nowhere.
    tl.store(delta + o_row, tl.where(b_lse == -float("inf"), 0.0, b_delta), mask=o_n < N)


@triton.jit
def _statistics(lse, delta, o_t):
    """The base-2 logsumexp and delta of tokens; +inf and 0 where a row sees nothing or is padding,
    which makes its weights zero."""
    b_lse = tl.load(lse + o_t, mask=o_t >= 0, other=-float("inf"))
    b_lse = tl.where(b_lse == -float("inf"), float("inf"), b_lse * LOG2E)
    return b_lse, tl.load(delta + o_t, mask=o_t >= 0, other=0.0)


@triton.jit
def _dq_phase(
    b_dq,
    b_q,
    b_grad,
    b_lse,
    b_delta,
    o_q,
    k,
    v,
    stride_k,
    stride_v,
    slots,
    index,
    start,
    stop,
    rule,
    more,
    gain,
    S,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_N: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
    MASKED: tl.constexpr,
):
    PADDED: tl.constexpr = MASKED or BLOCK_K % TILE_N != 0
    o_k, o_t = _listed(index, slots, start, stop, BLOCK_K, TILE_N)
    for i_p in range(start, stop, TILE_N):
        b_k = _rows(k, stride_k, o_t, D, BLOCK_D, PADDED)
        b_v = _rows(v, stride_v, o_t, D, BLOCK_D, PADDED)
        # [TILE_M, TILE_N]
        b_s = _dot(b_q, tl.trans(b_k)) * scale
        if GAIN:
            b_gain = tl.load(gain + _listed_block(index, o_k, i_p, BLOCK_K, TILE_N))
            b_s = tl.where(b_s > 0, b_s * b_gain, b_s)
        if PADDED:
            b_s = tl.where((o_t >= 0)[None, :], b_s, -float("inf"))
        if MASKED:
            o_block = _listed_block(index, o_k, i_p, BLOCK_K, TILE_N)
            b_s = _obey(b_s, o_q[:, None], o_k[None, :], o_block, rule, more, S, C, RULE, AXES)
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_dp = _dot(b_grad, tl.trans(b_v))
        b_ds = b_p * (b_dp - b_delta[:, None])
        if GAIN:
            b_ds = tl.where(b_s > 0, b_ds * b_gain, b_ds)
        b_dq = _dot(b_ds.to(b_k.dtype), b_k, b_dq)
        o_k, o_t = _listed(index, slots, i_p + TILE_N, stop, BLOCK_K, TILE_N)
    return b_dq


@triton.jit
def dq_kernel(
    q,
    k,
    v,
    grad,
    dq,
    lse,
    delta,
    slots,
    index,
    counts,
    rule,
    more,
    gain,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_db,
    stride_dh,
    stride_dn,
    pattern_b,
    pattern_h,
    route_b,
    route_h,
    gain_b,
    gain_h,
    width,
    H,
    N,
    S,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
):
    TILES: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    i_block, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_row = (i_b * pattern_b + i_h * pattern_h) * (S // BLOCK_Q) + i_block
    index += i_row * width
    masked = tl.load(counts + 2 * i_row) * BLOCK_K
    total = tl.load(counts + 2 * i_row + 1) * BLOCK_K
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    rule += (i_b * route_b + i_h * route_h) * S * C
    if GAIN:
        gain += ((i_b * gain_b + i_h * gain_h) * (S // BLOCK_Q) + i_block) * (S // BLOCK_K)
    lse += (i_b * H + i_h) * N
    delta += (i_b * H + i_h) * N

    o_q, o_t = _own(slots, i_block, i_tile, BLOCK_Q, TILE_M)
    b_q = _rows(q + i_b * stride_qb + i_h * stride_qh, stride_qn, o_t, D, BLOCK_D, True)
    b_grad = _rows(grad + i_b * stride_gb + i_h * stride_gh, stride_gn, o_t, D, BLOCK_D, True)
    b_lse, b_delta = _statistics(lse, delta, o_t)
    b_dq = tl.zeros([TILE_M, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(1, -1, -1):
        b_dq = _dq_phase(
            b_dq,
            b_q,
            b_grad,
            b_lse,
            b_delta,
            o_q,
            k,
            v,
            stride_kn,
            stride_vn,
            slots,
            index,
            0 if MASKED else masked,
            masked if MASKED else total,
            rule,
            more,
            gain,
            S,
            C,
            scale,
            D,
            BLOCK_D,
            BLOCK_K,
            TILE_N,
            RULE,
            AXES,
            GAIN,
            MASKED,
        )
    b_dq *= scale * LN2
    _store_rows(dq + i_b * stride_db + i_h * stride_dh, stride_dn, o_t, b_dq, D, BLOCK_D)


@triton.jit
def _dkdv_phase(
    b_dk,
    b_dv,
    b_k,
    b_v,
    o_k,
    i_block,
    q,
    grad,
    lse,
    delta,
    stride_q,
    stride_g,
    slots,
    index,
    start,
    stop,
    rule,
    more,
    gain,
    S,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_M: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
    MASKED: tl.constexpr,
):
    # No mask for padding: weights of padded queries are zero by their statistics, and rows of
    # padded keys are not stored.
    o_q, o_t = _listed(index, slots, start, stop, BLOCK_Q, TILE_M)
    for i_p in range(start, stop, TILE_M):
        b_q = _rows(q, stride_q, o_t, D, BLOCK_D, True)
        b_grad = _rows(grad, stride_g, o_t, D, BLOCK_D, True)
        b_lse, b_delta = _statistics(lse, delta, o_t)
        # [TILE_N, TILE_M]
        b_s = _dot(b_k, tl.trans(b_q)) * scale
        if GAIN:
            o_block = _listed_block(index, o_q, i_p, BLOCK_Q, TILE_M)
            b_gain = tl.load(gain + o_block * (S // BLOCK_K))
            b_s = tl.where(b_s > 0, b_s * b_gain, b_s)
        if MASKED:
            b_s = _obey(b_s, o_q[None, :], o_k[:, None], i_block, rule, more, S, C, RULE, AXES)
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_dv = _dot(b_p.to(b_grad.dtype), b_grad, b_dv)
        b_dp = _dot(b_v, tl.trans(b_grad))
        b_ds = b_p * (b_dp - b_delta[None, :])
        if GAIN:
            b_ds = tl.where(b_s > 0, b_ds * b_gain, b_ds)
        b_dk = _dot(b_ds.to(b_q.dtype), b_q, b_dk)
        o_q, o_t = _listed(index, slots, i_p + TILE_M, stop, BLOCK_Q, TILE_M)
    return b_dk, b_dv


@triton.jit
def dkdv_kernel(
    q,
    k,
    v,
    grad,
    dk,
    dv,
    lse,
    delta,
    slots,
    index,
    counts,
    rule,
    more,
    gain,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_db,
    stride_dh,
    stride_dn,
    stride_eb,
    stride_eh,
    stride_en,
    pattern_b,
    pattern_h,
    route_b,
    route_h,
    gain_b,
    gain_h,
    width,
    H,
    N,
    S,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
):
    TILES: tl.constexpr = (BLOCK_K + TILE_N - 1) // TILE_N
    i_block, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_row = (i_b * pattern_b + i_h * pattern_h) * (S // BLOCK_K) + i_block
    index += i_row * width
    masked = tl.load(counts + 2 * i_row) * BLOCK_Q
    total = tl.load(counts + 2 * i_row + 1) * BLOCK_Q
    q += i_b * stride_qb + i_h * stride_qh
    grad += i_b * stride_gb + i_h * stride_gh
    rule += (i_b * route_b + i_h * route_h) * S * C
    if GAIN:
        gain += (i_b * gain_b + i_h * gain_h) * (S // BLOCK_Q) * (S // BLOCK_K) + i_block
    lse += (i_b * H + i_h) * N
    delta += (i_b * H + i_h) * N

    o_k, o_t = _own(slots, i_block, i_tile, BLOCK_K, TILE_N)
    b_k = _rows(k + i_b * stride_kb + i_h * stride_kh, stride_kn, o_t, D, BLOCK_D, True)
    b_v = _rows(v + i_b * stride_vb + i_h * stride_vh, stride_vn, o_t, D, BLOCK_D, True)
    b_dk = tl.zeros([TILE_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([TILE_N, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(0 if RULE == NONE else 1, -1, -1):
        b_dk, b_dv = _dkdv_phase(
            b_dk,
            b_dv,
            b_k,
            b_v,
            o_k,
            i_block,
            q,
            grad,
            lse,
            delta,
            stride_qn,
            stride_gn,
            slots,
            index,
            0 if MASKED or RULE == NONE else masked,
            masked if MASKED else total,
            rule,
            more,
            gain,
            S,
            C,
            scale,
            D,
            BLOCK_D,
            BLOCK_Q,
            BLOCK_K,
            TILE_M,
            RULE,
            AXES,
            GAIN,
            MASKED,
        )
    b_dk *= scale * LN2
    _store_rows(dk + i_b * stride_db + i_h * stride_dh, stride_dn, o_t, b_dk, D, BLOCK_D)
    _store_rows(dv + i_b * stride_eb + i_h * stride_eh, stride_en, o_t, b_dv, D, BLOCK_D)


def _launch(
    kind: str,
    kernel: Any,
    tensors: Sequence[Tensor],
    lists: tuple[Tensor, Tensor, Tensor],
    rule: Sequence[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> None:
    """Run one of the three kernels above over the rows of `lists`.

    Args:
        tensors: what the kernel takes before `slots`; those of four axes are given by stride.
        lists: slots, index and counts.
    """
    q = tensors[0]
    B, H, N, D = q.shape
    slots, index, _ = lists
    picks = rule[0] if rule and rule[0].ndim == 4 else None
    mode = (NONE if not rule else WINDOWS if picks is None else ROUTE).value
    windows = mode == WINDOWS.value
    facts = {"ruled": mode != NONE.value, "gain": gain is not None}
    config = configs.choose(kind, q, block_q, block_k, **facts)
    block, tile = (block_k, config.tile_n) if kind == "dkdv" else (block_q, config.tile_m)
    kernel[index.shape[2] * triton.cdiv(block, tile), B * H](
        *tensors,
        *lists,
        *(rule or (slots, slots)),
        slots if gain is None else gain,
        *(step for x in tensors if x.ndim == 4 for step in x.stride()[:3]),
        *configs.pattern_strides(index),
        *((0, 0) if picks is None else configs.pattern_strides(picks)),
        *((0, 0) if gain is None else configs.pattern_strides(gain)),
        index.shape[3],
        H,
        N,
        slots.numel(),
        1 if picks is None else picks.shape[3],
        scale / math.log(2),
        D=D,
        BLOCK_D=configs.padded_dim(D),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        RULE=mode,
        AXES=rule[0].shape[1] if windows else 0,
        GAIN=gain is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _rowwise(x: Tensor) -> Tensor:
    """The kernels take any strides but one: the numbers of a head lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op("gen_accel::triton_attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    rows: Tensor,
    row_counts: Tensor,
    columns: Tensor | None,
    column_counts: Tensor | None,
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, (B, H, N, D) laid out like q, and the logsumexp, (B, H, N) fp32."""
    q, k, v = (_rowwise(x) for x in (q, k, v))
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tensors = q, k, v, out, lse
    lists = slots, rows, row_counts
    _launch("forward", forward_kernel, tensors, lists, rule, gain, block_q, block_k, scale)
    return out, lse


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_rowwise(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("gen_accel::triton_attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slots: Tensor,
    rows: Tensor,
    row_counts: Tensor,
    columns: Tensor,
    column_counts: Tensor,
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad = (_rowwise(x) for x in (q, k, v, grad))
    B, H, N, D = q.shape
    delta = torch.empty_like(lse)
    delta_kernel[triton.cdiv(N, configs.DELTA_TILE), B * H](
        out,
        grad,
        lse,
        grad_lse.contiguous(),
        delta,
        *out.stride()[:3],
        *grad.stride()[:3],
        H,
        N,
        D=D,
        BLOCK_D=configs.padded_dim(D),
        TILE=configs.DELTA_TILE,
    )
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    rest = rule, gain, block_q, block_k, scale
    _launch("dq", dq_kernel, (q, k, v, grad, dq, lse, delta), (slots, rows, row_counts), *rest)
    tensors = q, k, v, grad, dk, dv, lse, delta
    _launch("dkdv", dkdv_kernel, tensors, (slots, columns, column_counts), *rest)
    return dq, dk, dv


@attention_backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(_rowwise(x)) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, *lists, rule, gain, block_q, block_k, scale = inputs
    ctx.numbers = block_q, block_k, scale
    ctx.save_for_backward(q, k, v, *output, *lists, gain, *rule)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, *lists = ctx.saved_tensors
    lists, gain, rule = lists[:5], lists[5], lists[6:]
    rest = rule, gain, *ctx.numbers
    grads = attention_backward(grad, grad_lse, q, k, v, out, lse, *lists, *rest)
    return *grads, *[None] * 5, [None] * len(rule), *[None] * 4


attention.register_autograd(_differentiate, setup_context=_save)
