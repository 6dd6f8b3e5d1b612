"""Attention of queries that pick groups of keys for themselves; prefixes of names as in `tiles`.

A program owns a run of query slots. Group by group it gathers the slots that picked the group into
tiles, and adds to their sums in memory, which no other program touches.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from gen_accel.kernels.triton.sparse_backward import dq_phase, statistics
from gen_accel.kernels.triton.sparse_forward import forward_phase
from gen_accel.kernels.triton.tiles import LN2, NONE, SIZES, load_rows, store_rows


@triton.jit
def _owned_tokens(slots, i_s, i_r, S, OWNED: tl.constexpr, TILE: tl.constexpr):
    """Load the tokens of one tile of an owner; -1 for padding and past its end."""
    o_r = i_r + tl.arange(0, TILE)
    m_r = (o_r < OWNED) & (i_s + o_r < S)
    return tl.load(slots + i_s + o_r, mask=m_r, other=-1)


@triton.jit
def _gathered_tokens(slots, picked, i_s, i_p, count, TILE: tl.constexpr):
    """Load the tokens of the tile at place i_p of a list of slots; -1 past its end."""
    o_p = i_p + tl.arange(0, TILE)
    o_r = tl.load(picked + o_p, mask=o_p < count, other=0).to(tl.int32)
    return tl.load(slots + i_s + o_r, mask=o_p < count, other=-1)


@triton.jit
def _group(ranges, members, i_c, BLOCK_K: tl.constexpr):
    """Load the i_c-th group: the start and length of its list of slots, the start of its list of
    key blocks and the number of their slots. A group without keys is seen by no query."""
    start, count = tl.load(ranges + 2 * i_c), tl.load(ranges + 2 * i_c + 1)
    blocks, first = tl.load(members + 4 * i_c + 1), tl.load(members + 4 * i_c + 2)
    return start, tl.where(blocks > 0, count, 0), first, blocks * BLOCK_K


@triton.jit(do_not_specialize=SIZES)
def gathered_forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    acc,
    total,
    slots,
    picked,
    ranges,
    blocks,
    members,
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
    H,
    N,
    S,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OWNED: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    FIRST: tl.constexpr = D if D < WIDTH else WIDTH
    i_owner = tl.num_programs(0) - 1 - tl.program_id(0)  # text, which sees all, lies at the end
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_list = (i_b * pattern_b + i_h * pattern_h) * tl.num_programs(0) + i_owner
    picked += i_list * OWNED * C
    ranges += i_list * C * 2
    q += i_b * stride_qb + i_h * stride_qh
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    out += i_b * stride_ob + i_h * stride_oh
    i_row = tl.program_id(1).to(tl.int64) * N
    acc += i_row * D
    total += i_row
    lse += i_row  # base 2 and without the sum until the end
    i_s = i_owner * OWNED

    for i_r in range(0, OWNED, TILE_M):
        o_t = _owned_tokens(slots, i_s, i_r, S, OWNED, TILE_M)
        store_rows(acc, D, o_t, tl.zeros([TILE_M, BLOCK_D], tl.float32), D, BLOCK_D)
        tl.store(total + o_t, tl.zeros([TILE_M], tl.float32), mask=o_t >= 0)
        tl.store(lse + o_t, tl.full([TILE_M], -float("inf"), tl.float32), mask=o_t >= 0)
    for i_c in range(C):
        start, count, first, stop = _group(ranges, members, i_c, BLOCK_K)
        tl.debug_barrier()  # so that stores of other threads of the program are read
        for i_p in range(0, count, TILE_M):
            o_t = _gathered_tokens(slots, picked + start, i_s, i_p, count, TILE_M)
            b_q = load_rows(q, stride_qn, o_t, D, BLOCK_D, True)
            b_acc = load_rows(acc, D, o_t, FIRST, WIDTH, True)
            b_high = b_acc
            if WIDTH < BLOCK_D:
                b_high = load_rows(acc + WIDTH, D, o_t, D - WIDTH, WIDTH, True)
            b_sum = tl.load(total + o_t, mask=o_t >= 0, other=0.0)
            b_max = tl.load(lse + o_t, mask=o_t >= 0, other=-float("inf"))
            b_acc, b_high, b_sum, b_max = forward_phase(
                b_acc,
                b_high,
                b_sum,
                b_max,
                b_q,
                o_t,
                k,
                v,
                stride_kn,
                stride_vn,
                slots,
                blocks + first,
                0,
                stop,
                slots,
                slots,
                slots,
                S,
                C,
                scale,
                D,
                BLOCK_D,
                TILE_M,
                BLOCK_K,
                TILE_N,
                WIDTH,
                NONE,
                0,
                False,
                True,
            )
            store_rows(acc, D, o_t, b_acc, FIRST, WIDTH)
            if WIDTH < BLOCK_D:
                store_rows(acc + WIDTH, D, o_t, b_high, D - WIDTH, WIDTH)
            tl.store(total + o_t, b_sum, mask=o_t >= 0)
            tl.store(lse + o_t, b_max, mask=o_t >= 0)
    tl.debug_barrier()
    for i_r in range(0, OWNED, TILE_M):
        o_t = _owned_tokens(slots, i_s, i_r, S, OWNED, TILE_M)
        b_sum = tl.load(total + o_t, mask=o_t >= 0, other=0.0)
        b_max = tl.load(lse + o_t, mask=o_t >= 0, other=0.0)
        b_safe = tl.where(b_sum == 0.0, 1.0, b_sum)
        b_out = load_rows(acc, D, o_t, D, BLOCK_D, True) / b_safe[:, None]
        store_rows(out, stride_on, o_t, b_out, D, BLOCK_D)
        b_lse = tl.where(b_sum == 0.0, -float("inf"), (b_max + tl.log2(b_safe)) * LN2)
        tl.store(lse + o_t, b_lse, mask=o_t >= 0)


@triton.jit(do_not_specialize=SIZES)
def gathered_dq_kernel(
    q,
    k,
    v,
    grad,
    dq,
    lse,
    delta,
    acc,
    slots,
    picked,
    ranges,
    blocks,
    members,
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
    H,
    N,
    S,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OWNED: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    i_owner = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_list = (i_b * pattern_b + i_h * pattern_h) * tl.num_programs(0) + i_owner
    picked += i_list * OWNED * C
    ranges += i_list * C * 2
    q += i_b * stride_qb + i_h * stride_qh
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    grad += i_b * stride_gb + i_h * stride_gh
    dq += i_b * stride_db + i_h * stride_dh
    i_row = tl.program_id(1).to(tl.int64) * N
    acc += i_row * D
    lse += i_row
    delta += i_row
    i_s = i_owner * OWNED

    for i_r in range(0, OWNED, TILE_M):
        o_t = _owned_tokens(slots, i_s, i_r, S, OWNED, TILE_M)
        store_rows(acc, D, o_t, tl.zeros([TILE_M, BLOCK_D], tl.float32), D, BLOCK_D)
    for i_c in range(C):
        start, count, first, stop = _group(ranges, members, i_c, BLOCK_K)
        tl.debug_barrier()
        for i_p in range(0, count, TILE_M):
            o_t = _gathered_tokens(slots, picked + start, i_s, i_p, count, TILE_M)
            b_q = load_rows(q, stride_qn, o_t, D, BLOCK_D, True)
            b_grad = load_rows(grad, stride_gn, o_t, D, BLOCK_D, True)
            b_lse, b_delta = statistics(lse, delta, o_t)
            b_dq = load_rows(acc, D, o_t, D, BLOCK_D, True)
            b_dq = dq_phase(
                b_dq,
                b_q,
                b_grad,
                b_lse,
                b_delta,
                o_t,
                k,
                v,
                stride_kn,
                stride_vn,
                slots,
                blocks + first,
                0,
                stop,
                slots,
                slots,
                slots,
                S,
                C,
                scale,
                D,
                BLOCK_D,
                TILE_M,
                BLOCK_K,
                TILE_N,
                NONE,
                0,
                False,
                True,
            )
            store_rows(acc, D, o_t, b_dq, D, BLOCK_D)
    tl.debug_barrier()
    for i_r in range(0, OWNED, TILE_M):
        o_t = _owned_tokens(slots, i_s, i_r, S, OWNED, TILE_M)
        b_dq = load_rows(acc, D, o_t, D, BLOCK_D, True) * (scale * LN2)
        store_rows(dq, stride_dn, o_t, b_dq, D, BLOCK_D)
