"""Choice of the key blocks that score best, and the lists of all that are kept, in one pass.

One program holds the scores of a row as whole numbers in the same order. It finds the least one
that is taken bit by bit, from the highest on. Among equal scores the lower blocks are taken. Each
list has room for all that its row may keep, so that no row waits for others to know where its list
starts. No sort, no atomics, no wait for the device.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.triton.launch import launch
from gen_accel.kernels.triton.tiles import INTERPRETED

MOST_BLOCKS = 1 << 12  # of a row: 262,144 slots in blocks of 64
ROWS = 32 if INTERPRETED else 1  # of a program
OF_WARP = 256  # scores that a warp holds; with more, few programs fit; not timed
WARPS = 8  # of a program at most; with more, some cards would spill
ALWAYS, RANKED, WHOLE = (tl.constexpr(1 << bit) for bit in range(3))  # bits of a kind
LOWEST, HIGHEST = tl.constexpr(-(1 << 31)), tl.constexpr((1 << 31) - 1)

# Sizes that change from clip to clip: one compiled kernel serves all.
SIZES = ("first", "heads", "H", "R", "C", "entries", "most")


@triton.jit
def _sortable(b_x):
    """Turn fp32 into int32 of the same order: equal zeros, NaN above all, LOWEST below all."""
    b_bits = tl.where(b_x == 0.0, 0.0, b_x).to(tl.int32, bitcast=True)
    return tl.where(b_x == b_x, b_bits ^ ((b_bits >> 31) & HIGHEST), HIGHEST)


@triton.jit
def _best(b_key, count, BLOCK: tl.constexpr):
    """Mask of the `count` greatest keys of each row, the first of equal ones."""
    b_held = tl.sum((b_key >= 0).to(tl.int32), 1)
    b_cut = tl.where(b_held >= count, 0, LOWEST)
    b_held = tl.where(b_held >= count, b_held, BLOCK)  # keys from the cut on
    step = tl.full((), 1 << 30, tl.int32)
    while (step > 0) & (tl.max((b_held != count).to(tl.int32), 0) > 0):
        b_next = b_cut + step
        b_above = tl.sum((b_key >= b_next[:, None]).to(tl.int32), 1)
        b_cut = tl.where(b_above >= count, b_next, b_cut)
        b_held = tl.where(b_above >= count, b_above, b_held)
        step = step >> 1
    b_above = b_key > b_cut[:, None]
    b_equal = b_key == b_cut[:, None]
    b_left = count - tl.sum(b_above.to(tl.int32), 1)
    return b_above | (b_equal & (tl.cumsum(b_equal.to(tl.int32), 1) <= b_left[:, None]))


@triton.jit(do_not_specialize=SIZES)
def select_kernel(
    scores,
    added,
    kinds,
    before,
    wanted,
    keep,
    index,
    counts,
    first,
    heads,
    H,
    R,
    C,
    entries,
    most,
    ADDED: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Choose the blocks of ROWS rows: write the mask, the list and its numbers."""
    i_h = first + tl.program_id(1) % H
    i_head = (tl.program_id(1) // H * heads + i_h).to(tl.int64)
    o_r, o_c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_r, m_c = o_r < R, o_c < C
    m_x = m_r[:, None] & m_c[None, :]
    o_x = o_r[:, None] * C + o_c[None, :]
    scores += tl.program_id(1).to(tl.int64) * R * C
    keep += i_head * R * C
    index += i_head * entries
    b_x = tl.load(scores + o_x, mask=m_x, other=0.0)
    if ADDED:
        b_x += tl.load(added + i_head * C + o_c[None, :], mask=m_x, other=0.0)
    b_kind = tl.load(kinds + o_x, mask=m_x, other=0).to(tl.int32)
    count = most
    if EACH:
        count = tl.load(wanted + i_h).to(tl.int32)
    b_keep = _best(tl.where((b_kind & RANKED) != 0, _sortable(b_x), LOWEST), count, BLOCK)
    if BLOCK > 2048:
        tl.debug_barrier()  # else registers are spilled, so that two programs fit
    b_keep = (b_keep & m_x) | ((b_kind & ALWAYS) != 0)
    tl.store(keep + o_x, b_keep.to(tl.uint8), mask=m_x)
    b_whole = (b_kind & WHOLE) != 0
    # Two numbers in one, 16 bits each, so that one sum counts both parts of a list.
    b_both = tl.where(b_keep, tl.where(b_whole, 1 << 16, 1), 0)
    b_total = tl.sum(b_both, 1)
    b_masked = b_total & 0xFFFF
    b_start = tl.load(before + 2 * o_r, mask=m_r, other=0)
    b_start += tl.load(before + 2 * o_r + 1, mask=m_r, other=0) * most
    b_place = tl.cumsum(b_both, 1)
    b_place = tl.where(b_whole, (b_place >> 16) + b_masked[:, None], b_place & 0xFFFF)
    index += b_start[:, None] - 1
    tl.store(index + b_place, tl.broadcast_to(o_c[None, :], [ROWS, BLOCK]), mask=b_keep)
    counts += 4 * (i_head * R + o_r)
    tl.store(counts, b_masked, mask=m_r)
    tl.store(counts + 1, b_masked + (b_total >> 16), mask=m_r)
    tl.store(counts + 2, b_start, mask=m_r)
    tl.store(counts + 3, R - 1 - o_r, mask=m_r)


def sizes(blocks: int) -> dict[str, int]:
    """Scores of a row, with padding, rows of a program, and its warps."""
    block = triton.next_power_of_2(blocks)
    return {"ROWS": ROWS, "BLOCK": block, "num_warps": min(max(1, block // OF_WARP), WARPS)}


@torch.library.custom_op("gen_accel::triton_select", mutates_args=("keep", "index", "counts"))
def select(
    scores: Tensor,
    added: Tensor | None,
    kinds: Tensor,
    before: Tensor,
    wanted: Tensor | None,
    keep: Tensor,
    index: Tensor,
    counts: Tensor,
    first: int,
    count: int,
) -> None:
    """Choose the key blocks of h heads from number `first` on, and write what these keep.

    Args:
        scores: (B, h, R, C) fp32, of query blocks and key blocks.
        added: (B, H, C) fp32, added to the scores of all query blocks; or None.
        kinds: (R, C) uint8, the sum of ALWAYS for pairs that are kept whatever the scores, of
            RANKED for key blocks that are chosen among, and of WHOLE for those that need no mask.
        before: (R, 2) int32: of all rows before each, the pairs in ALWAYS, and how many choose.
        wanted: (H,) int64, blocks that the rows of each head choose; None for `count` of all.
        keep: (B, H, R, C) bool, contiguous, of all heads.
        index, counts: as of `listing.block_lists`, of all heads, with room after each list.
        count: most blocks that a row chooses; no more than are ranked.
    """
    B, H, R, C = scores.shape
    flags = {"ADDED": added is not None, "EACH": wanted is not None, **sizes(C)}
    launch(
        select_kernel,
        (triton.cdiv(R, flags["ROWS"]), B * H),
        scores,
        scores.contiguous(),
        scores if added is None else added.contiguous(),
        kinds,
        before,
        before if wanted is None else wanted,
        keep.view(torch.uint8),
        index,
        counts,
        first,
        keep.shape[1],
        H,
        R,
        C,
        index.shape[2],
        count,
        **flags,
    )


@select.register_fake
def _(*given: object) -> None:
    return None
