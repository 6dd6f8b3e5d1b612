"""Launches of the kernels for the rest of a plan: a call, its chunks, each kernel."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from gen_accel.kernels.triton import configs, pooling
from gen_accel.kernels.triton.block_facts import weigh_squares
from gen_accel.kernels.triton.launch import Repeated, rows
from gen_accel.kernels.triton.pooling import pool_backward_kernel, pool_kernel
from gen_accel.kernels.triton.rest_backward import (
    columns_dkdv_kernel,
    columns_dpooled_kernel,
    columns_dq_kernel,
)
from gen_accel.kernels.triton.rest_columns import columns_forward_kernel
from gen_accel.kernels.triton.rest_turns import rest_turns_kernel

PAIRS = 1 << 15  # the most pairs in a chunk, limited by the second axis of a grid


class Curved(NamedTuple):
    """Tensors that the second order of `Rest` needs beside q, k and v, all in fp32.

    Args:
        rise, weight: fields of `kernels.rest.Curve`, (B, H, N) and (B, H, D).
        key_means: (B, H, Kk, D), means of key blocks.
        squares: (B, H, N), squared offsets of keys from these means, weighed and summed over the
            channels.
    """

    rise: Tensor
    weight: Tensor
    key_means: Tensor
    squares: Tensor


class CurveGrads(NamedTuple):
    """Sums of the gradients of a curve, in fp32.

    Args:
        rise: (B, H, N).
        of_tokens: (B, H, parts, D), the part of the weight's gradient from each tile of keys.
        of_pairs: (B, H, Kq, parts, D), the part that the pooled keys of each tile of columns
            subtract.
    """

    rise: Tensor
    of_tokens: Tensor
    of_pairs: Tensor

    @property
    def weight(self) -> Tensor:
        """Gradient of the weight, (B, H, D)."""
        return self.of_tokens.sum(2) - self.of_pairs.sum((2, 3))


class RestGrads(NamedTuple):
    """Gradients and sums that a backward pass begins with.

    Args:
        grad: of the output, (B, H, N, D), rows of one stride.
        grad_lse: of the log-sum-exp, (B, H, N) fp32.
        low_lse: the log-sum-exp without the score of the common key, (B, H, N) fp32.
        delta: subtracted from the gradient of each score by the softmax, (B, H, N) fp32.
    """

    grad: Tensor
    grad_lse: Tensor
    low_lse: Tensor
    delta: Tensor

    def of_heads(self, some: slice) -> "RestGrads":
        of_rows = (x[:, some].contiguous() for x in self[1:])
        return RestGrads(self.grad[:, some], *of_rows)


class RestCall(NamedTuple):
    """Tensors of a call that all kernels read.

    Args:
        q, k, v: (B, H, N, D), rows of one stride.
        keep: (B, H, Kq, Kk) uint8, of any strides.
        slots: (S,) int32.
        held_q, held_k: (Kq, 2) and (Kk, 2) fp32, tokens and slots of each block.
        common: (B, H, D) fp32, see `rest_columns`.
        factor: of the slope, see `slope`.
        curve: None without a second order.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    slots: Tensor
    held_q: Tensor
    held_k: Tensor
    common: Tensor
    block_q: int
    block_k: int
    scale: float
    factor: float
    curve: Curved | None = None

    def of_heads(self, some: slice) -> "RestCall":
        q, k, v, keep = (x[:, some] for x in (self.q, self.k, self.v, self.keep))
        common = self.common[:, some].contiguous()
        curve = self.curve and Curved(*(x[:, some].contiguous() for x in self.curve))
        return self._replace(q=q, k=k, v=v, keep=keep, common=common, curve=curve)

    @property
    def curved(self) -> bool:
        return self.curve is not None

    @property
    def curve_or_any(self) -> Curved:
        """Curve of the call, or placeholders for kernels that do not read it."""
        return self.curve or Curved(*[self.held_k] * len(Curved._fields))

    @property
    def heads(self) -> int:
        """Number of heads of all samples."""
        return self.q.shape[0] * self.q.shape[1]

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of query and key blocks, Kq and Kk."""
        return self.keep.shape[2], self.keep.shape[3]

    @property
    def sizes(self) -> tuple[int, ...]:
        """H, N, Kq, Kk, the arguments of kernels before the scale."""
        return *self.q.shape[1:3], *self.blocks


class Chunk(NamedTuple):
    """Pairs of a head and a query block that share one set of tensors: groups `first` to `last`,
    with `size` query blocks each."""

    first: int
    last: int
    size: int

    @property
    def groups(self) -> int:
        return self.last - self.first

    @property
    def pairs(self) -> int:
        return self.groups * self.size


OfChunk = Callable[[Chunk], None]  # launch of a kernel on one chunk, with all else prepared


class PooledColumns(NamedTuple):
    """Columns of one set or more, see `rest_columns`.

    Args:
        keys, values: (sets, Kk, D) in the dtype of q, keys off the common one; for mean keys, one
            set a head.
        bias: (sets, Kk) fp32 in powers of two; for mean keys (Kk,), for all.
        spreads: log-sum-exps from which the biases were made; for mean keys the biases.
        curves: (sets, Kk) fp32 in powers of two, the variances; without a curve the spreads.
        centred: whether pooled around mean queries.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    spreads: Tensor
    curves: Tensor
    centred: bool


def chunks(call: RestCall) -> Iterator[Chunk]:
    """Yield chunks of all heads, of whole groups and nearly alike."""
    size, (total, step) = _group(call), _groups(call)
    for first in range(0, total, step):
        yield Chunk(first, min(first + step, total), size)


def _groups(call: RestCall) -> tuple[int, int]:
    """Number of groups of all heads, and of a chunk."""
    size = _group(call)
    pair = 2 * call.blocks[1] * call.q.shape[3] * call.q.element_size()
    given = configs.card_size(call.q.device), _columns_config("forward", call)
    most = min(configs.groups_at_once(*given, call.block_q, pair, size), PAIRS // size)
    total = call.heads * _grouping(call)[0]
    return total, triton.cdiv(total, triton.cdiv(total, most))


def most_pairs(call: RestCall) -> int:
    """Number of pairs of a chunk, the last one perhaps with fewer."""
    return _groups(call)[1] * _group(call)


def _group(call: RestCall) -> int:
    """Number of query blocks of a head that form the rows of one product."""
    return configs.group(_pool_config("pool", call), call.blocks[0])


def _grouping(call: RestCall, pooled: PooledColumns | None = None) -> tuple[int, int]:
    """Number of groups in a head, and of query blocks in a group: one around mean keys."""
    size = 1 if pooled is not None and not pooled.centred else _group(call)
    return triton.cdiv(call.blocks[0], size), size


def _arch(call: RestCall) -> str:
    return configs.architecture(call.q.device)


def _pool_config(kind: str, call: RestCall) -> configs.LaunchConfig:
    facts = _arch(call), kind, call.q.shape[3], call.q.dtype
    return configs.pool(*facts, call.block_k, call.curved)


def _columns_config(kind: str, call: RestCall) -> configs.LaunchConfig:
    facts = _arch(call), kind, call.q.shape[3], call.q.dtype
    return configs.columns(*facts, call.block_q, call.blocks[1], call.curved)


def _prepared(
    kernel: triton.JITFunction,
    call: RestCall,
    config: configs.LaunchConfig,
    *,
    tensors: Sequence[Tensor | tuple[Tensor | int, ...]],
    numbers: Sequence[float],
    **sizes: int,
) -> Repeated:
    """Prepare a kernel of this package's rest; all of them take arguments in the same order.

    Args:
        tensors: all tensors that it reads and writes.
        numbers: arguments between the tensors and the scale.
        sizes: constants other than the head dim.
    """
    return Repeated(
        kernel,
        call.q,
        *tensors,
        *numbers,
        call.scale / math.log(2),
        **configs.dims(call.q.shape[3]),
        **sizes,
        TILE_N=config.tile_n,
        **config.stages,
    )


def means_of(
    x: Tensor,
    call: RestCall,
    block: int,
    dtype: torch.dtype | None = None,
    common: Tensor | None = None,
) -> Tensor:
    """Average x over blocks, (B, H, S / block, D), by default in x's dtype, off `common` if
    given."""
    made = x.new_empty(*x.shape[:2], call.slots.numel() // block, x.shape[3], dtype=dtype)
    pooling.launch_sums(x, call.slots, block, made, mean=True, common=common)
    return made


def query_means(call: RestCall, known: Tensor | None) -> Tensor:
    """Means of query blocks, (B, H, Kq, D) fp32."""
    return means_of(call.q, call, call.block_q, torch.float32) if known is None else known


def with_curve(
    call: RestCall,
    rise: Tensor,
    weight: Tensor,
    key_means: Tensor | None,
    squares: Tensor | None = None,
) -> RestCall:
    """Add to the call the means of its key blocks and the squared offsets from them, each made
    once where it is not known."""
    rise, weight = rise.float().contiguous(), weight.float().contiguous()
    if key_means is None:
        key_means = means_of(call.k, call, call.block_k, torch.float32)
    if squares is None:
        squares, blocks = torch.empty_like(rise), (call.block_q, call.block_k)
        given = call.q, call.k, call.slots, blocks, key_means, key_means, weight, weight
        weigh_squares(*given, squares, squares, of_queries=False)
    return call._replace(curve=Curved(rise, weight, key_means, squares))


def around_keys(call: RestCall) -> tuple[Chunk, PooledColumns]:
    keys = means_of(call.k, call, call.block_k, common=call.common).flatten(0, 1)
    values = means_of(call.v, call, call.block_k).flatten(0, 1)
    chunk = Chunk(0, call.heads * call.blocks[0], 1)
    bias = call.held_k[:, 0].log2()
    return chunk, PooledColumns(keys, values, bias, bias, bias, centred=False)


def room(call: RestCall, pairs: int, *, spreads: bool = True) -> PooledColumns:
    """Allocate the columns for a number of pairs, uninitialised; without `spreads` the biases
    stand for them."""
    Kk = call.blocks[1]
    keys, values = call.q.new_empty(2, pairs, Kk, call.q.shape[3])
    numbers = call.q.new_empty(1 + spreads + call.curved, pairs, Kk, dtype=torch.float32)
    bias, own, curves = numbers[0], numbers[int(spreads)], numbers[-1]
    return PooledColumns(keys, values, bias, own, curves, centred=True)


def parts_of_means(call: RestCall) -> tuple[Tensor, Tensor]:
    """Allocate, uninitialised, (pairs, parts, D), the part of the gradient of a pair's mean query
    from each tile of keys; and their sum, (pairs, D) fp32."""
    pairs, D = most_pairs(call), call.q.shape[3]
    parts = call.q.new_empty(pairs, _key_tiles(call), D)
    return parts, call.q.new_empty(pairs, D, dtype=torch.float32)


def _key_tiles(call: RestCall) -> int:
    """Number of tiles of a head's keys."""
    tile = _pool_config("pool backward", call).tile_n
    return call.blocks[1] * triton.cdiv(call.block_k, tile)


def curve_grads(call: RestCall) -> CurveGrads | None:
    """Allocate the sums of a call with a curve; `of_tokens` zero, the others uninitialised."""
    if call.curve is None:
        return None
    B, H, _, D = call.q.shape
    (Kq, Kk), rise = call.blocks, call.curve.rise
    tiles = triton.cdiv(Kk, _columns_config("dpooled", call).tile_n)
    of_pairs, of_tokens = rise.new_empty(B, H, Kq, tiles, D), (B, H, _key_tiles(call), D)
    return CurveGrads(torch.empty_like(rise), rise.new_zeros(of_tokens), of_pairs)


def pool(call: RestCall, means: Tensor, pooled: PooledColumns) -> OfChunk:
    blocks, curve = configs.POOL_BLOCKS, call.curve_or_any
    (groups, size), config = _grouping(call), _pool_config("pool", call)
    prepared = _prepared(
        pool_kernel,
        call,
        config,
        tensors=(
            *(means, *rows(call.k, call.v), *pooled[:5], call.common),
            *(curve.squares, curve.key_means, curve.weight, call.keep, call.slots),
        ),
        numbers=(*call.keep.stride(), 0, groups, *call.sizes),
        BLOCK_K=call.block_k,
        GROUP=size,
        BLOCKS=blocks,
        CURVED=call.curved,
        STAGES=config.num_stages,
    )
    programs = triton.cdiv(call.blocks[1], blocks)
    return lambda chunk: prepared((programs, chunk.groups), first=chunk.first)


def attend_to_means(
    call: RestCall,
    pooled: PooledColumns,
    slope: Tensor | None,
    out: Tensor,
    lse: Tensor,
    low_lse: Tensor,
) -> None:
    """Write the output around mean keys, with the slope of H, (B, H, D, D), added if it is given,
    and the log-sum-exp."""
    config = _columns_config("forward", call)
    prepared = _prepared(
        columns_forward_kernel,
        call,
        config,
        tensors=(
            *(*rows(call.q), *pooled[:3], call.common, call.q if slope is None else slope),
            *(*rows(out), lse, low_lse, call.keep, call.slots),
        ),
        numbers=(*call.keep.stride(), *call.sizes, call.factor),
        BLOCK_Q=call.block_q,
        TILE_M=config.tile_m,
        WIDTH=configs.width(_arch(call), config, call.q.shape[3]),
        SLOPED=slope is not None,
    )
    prepared((call.blocks[0] * triton.cdiv(call.block_q, config.tile_m), call.heads))


def in_turns(
    call: RestCall,
    means: Tensor,
    slope: Tensor | None,
    out: Tensor,
    lse: Tensor,
    low_lse: Tensor,
) -> None:
    """Write the output around mean queries, (B, H, Kq, D) fp32, and the log-sum-exp; other
    arguments as in `attend_to_means`. See `rest_turns`."""
    (Kq, Kk), D, curve = call.blocks, call.q.shape[3], call.curve_or_any
    given = configs.choose_turns(call.q, call.block_q, call.block_k)
    of_pool, config = given
    size, blocks = configs.group(of_pool, Kq), configs.POOL_BLOCKS
    groups = triton.cdiv(Kq, size)
    total, pair = call.heads * groups, 2 * Kk * D * call.q.element_size()
    card = configs.card_size(call.q.device)
    step = configs.groups_in_turns(card, given, call.block_q, call.blocks, pair)
    chunks = triton.cdiv(total, step)
    step = triton.cdiv(total, chunks)
    pooled = room(call, min(chunks, configs.ROOMS) * step * size, spreads=False)
    turns = torch.zeros(1 + 2 * chunks, dtype=torch.int32, device=call.q.device)
    prepared = _prepared(
        rest_turns_kernel,
        call,
        config,
        tensors=(
            *(turns, *rows(call.q), means.to(call.q.dtype), *rows(call.k, call.v), *pooled[:3]),
            *(
                pooled.curves,
                curve.rise,
                call.common,
                curve.squares,
                curve.key_means,
                curve.weight,
                means,
            ),
            *(call.q if slope is None else slope, *rows(out), lse, low_lse),
            *(call.keep, call.slots),
        ),
        numbers=(*call.keep.stride(), chunks, step, total, groups, *call.sizes, call.factor),
        BLOCK_Q=call.block_q,
        BLOCK_K=call.block_k,
        GROUP=size,
        LOAD=of_pool.tile_n,
        BLOCKS=blocks,
        TILE_M=config.tile_m,
        WIDTH=configs.width(_arch(call), config, D),
        CURVED=call.curved,
        SLOPED=slope is not None,
        STAGES=of_pool.num_stages,
    )
    turns_of_group = triton.cdiv(Kk, blocks) + size * triton.cdiv(call.block_q, config.tile_m)
    prepared((chunks * step * turns_of_group, 1))


def dq_of(
    call: RestCall,
    pooled: PooledColumns,
    back: RestGrads,
    dmeans: Tensor | None,
    dq: Tensor,
    drise: Tensor | None,
) -> OfChunk:
    """Write dq, with the gradients of the mean queries `dmeans`, (pairs, D) fp32, added; and drise
    if the call has a curve."""
    config, (groups, size) = _columns_config("dq", call), _grouping(call, pooled)
    of_means = call.held_q if dmeans is None else dmeans  # not read if None
    prepared = _prepared(
        columns_dq_kernel,
        call,
        config,
        tensors=(
            *(*rows(call.q, back.grad), *pooled[:3], pooled.curves, call.curve_or_any.rise),
            *(call.common, back.grad_lse, of_means, call.held_q, *rows(dq)),
            *(back.low_lse if drise is None else drise, back.low_lse, back.delta),
            *(call.keep, call.slots),
        ),
        numbers=(*call.keep.stride(), 0, groups, *call.sizes),
        BLOCK_Q=call.block_q,
        GROUP=size,
        TILE_M=config.tile_m,
        CENTRED=pooled.centred,
        CURVED=call.curved,
    )
    tiles = triton.cdiv(call.block_q, config.tile_m)
    return lambda chunk: prepared((chunk.pairs * tiles, 1), first=chunk.first)


def dkdv_of(
    call: RestCall,
    pooled: PooledColumns,
    back: RestGrads,
    dk: Tensor,
    dv: Tensor,
) -> None:
    config = _columns_config("dkdv", call)
    prepared = _prepared(
        columns_dkdv_kernel,
        call,
        config,
        tensors=(
            *(*rows(call.q, back.grad), *pooled[:3], *rows(dk, dv)),
            *(back.low_lse, back.delta, call.keep, call.slots),
        ),
        numbers=(*call.keep.stride(), *call.sizes),
        BLOCK_Q=call.block_q,
        BLOCK_K=call.block_k,
        TILE_M=config.tile_m,
    )
    prepared((triton.cdiv(call.blocks[1], config.tile_n), call.heads))


def dpooled_of(
    call: RestCall,
    means: Tensor,
    pooled: PooledColumns,
    grads: PooledColumns,
    back: RestGrads,
    dweights: Tensor | None,
) -> OfChunk:
    """Write `grads`; with a curve, also `dweights`, in the form of `CurveGrads.of_pairs`."""
    config, curve = _columns_config("dpooled", call), call.curve_or_any
    groups, size = _grouping(call)
    prepared = _prepared(
        columns_dpooled_kernel,
        call,
        config,
        tensors=(
            *(*rows(call.q, back.grad), means, *pooled[:3], pooled.curves),
            *(curve.rise, call.common, curve.key_means, curve.weight, *grads[:5]),
            *(back.low_lse if dweights is None else dweights, back.low_lse, back.delta),
            call.slots,
        ),
        numbers=(0, groups, *call.sizes),
        BLOCK_Q=call.block_q,
        GROUP=size,
        TILE_M=config.tile_m,
        CURVED=call.curved,
    )
    tiles = triton.cdiv(call.blocks[1], config.tile_n)
    return lambda chunk: prepared((tiles, chunk.pairs), first=chunk.first)


def pool_backward(
    call: RestCall,
    means: Tensor,
    pooled: PooledColumns,
    grads: PooledColumns,
    parts: Tensor,
    sums: Tensor,
    dweights: Tensor | None,
) -> OfChunk:
    """Add to `sums` and write `parts`; with a curve, add to `dweights`, in the form of
    `CurveGrads.of_tokens`."""
    config, curve = _pool_config("pool backward", call), call.curve_or_any
    groups, size = _grouping(call)
    prepared = _prepared(
        pool_backward_kernel,
        call,
        config,
        tensors=(
            *(means, *rows(call.k, call.v), *grads[:5], pooled.spreads, call.common),
            *(curve.squares, curve.key_means, curve.weight, *sums, parts),
            *(pooled.spreads if dweights is None else dweights, call.slots),
        ),
        numbers=(0, 0, groups, *call.sizes),
        BLOCK_K=call.block_k,
        GROUP=size,
        TILE_M=min(config.tile_m, size),
        CURVED=call.curved,
    )

    def of_chunk(chunk: Chunk) -> None:
        heads = (chunk.last - 1) // groups - chunk.first // groups + 1
        prepared((_key_tiles(call), heads), first=chunk.first, last=chunk.last)

    return of_chunk
