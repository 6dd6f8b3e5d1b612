"""Block-sparse attention in Triton, in which the blocks that are left out come back pooled.

Forward and backward, bf16, fp16 and fp32, any head dim up to 256, any number of tokens, on NVIDIA
GPUs from compute capability 8.0 on.
"""

# pyright: reportMissingImports=false

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.triton import kernel as _kernel
from .plan import Plan, Rest, Windows

__all__ = ["Plan", "Rest", "Windows", "attention", "block_sparse_attention"]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    *,
    block_q: int = 64,
    block_k: int = 64,
    rest: Literal["zeroth", "first", "second"] | None = "zeroth",
    centre: Literal["query", "key"] = "query",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the kept blocks, and over the others pooled.

    Args:
        q, k, v: (B, H, N, D), alike.
        keep: (B or 1, H or 1, Kq, Kk) bool, which of the ceil(N / block_k) key blocks each of the
            ceil(N / block_q) query blocks sees whole.
        block_q, block_k: tokens in a query and in a key block.
        rest: what the other blocks are pooled to: one key and one value each, "first" with a slope
            of the values, "second" also with a curve of the weights. None: they are dropped.
        centre: the mean that they are pooled around, of the "query" block or of the "key" block;
            "second" is for "query".
        scale: 1 / sqrt(D) by default.

    Returns:
        Output (B, H, N, D) in q's dtype, and the natural log-sum-exp of each row, (B, H, N) fp32.
        Both are differentiable in q, k and v. A query that sees nothing gets zeros.

    Raises:
        ValueError: shapes that do not belong together; a device or dtype that is not served.
    """
    N = q.shape[2]
    slots = torch.arange(-(-N // (step := math.lcm(block_q, block_k))) * step, device=q.device)
    blocks = -(-N // block_q), -(-N // block_k)
    if keep.shape[2:] != blocks:
        raise ValueError(
            f"keep must be (B or 1, H or 1, {blocks[0]}, {blocks[1]}) for {N} tokens in blocks of "
            f"{block_q} queries and {block_k} keys, got {tuple(keep.shape)}"
        )
    rows, columns = len(slots) // block_q, len(slots) // block_k
    keep = F.pad(keep, (0, columns - blocks[1], 0, rows - blocks[0]))
    plan = Plan(
        slots.masked_fill(slots >= N, -1),
        keep,
        block_q,
        block_k,
        dynamic=True,
        rest=None if rest is None else Rest(centre, rest),
    )
    return attention(q, k, v, plan, scale=scale)


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Run a plan, which may lay tokens out in another order and have windows inside blocks; see
    `Plan`. Arguments and results are those of `block_sparse_attention`."""
    from .kernels.base import facts_of
    from .kernels.triton import rest as pooled

    if not q.shape == k.shape == v.shape or q.shape[2] != plan.tokens:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"q, k and v must be (B, H, {plan.tokens}, D), as the plan is, got {shapes}"
        )
    if reasons := _kernel.unsupported(facts_of(q, k, v, plan)):
        raise ValueError(f"block-sparse-rest: {'; '.join(reasons)}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if plan.rest is None:
        return _kernel.forward_lse(q, k, v, plan, scale=scale)
    return pooled.attention(_kernel, q, k, v, plan, scale=scale)
