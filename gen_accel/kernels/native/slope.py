"""Slope of the first order of a rest, in C++: see slope.cpp."""

import torch
from torch import Tensor

from gen_accel.kernels.native import build
from gen_accel.kernels.native.arguments import Pointers, SlopeArgs
from gen_accel.kernels.native.bounds import DTYPES, check


def slope_of(
    k: Tensor, v: Tensor, slots: Tensor | None, count: int, block_q: int, block_k: int
) -> Tensor:
    """Compute H of `Rest`, (B, H, D, D) fp32.

    Args:
        k, v: (B, H, N, D).
        slots: (count,) int64; None where each slot holds the token of its own number.
    """
    B, H, N, D = k.shape
    made = k.new_empty(B, H, D, D, dtype=torch.float32)
    args = SlopeArgs(B=B, H=H, N=N, D=D, S=count, block_q=block_q, block_k=block_k)
    call = Pointers(args)
    call.strided(k=k, v=v)
    call.whole(slots=slots)
    call.filled(slope=made)
    build.run("gen_accel_slope_forward", call.args, DTYPES[k.dtype])
    return made


def gradients(
    grad: Tensor,
    slope: Tensor,
    shares: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor | None,
    count: int,
    block_q: int,
    block_k: int,
    around_queries: bool,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute five gradients: of lse (the gradient of total is its negative); y . grad, where y is
    what the slope adds to the output and grad the gradient of the output; of q, k and v.

    Args:
        grad: (B, H, N, D) in q's dtype.
        shares: (B, H, N) fp32, each query's weight on the rest.
        factor: scale / N.
    """
    B, H, N, D = q.shape
    args = SlopeArgs(B=B, H=H, N=N, D=D, S=count, block_q=block_q, block_k=block_k)
    args.around_queries, args.factor = around_queries, factor
    check("slope", slope, torch.float32, (B, H, D, D))
    check("shares", shares, torch.float32, (B, H, N))
    call = Pointers(args)
    call.strided(q=q, k=k, v=v, grad=grad)
    call.whole(slots=slots, shares=shares, slope=slope)
    dlse, more = shares.new_empty(shares.shape), shares.new_empty(shares.shape)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    call.filled(dlse=dlse, more=more, dq=dq, dk=dk, dv=dv)
    build.run("gen_accel_slope_backward", call.args, DTYPES[q.dtype])
    return dlse, more, dq, dk, dv
