"""Linear attention over the blocks that a sparse branch leaves out, forward and backward.

The linear branch of SLA (Zhang et al., 2025, https://arxiv.org/abs/2509.24006), over all blocks
that are not critical. Unlike there, an empty rest gives zeros, the denominator takes an eps, sums
are fp32, and a query block adds up the rest instead of subtracting from the total where the rest
is the shorter list.

Three kernels: sums over each block of an outer product of rows, and two that apply to each block
the sums of its rest. The backward pass is the same three with other arguments.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.launch import launch
from gen_accel.kernels.triton.lists import listed
from gen_accel.kernels.triton.tiles import INTERPRETED


def linear_rest(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    critical: Tensor,
    block_q: int,
    block_k: int,
    eps: float,
) -> Tensor:
    """phi_q h / (eps + phi_q z), h = phi_k^T v and z = sum(phi_k) over the keys of the rest.

    Args:
        phi_q, phi_k, v: (B, H, S, D) in slot order, one dtype; phi_k is 0 where a slot is padding.
        critical: (B or 1, H or 1, Kq, Kk) bool, the key blocks that are not in a query's rest.
        eps: keeps small denominators from zero.

    Returns:
        (B, H, S, D); zero where the rest is empty.
    """
    rows = _shorter(critical)
    columns = _shorter(critical.transpose(-1, -2)) if torch.is_grad_enabled() else (None, None)
    return _linear_rest(phi_q, phi_k, v, *rows, *columns, block_q, block_k, eps)[0]


def _shorter(critical: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the list of what is critical, or of the rest if that is shorter.

    Returns:
        (B', H', K, K') int32 numbers, the unused ones last, and (B', H', K, 2) int32: how many
        are used, and whether they are to be subtracted from the total.
    """
    count = critical.sum(-1, keepdim=True)
    subtract = 2 * count <= critical.shape[-1]
    index, counts = listed(critical == subtract, torch.zeros_like(critical), cut=False)
    return index, torch.stack([counts[..., 0], subtract[..., 0].int()], dim=-1)


@triton.jit
def _dot(b_x, b_y, b_acc):
    """x y + acc. TF32 where one is fp32: sums over many keys are beyond fp16's range."""
    if b_x.dtype == tl.float32 and b_y.dtype == tl.float32:
        return tl.dot(b_x, b_y, b_acc, input_precision="ieee")
    elif INTERPRETED or b_x.dtype != b_y.dtype:
        return tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), b_acc, input_precision="tf32")
    else:
        return tl.dot(b_x, b_y, b_acc)


@triton.jit
def _tile(x, i_row, BLOCK: tl.constexpr, TILE: tl.constexpr, o_d, D: tl.constexpr):
    """[TILE, len(o_d)] of a block's rows from the i_row-th on, zeros past the block and past D."""
    o_r = i_row + tl.arange(0, TILE)
    mask = (o_r < BLOCK)[:, None] & (o_d < D)[None, :]
    return tl.load(x + o_r[:, None] * D + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def states_kernel(
    x,
    y,
    by,
    weight,
    h,
    z,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    SCALED: tl.constexpr,
):
    """h = (by x)^T y and z = sum(by weight x) over each block; by and weight are 1 if not SCALED.

    A program makes CHUNK columns of one block's h, [D, D].
    """
    i_block, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x += i_block * BLOCK * D
    y += i_block * BLOCK * D
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_h = tl.zeros([BLOCK_D, CHUNK], tl.float32)
    b_z = tl.zeros([BLOCK_D], tl.float32)
    for i_row in range(0, BLOCK, TILE):
        b_x = _tile(x, i_row, BLOCK, TILE, o_d, D)
        b_y = _tile(y, i_row, BLOCK, TILE, o_c, D)
        if SCALED:
            o_r = i_row + tl.arange(0, TILE)
            b_by = tl.load(by + i_block * BLOCK + o_r, mask=o_r < BLOCK, other=0.0)
            b_w = tl.load(weight + i_block * BLOCK + o_r, mask=o_r < BLOCK, other=0.0)
            b_scaled = b_x.to(tl.float32) * b_by[:, None]
            b_z += tl.sum(b_scaled * b_w[:, None], 0)
            b_h = _dot(tl.trans(b_scaled), b_y, b_h)
        else:
            b_z += tl.sum(b_x.to(tl.float32), 0)
            b_h = _dot(tl.trans(b_x), b_y, b_h)
    mask = (o_d < D)[:, None] & (o_c < D)[None, :]
    tl.store(h + (i_block * D + o_d[:, None]) * D + o_c[None, :], b_h, mask=mask)
    if i_chunk == 0:
        tl.store(z + i_block * D + o_d, b_z, mask=o_d < D)


@triton.jit
def _list(index, counts, pattern_b, pattern_h, width, i_x, H, K):
    """Where block i_x, numbered over all samples and heads, has its list, how many it holds, and
    whether they are subtracted; also the first block of the other kind in its head."""
    i_head, i_block = i_x // K, i_x % K
    i_row = ((i_head // H) * pattern_b + (i_head % H) * pattern_h) * K + i_block
    used, subtract = tl.load(counts + 2 * i_row), tl.load(counts + 2 * i_row + 1)
    return index + i_row * width, used, subtract != 0, i_head


@triton.jit
def _rest(x, total, index, used, subtract, size, o_x, mask):
    """Sum of a state over a block's rest. `size` is that of one block's state."""
    b_sum = tl.zeros(o_x.shape, tl.float32)
    for i_p in range(used):
        p_x = x + tl.load(index + i_p).to(tl.int64) * size + o_x
        b_sum += tl.load(p_x, mask=mask, other=0.0)
    if subtract:
        b_sum = tl.load(total + o_x, mask=mask, other=0.0) - b_sum
    return b_sum


@triton.jit
def apply_kernel(
    x,
    h,
    z,
    total_h,
    total_z,
    y,
    by,
    index,
    counts,
    pattern_b,
    pattern_h,
    width,
    H,
    K,
    K_OTHER,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    NORMED: tl.constexpr,
):
    """y = x h, with h summed over the block's rest; by 1 / (eps + x z), which is kept, if NORMED.

    A program makes CHUNK columns of one block's y.
    """
    i_block, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index, used, subtract, i_head = _list(
        index, counts, pattern_b, pattern_h, width, i_block, H, K
    )
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_chunk * CHUNK + tl.arange(0, CHUNK)
    o_h = o_d[:, None] * D + o_c[None, :]
    m_h = (o_d < D)[:, None] & (o_c < D)[None, :]
    h += i_head * K_OTHER * D * D
    b_h = _rest(h, total_h + i_head * D * D, index, used, subtract, D * D, o_h, m_h)
    if NORMED:
        z += i_head * K_OTHER * D
        b_z = _rest(z, total_z + i_head * D, index, used, subtract, D, o_d, o_d < D)
    x += i_block * BLOCK * D
    y += i_block * BLOCK * D
    for i_row in range(0, BLOCK, TILE):
        o_r = i_row + tl.arange(0, TILE)
        b_x = _tile(x, i_row, BLOCK, TILE, o_d, D)
        b_y = _dot(b_x, b_h, tl.zeros([TILE, CHUNK], tl.float32))
        if NORMED:
            # Nothing but padding in the rest: 1 / eps would swamp all else that goes backward.
            b_sum = tl.sum(b_x.to(tl.float32) * b_z[None, :], 1) + eps
            b_sum = tl.where(tl.max(tl.abs(b_z), 0) > 0.0, b_sum, 0.0)
            m_by = b_sum != 0.0
            b_by = tl.where(m_by, 1.0 / tl.where(m_by, b_sum, 1.0), 0.0)
            b_y *= b_by[:, None]
            if i_chunk == 0:
                tl.store(by + i_block * BLOCK + o_r, b_by, mask=o_r < BLOCK)
        mask = (o_r < BLOCK)[:, None] & (o_c < D)[None, :]
        p_y = y + o_r[:, None] * D + o_c[None, :]
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit
def apply_transposed_kernel(
    x,
    h,
    z,
    total_h,
    total_z,
    y,
    by,
    weight,
    index,
    counts,
    pattern_b,
    pattern_h,
    width,
    H,
    K,
    K_OTHER,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    SCALED: tl.constexpr,
):
    """y = by (x h^T + weight z), with h and z summed over the block's rest.

    by and weight are 1 if not SCALED. A program makes CHUNK columns of one block's y.
    """
    i_block, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index, used, subtract, i_head = _list(
        index, counts, pattern_b, pattern_h, width, i_block, H, K
    )
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_chunk * CHUNK + tl.arange(0, CHUNK)
    o_h = o_c[:, None] * D + o_d[None, :]
    m_h = (o_c < D)[:, None] & (o_d < D)[None, :]
    h += i_head * K_OTHER * D * D
    z += i_head * K_OTHER * D
    b_h = _rest(h, total_h + i_head * D * D, index, used, subtract, D * D, o_h, m_h)
    b_z = _rest(z, total_z + i_head * D, index, used, subtract, D, o_c, o_c < D)
    x += i_block * BLOCK * D
    y += i_block * BLOCK * D
    for i_row in range(0, BLOCK, TILE):
        o_r = i_row + tl.arange(0, TILE)
        b_x = _tile(x, i_row, BLOCK, TILE, o_d, D)
        b_y = _dot(b_x, tl.trans(b_h), tl.zeros([TILE, CHUNK], tl.float32))
        if SCALED:
            b_w = tl.load(weight + i_block * BLOCK + o_r, mask=o_r < BLOCK, other=0.0)
            b_by = tl.load(by + i_block * BLOCK + o_r, mask=o_r < BLOCK, other=0.0)
            b_y = (b_y + b_w[:, None] * b_z[None, :]) * b_by[:, None]
        else:
            b_y += b_z[None, :]
        mask = (o_r < BLOCK)[:, None] & (o_c < D)[None, :]
        p_y = y + o_r[:, None] * D + o_c[None, :]
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=mask)


def _launch(kernel: Any, x: Tensor, block: int, *arguments: Any, **options: Any) -> None:
    """One program for each block of x, (B, H, S, D), and each chunk of its columns."""
    D = x.shape[3]
    config = configs.linear(configs.architecture(x.device), D, x.dtype)
    chunk = min(config.chunk, configs.padded_dim(D))
    launch(
        kernel,
        (x.shape[:3].numel() // block, triton.cdiv(D, chunk)),
        x,
        *arguments,
        D=D,
        BLOCK_D=configs.padded_dim(D),
        BLOCK=block,
        TILE=configs.tile(block, config.tile),
        CHUNK=chunk,
        num_warps=config.num_warps,
        num_stages=1,
        **options,
    )


def _states(
    x: Tensor, y: Tensor, block: int, by: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The states of each block and their totals: h, z, total h, total z; fp32."""
    B, H, S, D = x.shape
    h = x.new_empty((B, H, S // block, D, D), dtype=torch.float32)
    z = x.new_empty((B, H, S // block, D), dtype=torch.float32)
    _launch(
        states_kernel,
        x,
        block,
        x,
        y,
        z if by is None else by,
        z if weight is None else weight,
        h,
        z,
        SCALED=by is not None,
    )
    return h, z, h.sum(2), z.sum(2)


def _lists(
    index: Tensor, counts: Tensor, x: Tensor, block: int, states: Sequence[Tensor]
) -> tuple:
    return (
        index,
        counts,
        *configs.pattern_strides(index),
        index.shape[3],
        x.shape[1],
        x.shape[2] // block,
        states[0].shape[2],
    )


@torch.library.custom_op("gen_accel::triton_linear_rest", mutates_args=())
def _linear_rest(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    rows: Tensor,
    row_counts: Tensor,
    columns: Tensor | None,
    column_counts: Tensor | None,
    block_q: int,
    block_k: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The output and what each row was multiplied by, (B, H, S) fp32."""
    phi_q, phi_k, v = (x.contiguous() for x in (phi_q, phi_k, v))
    out = torch.empty_like(phi_q)
    by = phi_q.new_empty(phi_q.shape[:3], dtype=torch.float32)
    states = _states(phi_k, v, block_k, None, None)
    lists = _lists(rows, row_counts, phi_q, block_q, states)
    _launch(apply_kernel, phi_q, block_q, phi_q, *states, out, by, *lists, eps, NORMED=True)
    return out, by


@_linear_rest.register_fake
def _(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    rows: Tensor,
    row_counts: Tensor,
    columns: Tensor | None,
    column_counts: Tensor | None,
    block_q: int,
    block_k: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(phi_q, memory_format=torch.contiguous_format)
    return out, phi_q.new_empty(phi_q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("gen_accel::triton_linear_rest_backward", mutates_args=())
def _backward(
    grad: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    out: Tensor,
    by: Tensor,
    rows: Tensor,
    row_counts: Tensor,
    columns: Tensor,
    column_counts: Tensor,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, phi_q, phi_k, v = (x.contiguous() for x in (grad, phi_q, phi_k, v))
    dphi_q, dphi_k, dv = (torch.empty_like(x) for x in (phi_q, phi_k, v))
    weight = -(grad.float() * out.float()).sum(-1)  # the gradient of eps + phi_q z, over `by`

    states = _states(phi_k, v, block_k, None, None)
    lists = _lists(rows, row_counts, phi_q, block_q, states)
    arguments = grad, *states, dphi_q, by, weight, *lists
    _launch(apply_transposed_kernel, phi_q, block_q, *arguments, SCALED=True)

    states = _states(phi_q, grad, block_q, by, weight)
    lists = _lists(columns, column_counts, phi_k, block_k, states)
    arguments = v, *states, dphi_k, by, by, *lists
    _launch(apply_transposed_kernel, phi_k, block_k, *arguments, SCALED=False)
    arguments = phi_k, *states, dv, by, *lists
    _launch(apply_kernel, phi_k, block_k, *arguments, 0.0, NORMED=False)
    return dphi_q, dphi_k, dv


@_backward.register_fake
def _(grad: Tensor, phi_q: Tensor, phi_k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (phi_q, phi_k, v)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.block_q, ctx.block_k, _ = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.block_q, ctx.block_k), *[None] * 7


_linear_rest.register_autograd(_differentiate, setup_context=_save)
