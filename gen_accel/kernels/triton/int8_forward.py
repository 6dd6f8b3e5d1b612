"""Forward pass with products of 8 bits, for cards whose tensor cores sum in fp32 at half rate.

Keys are rounded off the common key of their head, token by token, to whole steps of 1/127 of their
largest number; queries likewise, as they are. Products of the steps are whole numbers. The common
key adds the same to all scores of a query: the weights do not depend on it, and the log-sum-exp
gets it back in fp32. Values become fp16, each channel of a head by a power of two that brings it
to at most 1, so that no sum of a tile leaves the range of fp16. Weights, at most 1, are fp16 as
well, and the sums of a tile; tiles are added in fp32. Prefixes of names as in `tiles`.

References:
    Zhang et al., "SageAttention", arXiv 2410.02367: keys off their mean in 8 bits, weights and
    values in fp16 with sums in fp16. Unlike there, a step is of a token and not of a block.
    Zhang et al., "SageAttention2", arXiv 2411.10958: sums of few products are added up in fp32.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels import rounding
from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.launch import WARPS, launch, rows
from gen_accel.kernels.triton.rest_columns import common_of, common_scores
from gen_accel.kernels.triton.sparse_forward import attend_tiles, begun, ended
from gen_accel.kernels.triton.tiles import (
    BITS,
    NONE,
    SIZES,
    load_rows,
    of_head,
    one_row,
    own_list,
    own_tile,
    store_rows,
)

TILE = 64  # tokens that a program rounds; not timed
STEPS = tl.constexpr(rounding.STEPS)


@triton.jit
def in_steps(b_x):
    """Round rows, (tile, BLOCK_D) fp32, to whole steps: int8 numbers and the step of each row,
    which is NaN where the row holds NaN or inf."""
    b_step = tl.max(tl.abs(b_x), 1) / STEPS + tl.sum(b_x, 1) * 0.0
    b_safe = tl.where(b_step > 0, b_step, 1.0)
    return tl.floor(b_x / b_safe[:, None] + 0.5).to(tl.int8), b_step


@triton.jit(do_not_specialize=("H", "N"))
def round_kernel(
    k,
    v,
    common,
    powers,
    ints,
    steps,
    halves,
    H,
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write keys off the common key in whole steps, the steps, and values times `powers` in
    fp16."""
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_head = tl.program_id(1).to(tl.int64)
    o_t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o_t = tl.where(o_t < N, o_t, -1)
    b_k = load_rows(of_head(k, i_b, i_h), o_t, D, BLOCK_D, True).to(tl.float32)
    b_k -= one_row(common, i_head, D, BLOCK_D)[None, :]
    b_ints, b_step = in_steps(b_k)
    store_rows(of_head(ints, i_b, i_h), o_t, b_ints, D, BLOCK_D)
    tl.store(steps + i_head * N + o_t, b_step, mask=o_t >= 0)
    b_v = load_rows(of_head(v, i_b, i_h), o_t, D, BLOCK_D, True).to(tl.float32)
    b_v *= one_row(powers, i_head, D, BLOCK_D)[None, :]
    store_rows(of_head(halves, i_b, i_h), o_t, b_v, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def int8_forward_kernel(
    q,
    ints,
    halves,
    out,
    lse,
    steps,
    common,
    powers,
    slots,
    index,
    counts,
    rule,
    more,
    gain,
    pattern_b,
    pattern_h,
    route_b,
    route_h,
    gain_b,
    gain_h,
    entries,
    H,
    N,
    S,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    WIDTH: tl.constexpr,
    RULE: tl.constexpr,
    AXES: tl.constexpr,
    GAIN: tl.constexpr,
    BEGUN: tl.constexpr,
):
    TILES: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_head = tl.program_id(1).to(tl.int64)
    i_block, index, masked, total, rule, gain = own_list(
        *(index, counts, rule, more, gain, i_b * pattern_b + i_h * pattern_h),
        *(i_b * route_b + i_h * route_h, i_b * gain_b + i_h * gain_h, entries, S, C),
        *(BLOCK_Q, BLOCK_K, BLOCK_K, TILES, RULE, GAIN),
    )

    o_q, o_t = own_tile(slots, i_block, tl.program_id(0) % TILES, BLOCK_Q, TILE_M)
    b_q = load_rows(of_head(q, i_b, i_h), o_t, D, BLOCK_D, True).to(tl.float32)
    b_common = common_scores(b_q, one_row(common, i_head, D, BLOCK_D), scale)
    b_ints, b_step = in_steps(b_q)
    given = (b_ints, b_step * scale, b_common, steps + i_head * N)
    if RULE == BITS:
        o_q -= i_block * BLOCK_Q
    out = of_head(out, i_b, i_h)
    lse += i_head * N
    powers += i_head * D
    b_acc, b_high, b_sum, b_max = begun(out, lse, o_t, D, BLOCK_D, TILE_M, WIDTH, BEGUN)
    if BEGUN:
        b_acc = b_acc * _powers(powers, 0, D, WIDTH)
        b_high = b_high * _powers(powers, WIDTH, D, b_high.shape[1])
        b_max = b_max if GAIN else b_max - b_common
    operands = (of_head(ints, i_b, i_h), of_head(halves, i_b, i_h), i_b, i_h)
    for WHOLE in tl.static_range(2):  # blocks that need a mask, then the others
        start, stop = masked if WHOLE else 0, total if WHOLE else masked
        b_acc, b_high, b_sum, b_max = attend_tiles(
            *(b_acc, b_high, b_sum, b_max, given, o_q, operands),
            *((slots, index, start, stop), (rule, more, gain, S, C), scale),
            *(D, BLOCK_D, BLOCK_Q, BLOCK_K, TILE_N, WIDTH),
            *(NONE if WHOLE else RULE, AXES, GAIN, not WHOLE, False, True),
        )
    b_acc = b_acc / _powers(powers, 0, D, WIDTH)
    b_high = b_high / _powers(powers, WIDTH, D, b_high.shape[1])
    b_max = b_max if GAIN else b_max + b_common
    ended(out, lse, o_t, b_acc, b_high, b_sum, b_max, D, BLOCK_D, WIDTH)


@triton.jit
def _powers(powers, first, D: tl.constexpr, COUNT: tl.constexpr):
    """Load COUNT of a head's powers from `first` on, [1, COUNT]; 1 past D."""
    o_d = first + tl.arange(0, COUNT)
    return tl.load(powers + o_d, mask=o_d < D, other=1.0)[None, :]


def powers_of(v: Tensor) -> Tensor:
    """Compute the power of two that brings each channel of values, (B, H, N, D), to between 1/2
    and 1, (B, H, D) fp32; 1 for channels of zeros, and of numbers that are not finite."""
    most = torch.linalg.vector_norm(v, torch.inf, dim=2, dtype=torch.float32)
    exponent = torch.frexp(most).exponent.clamp(-126, 126)
    return torch.ldexp(torch.ones_like(most), -exponent.where(most.isfinite(), 0))


def rounded(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Round keys and values, (B, H, N, D), rows of one stride: whole steps (int8), values times
    `powers_of` (fp16), the steps, (B, H, N) fp32, the common key and the powers, (B, H, D)
    fp32."""
    B, H, N, D = k.shape
    ints, halves = (k.new_empty(k.shape, dtype=dtype) for dtype in (torch.int8, torch.float16))
    steps = k.new_empty(B, H, N, dtype=torch.float32)
    # What is no number in one key is not in the others.
    common, powers = common_of(k).nan_to_num_(0.0, 0.0, 0.0), powers_of(v)
    launch(
        round_kernel,
        (triton.cdiv(N, TILE), B * H),
        k,
        *(*rows(k, v), common, powers, *rows(ints), steps, *rows(halves), H, N),
        **configs.dims(D),
        TILE=TILE,
        num_warps=WARPS,
    )
    return ints, halves, steps, common, powers
