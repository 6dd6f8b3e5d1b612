"""Attention over lists of blocks, in the manner of FlashAttention-2, forward and backward.

Dao, 2023, https://arxiv.org/abs/2307.08691. Unlike there, keys come from a list of blocks, tokens
are addressed through the plan's slots, so that nothing is reordered or copied, and the lengths of
blocks and tiles are independent: the blocks of a list are laid end to end and cut into tiles.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.launch import launch, rowwise
from gen_accel.kernels.triton.sparse_backward import delta_kernel, dkdv_kernel, dq_kernel
from gen_accel.kernels.triton.sparse_forward import forward_kernel
from gen_accel.kernels.triton.tiles import BITS, NONE, ROUTE, WINDOWS


def _launch(
    kind: str,
    kernel: Any,
    tensors: Sequence[Tensor],
    lists: tuple[Tensor, Tensor, Tensor],
    rule: Sequence[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> None:
    """Run one of the three kernels over the rows of `lists`.

    Args:
        tensors: what the kernel takes before `slots`; those of four axes are given by stride.
        lists: slots, index and counts.
    """
    q = tensors[0]
    B, H, N, D = q.shape
    slots, index, counts = lists
    mode = mode_of(rule)
    if mode == BITS.value:
        rule = rule[2:] if kind == "dkdv" else rule[:2]
    picks = rule[0] if mode == ROUTE.value else None
    windows = mode == WINDOWS.value
    facts = {"ruled": mode != NONE.value, "gain": gain is not None}
    config = configs.choose(kind, q, block_q, block_k, **facts)
    block, tile = (block_k, config.tile_n) if kind == "dkdv" else (block_q, config.tile_m)
    launch(
        kernel,
        (counts.shape[2] * triton.cdiv(block, tile), B * H),
        q,
        *tensors,
        *lists,
        *(rule or (slots, slots)),
        slots if gain is None else gain,
        *(step for x in tensors if x.ndim == 4 for step in x.stride()[:3]),
        *configs.pattern_strides(index),
        *((0, 0) if picks is None else configs.pattern_strides(picks)),
        *((0, 0) if gain is None else configs.pattern_strides(gain)),
        index.shape[2],
        H,
        N,
        slots.numel(),
        1 if picks is None else picks.shape[3],
        scale / math.log(2),
        D=D,
        BLOCK_D=configs.padded_dim(D),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        RULE=mode,
        AXES=rule[0].shape[1] if windows else 0,
        GAIN=gain is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def mode_of(rule: Sequence[Tensor]) -> int:
    """Which of the kinds of rule in `tiles` the one of `Lists` is."""
    if not rule:
        return NONE.value
    if len(rule) == 4:
        return BITS.value
    return (ROUTE if rule[0].ndim == 4 else WINDOWS).value


@torch.library.custom_op("gen_accel::triton_attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    rows: Tensor,
    row_counts: Tensor,
    columns: Tensor | None,
    column_counts: Tensor | None,
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, (B, H, N, D) laid out like q, and the logsumexp, (B, H, N) fp32."""
    q, k, v = (rowwise(x) for x in (q, k, v))
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tensors = q, k, v, out, lse
    lists = slots, rows, row_counts
    _launch("forward", forward_kernel, tensors, lists, rule, gain, block_q, block_k, scale)
    return out, lse


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rowwise(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("gen_accel::triton_attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slots: Tensor,
    rows: Tensor,
    row_counts: Tensor,
    columns: Tensor,
    column_counts: Tensor,
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad = (rowwise(x) for x in (q, k, v, grad))
    B, H, N, D = q.shape
    delta = torch.empty_like(lse)
    launch(
        delta_kernel,
        (triton.cdiv(N, configs.DELTA_TILE), B * H),
        q,
        out,
        grad,
        lse,
        grad_lse.contiguous(),
        delta,
        *out.stride()[:3],
        *grad.stride()[:3],
        H,
        N,
        D=D,
        BLOCK_D=configs.padded_dim(D),
        TILE=configs.DELTA_TILE,
    )
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    rest = rule, gain, block_q, block_k, scale
    _launch("dq", dq_kernel, (q, k, v, grad, dq, lse, delta), (slots, rows, row_counts), *rest)
    tensors = q, k, v, grad, dk, dv, lse, delta
    _launch("dkdv", dkdv_kernel, tensors, (slots, columns, column_counts), *rest)
    return dq, dk, dv


@attention_backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(rowwise(x)) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, *lists, rule, gain, block_q, block_k, scale = inputs
    ctx.numbers = block_q, block_k, scale
    ctx.save_for_backward(q, k, v, *output, *lists, gain, *rule)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, *lists = ctx.saved_tensors
    lists, gain, rule = lists[:5], lists[5], lists[6:]
    rest = rule, gain, *ctx.numbers
    grads = attention_backward(grad, grad_lse, q, k, v, out, lse, *lists, *rest)
    return *grads, *[None] * 5, [None] * len(rule), *[None] * 4


attention.register_autograd(_differentiate, setup_context=_save)
