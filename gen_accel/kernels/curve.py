"""Second order of a rest around queries, in the form that the kernels take: see `Rest`."""

from typing import NamedTuple

import torch
from torch import Tensor

from gen_accel.kernels.helpers import native_serves, triton_serves
from gen_accel.kernels.native import curve as native
from gen_accel.kernels.packed import Packed
from gen_accel.plan import CURVATURE, Plan, unpack


class Curve(NamedTuple):
    """Numbers of the second order: the logarithm of what query t weighs a block by gains
    rise_t sum_d weight_d var_d, at most `MOST_GAINED`. var is the variance of the block's keys
    under the softmax of the mean query.

    Args:
        rise: (B, H, N) fp32 or wider, CURVATURE a_t.
        weight: (B, H, D), w.
    """

    rise: Tensor
    weight: Tensor


def curve_of(q: Tensor, k: Tensor, plan: Plan, scale: float, kernel: str = "auto") -> Curve | None:
    """Compute the curve of a call, differentiable in q and k; None without a second order.

    Args:
        q, k: (B, H, N, D).
        scale: factor of q k^T.
        kernel: name of the attention kernel, which decides what runs here: see `helpers`.
    """
    if plan.rest is None or plan.rest.order != "second":
        return None
    if native_serves(kernel, q, k):
        return Curve(*native.curve_of(q, k, plan, scale))
    if triton_serves(kernel, q, q.shape[3]):
        from gen_accel.kernels.triton import curve as by_triton  # imports triton

        return Curve(*by_triton.curve_of(q, k, plan, scale))
    return plain(q, k, plan, scale)


def plain(q: Tensor, k: Tensor, plan: Plan, scale: float) -> Curve:
    """Compute the curve in torch."""
    held_q, held_k = (held[:, 0] for held in plan.held)
    of_q, of_k = plan.left_out_counts()
    query = _squares_off_means(q, plan, plan.block_q)
    key = _squares_off_means(k, plan, plan.block_k)
    weight = _mean_square(query, of_q, held_q)
    by = _mean_square(key, of_k, held_k)
    both = (weight * by).sum(-1)
    some = both > 0
    factor = (CURVATURE * scale**2 / both.where(some, 1.0)).where(some, 0.0)
    # Product and sum, which no autocast rounds, not even in the backward pass.
    rise = (query * (by * factor[..., None])[:, :, None, None]).sum(-1)
    return Curve(unpack(rise.flatten(2)[..., None], plan)[..., 0], weight)


def _squares_off_means(x: Tensor, plan: Plan, block: int) -> Tensor:
    """Squared offsets of tokens from the mean of their block, (B, H, blocks, block, D) of slots; 0
    for padding."""
    real = plan.real.view(-1, block, 1)
    packed = Packed.apply(x.to(torch.promote_types(x.dtype, torch.float32)), plan)
    tokens = packed.unflatten(2, (-1, block)) * real
    mean = tokens.sum(3, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    return ((tokens - mean) * real).square()


def _mean_square(squares: Tensor, counts: Tensor, held: Tensor) -> Tensor:
    """Mean over the tokens of all blocks, (B, H, D), each block counted `counts` times.

    Args:
        squares: output of `_squares_off_means`.
        counts: (B or 1, H or 1, blocks).
        held: (blocks,), number of tokens of each.
    """
    counts = counts.to(squares.dtype)
    total = (counts * held.to(squares.dtype)).sum(-1, keepdim=True)
    return (squares.sum(3) * counts[..., None]).sum(2) / total.clamp_min(1)
