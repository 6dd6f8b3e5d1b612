"""Offsets of tokens from the mean of their block; prefixes of names as in `tiles`."""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportArgumentType=false, reportCallIssue=false

import triton
import triton.language as tl

from gen_accel.kernels.triton.tiles import load_columns, own_tile


@triton.jit
def block_mean(
    x, stride, slots, i_block, o_d, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Compute columns o_d of the mean of a block's tokens, fp32, and their number, at least 1."""
    b_sum = tl.zeros([o_d.shape[0]], tl.float32)
    b_held = tl.full((), 0, tl.int32)
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_sum += tl.sum(load_columns(x, stride, o_t, o_d, D).to(tl.float32), 0)
        b_held += tl.sum((o_t >= 0).to(tl.int32), 0)
    b_held = tl.maximum(b_held, 1).to(tl.float32)
    return b_sum / b_held, b_held


@triton.jit
def off_mean(x, stride, o_t, o_d, b_mean, D: tl.constexpr):
    """Offsets of tokens o_t from the mean of their block, [len(o_t), len(o_d)] fp32; 0 for token
    -1."""
    b_x = load_columns(x, stride, o_t, o_d, D).to(tl.float32)
    return tl.where((o_t >= 0)[:, None], b_x - b_mean[None, :], 0.0)
