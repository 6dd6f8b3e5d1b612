"""Least key that is taken of many: masses are counted in bins, by the upper half of the keys, and
in the decisive bin by the lower half.

Masses are whole numbers, so atomic additions give the same sum in any order.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.triton.launch import launch

BINS = 1 << 16
BLOCK = 1024  # keys of a program; not timed


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
