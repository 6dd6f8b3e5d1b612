"""Sums and means over blocks of tokens, by which methods choose blocks."""

import torch
from torch import Tensor

from gen_accel.kernels.helpers import native_serves, triton_serves
from gen_accel.kernels.native import selection as native
from gen_accel.plan import Slots, pack


def block_sums(x: Tensor, slots: Slots, block: int, kernel: str = "auto") -> Tensor:
    """Sum x (B, H, N, D) over blocks: (B, H, S / block, D) fp32, padding left out.

    Args:
        block: slots in a block.
        kernel: name of the attention kernel, which decides what runs here: see `helpers`.
    """
    if native_serves(kernel, x):
        return native.block_sums(x, slots.slots, block)
    if _triton_serves(kernel, x):
        return _by_triton(x, slots, block, mean=False)
    tokens = pack(x, slots).unflatten(2, (-1, block))
    if slots.tokens < len(slots.slots):
        tokens = tokens * slots.real.view(-1, block, 1)
    return tokens.sum(3, dtype=torch.float32)


def block_means(x: Tensor, slots: Slots, block: int, kernel: str = "auto") -> Tensor:
    """Average x over the tokens of each block, as `block_sums`; zero where a block holds none."""
    if _triton_serves(kernel, x):
        return _by_triton(x, slots, block, mean=True)
    sums = block_sums(x, slots, block, kernel)
    if slots.tokens == len(slots.slots):
        return sums / block
    return sums / slots.real.view(-1, block, 1).sum(1).clamp_min(1)


def _triton_serves(kernel: str, x: Tensor) -> bool:
    """Whether Triton runs. It has no gradient of these sums."""
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    return triton_serves(kernel, x) and not needs_grad


def _by_triton(x: Tensor, slots: Slots, block: int, *, mean: bool) -> Tensor:
    from gen_accel.kernels.triton import pooling  # imports triton, which may be missing

    return pooling.block_sums(x, slots.slots_int32, block, mean)
