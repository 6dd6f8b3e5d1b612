"""Lists of the blocks that a plan keeps, made by counting: no sort, no atomics, no wait.

Three passes: count the kept blocks of each row, add the counts up to the start of each list, write
the lists. `lists.listed` is the same in torch.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.triton.launch import launch

ROWS, CHUNK = 32, 64  # of one step of a program: sectors of memory are read whole either way
STEP = 1024  # counts that are added up at once

# Sizes that change from clip to clip: one compiled kernel serves all.
STRIDES = (f"{name}_{axis}" for name in ("keep", "whole") for axis in "bhrc")
SIZES = (*STRIDES, "H", "R", "C", "entries")


@triton.jit
def _kept(keep, whole, o_keep, o_whole, m_x):
    """Load two masks, [ROWS, CHUNK] int32: blocks that need a mask, and blocks that need none."""
    b_keep = tl.load(keep + o_keep, mask=m_x, other=0).to(tl.int32)
    b_whole = tl.load(whole + o_whole, mask=m_x, other=0).to(tl.int32) * b_keep
    return b_keep - b_whole, b_whole


@triton.jit(do_not_specialize=SIZES)
def count_kernel(
    keep,
    whole,
    counts,
    keep_b,
    keep_h,
    keep_r,
    keep_c,
    whole_b,
    whole_h,
    whole_r,
    whole_c,
    H,
    R,
    C,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Count the masked blocks and all blocks of each row, and write the row of each turn."""
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep += i_b * keep_b + i_h * keep_h + o_r.to(tl.int64)[:, None] * keep_r
    whole += i_b * whole_b + i_h * whole_h + o_r.to(tl.int64)[:, None] * whole_r
    b_masked = tl.zeros([ROWS], tl.int32)
    b_total = tl.zeros([ROWS], tl.int32)
    for i_c in range(0, C, CHUNK):
        o_c = i_c + tl.arange(0, CHUNK)
        m_x = (o_r < R)[:, None] & (o_c < C)[None, :]
        o_keep, o_whole = o_c.to(tl.int64) * keep_c, o_c.to(tl.int64) * whole_c
        b_some, b_full = _kept(keep, whole, o_keep[None, :], o_whole[None, :], m_x)
        b_masked += tl.sum(b_some, 1)
        b_total += tl.sum(b_some + b_full, 1)
    o_row = tl.program_id(1).to(tl.int64) * R + o_r
    tl.store(counts + 4 * o_row, b_masked, mask=o_r < R)
    tl.store(counts + 4 * o_row + 1, b_total, mask=o_r < R)
    tl.store(counts + 4 * o_row + 3, R - 1 - o_r, mask=o_r < R)


@triton.jit(do_not_specialize=("R", "entries"))
def starts_kernel(counts, index, R, entries, STEP: tl.constexpr):
    """Write where the list of each row starts, 0 for an empty one. The first entry of the index
    is always written, since kernels read ahead."""
    counts += tl.program_id(0).to(tl.int64) * R * 4
    tl.store(index + tl.program_id(0).to(tl.int64) * entries, 0)
    start = tl.full((), 0, tl.int32)
    for i_r in range(0, R, STEP):
        o_r = i_r + tl.arange(0, STEP)
        b_total = tl.load(counts + 4 * o_r + 1, mask=o_r < R, other=0)
        b_start = tl.where(b_total > 0, start + tl.cumsum(b_total, 0) - b_total, 0)
        tl.store(counts + 4 * o_r + 2, b_start, mask=o_r < R)
        start += tl.sum(b_total, 0)


@triton.jit(do_not_specialize=SIZES)
def fill_kernel(
    keep,
    whole,
    counts,
    index,
    keep_b,
    keep_h,
    keep_r,
    keep_c,
    whole_b,
    whole_h,
    whole_r,
    whole_c,
    H,
    R,
    C,
    entries,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the list of each row: the blocks that need a mask, then the others."""
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep += i_b * keep_b + i_h * keep_h + o_r.to(tl.int64)[:, None] * keep_r
    whole += i_b * whole_b + i_h * whole_h + o_r.to(tl.int64)[:, None] * whole_r
    o_row = tl.program_id(1).to(tl.int64) * R + o_r
    b_some_at = tl.load(counts + 4 * o_row + 2, mask=o_r < R, other=0)
    b_full_at = b_some_at + tl.load(counts + 4 * o_row, mask=o_r < R, other=0)
    index += tl.program_id(1).to(tl.int64) * entries
    for i_c in range(0, C, CHUNK):
        o_c = i_c + tl.arange(0, CHUNK)
        m_x = (o_r < R)[:, None] & (o_c < C)[None, :]
        o_keep, o_whole = o_c.to(tl.int64) * keep_c, o_c.to(tl.int64) * whole_c
        b_some, b_full = _kept(keep, whole, o_keep[None, :], o_whole[None, :], m_x)
        b_at = b_some_at[:, None] + tl.cumsum(b_some, 1) - 1
        tl.store(index + b_at, o_c[None, :], mask=(b_some != 0) & (b_at < entries))
        b_at = b_full_at[:, None] + tl.cumsum(b_full, 1) - 1
        tl.store(index + b_at, o_c[None, :], mask=(b_full != 0) & (b_at < entries))
        b_some_at += tl.sum(b_some, 1)
        b_full_at += tl.sum(b_full, 1)


@torch.library.custom_op("gen_accel::triton_block_lists", mutates_args=())
def block_lists(keep: Tensor, whole: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Make the lists of `lists.listed`, with turns from the last row to the first, since the rows
    of text, the longest, lie at the end.

    Args:
        keep, whole: (B', H', R, C) bool, of any strides: blocks that are kept, and that need no
            mask.
        entries: upper bound on the blocks that one pattern keeps.

    Returns:
        (B', H', entries) int32 and (B', H', R, 4) int32.
    """
    B, H, R, C = keep.shape
    keep, whole = keep.view(torch.uint8), whole.view(torch.uint8)
    index = keep.new_empty((B, H, entries), dtype=torch.int32)
    counts = keep.new_empty((B, H, R, 4), dtype=torch.int32)
    programs = triton.cdiv(R, ROWS), B * H
    strides = *keep.stride(), *whole.stride(), H, R, C
    sizes = {"ROWS": ROWS, "CHUNK": CHUNK}
    launch(count_kernel, programs, keep, keep, whole, counts, *strides, **sizes)
    launch(starts_kernel, (B * H, 1), keep, counts, index, R, entries, STEP=STEP)
    launch(fill_kernel, programs, keep, keep, whole, counts, index, *strides, entries, **sizes)
    return index, counts


@block_lists.register_fake
def _(keep: Tensor, whole: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    B, H, R, _ = keep.shape
    shapes = (B, H, entries), (B, H, R, 4)
    index, counts = (keep.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return index, counts
