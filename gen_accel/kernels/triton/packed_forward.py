"""Forward pass over packed keys and values; prefixes of names as in `tiles`.

The same result as `sparse_forward`, for Hopper and Blackwell. Keys and values lie in slot order,
so a tile of a listed block is one load by tensor descriptor: no address for each row, no fence
between the copy and the product. Other work for a pair of tokens is kept small. Maxima are
taken of unscaled scores and the scale is part of the subtraction, which needs it to be at least 0.
Sums are rescaled only in turns in which some maximum grew by more than SLACK, as the kernel of
FlashAttention-4 does on Blackwell, https://github.com/Dao-AILab/flash-attention; unlike there, all
rows of a tile are rescaled at once.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

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

# Base-2 logarithm. Weights of up to 256 lose nothing in 16 bits nor in sums in fp32.
SLACK = tl.constexpr(8.0)


@triton.jit
def _masked_phase(
    b_acc,
    b_sum,
    b_max,
    b_q,
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
):
    for i_p in range(start, stop):
        i_k, i_s = listed_load(index, i_p, BLOCK_K, LOAD)
        # [TILE_M, LOAD]
        b_s = dot(b_q, tl.trans(packed_tile(k, i_b, i_h, i_s, LOAD, BLOCK_D))) * scale
        if GAIN:
            b_s = tl.minimum(b_s, b_s * tl.load(gain + i_k))
        if RULE == BITS:
            o_row, i_at = o_q % BLOCK_Q, i_p * LOAD
            b_bits = listed_words(rule, o_row, i_at, stop * LOAD, BLOCK_Q, BLOCK_K, LOAD)
            b_s = obey_bits(b_s, b_bits, i_at, stop * LOAD, BLOCK_K, LOAD)
        else:
            o_k = i_s + tl.arange(0, LOAD)
            b_s = tl.where((tl.load(slots + o_k) >= 0)[None, :], b_s, -float("inf"))
            b_s = obey(b_s, o_q[:, None], o_k[None, :], i_k, rule, more, S, C, RULE, AXES)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)  # nothing seen so far
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_v = packed_tile(v, i_b, i_h, i_s, LOAD, BLOCK_D)
        b_acc = dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None])
        b_max = b_new
    return b_acc, b_sum, b_max


@triton.jit
def _whole_phase(
    b_acc,
    b_sum,
    b_max,
    b_q,
    k,
    v,
    i_b,
    i_h,
    index,
    start,
    stop,
    gain,
    scale,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD: tl.constexpr,
    LOADS: tl.constexpr,
    GAIN: tl.constexpr,
):
    # All loads of a turn stand together, so that they share one barrier.
    for i_p in range(start, stop, LOADS):
        i_k, i_s = listed_load(index, i_p, BLOCK_K, LOAD)
        b_k = packed_tile(k, i_b, i_h, i_s, LOAD, BLOCK_D)
        b_v = packed_tile(v, i_b, i_h, i_s, LOAD, BLOCK_D)
        if LOADS == 2:
            i_k2, i_s2 = listed_load(index, i_p + 1, BLOCK_K, LOAD)
            b_k2 = packed_tile(k, i_b, i_h, i_s2, LOAD, BLOCK_D)
            b_v2 = packed_tile(v, i_b, i_h, i_s2, LOAD, BLOCK_D)
        # [TILE_M, LOAD], not scaled
        b_s = dot(b_q, tl.trans(b_k))
        if GAIN:
            b_s = tl.minimum(b_s, b_s * tl.load(gain + i_k))
        b_most = b_s
        if LOADS == 2:
            b_s2 = dot(b_q, tl.trans(b_k2))
            if GAIN:
                b_s2 = tl.minimum(b_s2, b_s2 * tl.load(gain + i_k2))
            b_most = tl.maximum(b_s, b_s2)
        b_new = tl.maximum(b_max, tl.max(b_most, 1) * scale)
        if tl.max((b_new - b_max > SLACK).to(tl.int32), 0) > 0:
            b_decay = tl.exp2(b_max - b_new)
            b_acc = b_acc * b_decay[:, None]
            b_sum = b_sum * b_decay
            b_max = b_new
        b_p = tl.exp2(tl.fma(b_s, scale, -b_max[:, None]))
        b_acc = dot(b_p.to(b_v.dtype), b_v, b_acc)
        if LOADS == 2:
            b_p2 = tl.exp2(tl.fma(b_s2, scale, -b_max[:, None]))
            b_acc = dot(b_p2.to(b_v.dtype), b_v2, b_acc)
            b_p += b_p2
        b_sum += tl.sum(b_p, 1)
    return b_acc, b_sum, b_max


@triton.jit(do_not_specialize=SIZES)
def packed_forward_kernel(
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
    stride_ob,
    stride_oh,
    stride_on,
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
    LOADS: tl.constexpr,
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
    whole = masked + (total - masked) % LOADS  # a load is left over that has no other for its turn
    if RULE == BITS:
        i_list = i_pattern * (S // BLOCK_Q) + i_block
        rule = own_bits(rule, more, i_list, BLOCK_Q, BLOCK_K)
    else:
        rule += (i_b * route_b + i_h * route_h) * S * C
    if GAIN:
        gain += ((i_b * gain_b + i_h * gain_h) * (S // BLOCK_Q) + i_block) * (S // BLOCK_K)

    o_q, o_t = own_tile(slots, i_block, i_tile, BLOCK_Q, TILE_M)
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, stride_qn, o_t, D, BLOCK_D, True)
    b_acc = tl.zeros([TILE_M, BLOCK_D], tl.float32)
    b_sum = tl.zeros([TILE_M], tl.float32)
    b_max = tl.full([TILE_M], -float("inf"), tl.float32)
    for LEFT in tl.static_range(LOADS if RULE != NONE else 1):
        b_acc, b_sum, b_max = _masked_phase(
            b_acc,
            b_sum,
            b_max,
            b_q,
            o_q,
            k,
            v,
            i_b,
            i_h,
            slots,
            index,
            masked if LEFT else 0,
            whole if LEFT or RULE == NONE else masked,
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
            NONE if LEFT else RULE,
            AXES,
            GAIN,
        )
    b_acc, b_sum, b_max = _whole_phase(
        b_acc,
        b_sum,
        b_max,
        b_q,
        k,
        v,
        i_b,
        i_h,
        index,
        whole,
        total,
        gain,
        scale,
        BLOCK_D,
        BLOCK_K,
        LOAD,
        LOADS,
        GAIN,
    )
    b_safe = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_acc / b_safe[:, None]
    store_rows(out + i_b * stride_ob + i_h * stride_oh, stride_on, o_t, b_out, D, BLOCK_D)
    b_lse = tl.where(b_sum == 0.0, -float("inf"), (b_max + tl.log2(b_safe)) * LN2)
    tl.store(lse + (i_b * H + i_h) * N + o_t, b_lse, mask=o_t >= 0)
