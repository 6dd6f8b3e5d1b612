"""Rule of a static plan as one bit for each pair of slots in the blocks that need a mask.

A kernel then tests a bit instead of comparing places on each axis of the grid.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gen_accel.plan import PAIRS, Plan, Windows

WORD = 32  # pairs in one number
# Bytes of all plans together, of rows and of columns. Where a plan would take more, kernels
# compare places pair by pair: 115 thousand tokens in windows of 18 x 24 x 24 take 0.3 GB.
MOST = 1 << 30

_sizes: "WeakKeyDictionary[Plan, int]" = WeakKeyDictionary()


def rule_of(plan: Plan, masked: Tensor) -> list[Tensor] | None:
    """Make the `rule` of `lists.Lists` as bits: words and firsts of the rows, then of the columns;
    None where they do not fit. Waits for the device.

    Padding of keys is in the bits of the rows, and padding of queries in the bits of the columns.

    Args:
        masked: (B', H', Kq, Kk) bool, the pairs of blocks that need a mask.
    """
    aligned = plan.block_q % WORD == plan.block_k % WORD == 0
    if not isinstance(plan.partial, Windows) or not aligned:
        return None
    size = size_of(plan, masked)
    if sum(_sizes.values()) + size > MOST:
        return None
    _sizes[plan] = size
    rows = _bits(plan, masked, plan.block_q, plan.block_k, by_key=False)
    return [*rows, *_bits(plan, masked.mT, plan.block_k, plan.block_q, by_key=True)]


def size_of(plan: Plan, masked: Tensor) -> int:
    """Bytes that the bits take. Waits for the device."""
    return 2 * int(masked.sum()) * plan.block_q * plan.block_k // 8


def _bits(
    plan: Plan, masked: Tensor, own: int, listed: int, *, by_key: bool
) -> tuple[Tensor, Tensor]:
    """Bits in the order of lists of the masked blocks of each row.

    Args:
        masked: (B', H', R, C) bool.
        own, listed: slots in a block of a row and of a column.
        by_key: rows are of keys, columns of queries.

    Returns:
        (pairs, listed / WORD, own) int32: for the own block's i-th slot, bit b of word w is for
        the listed block's slot 32 w + b; and (B', H', R) int32, the first pair of each row.
    """
    device = masked.device
    pairs = masked.nonzero()[:, 2:]
    words = torch.empty((len(pairs), listed // WORD, own), dtype=torch.int32, device=device)
    in_own, in_listed = (torch.arange(block, device=device) for block in (own, listed))
    bit = torch.ones((), dtype=torch.int32, device=device) << in_listed[:WORD].int()
    rule, step = plan.partial, max(1, PAIRS // (own * listed))
    assert isinstance(rule, Windows)
    for some, out in zip(pairs.split(step), words.split(step), strict=True):
        rows = (some[:, :1] * own + in_own)[:, :, None]
        columns = (some[:, 1:] * listed + in_listed)[:, None]
        seen = rule.allows(columns, rows) if by_key else rule.allows(rows, columns)
        seen = (seen & plan.real[columns]).unflatten(2, (-1, WORD))
        out.copy_((seen * bit).sum(-1, dtype=torch.int32).mT)
    held = masked.sum(-1).flatten()
    first = (held.cumsum(0) - held).view(masked.shape[:3])
    return words, first.int()
