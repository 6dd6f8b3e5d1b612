"""Lists made by counting: no sort, no wait for the device.

`block_lists`: the blocks that a plan keeps, in three passes: count the kept blocks of each row,
add the counts up to the start of each list, write the lists. `lists.listed` is the same in torch.

`owners_of`: for each run of slots and each group of keys, the slots that picked it, in their
order. One program lists the picks of one run, its owner, into memory of its own.

`least_taken`: the least key that is taken of many. Masses are counted in bins, by the upper half
of the keys, and in the decisive bin by the lower half. They are whole numbers, so atomic additions
give the same sum in any order.
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
BINS = 1 << 16
BLOCK = 1024  # keys of a program that counts bins; not timed

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


@triton.jit
def _picked(picks, slots, i_s, o_r, o_c, picks_s, picks_c, S, C, OWNED: tl.constexpr):
    """Load picks as int32, [ROWS, CHUNK]: 1 where a slot of an owner picked a group; 0 for
    padding."""
    o_s = i_s + o_r
    m_s = (o_r < OWNED) & (o_s < S)
    m_s = m_s & (tl.load(slots + o_s, mask=m_s, other=-1) >= 0)
    o_x = o_s.to(tl.int64)[:, None] * picks_s + o_c.to(tl.int64)[None, :] * picks_c
    m_x = m_s[:, None] & (o_c < C)[None, :]
    return (tl.load(picks + o_x, mask=m_x, other=0) != 0).to(tl.int32)


@triton.jit(do_not_specialize=("picks_b", "picks_h", "picks_s", "picks_c", "H", "S", "C"))
def owners_kernel(
    picks,
    slots,
    picked,
    ranges,
    picks_b,
    picks_h,
    picks_s,
    picks_c,
    H,
    S,
    C,
    OWNED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Count the picks of an owner's slots, and list them group after group."""
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    picks += i_b * picks_b + i_h * picks_h
    i_list = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    picked += i_list * OWNED * C
    ranges += i_list * C * 2
    i_s = tl.program_id(0) * OWNED
    start = 0
    for i_c in range(0, C, CHUNK):
        o_c = i_c + tl.arange(0, CHUNK)
        b_total = tl.zeros([CHUNK], tl.int32)
        for i_r in range(0, OWNED, ROWS):
            o_r = i_r + tl.arange(0, ROWS)
            b_one = _picked(picks, slots, i_s, o_r, o_c, picks_s, picks_c, S, C, OWNED)
            b_total += tl.sum(b_one, 0)
        b_at = start + tl.cumsum(b_total, 0) - b_total
        tl.store(ranges + 2 * o_c, b_at, mask=o_c < C)
        tl.store(ranges + 2 * o_c + 1, b_total, mask=o_c < C)
        for i_r in range(0, OWNED, ROWS):
            o_r = i_r + tl.arange(0, ROWS)
            b_one = _picked(picks, slots, i_s, o_r, o_c, picks_s, picks_c, S, C, OWNED)
            b_place = b_at[None, :] + tl.cumsum(b_one, 0) - 1
            b_slot = tl.broadcast_to(o_r[:, None], [ROWS, CHUNK]).to(tl.int16)
            tl.store(picked + b_place, b_slot, mask=b_one != 0)
            b_at += tl.sum(b_one, 0)
        start += tl.sum(b_total, 0)


def owners_of(picks: Tensor, slots: Tensor, owned: int) -> tuple[Tensor, Tensor]:
    """Make the lists of all owners.

    Args:
        picks: (B', H', S, C) bool, of any strides.
        slots: (S,) int32, the token of each slot, -1 for padding, which is in no list.
        owned: slots of an owner; the last owner may have fewer.

    Returns:
        (B', H', owners, owned * C) int16, the slots counted from the owner's first, one group's
        list after the other, the rest unused; and (B', H', owners, C, 2) int32, where the list of
        each group starts and how long it is.
    """
    B, H, S, C = picks.shape
    owners = triton.cdiv(S, owned)
    picked = picks.new_empty((B, H, owners, owned * C), dtype=torch.int16)
    ranges = picks.new_empty((B, H, owners, C, 2), dtype=torch.int32)
    picks = picks.view(torch.uint8)
    launch(
        owners_kernel,
        (owners, B * H),
        picks,
        picks,
        slots,
        picked,
        ranges,
        *picks.stride(),
        H,
        S,
        C,
        OWNED=owned,
        ROWS=ROWS,
        CHUNK=CHUNK,
    )
    return picked, ranges


@triton.jit
def bins_kernel(
    keys, upper, count, n, WEIGHTED: tl.constexpr, LOWER: tl.constexpr, BLOCK: tl.constexpr
):
    """Add the masses of keys to their bins: the keys themselves as fp32, rounded down, or 1."""
    i_scope = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_key = tl.load(keys + i_scope * n + o_n, mask=m_n, other=0)
    if WEIGHTED:
        b_rank = b_key.to(tl.int64)
        b_mass = b_key.to(tl.float32, bitcast=True).to(tl.int64)
    else:
        b_rank = b_key.to(tl.int64) + 2147483648
        b_mass = tl.full([BLOCK], 1, tl.int64)
    if LOWER:
        m_n = m_n & ((b_rank >> 16) == tl.load(upper + i_scope))
        b_bin = b_rank & 0xFFFF
    else:
        b_bin = b_rank >> 16
    # The first number of a scope stays 0: the mass below the first bin.
    p_count = count + i_scope * 65537 + 1 + b_bin
    tl.atomic_add(p_count, b_mass, mask=m_n, sem="relaxed")


@torch.library.custom_op("gen_accel::triton_least_taken", mutates_args=())
def least_taken(keys: Tensor, slack: Tensor, weighted: bool) -> Tensor:
    """Greatest key below which at most `slack` of the mass lies; a number above all keys if their
    total is no more.

    Args:
        keys: (..., n) int32, contiguous. With `weighted`, the bits of fp32 numbers that are not
            negative, and their whole parts are the masses; else each key counts 1.
        slack: (...) int64, not negative.

    Returns:
        (...) int64.
    """
    n = keys.shape[-1]
    flat, slack = keys.view(-1, n), slack.reshape(-1, 1)
    upper = torch.zeros_like(slack)
    bins = []
    for lower in (False, True):
        count = slack.new_zeros(len(slack), BINS + 1)
        flags = {"WEIGHTED": weighted, "LOWER": lower, "BLOCK": BLOCK}
        launch(
            bins_kernel, (triton.cdiv(n, BLOCK), len(flat)), flat, flat, upper, count, n, **flags
        )
        below = count.cumsum(-1)
        upper = torch.searchsorted(below, slack, right=True) - 1
        slack = slack - below.gather(-1, upper)
        bins.append(upper)
    cut = torch.add(bins[1], bins[0], alpha=BINS)
    return (cut if weighted else cut - (1 << 31)).view(keys.shape[:-1])


@least_taken.register_fake
def _(keys: Tensor, slack: Tensor, weighted: bool) -> Tensor:
    return keys.new_empty(keys.shape[:-1], dtype=torch.int64)
