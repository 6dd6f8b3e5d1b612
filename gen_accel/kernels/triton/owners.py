"""Lists of picks: for each run of slots and each group of keys, the slots that picked it.

One program lists the picks of one run, its owner, into memory of its own: no sort, no atomics, no
wait. Each list is in the order of the slots.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.triton.launch import launch

ROWS, CHUNK = 32, 64  # of one step of a program


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
