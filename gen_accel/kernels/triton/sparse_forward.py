"""Forward pass of attention over lists of blocks; prefixes of names as in `tiles`."""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from gen_accel.kernels.triton.tiles import (
    BITS,
    LN2,
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


@triton.jit
def forward_phase(
    b_acc,
    b_high,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_N: tl.constexpr,
    WIDTH: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Sum over the places of a list from `start` to `stop`, for the first WIDTH columns of v, and
    in `b_high` for the other columns, which are as many or none."""
    FIRST: tl.constexpr = D if D < WIDTH else WIDTH
    PADDED: tl.constexpr = MASKED or BLOCK_K % TILE_N != 0
    # With many rows no register is left to hold words while scores are made.
    EARLY: tl.constexpr = MASKED and RULE == BITS and BLOCK_Q < 128
    # Places are fetched one tile ahead, so that loads of keys depend on no load of the same turn.
    o_k, o_t = listed_tile(index, slots, start, stop, BLOCK_K, TILE_N)
    for i_p in range(start, stop, TILE_N):
        if EARLY:
            b_w = listed_words(rule, o_q, i_p, stop, BLOCK_Q, BLOCK_K, TILE_N)
        b_k = load_rows(k, stride_k, o_t, D, BLOCK_D, PADDED)
        # [TILE_M, TILE_N]
        b_s = dot(b_q, tl.trans(b_k)) * scale
        if GAIN:
            b_gain = tl.load(gain + listed_block(index, o_k, i_p, BLOCK_K, TILE_N))
            b_s = tl.where(b_s > 0, b_s * b_gain, b_s)
        if PADDED and not (MASKED and RULE == BITS):
            b_s = tl.where((o_t >= 0)[None, :], b_s, -float("inf"))
        if MASKED and RULE == BITS:
            if not EARLY:
                b_w = listed_words(rule, o_q, i_p, stop, BLOCK_Q, BLOCK_K, TILE_N)
            b_s = obey_bits(b_s, b_w, i_p, stop, BLOCK_K, TILE_N)
        elif MASKED:
            o_block = listed_block(index, o_k, i_p, BLOCK_K, TILE_N)
            b_s = obey(b_s, o_q[:, None], o_k[None, :], o_block, rule, more, S, C, RULE, AXES)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = b_new
        if MASKED:
            b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)  # nothing seen so far
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_v = load_rows(v, stride_v, o_t, FIRST, WIDTH, PADDED)
        b_acc = b_acc * b_decay[:, None]
        b_acc = dot(b_p.to(b_v.dtype), b_v, b_acc)
        if WIDTH < BLOCK_D:
            b_v = load_rows(v + WIDTH, stride_v, o_t, D - WIDTH, WIDTH, PADDED)
            b_high = b_high * b_decay[:, None]
            b_high = dot(b_p.to(b_v.dtype), b_v, b_high)
        b_max = b_new
        o_k, o_t = listed_tile(index, slots, i_p + TILE_N, stop, BLOCK_K, TILE_N)
    return b_acc, b_high, b_sum, b_max


@triton.jit(do_not_specialize=SIZES)
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
    WIDTH: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
):
    FIRST: tl.constexpr = D if D < WIDTH else WIDTH
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

    o_q, o_t = own_tile(slots, i_block, i_tile, BLOCK_Q, TILE_M)
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, stride_qn, o_t, D, BLOCK_D, True)
    if RULE == BITS:
        o_q -= i_block * BLOCK_Q
    b_acc = tl.zeros([TILE_M, WIDTH], tl.float32)
    b_high = tl.zeros([TILE_M, WIDTH if WIDTH < BLOCK_D else 1], tl.float32)
    b_sum = tl.zeros([TILE_M], tl.float32)
    b_max = tl.full([TILE_M], -float("inf"), tl.float32)
    for MASKED in tl.static_range(1, -1, -1):
        b_acc, b_high, b_sum, b_max = forward_phase(
            b_acc,
            b_high,
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
            BLOCK_Q,
            BLOCK_K,
            TILE_N,
            WIDTH,
            RULE,
            AXES,
            GAIN,
            MASKED,
        )
    b_safe = tl.where(b_sum == 0.0, 1.0, b_sum)
    out += i_b * stride_ob + i_h * stride_oh
    store_rows(out, stride_on, o_t, b_acc / b_safe[:, None], FIRST, WIDTH)
    if WIDTH < BLOCK_D:
        b_high = b_high / b_safe[:, None]
        store_rows(out + WIDTH, stride_on, o_t, b_high, D - WIDTH, WIDTH)
    b_lse = tl.where(b_sum == 0.0, -float("inf"), (b_max + tl.log2(b_safe)) * LN2)
    tl.store(lse + (i_b * H + i_h) * N + o_t, b_lse, mask=o_t >= 0)
