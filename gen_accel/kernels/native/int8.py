"""Attention with 8-bit products, in C++: see int8.cpp."""

import torch
from torch import Tensor

from gen_accel.kernels.native import build, prepare
from gen_accel.kernels.native.arguments import DTYPES, Args, Call
from gen_accel.plan import Plan


def lacks() -> str | None:
    """Name the instructions that this processor lacks; None where it has them, or where the
    library that tells is not built."""
    library = build.library()
    missing = None if library is None else library.gen_accel_int8_lacks()
    return None if missing is None else missing.decode()


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute (B, H, N, D), fp32 where `wide`, else in q's dtype, and log-sum-exps (B, H, N) fp32,
    without a gradient."""
    return _attention(q, k, v, *prepare(plan), scale, wide)


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
    wide: bool,
) -> tuple[Tensor, Tensor]:
    call = Call(Args(scale=scale, wide=wide), "int8")
    call.rows(q=q, k=k, v=v)
    call.lists(slots, index, counts, rule, gain, block_q, block_k)
    out, lse = _results(q, wide)
    call.writes(o=out, lse=lse)
    build.run("gen_accel_int8", call.args, DTYPES[q.dtype], kernel="int8")
    return out, lse


def _results(q: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape, dtype=torch.float32 if wide else q.dtype)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


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
    wide: bool,
) -> tuple[Tensor, Tensor]:
    return _results(q, wide)
