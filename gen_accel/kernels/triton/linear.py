"""Linear attention of each query block over its own set of key blocks, forward and backward.

The linear branch of SLA (Zhang et al., 2025, https://arxiv.org/abs/2509.24006), over any sets of
blocks. Unlike there, an empty set gives zeros, the denominator takes an eps, and sums are fp32.

Four kernels. The state of a block is the sum over its rows of an outer product, and the sum of one
of the factors. `states_kernel` makes the states of all blocks, `sums_kernel` adds them up for each
set, by one matrix product, and two kernels apply the sums to the rows of each block. The backward
pass is the same four with other arguments.

States and their sums are bf16 where the inputs are, and fp32 where they are fp16, whose range is
too small, or fp32.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.base import Context, Values
from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.launch import (
    laid_out_alike,
    launch,
    launch_blocks,
    results,
    rows,
    rowwise,
)
from gen_accel.kernels.triton.tiles import (
    INTERPRETED,
    load_columns,
    mixed_dot,
    of_head,
    place_of_chunk,
    store_columns,
)


def linear_sets(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    slots: Tensor,
    sets: Tensor,
    block_q: int,
    block_k: int,
    eps: float,
    feature: str = "",
) -> Tensor:
    """Compute phi_q h / (eps + phi_q z), h = phi_k^T v and z = sum(phi_k) over the keys of the
    set.

    Args:
        phi_q, phi_k, v: (B, H, N, D), one dtype.
        slots: (S,) int32, the token of each slot, -1 for padding.
        sets: (B or 1, H or 1, Kq, Kk) bool, the key blocks of each query block.
        eps: keeps small denominators from zero.
        feature: one of FEATURES, which makes phi_q and phi_k of the inputs; without a gradient.

    Returns:
        (B, H, N, D), laid out like `phi_q`; zero where the set holds no token.
    """
    number = FEATURES.index(feature)
    return _linear_sets(phi_q, phi_k, v, slots, sets, block_q, block_k, eps, number)[0]


FEATURES = ("", "softmax", "elu", "relu")  # of the head dim; "elu" plus 1

# Sizes that change from clip to clip: one compiled kernel serves all.
SIZES = ("sets_b", "sets_h", "sets_r", "sets_c", "H", "N", "K", "R", "C")


@triton.jit
def _tokens(slots, i_block, i_row, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Load [TILE] tokens of a block from its i_row-th slot on, -1 for padding and past the
    block."""
    o_r = i_row + tl.arange(0, TILE)
    return tl.load(slots + i_block * BLOCK + o_r, mask=o_r < BLOCK, other=-1)


@triton.jit
def _features(b_x, o_t, o_d, D: tl.constexpr, FEATURE: tl.constexpr):
    """Compute the features of whole rows, in their dtype; zeros for token -1 and past D."""
    if FEATURE == 0:
        return b_x
    m_x = (o_t >= 0)[:, None] & (o_d < D)[None, :]
    b_f = b_x.to(tl.float32)
    if FEATURE == 1:
        b_f = tl.where((o_d < D)[None, :], b_f, -float("inf"))
        b_f = tl.exp(b_f - tl.max(b_f, 1)[:, None])
        b_f = b_f / tl.sum(b_f, 1)[:, None]
    if FEATURE == 2:
        b_f = tl.where(b_f > 0, b_f + 1, tl.exp(tl.minimum(b_f, 0.0)))
    if FEATURE == 3:
        b_f = tl.maximum(b_f, 0.0)
    return tl.where(m_x, b_f, 0.0).to(b_x.dtype)


@triton.jit(do_not_specialize=SIZES)
def states_kernel(
    x,
    y,
    by,
    weight,
    state,
    slots,
    H,
    N,
    K,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    SCALED: tl.constexpr,
    FEATURE: tl.constexpr,
):
    """Compute h = (by x)^T y and z = sum(by weight x) over each block; by and weight are 1 if not
    SCALED.

    A program makes CHUNK columns of one block's h, [D, D], followed by z, [D].
    """
    i_block, i_chunk, i_b, i_h = place_of_chunk(H, D, CHUNK)
    x = of_head(x, i_b, i_h)
    y = of_head(y, i_b, i_h)
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_h = tl.zeros([BLOCK_D, CHUNK], tl.float32)
    b_z = tl.zeros([BLOCK_D], tl.float32)
    for i_row in range(0, BLOCK, TILE):
        o_t = _tokens(slots, i_block, i_row, BLOCK, TILE)
        b_x = _features(load_columns(x, o_t, o_d, D), o_t, o_d, D, FEATURE)
        b_y = load_columns(y, o_t, o_c, D)
        if SCALED:
            o_n = (i_b * H + i_h) * N + o_t
            b_by = tl.load(by + o_n, mask=o_t >= 0, other=0.0)
            b_w = tl.load(weight + o_n, mask=o_t >= 0, other=0.0)
            b_scaled = b_x.to(tl.float32) * b_by[:, None]
            b_z += tl.sum(b_scaled * b_w[:, None], 0)
            b_h = mixed_dot(tl.trans(b_scaled), b_y, b_h)
        else:
            b_z += tl.sum(b_x.to(tl.float32), 0)
            b_h = mixed_dot(tl.trans(b_x), b_y, b_h)
    mask = (o_d < D)[:, None] & (o_c < D)[None, :]
    state += ((i_b * H + i_h) * K + i_block) * (D * D + D)
    b_h, b_z = b_h.to(state.dtype.element_ty), b_z.to(state.dtype.element_ty)
    tl.store(state + o_d[:, None] * D + o_c[None, :], b_h, mask=mask)
    if i_chunk == 0:
        tl.store(state + D * D + o_d, b_z, mask=o_d < D)


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    sets,
    state,
    total,
    sets_b,
    sets_h,
    sets_r,
    sets_c,
    H,
    R,
    C,
    SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute total = sets @ state: for each of R blocks, the sum of the states, SIZE numbers
    each, of the blocks in its set, out of C.

    A program makes TILE_N numbers of TILE_M blocks. Programs for the same numbers run side by
    side, so that states are read from memory once.
    """
    i_m, i_n = tl.program_id(0) % tl.cdiv(R, TILE_M), tl.program_id(0) // tl.cdiv(R, TILE_M)
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_m = i_m * TILE_M + tl.arange(0, TILE_M)
    o_n = i_n * TILE_N + tl.arange(0, TILE_N)
    sets += i_b * sets_b + i_h * sets_h + o_m.to(tl.int64)[:, None] * sets_r
    state += tl.program_id(1).to(tl.int64) * C * SIZE
    b_total = tl.zeros([TILE_M, TILE_N], tl.float32)
    for i_k in range(0, C, TILE_K):
        o_k = i_k + tl.arange(0, TILE_K)
        m_set = (o_m < R)[:, None] & (o_k < C)[None, :]
        b_set = tl.load(sets + o_k.to(tl.int64)[None, :] * sets_c, mask=m_set, other=0)
        m_state = (o_k < C)[:, None] & (o_n < SIZE)[None, :]
        p_state = state + o_k.to(tl.int64)[:, None] * SIZE + o_n[None, :]
        b_state = tl.load(p_state, mask=m_state, other=0.0)
        if INTERPRETED:
            b_state = b_state.to(tl.float32)
        b_set = b_set.to(b_state.dtype)
        b_total = tl.dot(b_set, b_state, b_total, input_precision=PRECISION)
    total += (tl.program_id(1).to(tl.int64) * R + o_m[:, None]) * SIZE + o_n[None, :]
    mask = (o_m < R)[:, None] & (o_n < SIZE)[None, :]
    tl.store(total, b_total.to(total.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    x,
    total,
    y,
    by,
    slots,
    H,
    N,
    K,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    NORMED: tl.constexpr,
    FEATURE: tl.constexpr,
):
    """Compute y = x h, with the sum h of the block's set; if NORMED times 1 / (eps + x z), which
    is kept.

    A program makes CHUNK columns of one block's y.
    """
    i_block, i_chunk, i_b, i_h = place_of_chunk(H, D, CHUNK)
    x = of_head(x, i_b, i_h)
    y = of_head(y, i_b, i_h)
    total += ((i_b * H + i_h) * K + i_block) * (D * D + D)
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_chunk * CHUNK + tl.arange(0, CHUNK)
    m_h = (o_d < D)[:, None] & (o_c < D)[None, :]
    b_h = tl.load(total + o_d[:, None] * D + o_c[None, :], mask=m_h, other=0.0)
    if NORMED:
        b_z = tl.load(total + D * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    for i_row in range(0, BLOCK, TILE):
        o_t = _tokens(slots, i_block, i_row, BLOCK, TILE)
        b_x = _features(load_columns(x, o_t, o_d, D), o_t, o_d, D, FEATURE)
        b_y = mixed_dot(b_x, b_h, tl.zeros([TILE, CHUNK], tl.float32))
        if NORMED:
            # Only padding in the set: 1 / eps would swamp everything else in the backward pass.
            b_sum = tl.sum(b_x.to(tl.float32) * b_z[None, :], 1) + eps
            b_sum = tl.where(tl.max(tl.abs(b_z), 0) > 0.0, b_sum, 0.0)
            m_by = b_sum != 0.0
            b_by = tl.where(m_by, 1.0 / tl.where(m_by, b_sum, 1.0), 0.0)
            b_y *= b_by[:, None]
            if i_chunk == 0:
                tl.store(by + (i_b * H + i_h) * N + o_t, b_by, mask=o_t >= 0)
        store_columns(y, o_t, o_c, b_y, D)


@triton.jit(do_not_specialize=SIZES)
def apply_transposed_kernel(
    x,
    total,
    y,
    by,
    weight,
    slots,
    H,
    N,
    K,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Compute y = by (x h^T + weight z), with the sums h and z of the block's set.

    by and weight are 1 if not SCALED. A program makes CHUNK columns of one block's y.
    """
    i_block, i_chunk, i_b, i_h = place_of_chunk(H, D, CHUNK)
    x = of_head(x, i_b, i_h)
    y = of_head(y, i_b, i_h)
    total += ((i_b * H + i_h) * K + i_block) * (D * D + D)
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_chunk * CHUNK + tl.arange(0, CHUNK)
    m_h = (o_c < D)[:, None] & (o_d < D)[None, :]
    b_h = tl.load(total + o_c[:, None] * D + o_d[None, :], mask=m_h, other=0.0)
    b_z = tl.load(total + D * D + o_c, mask=o_c < D, other=0.0).to(tl.float32)
    for i_row in range(0, BLOCK, TILE):
        o_t = _tokens(slots, i_block, i_row, BLOCK, TILE)
        b_x = load_columns(x, o_t, o_d, D)
        b_y = mixed_dot(b_x, tl.trans(b_h), tl.zeros([TILE, CHUNK], tl.float32))
        if SCALED:
            o_n = (i_b * H + i_h) * N + o_t
            b_w = tl.load(weight + o_n, mask=o_t >= 0, other=0.0)
            b_by = tl.load(by + o_n, mask=o_t >= 0, other=0.0)
            b_y = (b_y + b_w[:, None] * b_z[None, :]) * b_by[:, None]
        else:
            b_y += b_z[None, :]
        store_columns(y, o_t, o_c, b_y, D)


def _launch(
    kernel: triton.JITFunction,
    x: Tensor,
    slots: Tensor,
    block: int,
    tensors: Sequence[Tensor | tuple[Tensor | int, ...]],
    *numbers: float,
    **flags: int,
) -> None:
    """Run `launch_blocks` over blocks of x."""
    config = configs.linear(configs.architecture(x.device), x.shape[3], x.dtype)
    sizes = *x.shape[1:3], len(slots) // block
    launch_blocks(kernel, x, slots, block, tensors, *sizes, *numbers, config=config, **flags)


def precision(dtype: torch.dtype) -> str:
    """Precision of the sums of the states of inputs of a dtype."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _sums(
    x: Tensor,
    y: Tensor,
    slots: Tensor,
    sets: Tensor,
    block: int,
    by: Tensor | None = None,
    weight: Tensor | None = None,
    feature: int = 0,
) -> Tensor:
    """Sum the states of x and y over each set, (B, H, R, D D + D).

    Args:
        sets: (B', H', R, C) bool of any strides, over blocks of x.
        feature: number of the entry of FEATURES that is applied to x first.
    """
    B, H, _, D = x.shape
    size, kept = D * D + D, configs.state_dtype(x.dtype)
    state = x.new_empty((B, H, sets.shape[3], size), dtype=kept)
    scales = state if by is None else by, state if weight is None else weight
    tensors = *rows(x, y), *scales, state
    _launch(states_kernel, x, slots, block, tensors, SCALED=by is not None, FEATURE=feature)
    total = x.new_empty((B, H, sets.shape[2], size), dtype=kept)
    config = configs.sums(configs.architecture(x.device), x.dtype)
    steps = (n if length > 1 else 0 for n, length in zip(sets.stride(), sets.shape, strict=True))
    launch(
        sums_kernel,
        (triton.cdiv(sets.shape[2], config.tile_m) * triton.cdiv(size, config.tile_n), B * H),
        x,
        sets.view(torch.uint8),
        state,
        total,
        *steps,
        H,
        *sets.shape[2:],
        SIZE=size,
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        TILE_K=config.tile_k,
        PRECISION=precision(x.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return total


@torch.library.custom_op("gen_accel::triton_linear_sets", mutates_args=())
def _linear_sets(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    slots: Tensor,
    sets: Tensor,
    block_q: int,
    block_k: int,
    eps: float,
    feature: int,
) -> tuple[Tensor, Tensor]:
    """Compute the output, laid out like phi_q, and the factor of each row, (B, H, N) fp32."""
    phi_q, phi_k, v = (rowwise(x) for x in (phi_q, phi_k, v))
    out, by = results(phi_q)
    total = _sums(phi_k, v, slots, sets, block_k, feature=feature)
    tensors = *rows(phi_q), total, *rows(out), by
    _launch(apply_kernel, phi_q, slots, block_q, tensors, eps, NORMED=True, FEATURE=feature)
    return out, by


_linear_sets.register_fake(results)


@torch.library.custom_op("gen_accel::triton_linear_sets_backward", mutates_args=())
def _backward(
    grad: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    slots: Tensor,
    sets: Tensor,
    out: Tensor,
    by: Tensor,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, phi_q, phi_k, v = (rowwise(x) for x in (grad, phi_q, phi_k, v))
    dphi_q, dphi_k, dv = (torch.empty_like(x) for x in (phi_q, phi_k, v))
    weight = -(grad.float() * out.float()).sum(-1)  # the gradient of eps + phi_q z, over `by`
    total = _sums(phi_k, v, slots, sets, block_k)
    tensors = *rows(grad), total, *rows(dphi_q), by, weight.contiguous()
    _launch(apply_transposed_kernel, grad, slots, block_q, tensors, SCALED=True)
    total = _sums(phi_q, grad, slots, sets.mT, block_q, by, weight.contiguous())
    tensors = *rows(v), total, *rows(dphi_k), by, by
    _launch(apply_transposed_kernel, v, slots, block_k, tensors, SCALED=False)
    tensors = *rows(phi_k), total, *rows(dv), by
    _launch(apply_kernel, phi_k, slots, block_k, tensors, 0.0, NORMED=False, FEATURE=0)
    return dphi_q, dphi_k, dv


_backward.register_fake(laid_out_alike(1))


def _save(ctx: Context, inputs: Values, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.block_q, ctx.block_k, _, feature = inputs
    assert not feature
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Context, grad: Tensor, _: object) -> Values:
    return *_backward(grad, *ctx.saved_tensors, ctx.block_q, ctx.block_k), *[None] * 6


_linear_sets.register_autograd(_differentiate, setup_context=_save)
