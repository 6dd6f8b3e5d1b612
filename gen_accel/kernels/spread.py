"""Spread: weight of each key block for the mean query of a block. Methods choose blocks by it."""

import torch
from torch import Tensor

from gen_accel.kernels.helpers import native_serves, triton_serves
from gen_accel.kernels.native import rest as native
from gen_accel.plan import Slots, pack

NUMBERS = 1 << 24  # scores that are held at once


@torch.no_grad()
def block_spread(
    query_means: Tensor, k: Tensor, slots: Slots, *, scale: float, kernel: str = "auto"
) -> Tensor:
    """Compute the natural log-sum-exp of scale qmean . k_t over the tokens t of each key block,
    (B, H, Kq, Kk) fp32, without a gradient; -inf where a block holds none.

    Args:
        query_means: (B, H, Kq, D) fp32.
        k: (B, H, N, D).
        slots: layout of tokens in blocks.
        kernel: name of the attention kernel, which decides what runs here: see `helpers`.
    """
    if native_serves(kernel, k):
        return native.spread(query_means, k, slots, scale=scale)
    if triton_serves(kernel, k, k.shape[3]):
        from gen_accel.kernels.triton import rest as by_triton  # imports triton

        return by_triton.spread(query_means, k, slots, scale=scale)
    return plain(query_means, k, slots, scale=scale)


def plain(query_means: Tensor, k: Tensor, slots: Slots, *, scale: float) -> Tensor:
    """Compute the spread in torch, some key blocks at once: the scores of all are never stored."""
    keys = pack(k, slots).unflatten(2, (-1, slots.block_k))
    real = slots.real.view(-1, slots.block_k)
    B, H, Kq, _ = query_means.shape
    step = max(1, NUMBERS // (B * H * Kq * slots.block_k))
    made = []
    for some in range(0, keys.shape[2], step):
        rows = keys[:, :, some : some + step].flatten(2, 3).float()
        scores = (query_means.float() @ rows.mT * scale).unflatten(3, (-1, slots.block_k))
        hidden = ~real[some : some + step]
        made.append(scores.masked_fill(hidden, -torch.inf).logsumexp(-1))
    return torch.cat(made, 3)
