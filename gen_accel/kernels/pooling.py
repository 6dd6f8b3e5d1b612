"""Sums and means over blocks of tokens, which methods choose by."""

import torch
from torch import Tensor

from gen_accel.kernels import native_serves
from gen_accel.kernels.native.selection import block_sums as native_sums
from gen_accel.plan import Slots, pack


def block_sums(x: Tensor, slots: Slots, block: int) -> Tensor:
    """(B, H, S / block, D) fp32 of x (B, H, N, D), padding left out."""
    if native_serves(x):
        return native_sums(x, slots.slots, block)
    tokens = pack(x, slots).unflatten(2, (-1, block))
    if slots.tokens < len(slots.slots):
        tokens = tokens * slots.real.view(-1, block, 1).to(x.dtype)
    return tokens.sum(3, dtype=torch.float32)


def block_means(x: Tensor, slots: Slots, block: int) -> Tensor:
    """The same, over how many tokens each block holds; zero where none."""
    if slots.tokens == len(slots.slots):
        return block_sums(x, slots, block) / block
    return block_sums(x, slots, block) / slots.real.view(-1, block, 1).sum(1).clamp_min(1)
