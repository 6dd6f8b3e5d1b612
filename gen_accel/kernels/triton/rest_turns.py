"""Forward pass of a rest around mean queries in one launch: pooled keys and values are written
and read within it. Prefixes of names as in `tiles`.

A program takes one turn, numbered by a counter on the device. A turn either pools key blocks for a
group of query blocks, see `pooling`, or attends to the columns of a pair with a tile of queries,
see `rest_columns`. Groups are cut into chunks, and ROOMS chunks have memory at a time: chunk n
takes room n mod ROOMS. Turns that pool chunk n + 1 come before those that attend to chunk n, so
that a program seldom waits for what it reads.

A turn waits for turns with lower numbers alone: one that attends, until its chunk is pooled; one
that pools, until the last chunk of its room is read. Programs that run hold the lowest numbers
that are not done, so that the lowest of them waits for none: however few programs fit on a card,
they come to an end. The order decides no number: no program adds to what another one wrote.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.pooling import pool_blocks
from gen_accel.kernels.triton.rest_columns import SIZES, attend_columns, pair_at

ROOMS = tl.constexpr(configs.ROOMS)


@triton.jit
def _await(count, most):
    """Wait until a count reaches `most`; what was written before it was counted can be read."""
    while tl.atomic_add(count, 0, sem="acquire") < most:
        pass
    tl.debug_barrier()


@triton.jit
def _count(count):
    """Count this program, and with it all that its threads wrote."""
    tl.debug_barrier()
    tl.atomic_add(count, 1, sem="release")


@triton.jit(do_not_specialize=(*SIZES, "chunks", "step", "all_groups"))
def rest_turns_kernel(
    turns,
    q,
    means,
    k,
    v,
    pooled_k,
    pooled_v,
    bias,
    curves,
    rise,
    common,
    squares,
    key_means,
    weight,
    wide_means,
    state,
    out,
    lse,
    low_lse,
    keep,
    slots,
    keep_b,
    keep_h,
    keep_r,
    keep_c,
    chunks,
    step,
    all_groups,
    groups,
    H,
    N,
    R,
    C,
    factor,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    LOAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    WIDTH: tl.constexpr,
    CURVED: tl.constexpr,
    SLOPED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Take one turn.

    Args:
        turns: (1 + 2 chunks,) int32 zeros: turns taken; of each chunk, turns that pooled it; of
            each chunk, turns that attended to it.
        chunks, step, all_groups: number of chunks, of groups in a chunk, and of groups.
        LOAD, STAGES: keys of a load that are pooled, and stages of that loop.
    """
    TILES: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    pooling = step * ((C + BLOCKS - 1) // BLOCKS)  # turns of a chunk
    attending = step * GROUP * TILES
    i_turn = tl.atomic_add(turns, 1, sem="relaxed")
    # Stage n: pool chunk n, then attend to chunk n - 1. Stage 0 has the first part alone.
    i_stage = (i_turn + attending) // (pooling + attending)
    i_in = (i_turn + attending) % (pooling + attending)
    i_in = tl.where(i_stage == 0, i_in - attending, i_in)
    pools = (i_stage < chunks) & (i_in < pooling)
    if pools:
        pooled = turns + 1 + i_stage
        if i_stage >= ROOMS:
            _await(pooled + chunks - ROOMS, attending)
        i_own = i_in % step
        i_group = i_stage * step + i_own
        if i_group < all_groups:
            pool_blocks(
                means,
                k,
                v,
                pooled_k,
                pooled_v,
                bias,
                bias,
                curves,
                common,
                squares,
                key_means,
                weight,
                keep,
                slots,
                keep_b,
                keep_h,
                keep_r,
                keep_c,
                i_group,
                (i_stage % ROOMS * step + i_own) * GROUP,
                i_in // step * BLOCKS,
                groups,
                H,
                N,
                R,
                C,
                scale,
                D,
                BLOCK_D,
                BLOCK_K,
                GROUP,
                LOAD,
                BLOCKS,
                CURVED,
                False,
                STAGES,
            )
        _count(pooled)
    else:
        i_chunk = i_stage - 1
        i_in = tl.where(i_stage < chunks, i_in - pooling, i_in)
        pooled = turns + 1 + i_chunk
        _await(pooled, pooling)
        i_pair = i_in // TILES
        i_head, i_block = pair_at(i_chunk * step, groups, i_pair, GROUP)
        if (i_chunk * step + i_pair // GROUP < all_groups) & (i_block < R):
            attend_columns(
                q,
                pooled_k,
                pooled_v,
                bias,
                curves,
                rise,
                common,
                wide_means,
                state,
                out,
                lse,
                low_lse,
                keep,
                slots,
                keep_b,
                keep_h,
                keep_r,
                keep_c,
                (i_chunk % ROOMS * step * GROUP + i_pair).to(tl.int64),
                i_head,
                i_block,
                i_in % TILES,
                H,
                N,
                R,
                C,
                factor,
                scale,
                D,
                BLOCK_D,
                BLOCK_Q,
                TILE_M,
                TILE_N,
                WIDTH,
                True,
                CURVED,
                SLOPED,
            )
        _count(pooled + chunks)
