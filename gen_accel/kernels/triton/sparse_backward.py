"""Backward pass of attention over lists of blocks; prefixes of names as in `tiles`.

Operands of a loop are read as in `sparse_forward`. If PACKED they lie in slot order: keys and
values for the gradient of queries; queries, their gradients and statistics for the gradient of
keys and values.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false
# pyright: reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.launch import launch, rows
from gen_accel.kernels.triton.tiles import (
    BITS,
    LN2,
    LOG2E,
    NONE,
    SIZES,
    dampened,
    dot,
    listed_block,
    listed_blocks,
    listed_load,
    listed_tile,
    listed_words,
    load_rows,
    obey,
    obey_bits,
    of_head,
    own_bits,
    own_list,
    own_tile,
    packed_tile,
    store_rows,
)


@triton.jit(do_not_specialize=("H", "N"))
def delta_kernel(
    out,
    grad,
    lse,
    grad_lse,
    delta,
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
    b_out = load_rows(of_head(out, i_b, i_h), o_t, D, BLOCK_D, True)
    b_grad = load_rows(of_head(grad, i_b, i_h), o_t, D, BLOCK_D, True)
    o_row = (i_b * H + i_h) * N + o_n
    b_lse = tl.load(lse + o_row, mask=o_n < N, other=0.0)
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    b_delta -= tl.load(grad_lse + o_row, mask=o_n < N, other=0.0)
    # The gradient at the -inf of a row that sees nothing is ignored.
    tl.store(delta + o_row, tl.where(b_lse == -float("inf"), 0.0, b_delta), mask=o_n < N)


def delta_of(out: Tensor, grad: Tensor, lse: Tensor, grad_lse: Tensor) -> Tensor:
    """Run `delta_kernel`: (B, H, N) fp32."""
    B, H, N, D = out.shape
    delta = torch.empty_like(lse)
    launch(
        delta_kernel,
        (triton.cdiv(N, configs.DELTA_TILE), B * H),
        out,
        *(*rows(out, grad), lse, grad_lse.contiguous(), delta),
        *(H, N),
        **configs.dims(D),
        TILE=configs.DELTA_TILE,
    )
    return delta


@triton.jit
def statistics(lse, delta, o_t):
    """Load the base-2 log-sum-exp and delta of tokens; +inf and 0 where a row sees nothing or is
    padding, which makes its weights zero."""
    b_lse = tl.load(lse + o_t, mask=o_t >= 0, other=-float("inf"))
    b_lse = tl.where(b_lse == -float("inf"), float("inf"), b_lse * LOG2E)
    return b_lse, tl.load(delta + o_t, mask=o_t >= 0, other=0.0)


@triton.jit
def dq_tiles(
    b_dq,
    b_q,
    b_grad,
    b_lse,
    b_delta,
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
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Add the gradient of queries over some places of a list; arguments as in `attend_tiles`."""
    k, v, i_b, i_h = operands
    slots, index, start, stop = lists
    rule, more, gain, S, C = rules
    PADDED: tl.constexpr = MASKED or BLOCK_K % TILE_N != 0
    STEP: tl.constexpr = 1 if PACKED else TILE_N
    if not PACKED:
        o_k, o_t = listed_tile(index, slots, start, stop, BLOCK_K, TILE_N)
    for i_p in range(start, stop, STEP):
        if PACKED:
            o_block, i_s = listed_load(index, i_p, BLOCK_K, TILE_N)
            b_k = packed_tile(k, i_b, i_h, i_s, TILE_N, BLOCK_D)
            b_v = packed_tile(v, i_b, i_h, i_s, TILE_N, BLOCK_D)
        else:
            b_k = load_rows(k, o_t, D, BLOCK_D, PADDED)
            b_v = load_rows(v, o_t, D, BLOCK_D, PADDED)
            if GAIN or (MASKED and RULE != BITS):
                o_block = listed_block(index, o_k, i_p, BLOCK_K, TILE_N)
        # [TILE_M, TILE_N]; if PACKED not scaled
        b_s = dot(b_q, tl.trans(b_k))
        if not PACKED:
            b_s *= scale
        if GAIN:
            b_gain = tl.load(gain + o_block)
            b_s = dampened(b_s, b_gain, PACKED)
        b_w = tl.fma(b_s, scale, -b_lse[:, None]) if PACKED else b_s
        if MASKED and RULE == BITS:
            i_at, i_end = (i_p * TILE_N, stop * TILE_N) if PACKED else (i_p, stop)
            b_bits = listed_words(rule, o_q, i_at, i_end, BLOCK_Q, BLOCK_K, TILE_N)
            b_w = obey_bits(b_w, b_bits, i_at, i_end, BLOCK_K, TILE_N)
        elif PADDED:
            if PACKED:
                o_k = i_s + tl.arange(0, TILE_N)
                o_t = tl.load(slots + o_k)
            b_w = tl.where((o_t >= 0)[None, :], b_w, -float("inf"))
            if MASKED:
                b_w = obey(b_w, o_q[:, None], o_k[None, :], o_block, rule, more, S, C, RULE, AXES)
        b_p = tl.exp2(b_w if PACKED else b_w - b_lse[:, None])
        b_ds = b_p * (dot(b_grad, tl.trans(b_v)) - b_delta[:, None])
        if GAIN:
            b_ds = tl.where(b_s > 0, b_ds * b_gain, b_ds)
        b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
        if not PACKED:
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
    if not PACKED:
        k = of_head(k, i_b, i_h)
        v = of_head(v, i_b, i_h)

    o_q, o_t = own_tile(slots, i_block, tl.program_id(0) % TILES, BLOCK_Q, TILE_M)
    b_q = load_rows(of_head(q, i_b, i_h), o_t, D, BLOCK_D, True)
    b_grad = load_rows(of_head(grad, i_b, i_h), o_t, D, BLOCK_D, True)
    if PACKED:
        b_lse = tl.load(lse + (i_b * H + i_h) * S + o_q)
        b_delta = tl.load(delta + (i_b * H + i_h) * S + o_q)
    else:
        b_lse, b_delta = statistics(lse + (i_b * H + i_h) * N, delta + (i_b * H + i_h) * N, o_t)
    if RULE == BITS:
        o_q -= i_block * BLOCK_Q
    b_dq = tl.zeros([TILE_M, BLOCK_D], tl.float32)
    operands = (k, v, i_b, i_h)
    for MASKED in tl.static_range(1, -1, -1):
        start, stop = 0 if MASKED else masked, masked if MASKED else total
        b_dq = dq_tiles(
            *(b_dq, b_q, b_grad, b_lse, b_delta, o_q, operands),
            *((slots, index, start, stop), (rule, more, gain, S, C), scale),
            *(D, BLOCK_D, BLOCK_Q, BLOCK_K, TILE_N, RULE, AXES, GAIN, MASKED, PACKED),
        )
    b_dq *= scale * LN2
    store_rows(of_head(dq, i_b, i_h), o_t, b_dq, D, BLOCK_D)


@triton.jit
def _dkdv_tiles(
    b_dk,
    b_dv,
    b_k,
    b_v,
    o_k,
    i_block,
    operands,
    lists,
    rules,
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
    PACKED: tl.constexpr,
):
    """Add the gradients of keys and values over some places of a list.

    Args:
        operands: q and grad of the head, or if PACKED of all heads; lse and delta of the head;
            strides of q and grad; sample and head.
        lists, rules: as in `attend_tiles`.
    """
    q, grad, lse, delta, i_b, i_h = operands
    slots, index, start, stop = lists
    rule, more, gain, S, C = rules
    STEP: tl.constexpr = 1 if PACKED else TILE_M
    # No mask for padding: weights of padded queries are zero by their statistics, and rows of
    # padded keys are not stored.
    if not PACKED:
        o_q, o_t = listed_tile(index, slots, start, stop, BLOCK_Q, TILE_M)
    for i_p in range(start, stop, STEP):
        if PACKED:
            o_block, i_s = listed_load(index, i_p, BLOCK_Q, TILE_M)
            b_q = packed_tile(q, i_b, i_h, i_s, TILE_M, BLOCK_D)
            b_grad = packed_tile(grad, i_b, i_h, i_s, TILE_M, BLOCK_D)
            o_q = i_s + tl.arange(0, TILE_M)
            b_lse, b_delta = tl.load(lse + o_q), tl.load(delta + o_q)
        else:
            b_q = load_rows(q, o_t, D, BLOCK_D, True)
            b_grad = load_rows(grad, o_t, D, BLOCK_D, True)
            b_lse, b_delta = statistics(lse, delta, o_t)
            if GAIN:
                o_block = listed_block(index, o_q, i_p, BLOCK_Q, TILE_M)
        # [TILE_N, TILE_M]; if PACKED not scaled
        b_s = dot(b_k, tl.trans(b_q))
        if not PACKED:
            b_s *= scale
        if GAIN:
            b_gain = tl.load(gain + o_block * (S // BLOCK_K))
            b_s = dampened(b_s, b_gain, PACKED)
        b_w = tl.fma(b_s, scale, -b_lse[None, :]) if PACKED else b_s
        if MASKED and RULE == BITS:
            i_at, i_end = (i_p * TILE_M, stop * TILE_M) if PACKED else (i_p, stop)
            b_bits = listed_words(rule, o_k, i_at, i_end, BLOCK_K, BLOCK_Q, TILE_M)
            b_w = obey_bits(b_w, b_bits, i_at, i_end, BLOCK_Q, TILE_M)
        elif MASKED:
            b_w = obey(b_w, o_q[None, :], o_k[:, None], i_block, rule, more, S, C, RULE, AXES)
        b_p = tl.exp2(b_w if PACKED else b_w - b_lse[None, :])
        b_dv = dot(b_p.to(b_grad.dtype), b_grad, b_dv)
        b_ds = b_p * (dot(b_v, tl.trans(b_grad)) - b_delta[None, :])
        if GAIN:
            b_ds = tl.where(b_s > 0, b_ds * b_gain, b_ds)
        b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
        if not PACKED:
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
    PACKED: tl.constexpr,
):
    TILES: tl.constexpr = (BLOCK_K + TILE_N - 1) // TILE_N
    PLACES: tl.constexpr = BLOCK_Q // TILE_M if PACKED else BLOCK_Q
    i_turn, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_pattern = i_b * pattern_b + i_h * pattern_h
    i_block, index, masked, total = listed_blocks(
        index, counts, i_pattern, i_turn, S // BLOCK_K, entries, PLACES
    )
    if not PACKED:
        q = of_head(q, i_b, i_h)
        grad = of_head(grad, i_b, i_h)
    if RULE == BITS:
        i_list = i_pattern * (S // BLOCK_K) + i_block
        rule = own_bits(rule, more, i_list, BLOCK_K, BLOCK_Q)
    else:
        rule += (i_b * route_b + i_h * route_h) * S * C
    if GAIN:
        gain += (i_b * gain_b + i_h * gain_h) * (S // BLOCK_Q) * (S // BLOCK_K) + i_block
    rows = S if PACKED else N
    lse += (i_b * H + i_h) * rows
    delta += (i_b * H + i_h) * rows

    o_k, o_t = own_tile(slots, i_block, i_tile, BLOCK_K, TILE_N)
    b_k = load_rows(of_head(k, i_b, i_h), o_t, D, BLOCK_D, True)
    b_v = load_rows(of_head(v, i_b, i_h), o_t, D, BLOCK_D, True)
    if RULE == BITS:
        o_k -= i_block * BLOCK_K
    b_dk = tl.zeros([TILE_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([TILE_N, BLOCK_D], tl.float32)
    operands = (q, grad, lse, delta, i_b, i_h)
    for MASKED in tl.static_range(0 if RULE == NONE else 1, -1, -1):
        start = 0 if MASKED or RULE == NONE else masked
        stop = masked if MASKED else total
        b_dk, b_dv = _dkdv_tiles(
            *(b_dk, b_dv, b_k, b_v, o_k, i_block, operands),
            *((slots, index, start, stop), (rule, more, gain, S, C), scale),
            *(D, BLOCK_D, BLOCK_Q, BLOCK_K, TILE_M, RULE, AXES, GAIN, MASKED, PACKED),
        )
    b_dk *= scale * LN2
    store_rows(of_head(dk, i_b, i_h), o_t, b_dk, D, BLOCK_D)
    store_rows(of_head(dv, i_b, i_h), o_t, b_dv, D, BLOCK_D)
