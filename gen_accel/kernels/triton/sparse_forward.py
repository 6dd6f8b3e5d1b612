"""Forward pass of attention over lists of blocks; prefixes of names as in `tiles`.

Keys and values are read row by row through the plan's slots. If PACKED, on Hopper and Blackwell,
they lie in slot order, and a tile of a listed block is one load by tensor descriptor: no address
for each row, no fence between the copy and the product. Whole blocks then take a loop of their
own, with little other work for a pair of tokens: maxima are taken of unscaled scores, and the
scale, at least 0, is part of the subtraction. Sums are rescaled only in turns in which some
maximum grew by more than SLACK, as the kernel of FlashAttention-4 does on Blackwell,
https://github.com/Dao-AILab/flash-attention; unlike there, all rows of a tile are rescaled at
once. If BEGUN, the softmax goes on with what other keys gave to it, such as the pooled ones of a
rest.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportIndexIssue=false

import triton
import triton.language as tl

from gen_accel.kernels.triton.tiles import (
    BITS,
    LN2,
    LOG2E,
    NONE,
    SIZES,
    dampened,
    dot,
    half_dot,
    int8_dot,
    listed_block,
    listed_load,
    listed_tile,
    listed_words,
    load_rows,
    obey,
    obey_bits,
    of_head,
    own_list,
    own_tile,
    packed_tile,
    store_rows,
)

# Base-2 logarithm. Weights of up to 256 lose nothing in 16 bits nor in sums in fp32.
SLACK = tl.constexpr(8.0)


@triton.jit
def _scores_of_steps(b_q, b_k, o_t, PADDED: tl.constexpr, GAIN: tl.constexpr):
    """Compute scaled scores of queries and keys in whole steps, off the scores of the common key,
    which weights do not depend on; if GAIN, which does, with them."""
    b_ints, b_steps, b_common, steps = b_q
    b_of_keys = tl.load(steps + o_t, mask=o_t >= 0 if PADDED else None)
    b_s = int8_dot(b_ints, tl.trans(b_k)).to(tl.float32)
    b_s = b_s * b_of_keys[None, :] * b_steps[:, None]
    return b_s + b_common[:, None] if GAIN else b_s


@triton.jit
def _added(b_acc, b_decay, b_p, b_v, INT8: tl.constexpr):
    """Compute decay acc + p v; if INT8 with the sums of a tile in fp16, and of tiles in fp32."""
    if INT8:
        b_sums = half_dot(b_p.to(b_v.dtype), b_v).to(tl.float32)
        b_decay = tl.broadcast_to(b_decay[:, None], b_acc.shape)
        return tl.fma(b_acc, b_decay, b_sums)
    else:
        return dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None])


@triton.jit
def attend_tiles(
    b_acc,
    b_high,
    b_sum,
    b_max,
    b_q,
    o_q,
    operands,
    lists,
    rules,
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
    PACKED: tl.constexpr,
    INT8: tl.constexpr = False,
):
    """Continue the softmax over some places of a list, for the first WIDTH columns of v, and in
    `b_high` for the other columns, which are as many or none.

    Args:
        operands: k and v of the head, or if PACKED of all heads; sample and head.
        lists: slots, the list, and the places to start and to stop at, in slots; if PACKED in
            loads.
        b_q: queries; if INT8 those, in whole steps, with the steps times the scale, the scores of
            the common key, and the pointer to the steps of the keys, see `int8_forward`.
        rules: rule, more, gain, S and C, as arguments of the kernel.
    """
    k, v, i_b, i_h = operands
    slots, index, start, stop = lists
    rule, more, gain, S, C = rules
    FIRST: tl.constexpr = D if D < WIDTH else WIDTH
    PADDED: tl.constexpr = MASKED or BLOCK_K % TILE_N != 0
    BY_BITS: tl.constexpr = MASKED and RULE == BITS
    # With many rows no register is left to hold words while scores are made.
    EARLY: tl.constexpr = BY_BITS and BLOCK_Q < 128 and not PACKED
    STEP: tl.constexpr = 1 if PACKED else TILE_N
    if not PACKED:
        # Places are fetched one tile ahead, so that loads of keys depend on no load of the same
        # turn.
        o_k, o_t = listed_tile(index, slots, start, stop, BLOCK_K, TILE_N)
    for i_p in range(start, stop, STEP):
        if EARLY:
            b_w = listed_words(rule, o_q, i_p, stop, BLOCK_Q, BLOCK_K, TILE_N)
        if PACKED:
            i_k, i_s = listed_load(index, i_p, BLOCK_K, TILE_N)
            b_k = packed_tile(k, i_b, i_h, i_s, TILE_N, BLOCK_D)
        else:
            b_k = load_rows(k, o_t, D, BLOCK_D, PADDED)
        # [TILE_M, TILE_N]
        if INT8:
            b_s = _scores_of_steps(b_q, b_k, o_t, PADDED, GAIN)
        else:
            b_s = dot(b_q, tl.trans(b_k)) * scale
        if GAIN:
            o_block = i_k if PACKED else listed_block(index, o_k, i_p, BLOCK_K, TILE_N)
            b_s = dampened(b_s, tl.load(gain + o_block), PACKED)
        if BY_BITS:
            i_at, i_end = (i_p * TILE_N, stop * TILE_N) if PACKED else (i_p, stop)
            if not EARLY:
                b_w = listed_words(rule, o_q, i_at, i_end, BLOCK_Q, BLOCK_K, TILE_N)
            b_s = obey_bits(b_s, b_w, i_at, i_end, BLOCK_K, TILE_N)
        elif PADDED:
            if PACKED:
                o_k = i_s + tl.arange(0, TILE_N)
                o_t = tl.load(slots + o_k)
            b_s = tl.where((o_t >= 0)[None, :], b_s, -float("inf"))
            if MASKED:
                o_block = i_k if PACKED else listed_block(index, o_k, i_p, BLOCK_K, TILE_N)
                b_s = obey(b_s, o_q[:, None], o_k[None, :], o_block, rule, more, S, C, RULE, AXES)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = b_new
        if MASKED:
            b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)  # nothing seen so far
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        if PACKED:
            b_v = packed_tile(v, i_b, i_h, i_s, TILE_N, BLOCK_D)
        else:
            b_v = load_rows(v, o_t, FIRST, WIDTH, PADDED)
        b_acc = _added(b_acc, b_decay, b_p, b_v, INT8)
        if WIDTH < BLOCK_D:
            b_v = load_rows((v[0] + WIDTH, v[1]), o_t, D - WIDTH, WIDTH, PADDED)
            b_high = _added(b_high, b_decay, b_p, b_v, INT8)
        b_max = b_new
        if not PACKED:
            o_k, o_t = listed_tile(index, slots, i_p + TILE_N, stop, BLOCK_K, TILE_N)
    return b_acc, b_high, b_sum, b_max


@triton.jit
def _attend_loads(
    b_acc,
    b_sum,
    b_max,
    b_q,
    operands,
    lists,
    gain,
    scale,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD: tl.constexpr,
    LOADS: tl.constexpr,
    GAIN: tl.constexpr,
):
    """Run `attend_tiles` over packed whole blocks, LOADS loads in a turn."""
    k, v, i_b, i_h = operands
    _, index, start, stop = lists
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
            b_s = dampened(b_s, tl.load(gain + i_k), True)
        b_most = b_s
        if LOADS == 2:
            b_s2 = dot(b_q, tl.trans(b_k2))
            if GAIN:
                b_s2 = dampened(b_s2, tl.load(gain + i_k2), True)
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


@triton.jit
def begun(
    out,
    lse,
    o_t,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    WIDTH: tl.constexpr,
    BEGUN: tl.constexpr,
):
    """Begin the softmax of tokens o_t of a head: sums of the first WIDTH columns of v and of the
    others, of weights, and maxima. If BEGUN go on with the output and log-sum-exp that are there;
    where the latter is -inf, whatever the output holds."""
    b_acc = tl.zeros([TILE_M, WIDTH], tl.float32)
    b_high = tl.zeros([TILE_M, WIDTH if WIDTH < BLOCK_D else 1], tl.float32)
    b_sum = tl.zeros([TILE_M], tl.float32)
    b_max = tl.full([TILE_M], -float("inf"), tl.float32)
    if BEGUN:
        FIRST: tl.constexpr = D if D < WIDTH else WIDTH
        b_max = tl.load(lse + o_t, mask=o_t >= 0, other=-float("inf")) * LOG2E
        m_begun = b_max > -float("inf")
        b_sum = tl.where(m_begun, 1.0, 0.0)
        b_acc = load_rows(out, o_t, FIRST, WIDTH, True).to(tl.float32)
        b_acc = tl.where(m_begun[:, None], b_acc, 0.0)
        if WIDTH < BLOCK_D:
            b_high = load_rows((out[0] + WIDTH, out[1]), o_t, D - WIDTH, WIDTH, True)
            b_high = tl.where(m_begun[:, None], b_high.to(tl.float32), 0.0)
    return b_acc, b_high, b_sum, b_max


@triton.jit
def ended(
    out,
    lse,
    o_t,
    b_acc,
    b_high,
    b_sum,
    b_max,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the output and the log-sum-exp of tokens o_t of a head."""
    FIRST: tl.constexpr = D if D < WIDTH else WIDTH
    b_safe = tl.where(b_sum == 0.0, 1.0, b_sum)
    store_rows(out, o_t, b_acc / b_safe[:, None], FIRST, WIDTH)
    if WIDTH < BLOCK_D:
        b_high = b_high / b_safe[:, None]
        store_rows((out[0] + WIDTH, out[1]), o_t, b_high, D - WIDTH, WIDTH)
    b_lse = tl.where(b_sum == 0.0, -float("inf"), (b_max + tl.log2(b_safe)) * LN2)
    tl.store(lse + o_t, b_lse, mask=o_t >= 0)


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
    LOADS: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
    BEGUN: tl.constexpr,
    PACKED: tl.constexpr,
):
    TILES: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    PLACES: tl.constexpr = BLOCK_K // TILE_N if PACKED else BLOCK_K
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_block, index, masked, total, rule, gain = own_list(
        *(index, counts, rule, more, gain, i_b * pattern_b + i_h * pattern_h),
        *(i_b * route_b + i_h * route_h, i_b * gain_b + i_h * gain_h, entries, S, C),
        *(BLOCK_Q, BLOCK_K, PLACES, TILES, RULE, GAIN),
    )
    if PACKED:
        total, end = masked + (total - masked) % LOADS, total  # a load that has no other beside it
    else:
        k = of_head(k, i_b, i_h)
        v = of_head(v, i_b, i_h)

    o_q, o_t = own_tile(slots, i_block, tl.program_id(0) % TILES, BLOCK_Q, TILE_M)
    b_q = load_rows(of_head(q, i_b, i_h), o_t, D, BLOCK_D, True)
    if RULE == BITS:
        o_q -= i_block * BLOCK_Q
    out = of_head(out, i_b, i_h)
    lse += (i_b * H + i_h) * N
    b_acc, b_high, b_sum, b_max = begun(out, lse, o_t, D, BLOCK_D, TILE_M, WIDTH, BEGUN)
    operands = (k, v, i_b, i_h)
    # If PACKED, the second phase is the load that is left over. Without a rule it joins the first.
    PHASES: tl.constexpr = (LOADS if RULE != NONE else 1) if PACKED else 2
    for SECOND in tl.static_range(PHASES):
        start, stop = masked if SECOND else 0, total if SECOND or PHASES == 1 else masked
        b_acc, b_high, b_sum, b_max = attend_tiles(
            *(b_acc, b_high, b_sum, b_max, b_q, o_q, operands),
            *((slots, index, start, stop), (rule, more, gain, S, C), scale),
            *(D, BLOCK_D, BLOCK_Q, BLOCK_K, TILE_N, WIDTH),
            *(NONE if SECOND else RULE, AXES, GAIN, PACKED or not SECOND, PACKED),
        )
    if PACKED:
        lists = (slots, index, total, end)
        b_acc, b_sum, b_max = _attend_loads(
            *(b_acc, b_sum, b_max, b_q, operands, lists, gain, scale),
            *(BLOCK_D, BLOCK_K, TILE_N, LOADS, GAIN),
        )
    ended(out, lse, o_t, b_acc, b_high, b_sum, b_max, D, BLOCK_D, WIDTH)
