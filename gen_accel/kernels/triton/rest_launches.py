"""Launches of the kernels for the rest of a plan: a call, its chunks, each kernel."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gen_accel.kernels.triton import configs, pooling
from gen_accel.kernels.triton.launch import launch
from gen_accel.kernels.triton.rest_columns import (
    columns_dkdv_kernel,
    columns_dpooled_kernel,
    columns_dq_kernel,
    columns_forward_kernel,
)
from gen_accel.kernels.triton.rest_pooling import pool_backward_kernel, pool_kernel
from gen_accel.kernels.triton.rest_shares import shares_kernel

PAIRS = 1 << 15  # the most in a chunk, which the second axis of a grid numbers


class Call(NamedTuple):
    """Call whose tensors all kernels read.

    Args:
        q, k, v: (B, H, N, D), rows of one stride.
        keep: (B, H, Kq, Kk) uint8, of any strides.
        slots: (S,) int32.
        held_q, held_k: (Kq, 2) and (Kk, 2) fp32, tokens and slots of each block.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    slots: Tensor
    held_q: Tensor
    held_k: Tensor
    block_q: int
    block_k: int
    scale: float

    def of_heads(self, some: slice) -> "Call":
        q, k, v, keep = (x[:, some] for x in (self.q, self.k, self.v, self.keep))
        return self._replace(q=q, k=k, v=v, keep=keep)

    @property
    def heads(self) -> int:
        """Heads of all samples."""
        return self.q.shape[0] * self.q.shape[1]

    @property
    def blocks(self) -> tuple[int, int]:
        """Kq and Kk."""
        return self.keep.shape[2], self.keep.shape[3]

    @property
    def sizes(self) -> tuple[int, ...]:
        """H, N, Kq, Kk as kernels take them before the scale."""
        return *self.q.shape[1:3], *self.blocks

    @property
    def dim(self) -> dict[str, int]:
        D = self.q.shape[3]
        return {"D": D, "BLOCK_D": configs.padded_dim(D)}


class Chunk(NamedTuple):
    """Pairs of a head and a query block that share one set of tensors: groups `first` to `last` of
    `size` query blocks each, of which a head has `groups`."""

    first: int
    last: int
    groups: int
    size: int

    @property
    def pairs(self) -> int:
        return (self.last - self.first) * self.size


class Pooled(NamedTuple):
    """Columns.

    Args:
        keys, values: (sets, Kk, D) in the dtype of q; of mean keys, one set a head.
        bias: (sets, Kk) fp32 in powers of two; of mean keys (Kk,), for all.
        spreads: the log-sum-exps that the biases were made of; of mean keys the biases.
        centred: around mean queries.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    spreads: Tensor
    centred: bool


def chunks(call: Call) -> Iterator[Chunk]:
    """Chunks of all heads: as many groups at once as fit into the cache, at least one."""
    (Kq, _), size = call.blocks, _group(call)
    groups = -(-Kq // size)
    step = _most_pairs(call) // size
    for first in range(0, call.heads * groups, step):
        yield Chunk(first, min(first + step, call.heads * groups), groups, size)


def _most_pairs(call: Call) -> int:
    """Number of pairs that a chunk has at most, in whole groups: no more than there are."""
    (Kq, Kk), size = call.blocks, _group(call)
    fit = configs.CACHED[_arch(call)] // (2 * Kk * call.q.shape[3] * call.q.element_size())
    there = -(-Kq // size) * size * call.heads
    return max(size, min(fit, there, PAIRS) // size * size)


def _group(call: Call) -> int:
    """Number of query blocks of a head that are the rows of one product."""
    return configs.tile(call.blocks[0], _pool_config("pool", call).tile_m)


def _arch(call: Call) -> str:
    return configs.architecture(call.q.device)


def _pool_config(kind: str, call: Call) -> configs.Config:
    return configs.pool(_arch(call), kind, call.q.shape[3], call.q.dtype, call.block_k)


def _columns_config(kind: str, call: Call) -> configs.Config:
    facts = _arch(call), kind, call.q.shape[3], call.q.dtype
    return configs.columns(*facts, call.block_q, call.blocks[1])


def _strides(*tensors: Tensor) -> Iterator[int]:
    return (step for x in tensors for step in x.stride()[:3])


def _launch(
    kernel: Any,
    programs: tuple[int, int],
    call: Call,
    config: configs.Config,
    *,
    tensors: Sequence[Tensor],
    strided: Sequence[Tensor],
    numbers: Sequence[int],
    **sizes: int,
) -> None:
    """Run a kernel of this package's rest, all of which take their arguments in one order.

    Args:
        tensors: all that it reads and writes.
        strided: those of (B, H, N, D), given by stride.
        numbers: between the strides and the scale.
        sizes: constants beside the dim of a head.
    """
    launch(
        kernel,
        programs,
        call.q,
        *tensors,
        *_strides(*strided),
        *numbers,
        call.scale / math.log(2),
        **call.dim,
        **sizes,
        TILE_N=config.tile_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def means_of(x: Tensor, call: Call, block: int) -> Tensor:
    """(B, H, S / block, D) in the dtype of x."""
    made = x.new_empty(*x.shape[:2], call.slots.numel() // block, x.shape[3])
    pooling.launch_sums(x, call.slots, block, made, mean=True)
    return made


def around_keys(call: Call) -> tuple[Chunk, Pooled]:
    keys, values = (means_of(x, call, call.block_k).flatten(0, 1) for x in (call.k, call.v))
    chunk = Chunk(0, call.heads * call.blocks[0], call.blocks[0], 1)
    bias = call.held_k[:, 0].log2()
    return chunk, Pooled(keys, values, bias, bias, centred=False)


def room(call: Call) -> Pooled:
    """Uninitialised, for the pairs of a chunk."""
    pairs, Kk = _most_pairs(call), call.blocks[1]
    columns = call.q.new_empty(2, pairs, Kk, call.q.shape[3])
    numbers = call.q.new_empty(2, pairs, Kk, dtype=torch.float32)
    return Pooled(*columns, *numbers, centred=True)


def parts_of_means(call: Call) -> Tensor:
    """Uninitialised, (pairs, parts, D): what each tile of keys gives to the gradient of a pair's
    mean query."""
    tiles = triton.cdiv(call.block_k, _pool_config("pool backward", call).tile_n)
    return call.q.new_empty(_most_pairs(call), call.blocks[1] * tiles, call.q.shape[3])


def pool(call: Call, chunk: Chunk, means: Tensor, pooled: Pooled) -> None:
    H, _, Kq, Kk = call.sizes
    blocks = configs.POOL_BLOCKS
    _launch(
        pool_kernel,
        (triton.cdiv(Kk, blocks), chunk.last - chunk.first),
        call,
        _pool_config("pool", call),
        tensors=(means, call.k, call.v, *pooled[:4], call.keep, call.slots),
        strided=(call.k, call.v),
        numbers=(*call.keep.stride(), chunk.first, chunk.groups, H, Kq, Kk),
        BLOCK_K=call.block_k,
        GROUP=chunk.size,
        BLOCKS=blocks,
    )


def forward(
    call: Call,
    chunk: Chunk,
    pooled: Pooled,
    out: Tensor,
    lse: Tensor,
    joint: Tensor,
    total: Tensor,
) -> None:
    config = _columns_config("forward", call)
    _launch(
        columns_forward_kernel,
        (chunk.pairs * triton.cdiv(call.block_q, config.tile_m), 1),
        call,
        config,
        tensors=(call.q, *pooled[:3], out, lse, joint, total, call.keep, call.slots),
        strided=(call.q, out, joint),
        numbers=(*call.keep.stride(), chunk.first, chunk.groups, *call.sizes),
        BLOCK_Q=call.block_q,
        GROUP=chunk.size,
        TILE_M=config.tile_m,
        WIDTH=configs.width(_arch(call), config, call.q.shape[3]),
        CENTRED=pooled.centred,
    )


def shares(
    grad: Tensor, grad_total: Tensor, joint: Tensor, total: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of out and lse, and (B, H, N) fp32, what the softmax takes from the gradient
    of each score of a row."""
    B, H, N, D = out.shape
    dout = torch.empty_like(out)
    dlse, delta = total.new_empty(2, B, H, N)
    launch(
        shares_kernel,
        (triton.cdiv(N, configs.DELTA_TILE), B * H),
        out,
        *(grad, out, joint, dout, lse.contiguous(), total, grad_total.contiguous(), dlse, delta),
        *_strides(grad, out, joint, dout),
        H,
        N,
        D=D,
        BLOCK_D=configs.padded_dim(D),
        TILE=configs.DELTA_TILE,
    )
    return dout, dlse, delta


def dq_of(
    call: Call,
    chunk: Chunk,
    pooled: Pooled,
    grad: Tensor,
    dmeans: Tensor | None,
    dq: Tensor,
    total: Tensor,
    delta: Tensor,
) -> None:
    """Write dq, to which the gradients of the mean queries are added, `dmeans` (pairs, D) fp32."""
    config = _columns_config("dq", call)
    of_means = call.held_q if dmeans is None else dmeans  # not read without
    _launch(
        columns_dq_kernel,
        (chunk.pairs * triton.cdiv(call.block_q, config.tile_m), 1),
        call,
        config,
        tensors=(
            *(call.q, grad, *pooled[:3], of_means, call.held_q),
            *(dq, total, delta, call.keep, call.slots),
        ),
        strided=(call.q, grad, dq),
        numbers=(*call.keep.stride(), chunk.first, chunk.groups, *call.sizes),
        BLOCK_Q=call.block_q,
        GROUP=chunk.size,
        TILE_M=config.tile_m,
        CENTRED=pooled.centred,
    )


def dkdv_of(
    call: Call,
    pooled: Pooled,
    grad: Tensor,
    dk: Tensor,
    dv: Tensor,
    total: Tensor,
    delta: Tensor,
) -> None:
    config = _columns_config("dkdv", call)
    _launch(
        columns_dkdv_kernel,
        (triton.cdiv(call.blocks[1], config.tile_n), call.heads),
        call,
        config,
        tensors=(call.q, grad, *pooled[:3], dk, dv, total, delta, call.keep, call.slots),
        strided=(call.q, grad, dk, dv),
        numbers=(*call.keep.stride(), *call.sizes),
        BLOCK_Q=call.block_q,
        BLOCK_K=call.block_k,
        TILE_M=config.tile_m,
    )


def dpooled_of(
    call: Call,
    chunk: Chunk,
    means: Tensor,
    pooled: Pooled,
    grads: Pooled,
    grad: Tensor,
    total: Tensor,
    delta: Tensor,
) -> None:
    config = _columns_config("dpooled", call)
    _launch(
        columns_dpooled_kernel,
        (triton.cdiv(call.blocks[1], config.tile_n), chunk.pairs),
        call,
        config,
        tensors=(call.q, grad, means, *pooled[:3], *grads[:4], total, delta, call.slots),
        strided=(call.q, grad),
        numbers=(chunk.first, chunk.groups, *call.sizes),
        BLOCK_Q=call.block_q,
        GROUP=chunk.size,
        TILE_M=config.tile_m,
    )


def pool_backward(
    call: Call,
    chunk: Chunk,
    means: Tensor,
    pooled: Pooled,
    grads: Pooled,
    parts: Tensor,
    sums: Tensor,
) -> None:
    config = _pool_config("pool backward", call)
    heads = (chunk.last - 1) // chunk.groups - chunk.first // chunk.groups + 1
    _launch(
        pool_backward_kernel,
        (call.blocks[1] * triton.cdiv(call.block_k, config.tile_n), heads),
        call,
        config,
        tensors=(means, call.k, call.v, *grads[:4], pooled.spreads, *sums, parts, call.slots),
        strided=(call.k, call.v),
        numbers=(chunk.first, chunk.last, chunk.groups, *call.sizes),
        BLOCK_K=call.block_k,
        GROUP=chunk.size,
        TILE_M=min(config.tile_m, chunk.size),
    )
