"""Linear attention of each query block over its own set of key blocks.

    o = f(q) (sum f(k)^T v) / (eps + f(q) . sum f(k)), sums over the keys of the set

`plain` is the definition, torch alone with autograd. A Triton kernel does the same on GPUs, and
native/linear.cpp, with f in it, on CPUs where it is built. The name of the attention kernel
decides which of them runs: see `dispatch`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gen_accel.kernels.dispatch import native_serves, triton_serves
from gen_accel.kernels.native import linear as native
from gen_accel.plan import Plan, pack, unpack

STATES = 1 << 27  # numbers in the states and sums that are held at once; at least one head


def in_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    sets: Tensor | None,
    feature_map: str,
    eps: float,
    *,
    kernel: str = "auto",
) -> Tensor | None:
    """Compute f and the sums in one pass, (B, H, N, D) in token order; None where no kernel
    serves these tensors.

    Args:
        q, k, v: (B, H, N, D).
        plan: plan whose slots and blocks the sets are for.
        sets: (B, H, Kq, Kk) bool, the key blocks of each query block; None for all.
        feature_map: f, "softmax" over the head dim, "elu" plus 1 or "relu".
        eps: keeps small denominators from zero.
    """
    if native_serves(kernel, q, k, v):
        return native.linear(q, k, v, *_arguments(plan, sets, feature_map), eps)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not triton_serves(kernel, q, q.shape[3]) or trains:
        return None
    return _by_heads(q, k, v, plan, sets, partial(_fused, eps=eps, feature=feature_map))


def added(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    sets: Tensor | None,
    feature_map: str,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    base: Tensor,
    *,
    kernel: str = "auto",
) -> Tensor | None:
    """Compute `base` + `in_one` weight^T + bias, without a gradient, in the memory of a
    contiguous `base`; None if no kernel serves these tensors.

    Args:
        weight, bias: of a linear layer of the head dim.
        base: (B, H, N, D) in q's dtype.
    """
    if not native_serves(kernel, q, k, v, base):
        return None
    out = base.contiguous()
    sizes = _arguments(plan, sets, feature_map)
    native.add_projected_linear(q, k, v, *sizes, eps, weight, bias, out)
    return out


def _arguments(
    plan: Plan, sets: Tensor | None, feature_map: str
) -> tuple[Tensor, Tensor | None, int, int, int]:
    """Arguments of the native branch between v and eps."""
    return plan.slots, sets, plan.block_q, plan.block_k, native.MAPS.index(feature_map)


def linear_attention(
    fq: Tensor,
    fk: Tensor,
    v: Tensor,
    plan: Plan,
    sets: Tensor | None,
    *,
    eps: float,
    kernel: str = "auto",
) -> Tensor:
    """Compute linear attention over sets, (B, H, N, D); zero where a set holds no token.

    Args:
        fq, fk: features of q and k, (B, H, N, D).
        v: (B, H, N, D).
        plan: plan whose slots and blocks the sets are for.
        sets: (B, H, Kq, Kk) bool; None for all.
        eps: keeps small denominators from zero.
    """
    fused = triton_serves(kernel, fq, fq.shape[3])
    if sets is None and not fused:
        return over_all(fq, fk, v, eps=eps)
    return _by_heads(fq, fk, v, plan, sets, partial(_fused if fused else plain, eps=eps))


def _by_heads(
    fq: Tensor,
    fk: Tensor,
    v: Tensor,
    plan: Plan,
    sets: Tensor | None,
    run: Callable[..., Tensor],
) -> Tensor:
    """Run `run(fq, fk, v, plan, sets)` for as many heads at once as STATES allows; None is all
    sets."""
    B, H, _, D = fq.shape
    if sets is None:
        sets = torch.ones_like(plan.keep[:1, :1])
    states = sets.shape[2] + sets.shape[3]
    heads = max(1, STATES // (B * states * D * D))
    if heads >= H:
        return run(fq, fk, v, plan, sets)
    some = [x.split(heads, 1) for x in (fq, fk, v, sets.expand(-1, H, -1, -1))]
    return torch.cat([run(q, k, w, plan, one) for q, k, w, one in zip(*some, strict=True)], 1)


def over_all(fq: Tensor, fk: Tensor, v: Tensor, *, eps: float) -> Tensor:
    """Compute linear attention over all keys."""
    wide = torch.promote_types(fq.dtype, torch.float32)  # sums over all keys overflow fp16
    queries, keys, values = fq.to(wide), fk.to(wide), v.to(wide)
    state, norm = keys.transpose(-1, -2) @ values, keys.sum(2)[..., None]
    return ((queries @ state) / (queries @ norm + eps)).to(fq.dtype)


def plain(fq: Tensor, fk: Tensor, v: Tensor, plan: Plan, sets: Tensor, *, eps: float) -> Tensor:
    """Compute linear attention over sets in torch. The states of the key blocks are made once, and
    summed for each query block by one product with the map of the sets."""
    wide = torch.promote_types(fq.dtype, torch.float32)  # sums over many keys overflow fp16
    real = plan.real[:, None].to(wide)
    keys = (pack(fk, plan).to(wide) * real).unflatten(2, (-1, plan.block_k))
    values = pack(v, plan).to(wide).unflatten(2, (-1, plan.block_k))
    states = keys.transpose(-1, -2) @ values  # (B, H, Kk, D, D)
    weights = sets.to(wide)
    state = (weights @ states.flatten(3)).unflatten(3, states.shape[3:])
    norm = weights @ keys.sum(3)  # (B, H, Kq, D)
    queries = pack(fq, plan).to(wide).unflatten(2, (-1, plan.block_q))
    out = (queries @ state) / (queries @ norm[..., None] + eps)
    return unpack(out.flatten(2, 3).to(fq.dtype), plan)


def _fused(
    fq: Tensor,
    fk: Tensor,
    v: Tensor,
    plan: Plan,
    sets: Tensor,
    *,
    eps: float,
    feature: str = "",
) -> Tensor:
    from gen_accel.kernels.triton.linear import linear_sets  # imports triton, which may be missing

    fk, v = fk.to(fq.dtype), v.to(fq.dtype)
    sizes = plan.slots_int32, sets, plan.block_q, plan.block_k
    return linear_sets(fq, fk, v, *sizes, eps, feature)
