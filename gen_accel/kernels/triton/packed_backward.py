"""Backward pass over packed operands, on Hopper and Blackwell; names as in `tiles`.

The same result as `sparse_backward`. Operands of a loop lie in slot order: keys and values for the
gradient of queries; queries, their gradients and statistics for the gradient of keys and values.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from gen_accel.kernels.triton.tiles import (
    BITS,
    LN2,
    NONE,
    SIZES,
    dot,
    listed_blocks,
    listed_load,
    listed_words,
    load_rows,
    obey,
    obey_bits,
    own_bits,
    own_tile,
    packed_tile,
    store_rows,
)


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
    i_b,
    i_h,
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
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
    MASKED: tl.constexpr,
):
    for i_p in range(start, stop):
        i_k, i_s = listed_load(index, i_p, BLOCK_K, LOAD)
        b_k = packed_tile(k, i_b, i_h, i_s, LOAD, BLOCK_D)
        b_v = packed_tile(v, i_b, i_h, i_s, LOAD, BLOCK_D)
        # [TILE_M, LOAD], not scaled
        b_s = dot(b_q, tl.trans(b_k))
        if GAIN:
            b_gain = tl.load(gain + i_k)
            b_s = tl.minimum(b_s, b_s * b_gain)
        b_w = tl.fma(b_s, scale, -b_lse[:, None])
        if MASKED and RULE == BITS:
            o_row, i_at = o_q % BLOCK_Q, i_p * LOAD
            b_bits = listed_words(rule, o_row, i_at, stop * LOAD, BLOCK_Q, BLOCK_K, LOAD)
            b_w = obey_bits(b_w, b_bits, i_at, stop * LOAD, BLOCK_K, LOAD)
        elif MASKED:
            o_k = i_s + tl.arange(0, LOAD)
            b_w = tl.where((tl.load(slots + o_k) >= 0)[None, :], b_w, -float("inf"))
            b_w = obey(b_w, o_q[:, None], o_k[None, :], i_k, rule, more, S, C, RULE, AXES)
        b_p = tl.exp2(b_w)
        b_ds = b_p * (dot(b_grad, tl.trans(b_v)) - b_delta[:, None])
        if GAIN:
            b_ds = tl.where(b_s > 0, b_ds * b_gain, b_ds)
        b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
    return b_dq


@triton.jit(do_not_specialize=SIZES)
def packed_dq_kernel(
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
    entries,
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
    LOAD: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
):
    TILES: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    i_turn, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_pattern = i_b * pattern_b + i_h * pattern_h
    i_block, index, masked, total = listed_blocks(
        index, counts, i_pattern, i_turn, S // BLOCK_Q, entries, BLOCK_K // LOAD
    )
    if RULE == BITS:
        i_list = i_pattern * (S // BLOCK_Q) + i_block
        rule = own_bits(rule, more, i_list, BLOCK_Q, BLOCK_K)
    else:
        rule += (i_b * route_b + i_h * route_h) * S * C
    if GAIN:
        gain += ((i_b * gain_b + i_h * gain_h) * (S // BLOCK_Q) + i_block) * (S // BLOCK_K)

    o_q, o_t = own_tile(slots, i_block, i_tile, BLOCK_Q, TILE_M)
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, stride_qn, o_t, D, BLOCK_D, True)
    b_grad = load_rows(grad + i_b * stride_gb + i_h * stride_gh, stride_gn, o_t, D, BLOCK_D, True)
    b_lse = tl.load(lse + (i_b * H + i_h) * S + o_q)
    b_delta = tl.load(delta + (i_b * H + i_h) * S + o_q)
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
            i_b,
            i_h,
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
            BLOCK_D,
            BLOCK_Q,
            BLOCK_K,
            LOAD,
            RULE,
            AXES,
            GAIN,
            MASKED,
        )
    b_dq *= scale * LN2
    store_rows(dq + i_b * stride_db + i_h * stride_dh, stride_dn, o_t, b_dq, D, BLOCK_D)


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
    i_b,
    i_h,
    index,
    start,
    stop,
    rule,
    more,
    gain,
    S,
    C,
    scale,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
    MASKED: tl.constexpr,
):
    # No mask for padding: weights of padded queries are zero by their statistics, and rows of
    # padded keys are not stored.
    for i_p in range(start, stop):
        i_q, i_s = listed_load(index, i_p, BLOCK_Q, LOAD)
        b_q = packed_tile(q, i_b, i_h, i_s, LOAD, BLOCK_D)
        b_grad = packed_tile(grad, i_b, i_h, i_s, LOAD, BLOCK_D)
        o_q = i_s + tl.arange(0, LOAD)
        b_lse, b_delta = tl.load(lse + o_q), tl.load(delta + o_q)
        # [TILE_N, LOAD], not scaled
        b_s = dot(b_k, tl.trans(b_q))
        if GAIN:
            b_gain = tl.load(gain + i_q * (S // BLOCK_K))
            b_s = tl.minimum(b_s, b_s * b_gain)
        b_w = tl.fma(b_s, scale, -b_lse[None, :])
        if MASKED and RULE == BITS:
            o_row, i_at = o_k % BLOCK_K, i_p * LOAD
            b_bits = listed_words(rule, o_row, i_at, stop * LOAD, BLOCK_K, BLOCK_Q, LOAD)
            b_w = obey_bits(b_w, b_bits, i_at, stop * LOAD, BLOCK_Q, LOAD)
        elif MASKED:
            b_w = obey(b_w, o_q[None, :], o_k[:, None], i_block, rule, more, S, C, RULE, AXES)
        b_p = tl.exp2(b_w)
        b_dv = dot(b_p.to(b_grad.dtype), b_grad, b_dv)
        b_ds = b_p * (dot(b_v, tl.trans(b_grad)) - b_delta[None, :])
        if GAIN:
            b_ds = tl.where(b_s > 0, b_ds * b_gain, b_ds)
        b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
    return b_dk, b_dv


@triton.jit(do_not_specialize=SIZES)
def packed_dkdv_kernel(
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
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
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
    entries,
    H,
    N,
    S,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_N: tl.constexpr,
    LOAD: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
):
    TILES: tl.constexpr = (BLOCK_K + TILE_N - 1) // TILE_N
    i_turn, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_pattern = i_b * pattern_b + i_h * pattern_h
    i_block, index, masked, total = listed_blocks(
        index, counts, i_pattern, i_turn, S // BLOCK_K, entries, BLOCK_Q // LOAD
    )
    if RULE == BITS:
        i_list = i_pattern * (S // BLOCK_K) + i_block
        rule = own_bits(rule, more, i_list, BLOCK_K, BLOCK_Q)
    else:
        rule += (i_b * route_b + i_h * route_h) * S * C
    if GAIN:
        gain += (i_b * gain_b + i_h * gain_h) * (S // BLOCK_Q) * (S // BLOCK_K) + i_block
    lse += (i_b * H + i_h) * S
    delta += (i_b * H + i_h) * S

    o_k, o_t = own_tile(slots, i_block, i_tile, BLOCK_K, TILE_N)
    b_k = load_rows(k + i_b * stride_kb + i_h * stride_kh, stride_kn, o_t, D, BLOCK_D, True)
    b_v = load_rows(v + i_b * stride_vb + i_h * stride_vh, stride_vn, o_t, D, BLOCK_D, True)
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
            i_b,
            i_h,
            index,
            0 if MASKED or RULE == NONE else masked,
            masked if MASKED else total,
            rule,
            more,
            gain,
            S,
            C,
            scale,
            BLOCK_D,
            BLOCK_Q,
            BLOCK_K,
            LOAD,
            RULE,
            AXES,
            GAIN,
            MASKED,
        )
    b_dk *= scale * LN2
    store_rows(dk + i_b * stride_db + i_h * stride_dh, stride_dn, o_t, b_dk, D, BLOCK_D)
    store_rows(dv + i_b * stride_eb + i_h * stride_eh, stride_en, o_t, b_dv, D, BLOCK_D)
