"""Facts of blocks for the choice of blocks and for a rest of the second order around queries, in
four launches: over the blocks of queries, over those of keys and values, over heads, and over the
blocks of queries and keys once more. Prefixes of names as in `tiles`.

The first two leave sums of each block; the third adds them up over the blocks of a head, column by
column; the fourth needs these totals. No atomics: each sum is written by one program, in a fixed
order. `curve` runs the same kernels where there is a gradient.

The common key, see `rest_columns`, is the mean of the means of the blocks that count, and 0 where
none does: of a video without its text, whose keys are outliers.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.base import BlockFacts
from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.launch import TILE, WARPS, launch, operate, rows, rowwise
from gen_accel.kernels.triton.pooling import BlockSquares, block_squares
from gen_accel.kernels.triton.slope import matrices, parts_and_facts
from gen_accel.kernels.triton.tiles import of_head, off_mean, one_row, own_tile
from gen_accel.plan import CURVATURE, Plan, Rest, Slots

COLUMNS = 64  # that a program of `head_facts_kernel` adds up, TILE rows at a time; not timed


@triton.jit
def _column_sums(
    x,
    counted,
    i_column,
    K,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Add up columns of x, (K, WIDTH) fp32, from `i_column` on, if COUNTED over the rows with a
    count alone; and the counts, and the rows that have one."""
    o_c = i_column + tl.arange(0, COLUMNS)
    b_sum = tl.zeros([COLUMNS], tl.float32)
    b_total = tl.full((), 0.0, tl.float32)
    b_rows = tl.full((), 0.0, tl.float32)
    for i_row in range(0, K, TILE):
        o_k = i_row + tl.arange(0, TILE)
        m_k = o_k < K
        if COUNTED:
            b_count = tl.load(counted + o_k, mask=m_k, other=0.0)
            m_k &= b_count > 0.0
            b_total += tl.sum(b_count, 0)
            b_rows += tl.sum(m_k.to(tl.float32), 0)
        p_x = x + o_k.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
        b_sum += tl.sum(tl.load(p_x, mask=m_k[:, None] & (o_c < WIDTH)[None, :], other=0.0), 0)
    return b_sum, b_total, b_rows


@triton.jit(do_not_specialize=("R", "C", "PARTS"))
def head_facts_kernel(
    squares,
    key_squares,
    key_means,
    parts,
    counted,
    key_counted,
    weight,
    by,
    common,
    state,
    totals,
    R,
    C,
    PARTS,
    D: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write COLUMNS columns of one head: of w, of u, of the common key or of the slope H. The
    programs of head 0 also write the number of tokens that w and u are means of, at least 1."""
    CHUNKS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    i_head = tl.program_id(1).to(tl.int64)
    i_kind, i_column = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS * COLUMNS
    o_d = i_column + tl.arange(0, COLUMNS)
    if i_kind == 0:
        b_sum, b_total, _rows = _column_sums(
            squares + i_head * R * D, counted, i_column, R, D, TILE, COLUMNS, True
        )
        b_total = tl.maximum(b_total, 1.0)
        tl.store(weight + i_head * D + o_d, b_sum / b_total, mask=o_d < D)
        if i_head == 0:
            tl.store(totals, b_total)
    elif i_kind == 1:
        b_sum, b_total, _rows = _column_sums(
            key_squares + i_head * C * D, key_counted, i_column, C, D, TILE, COLUMNS, True
        )
        b_total = tl.maximum(b_total, 1.0)
        tl.store(by + i_head * D + o_d, b_sum / b_total, mask=o_d < D)
        if i_head == 0:
            tl.store(totals + 1, b_total)
    elif i_kind == 2:
        b_sum, _total, b_rows = _column_sums(
            key_means + i_head * C * D, key_counted, i_column, C, D, TILE, COLUMNS, True
        )
        tl.store(common + i_head * D + o_d, b_sum / tl.maximum(b_rows, 1.0), mask=o_d < D)
    else:
        SIZE: tl.constexpr = D * D
        i_column = (tl.program_id(0) - 3 * CHUNKS) * COLUMNS
        b_sum, _total, _rows = _column_sums(
            parts + i_head * PARTS * SIZE, counted, i_column, PARTS, SIZE, TILE, COLUMNS, False
        )
        o_d = i_column + tl.arange(0, COLUMNS)
        tl.store(state + i_head * SIZE + o_d, b_sum.to(state.dtype.element_ty), mask=o_d < SIZE)


@triton.jit
def factors(weight, by, i_head, scale, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return w, u, w . u with 1 in place of 0, and c of `curve`."""
    b_w, b_u = one_row(weight, i_head, D, BLOCK_D), one_row(by, i_head, D, BLOCK_D)
    b_both = tl.sum(b_w * b_u, 0)
    b_safe = tl.where(b_both > 0.0, b_both, 1.0)
    return b_w, b_u, b_safe, tl.where(b_both > 0.0, scale / b_safe, 0.0)


@triton.jit
def _weighed(
    x,
    means,
    b_weight,
    made,
    slots,
    i_block,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the weighed sums of the squared offsets of a block's tokens from its mean."""
    b_mean = one_row(means, i_block, D, BLOCK_D)
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_off = off_mean(x, o_t, tl.arange(0, BLOCK_D), b_mean, D)
        tl.store(made + o_t, tl.sum(b_off * b_off * b_weight[None, :], 1), mask=o_t >= 0)


@triton.jit(do_not_specialize=("first", "H", "N", "R", "C"))
def weighed_squares_kernel(
    q,
    k,
    wide_means,
    key_means,
    weight,
    by,
    rise,
    squares,
    slots,
    first,
    H,
    N,
    R,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the rise of the queries of one block, or, from the R-th block on, e of the keys of
    one, see `pooling`. The first program has block `first`; `scale` is s of `curve`."""
    i_block, i_head = first + tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    if i_block < R:
        _w, b_u, _safe, b_c = factors(weight, by, i_head, scale, D, BLOCK_D)
        means, made = wide_means + i_head * R * D, rise + i_head * N
        rows = of_head(q, i_b, i_h)
        _weighed(rows, means, b_u * b_c, made, slots, i_block, D, BLOCK_D, BLOCK_Q, TILE)
    else:
        b_w = one_row(weight, i_head, D, BLOCK_D)
        means, made = key_means + i_head * C * D, squares + i_head * N
        rows = of_head(k, i_b, i_h)
        _weighed(rows, means, b_w, made, slots, i_block - R, D, BLOCK_D, BLOCK_K, TILE)


def facts_of(
    q: Tensor, k: Tensor, v: Tensor, slots: Slots | Plan, rest: Rest, *, scale: float
) -> BlockFacts:
    """Compute the facts of a call with a rest of the second order, without a gradient."""
    tokens = slots.tokens if rest.tokens is None else rest.tokens
    numbers = tokens, slots.block_q, slots.block_k, scale
    return BlockFacts(*operate(block_facts, q, k, v, slots.slots_int32, *numbers))


@torch.library.custom_op("gen_accel::triton_block_facts", mutates_args=())
def block_facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    tokens: int,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the fields of `BlockFacts`.

    Args:
        slots: (S,) int32, the token of each slot, -1 for padding.
        tokens: blocks of tokens from the first to this one count in w, u and the common key.
    """
    q, k, v = (rowwise(x) for x in (q, k, v))
    queries = block_squares(q, slots, block_q, tokens)
    parts, keys, deviations = parts_and_facts(k, v, slots, block_k, tokens)
    weight, by, common = (deviations.new_empty(*q.shape[:2], q.shape[3]) for _ in range(3))
    state = matrices(k)
    head_facts(queries, keys, weight, by, deviations.new_empty(2), (parts, common, state))
    rise, squares = (weight.new_empty(q.shape[:3]) for _ in range(2))
    means, blocks = (queries.means, keys.means), (block_q, block_k)
    weigh_squares(q, k, slots, blocks, *means, weight, by, rise, squares, scale=scale)
    return *means, deviations, rise, weight, squares, common, state


@block_facts.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    tokens: int,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, ...]:
    B, H, N, D = q.shape
    Kq, Kk = (len(slots) // block for block in (block_q, block_k))
    means = (B, H, Kq, D), (B, H, Kk, D)
    shapes = *means, (B, H, Kk), (B, H, N), (B, H, D), (B, H, N), (B, H, D)
    made = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return *made, matrices(k)


def head_facts(
    queries: BlockSquares,
    keys: BlockSquares,
    weight: Tensor,
    by: Tensor,
    totals: Tensor,
    more: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Write w and u, (B, H, D), and the number of tokens that they are means of, (2,).

    Args:
        more: parts of H, the common keys, (B, H, D), and H, (B, H, D, D); the last two are
            written.
    """
    D, PARTS = weight.shape[2], 0 if more is None else more[0].shape[2]
    parts, common, state = (weight,) * 3 if more is None else more
    programs = 2 * triton.cdiv(D, COLUMNS)
    if more is not None:
        programs += triton.cdiv(D, COLUMNS) + triton.cdiv(D * D, COLUMNS)
    launch(
        head_facts_kernel,
        (programs, weight.shape[:2].numel()),
        weight,
        *(queries.squares, keys.squares, keys.means, parts, queries.counted, keys.counted),
        *(weight, by, common, state, totals),
        *(queries.means.shape[2], keys.means.shape[2], PARTS),
        D=D,
        TILE=TILE,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )


def weigh_squares(
    q: Tensor,
    k: Tensor,
    slots: Tensor,
    blocks: tuple[int, int],
    query_means: Tensor,
    key_means: Tensor,
    weight: Tensor,
    by: Tensor,
    rise: Tensor,
    squares: Tensor,
    *,
    scale: float = 0.0,
    of_queries: bool = True,
    of_keys: bool = True,
) -> None:
    """Write the rise of queries and e of keys, (B, H, N) fp32.

    Args:
        q, k: (B, H, N, D), see `rowwise`.
        blocks: slots in a query and in a key block.
        query_means, key_means: (B, H, Kq, D) and (B, H, Kk, D) fp32.
        scale: factor of q k^T.
        of_queries, of_keys: whether this side is written. If not, its tensors hold anything, and
            without queries `by` too.
    """
    B, H, N, D = q.shape
    Kq, Kk = (len(slots) // block for block in blocks)
    launch(
        weighed_squares_kernel,
        (of_queries * Kq + of_keys * Kk, B * H),
        q,
        *(*rows(q, k), query_means, key_means, weight, by, rise, squares, slots),
        *(0 if of_queries else Kq, H, N, Kq, Kk, CURVATURE * scale**2),
        **configs.dims(D),
        BLOCK_Q=blocks[0],
        BLOCK_K=blocks[1],
        TILE=TILE,
        num_warps=WARPS,
    )
