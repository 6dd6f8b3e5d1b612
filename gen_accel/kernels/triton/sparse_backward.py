"""Backward pass of attention over lists of blocks; prefixes of names as in `tiles`."""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from gen_accel.kernels.triton.tiles import (
    BITS,
    LN2,
    LOG2E,
    NONE,
    SIZES,
    dot,
    listed_block,
    listed_blocks,
    listed_tile,
    listed_words,
    load_rows,
    obey,
    obey_bits,
    own_bits,
    own_tile,
    store_rows,
)


@triton.jit(do_not_specialize=("H", "N"))
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
    """Write delta, which the softmax subtracts from a row's score gradients: sum(grad * out) -
    grad_lse."""
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o_t = tl.where(o_n < N, o_n, -1)
    b_out = load_rows(out + i_b * stride_ob + i_h * stride_oh, stride_on, o_t, D, BLOCK_D, True)
    b_grad = load_rows(grad + i_b * stride_gb + i_h * stride_gh, stride_gn, o_t, D, BLOCK_D, True)
    o_row = (i_b * H + i_h) * N + o_n
    b_lse = tl.load(lse + o_row, mask=o_n < N, other=0.0)
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    b_delta -= tl.load(grad_lse + o_row, mask=o_n < N, other=0.0)
    # The gradient at the -inf of a row that sees nothing is ignored.
    tl.store(delta + o_row, tl.where(b_lse == -float("inf"), 0.0, b_delta), mask=o_n < N)


@triton.jit
def statistics(lse, delta, o_t):
    """Load the base-2 log-sum-exp and delta of tokens; +inf and 0 where a row sees nothing or is
    padding, which makes its weights zero."""
    b_lse = tl.load(lse + o_t, mask=o_t >= 0, other=-float("inf"))
    b_lse = tl.where(b_lse == -float("inf"), float("inf"), b_lse * LOG2E)
    return b_lse, tl.load(delta + o_t, mask=o_t >= 0, other=0.0)


@triton.jit
def dq_phase(
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
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_N: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
    MASKED: tl.constexpr,
):
    PADDED: tl.constexpr = MASKED or BLOCK_K % TILE_N != 0
    o_k, o_t = listed_tile(index, slots, start, stop, BLOCK_K, TILE_N)
    for i_p in range(start, stop, TILE_N):
        b_k = load_rows(k, stride_k, o_t, D, BLOCK_D, PADDED)
        b_v = load_rows(v, stride_v, o_t, D, BLOCK_D, PADDED)
        # [TILE_M, TILE_N]
        b_s = dot(b_q, tl.trans(b_k)) * scale
        if GAIN:
            b_gain = tl.load(gain + listed_block(index, o_k, i_p, BLOCK_K, TILE_N))
            b_s = tl.where(b_s > 0, b_s * b_gain, b_s)
        if PADDED and not (MASKED and RULE == BITS):
            b_s = tl.where((o_t >= 0)[None, :], b_s, -float("inf"))
        if MASKED and RULE == BITS:
            b_w = listed_words(rule, o_q, i_p, stop, BLOCK_Q, BLOCK_K, TILE_N)
            b_s = obey_bits(b_s, b_w, i_p, stop, BLOCK_K, TILE_N)
        elif MASKED:
            o_block = listed_block(index, o_k, i_p, BLOCK_K, TILE_N)
            b_s = obey(b_s, o_q[:, None], o_k[None, :], o_block, rule, more, S, C, RULE, AXES)
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_dp = dot(b_grad, tl.trans(b_v))
        b_ds = b_p * (b_dp - b_delta[:, None])
        if GAIN:
            b_ds = tl.where(b_s > 0, b_ds * b_gain, b_ds)
        b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
        o_k, o_t = listed_tile(index, slots, i_p + TILE_N, stop, BLOCK_K, TILE_N)
    return b_dq


@triton.jit(do_not_specialize=SIZES)
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
    TILE_N: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
):
    TILES: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    i_turn, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_pattern = i_b * pattern_b + i_h * pattern_h
    i_block, index, masked, total = listed_blocks(
        index, counts, i_pattern, i_turn, S // BLOCK_Q, entries, BLOCK_K
    )
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    if RULE == BITS:
        i_list = i_pattern * (S // BLOCK_Q) + i_block
        rule = own_bits(rule, more, i_list, BLOCK_Q, BLOCK_K)
    else:
        rule += (i_b * route_b + i_h * route_h) * S * C
    if GAIN:
        gain += ((i_b * gain_b + i_h * gain_h) * (S // BLOCK_Q) + i_block) * (S // BLOCK_K)
    lse += (i_b * H + i_h) * N
    delta += (i_b * H + i_h) * N

    o_q, o_t = own_tile(slots, i_block, i_tile, BLOCK_Q, TILE_M)
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, stride_qn, o_t, D, BLOCK_D, True)
    b_grad = load_rows(grad + i_b * stride_gb + i_h * stride_gh, stride_gn, o_t, D, BLOCK_D, True)
    b_lse, b_delta = statistics(lse, delta, o_t)
    if RULE == BITS:
        o_q -= i_block * BLOCK_Q
    b_dq = tl.zeros([TILE_M, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(1, -1, -1):
        b_dq = dq_phase(
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
            BLOCK_Q,
            BLOCK_K,
            TILE_N,
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
    o_q, o_t = listed_tile(index, slots, start, stop, BLOCK_Q, TILE_M)
    for i_p in range(start, stop, TILE_M):
        b_q = load_rows(q, stride_q, o_t, D, BLOCK_D, True)
        b_grad = load_rows(grad, stride_g, o_t, D, BLOCK_D, True)
        b_lse, b_delta = statistics(lse, delta, o_t)
        # [TILE_N, TILE_M]
        b_s = dot(b_k, tl.trans(b_q)) * scale
        if GAIN:
            o_block = listed_block(index, o_q, i_p, BLOCK_Q, TILE_M)
            b_gain = tl.load(gain + o_block * (S // BLOCK_K))
            b_s = tl.where(b_s > 0, b_s * b_gain, b_s)
        if MASKED and RULE == BITS:
            b_w = listed_words(rule, o_k, i_p, stop, BLOCK_K, BLOCK_Q, TILE_M)
            b_s = obey_bits(b_s, b_w, i_p, stop, BLOCK_Q, TILE_M)
        elif MASKED:
            b_s = obey(b_s, o_q[None, :], o_k[:, None], i_block, rule, more, S, C, RULE, AXES)
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_dv = dot(b_p.to(b_grad.dtype), b_grad, b_dv)
        b_dp = dot(b_v, tl.trans(b_grad))
        b_ds = b_p * (b_dp - b_delta[None, :])
        if GAIN:
            b_ds = tl.where(b_s > 0, b_ds * b_gain, b_ds)
        b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
        o_q, o_t = listed_tile(index, slots, i_p + TILE_M, stop, BLOCK_Q, TILE_M)
    return b_dk, b_dv


@triton.jit(do_not_specialize=SIZES)
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
    TILE_N: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
):
    TILES: tl.constexpr = (BLOCK_K + TILE_N - 1) // TILE_N
    i_turn, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_pattern = i_b * pattern_b + i_h * pattern_h
    i_block, index, masked, total = listed_blocks(
        index, counts, i_pattern, i_turn, S // BLOCK_K, entries, BLOCK_Q
    )
    q += i_b * stride_qb + i_h * stride_qh
    grad += i_b * stride_gb + i_h * stride_gh
    if RULE == BITS:
        i_list = i_pattern * (S // BLOCK_K) + i_block
        rule = own_bits(rule, more, i_list, BLOCK_K, BLOCK_Q)
    else:
        rule += (i_b * route_b + i_h * route_h) * S * C
    if GAIN:
        gain += (i_b * gain_b + i_h * gain_h) * (S // BLOCK_Q) * (S // BLOCK_K) + i_block
    lse += (i_b * H + i_h) * N
    delta += (i_b * H + i_h) * N

    o_k, o_t = own_tile(slots, i_block, i_tile, BLOCK_K, TILE_N)
    b_k = load_rows(k + i_b * stride_kb + i_h * stride_kh, stride_kn, o_t, D, BLOCK_D, True)
    b_v = load_rows(v + i_b * stride_vb + i_h * stride_vh, stride_vn, o_t, D, BLOCK_D, True)
    if RULE == BITS:
        o_k -= i_block * BLOCK_K
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
    store_rows(dk + i_b * stride_db + i_h * stride_dh, stride_dn, o_t, b_dk, D, BLOCK_D)
    store_rows(dv + i_b * stride_eb + i_h * stride_eh, stride_en, o_t, b_dv, D, BLOCK_D)
