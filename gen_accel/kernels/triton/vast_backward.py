"""The backward pass of rows whose scores are vast; prefixes of names as in `tiles`.

Of a score beyond VAST a log-sum-exp in fp32 tells no weight: it is rounded by as much as scores
differ, and a product that is summed up in another order is off by as much. The other kernels give
such rows no weight. Here their highest score and the sum of their weights are made anew, by the
same products, tile by tile, as those that their gradients are then made of.

One program works off a head. Where no row of it is vast, as in every model that is sane, it reads
the log-sum-exps and ends.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.launch import launch
from gen_accel.kernels.triton.sparse_backward import dq_phase
from gen_accel.kernels.triton.tiles import (
    BITS,
    LN2,
    NONE,
    ROUTE,
    SIZES,
    VAST,
    WINDOWS,
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

SCAN = tl.constexpr(4096)  # log-sum-exps that are read at once


@triton.jit
def _vast(lse, o_t):
    """Whether the row of each token is vast; one that sees nothing is not."""
    b_lse = tl.load(lse + o_t, mask=o_t >= 0, other=0.0)
    return (tl.abs(b_lse) > VAST) & (b_lse != -float("inf"))


@triton.jit
def _levels_phase(
    b_high,
    b_sum,
    b_mean,
    b_q,
    b_grad,
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
    TILE: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
):
    """Highest score, sum of weights, and what comes from above by their mean, times that sum."""
    for i_p in range(start, stop, TILE):
        o_k, o_t = listed_tile(index, slots, i_p, stop, BLOCK_K, TILE)
        b_k = load_rows(k, stride_k, o_t, D, BLOCK_D, True)
        b_v = load_rows(v, stride_v, o_t, D, BLOCK_D, True)
        # [TILE, TILE]
        b_s = dot(b_q, tl.trans(b_k)) * scale
        if GAIN:
            b_gain = tl.load(gain + listed_block(index, o_k, i_p, BLOCK_K, TILE))
            b_s = tl.where(b_s > 0, b_s * b_gain, b_s)
        b_s = tl.where((o_t >= 0)[None, :], b_s, -float("inf"))
        if RULE == BITS:
            b_w = listed_words(rule, o_q, i_p, stop, BLOCK_Q, BLOCK_K, TILE)
            b_s = obey_bits(b_s, b_w, i_p, stop, BLOCK_K, TILE)
        else:
            o_block = listed_block(index, o_k, i_p, BLOCK_K, TILE)
            b_s = obey(b_s, o_q[:, None], o_k[None, :], o_block, rule, more, S, C, RULE, AXES)
        b_new = tl.maximum(b_high, tl.max(b_s, 1))
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)  # nothing seen so far
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_high - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_mean = b_mean * b_decay + tl.sum(b_p * dot(b_grad, tl.trans(b_v)), 1)
        b_high = b_new
    return b_high, b_sum, b_mean


@triton.jit
def _keys_phase(
    b_dk,
    b_dv,
    b_k,
    b_v,
    o_k,
    i_block,
    q,
    grad,
    lse,
    high,
    inverse,
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
    TILE: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
):
    """What the vast rows of a list add to the gradients of a tile of keys and their values."""
    for i_p in range(start, stop, TILE):
        o_q, o_t = listed_tile(index, slots, i_p, stop, BLOCK_Q, TILE)
        m_v = _vast(lse, o_t)
        if tl.max(m_v.to(tl.int32), 0) > 0:
            b_q = load_rows(q, stride_q, o_t, D, BLOCK_D, True)
            b_grad = load_rows(grad, stride_g, o_t, D, BLOCK_D, True)
            b_high = tl.load(high + o_t, mask=m_v, other=float("inf"))
            b_inverse = tl.load(inverse + o_t, mask=m_v, other=0.0)
            b_delta = tl.load(delta + o_t, mask=m_v, other=0.0)
            # [TILE, TILE], turned: a product the other way about may round otherwise
            b_s = tl.trans(dot(b_q, tl.trans(b_k))) * scale
            if GAIN:
                b_gain = tl.load(
                    gain + listed_block(index, o_q, i_p, BLOCK_Q, TILE) * (S // BLOCK_K)
                )
                b_s = tl.where(b_s > 0, b_s * b_gain, b_s)
            b_s = tl.where(m_v[None, :], b_s, -float("inf"))
            if RULE == BITS:
                b_w = listed_words(rule, o_k, i_p, stop, BLOCK_K, BLOCK_Q, TILE)
                b_s = obey_bits(b_s, b_w, i_p, stop, BLOCK_Q, TILE)
            else:
                b_s = obey(b_s, o_q[None, :], o_k[:, None], i_block, rule, more, S, C, RULE, AXES)
            b_p = tl.exp2(b_s - b_high[None, :]) * b_inverse[None, :]
            b_dv = dot(b_p.to(b_grad.dtype), b_grad, b_dv)
            b_ds = b_p * (dot(b_v, tl.trans(b_grad)) - b_delta[None, :])
            if GAIN:
                b_ds = tl.where(b_s > 0, b_ds * b_gain, b_ds)
            b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
    return b_dk, b_dv


@triton.jit(do_not_specialize=(*SIZES, "entries_k"))
def vast_backward_kernel(
    q,
    k,
    v,
    grad,
    dq,
    dk,
    dv,
    lse,
    grad_lse,
    high,
    inverse,
    delta,
    slots,
    rows,
    row_counts,
    columns,
    column_counts,
    rule,
    more,
    rule_k,
    more_k,
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
    stride_ab,
    stride_ah,
    stride_an,
    stride_bb,
    stride_bh,
    stride_bn,
    stride_cb,
    stride_ch,
    stride_cn,
    pattern_b,
    pattern_h,
    route_b,
    route_h,
    gain_b,
    gain_h,
    entries,
    entries_k,
    H,
    N,
    S,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
):
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_row = (i_b * H + i_h) * N
    lse += i_row
    b_any = tl.zeros([SCAN], tl.int32)
    for i_n in range(0, N, SCAN):
        o_n = i_n + tl.arange(0, SCAN)
        b_any = tl.maximum(b_any, _vast(lse, tl.where(o_n < N, o_n, -1)).to(tl.int32))
    if tl.max(b_any, 0) == 0:
        return

    q += i_b * stride_qb + i_h * stride_qh
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    grad += i_b * stride_gb + i_h * stride_gh
    dq += i_b * stride_ab + i_h * stride_ah
    dk += i_b * stride_bb + i_h * stride_bh
    dv += i_b * stride_cb + i_h * stride_ch
    grad_lse += i_row
    high += i_row
    inverse += i_row
    delta += i_row
    i_pattern = i_b * pattern_b + i_h * pattern_h
    Kq, Kk = S // BLOCK_Q, S // BLOCK_K
    if RULE != BITS:
        rule += (i_b * route_b + i_h * route_h) * S * C
        rule_k = rule
    if GAIN:
        gain += (i_b * gain_b + i_h * gain_h) * Kq * Kk

    TILES: tl.constexpr = (BLOCK_Q + TILE - 1) // TILE
    for i_own in range(Kq * TILES):
        i_block, index, masked, total = listed_blocks(
            rows, row_counts, i_pattern, i_own // TILES, Kq, entries, BLOCK_K
        )
        o_q, o_t = own_tile(slots, i_block, i_own % TILES, BLOCK_Q, TILE)
        m_v = _vast(lse, o_t)
        if tl.max(m_v.to(tl.int32), 0) > 0:
            bits = rule
            if RULE == BITS:
                bits = own_bits(rule, more, i_pattern * Kq + i_block, BLOCK_Q, BLOCK_K)
                o_q -= i_block * BLOCK_Q
            b_q = load_rows(q, stride_qn, o_t, D, BLOCK_D, True)
            b_grad = load_rows(grad, stride_gn, o_t, D, BLOCK_D, True)
            b_high = tl.full([TILE], -float("inf"), tl.float32)
            b_sum = tl.zeros([TILE], tl.float32)
            b_mean = tl.zeros([TILE], tl.float32)
            for MASKED in tl.static_range(0 if RULE == NONE else 1, -1, -1):
                b_high, b_sum, b_mean = _levels_phase(
                    b_high,
                    b_sum,
                    b_mean,
                    b_q,
                    b_grad,
                    o_q,
                    k,
                    v,
                    stride_kn,
                    stride_vn,
                    slots,
                    index,
                    0 if MASKED or RULE == NONE else masked,
                    masked if MASKED else total,
                    bits,
                    more,
                    gain + i_block * Kk,
                    S,
                    C,
                    scale,
                    D,
                    BLOCK_D,
                    BLOCK_Q,
                    BLOCK_K,
                    TILE,
                    RULE if MASKED else NONE,
                    AXES,
                    GAIN,
                )
            b_inverse = 1.0 / tl.where(m_v, b_sum, 1.0)
            b_delta = b_mean * b_inverse - tl.load(grad_lse + o_t, mask=m_v, other=0.0)
            b_high = tl.where(m_v, b_high, float("inf"))  # the other rows are others' work
            b_delta = tl.where(m_v, b_delta, 0.0)
            b_dq = tl.zeros([TILE, BLOCK_D], tl.float32)
            for MASKED in tl.static_range(0 if RULE == NONE else 1, -1, -1):
                b_dq = dq_phase(
                    b_dq,
                    b_q,
                    b_grad,
                    b_high,
                    b_delta,
                    o_q,
                    k,
                    v,
                    stride_kn,
                    stride_vn,
                    slots,
                    index,
                    0 if MASKED or RULE == NONE else masked,
                    masked if MASKED else total,
                    bits,
                    more,
                    gain + i_block * Kk,
                    S,
                    C,
                    scale,
                    D,
                    BLOCK_D,
                    BLOCK_Q,
                    BLOCK_K,
                    TILE,
                    RULE if MASKED else NONE,
                    AXES,
                    GAIN,
                    True,
                )
            b_dq *= (b_inverse * scale * LN2)[:, None]
            store_rows(dq, stride_an, tl.where(m_v, o_t, -1), b_dq, D, BLOCK_D)
            tl.store(high + o_t, b_high, mask=m_v)
            tl.store(inverse + o_t, b_inverse, mask=m_v)
            tl.store(delta + o_t, b_delta, mask=m_v)
    tl.debug_barrier()  # what other threads of the program have stored is read

    TILES_K: tl.constexpr = (BLOCK_K + TILE - 1) // TILE
    for i_own in range(Kk * TILES_K):
        i_block, index, masked, total = listed_blocks(
            columns, column_counts, i_pattern, i_own // TILES_K, Kk, entries_k, BLOCK_Q
        )
        o_k, o_t = own_tile(slots, i_block, i_own % TILES_K, BLOCK_K, TILE)
        bits = rule_k
        if RULE == BITS:
            bits = own_bits(rule_k, more_k, i_pattern * Kk + i_block, BLOCK_K, BLOCK_Q)
            o_k -= i_block * BLOCK_K
        b_k = load_rows(k, stride_kn, o_t, D, BLOCK_D, True)
        b_v = load_rows(v, stride_vn, o_t, D, BLOCK_D, True)
        b_dk = tl.zeros([TILE, BLOCK_D], tl.float32)
        b_dv = tl.zeros([TILE, BLOCK_D], tl.float32)
        for MASKED in tl.static_range(0 if RULE == NONE else 1, -1, -1):
            b_dk, b_dv = _keys_phase(
                b_dk,
                b_dv,
                b_k,
                b_v,
                o_k,
                i_block,
                q,
                grad,
                lse,
                high,
                inverse,
                delta,
                stride_qn,
                stride_gn,
                slots,
                index,
                0 if MASKED or RULE == NONE else masked,
                masked if MASKED else total,
                bits,
                more_k,
                gain + i_block,
                S,
                C,
                scale,
                D,
                BLOCK_D,
                BLOCK_Q,
                BLOCK_K,
                TILE,
                RULE if MASKED else NONE,
                AXES,
                GAIN,
            )
        b_dk = b_dk * (scale * LN2) + load_rows(dk, stride_bn, o_t, D, BLOCK_D, True)
        store_rows(dk, stride_bn, o_t, b_dk, D, BLOCK_D)
        b_dv += load_rows(dv, stride_cn, o_t, D, BLOCK_D, True)
        store_rows(dv, stride_cn, o_t, b_dv, D, BLOCK_D)


def add_vast_rows(
    tensors: Sequence[Tensor],
    lse: Tensor,
    grad_lse: Tensor,
    slots: Tensor,
    by_row: tuple[Tensor, Tensor],
    by_column: tuple[Tensor, Tensor],
    rule: Sequence[Tensor],
    mode: int,
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> None:
    """Write the gradients of vast rows of q, and add those that k and v have of them.

    Args:
        tensors: q, k, v and the gradient of the output; dq, dk and dv, in which such rows count
            for nothing yet.
        by_row, by_column: index and counts of query blocks and of key blocks, as in `Lists`.
        rule: as there, of the kind `mode`.
    """
    q = tensors[0]
    B, H, N, D = q.shape
    picks = rule[0] if mode == ROUTE.value else None
    axes = rule[0].shape[1] if mode == WINDOWS.value else 0
    if mode != BITS.value:  # which has words of their own for keys
        rule = (*rule, slots, slots)[:2] * 2
    launch(
        vast_backward_kernel,
        (1, B * H),
        q,
        *tensors,
        lse,
        grad_lse.contiguous(),
        *lse.new_empty(3, *lse.shape).unbind(),
        slots,
        *by_row,
        *by_column,
        *rule,
        slots if gain is None else gain,
        *(step for x in tensors for step in x.stride()[:3]),
        *configs.pattern_strides(by_row[0]),
        *((0, 0) if picks is None else configs.pattern_strides(picks)),
        *((0, 0) if gain is None else configs.pattern_strides(gain)),
        by_row[0].shape[2],
        by_column[0].shape[2],
        H,
        N,
        slots.numel(),
        1 if picks is None else picks.shape[3],
        scale / math.log(2),
        D=D,
        BLOCK_D=configs.padded_dim(D),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILE=tile_of(D),
        RULE=mode,
        AXES=axes,
        GAIN=gain is not None,
        num_warps=4,
        num_stages=1,
    )


def tile_of(D: int) -> int:
    """Queries and keys of a tile; not timed."""
    return 32 if configs.padded_dim(D) <= 128 else 16
