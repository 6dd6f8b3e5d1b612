"""Attention with products of 8 bits, in C++: see int8.cpp."""

import torch
from torch import Tensor

from gen_accel.kernels.native import build, check_alike, prepare
from gen_accel.kernels.native.arguments import Call
from gen_accel.plan import Plan


def lacks() -> str | None:
    """The instructions that this processor would need; None where it has them, or where the
    library that tells is not built."""
    library = build.library()
    missing = None if library is None else library.gen_accel_int8_lacks()
    return None if missing is None else missing.decode()


def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> Tensor:
    """(B, H, N, D), without a gradient."""
    return _attention(q, k, v, *prepare(plan), scale)


@torch.library.custom_op("gen_accel::native_int8", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor | None,
    index: Tensor,
    counts: Tensor,
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    check_alike("int8", q, k, v)
    call = Call(q, k, v, slots, index, counts, rule, gain, block_q, block_k, scale)
    out = q.new_empty(q.shape)
    call.filled(o=out)
    build.run("gen_accel_int8", call.args, build.DTYPES[q.dtype], kernel="int8")
    return out


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor | None,
    index: Tensor,
    counts: Tensor,
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
