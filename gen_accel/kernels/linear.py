"""Linear attention of each query block over its own set of key blocks.

    o = f(q) (sum f(k)^T v) / (eps + f(q) . sum f(k)), sums over the keys of the set

`plain` is the meaning, torch alone with autograd; on GPUs a fused kernel does the same, and on
CPUs native/linear.cpp, with f in it, where that is built. The kernel that is named for attention
says nothing of which of them runs.
"""

import torch
from torch import Tensor

from gen_accel.kernels import triton

STATES = 1 << 27  # numbers in the states that are made at once, half a gigabyte; at least one head


def linear_attention(
    fq: Tensor, fk: Tensor, v: Tensor, sets: Tensor, block_q: int, block_k: int, *, eps: float
) -> Tensor:
    """(B, H, S, D) in slot order; zero where a set holds no token.

    Args:
        fq, fk: features of q and k, (B, H, S, D) in slot order; fk is zero for padding.
        v: like them.
        sets: (B, H, Kq, Kk) bool.
        eps: keeps small denominators from zero.
    """
    B, _, S, D = fq.shape
    heads = max(1, STATES // (B * (S // block_k) * D * D))
    fused = fq.device.type == "cuda" and not triton.device_reasons(fq.device)
    run = _fused if fused and fq.dtype in triton.DTYPES else plain
    some = [x.split(heads, 1) for x in (fq, fk, v, sets)]
    return torch.cat(
        [run(q, k, w, s, block_q, block_k, eps=eps) for q, k, w, s in zip(*some, strict=True)], 1
    )


def plain(
    fq: Tensor, fk: Tensor, v: Tensor, sets: Tensor, block_q: int, block_k: int, *, eps: float
) -> Tensor:
    """The states of the key blocks are made once, and added up for each query block by one product
    with the map of the sets."""
    wide = torch.promote_types(fq.dtype, torch.float32)  # sums over many keys overflow fp16
    keys, values = (x.to(wide).unflatten(2, (-1, block_k)) for x in (fk, v))
    states = keys.transpose(-1, -2) @ values  # (B, H, Kk, D, D)
    weights = sets.to(wide)
    state = (weights @ states.flatten(3)).unflatten(3, states.shape[3:])
    norm = weights @ keys.sum(3)  # (B, H, Kq, D)
    queries = fq.to(wide).unflatten(2, (-1, block_q))
    out = (queries @ state) / (queries @ norm[..., None] + eps)
    return out.flatten(2, 3).to(fq.dtype)


def _fused(
    fq: Tensor, fk: Tensor, v: Tensor, sets: Tensor, block_q: int, block_k: int, *, eps: float
) -> Tensor:
    from gen_accel.kernels.triton.linear import linear_rest  # imports triton, which may be missing

    fk, v = fk.to(fq.dtype).contiguous(), v.to(fq.dtype).contiguous()
    return linear_rest(fq.contiguous(), fk, v, ~sets, block_q, block_k, eps)
