"""Sums over blocks of tokens, in one pass over the tokens in place."""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.launch import launch, rowwise

TILE = 32  # rows that a program holds at a time
WARPS = 4


@triton.jit(do_not_specialize=("H", "K"))
def sums_kernel(
    x,
    common,
    out,
    slots,
    stride_b,
    stride_h,
    stride_n,
    H,
    K,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    MEAN: tl.constexpr,
    LESS: tl.constexpr,
):
    """Sum, or average, the tokens of each block, zero where it holds none; if LESS, subtract
    `common` of the head."""
    i_block, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    x += (i_head // H) * stride_b + (i_head % H) * stride_h
    o_d = tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    held = tl.full((), 0, tl.int32)
    for i_row in range(0, BLOCK, TILE):
        o_r = i_row + tl.arange(0, TILE)
        o_t = tl.load(slots + i_block * BLOCK + o_r, mask=o_r < BLOCK, other=-1)
        mask = (o_t >= 0)[:, None] & (o_d < D)[None, :]
        p_x = x + o_t.to(tl.int64)[:, None] * stride_n + o_d[None, :]
        b_sum += tl.sum(tl.load(p_x, mask=mask, other=0.0).to(tl.float32), 0)
        held += tl.sum((o_t >= 0).to(tl.int32), 0)
    if MEAN:
        b_sum = b_sum / tl.maximum(held, 1).to(tl.float32)
    if LESS:
        b_sum -= tl.load(common + i_head * D + o_d, mask=o_d < D, other=0.0)
    tl.store(out + (i_head * K + i_block) * D + o_d, b_sum, mask=o_d < D)


@torch.library.custom_op("gen_accel::triton_block_sums", mutates_args=())
def block_sums(x: Tensor, slots: Tensor, block: int, mean: bool) -> Tensor:
    """Sum x (B, H, N, D) over blocks: (B, H, S / block, D) fp32; without a gradient.

    Args:
        slots: (S,) int32, the token of each slot, -1 for padding.
        mean: divide by the number of tokens of each block.
    """
    B, H, _, D = x.shape
    out = x.new_empty((B, H, len(slots) // block, D), dtype=torch.float32)
    launch_sums(rowwise(x), slots, block, out, mean=mean)
    return out


@block_sums.register_fake
def _(x: Tensor, slots: Tensor, block: int, mean: bool) -> Tensor:
    B, H, _, D = x.shape
    return x.new_empty((B, H, len(slots) // block, D), dtype=torch.float32)


def launch_sums(
    x: Tensor,
    slots: Tensor,
    block: int,
    out: Tensor,
    *,
    mean: bool,
    common: Tensor | None = None,
) -> None:
    """Write the sums or means into `out`, (B, H, S / block, D) of any dtype.

    Args:
        x: (B, H, N, D), see `rowwise`.
        common: (B, H, D) fp32, subtracted from each.
    """
    B, H, _, D = x.shape
    blocks = out.shape[2]
    launch(
        sums_kernel,
        (blocks, B * H),
        x,
        *(x, out if common is None else common, out, slots),
        *x.stride()[:3],
        H,
        blocks,
        D=D,
        BLOCK_D=configs.padded_dim(D),
        BLOCK=block,
        TILE=TILE,
        MEAN=mean,
        LESS=common is not None,
        num_warps=WARPS,
    )
