"""Attention of queries that pick groups of keys for themselves, with the queries of each group
gathered into tiles.

After FlashMoBA (Xiao et al., 2025, https://arxiv.org/abs/2511.11571): nearly all of the computed
pairs were picked. Sums of a query over its groups lie in fp32 in memory that one program alone
adds to, in the order of the groups: no atomics, the same from run to run.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.gathered_kernels import gathered_dq_kernel, gathered_forward_kernel
from gen_accel.kernels.triton.launch import empty_out, launch, rowwise
from gen_accel.kernels.triton.listing import block_lists
from gen_accel.kernels.triton.owners import owners_of
from gen_accel.kernels.triton.sparse_backward import delta_kernel, dkdv_kernel
from gen_accel.kernels.triton.tiles import NONE
from gen_accel.plan import Plan, Route

# Mean slots of a group from which on queries are gathered. Each group of a query reads and writes
# its sums, which costs as much as some tens of keys.
LEAST = 64
OWNED, INTERPRETED = 2048, 64  # slots of a program; fewer fill their tiles less, more balance less
TILE = 64  # the most queries in a tile, so that tiles are filled and work is balanced
# Instead of the block kernels' configurations, which would spill by compile_matrix; not timed.
INSTEAD = {
    ("sm_80", 64, "dq"): configs.Config(64, 32, 4, 1),
    ("sm_80", 128, "forward"): configs.Config(64, 32, 4, 1),
    ("sm_90", 128, "forward"): configs.Config(64, 32, 4, 2),
    ("sm_100", 64, "forward"): configs.Config(64, 64, 4, 2),
    ("sm_100", 64, "dq"): configs.Config(64, 64, 4, 2),
    ("sm_120", 64, "forward"): configs.Config(64, 32, 4, 2),
}
HELD = 1 << 30  # bytes of sums and lists that are held at once; at least one head's


def serves(plan: Plan) -> bool:
    """Whether queries are gathered, decided by shapes: the plan has a route into long groups, and
    no gain. Nothing waits for the device for plans that methods make; a plan made by hand is asked
    once whether it keeps everything that was picked."""
    route = plan.partial
    if not isinstance(route, Route) or plan.gain is not None or plan.trimmed:
        return False
    return len(plan.slots) >= LEAST * route.picks.shape[3] and not plan.leaves_out_picks


def forward_lse(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the output and each row's natural log-sum-exp, (B, H, N) fp32; both have gradients.

    Args:
        wide: return the output in fp32.
    """
    route = plan.partial
    assert isinstance(route, Route)
    given = plan.slots, route.picks, route.group, plan.block_k, scale
    return torch.ops.gen_accel.triton_gathered(q, k, v, *given, wide=wide)


def owned_slots(device: torch.device) -> int:
    return INTERPRETED if device.type == "cpu" else OWNED


def from_table(arch: str, kind: str, D: int, dtype: torch.dtype, block_k: int) -> configs.Config:
    """Look up the configuration for "forward", "dq" or "dkdv", with tiles for short blocks."""
    block = min(block_k, TILE) if kind == "dkdv" else TILE
    if dtype == torch.float32 and kind != "dkdv":
        D = configs.BUCKETS[-1]  # the smallest tiles, since sums and indices take registers too
    config = configs.from_table(arch, kind, D, dtype, block)
    if dtype != torch.float32:
        config = INSTEAD.get((arch, configs.bucket(D), kind), config)
    return configs.cut(kind, config, block)


def _config(kind: str, q: Tensor, block_k: int) -> configs.Config:
    return from_table(configs.architecture(q.device), kind, q.shape[3], q.dtype, block_k)


def _by_heads(q: Tensor, picks: Tensor, extra: int) -> Iterator[tuple[slice, slice]]:
    """Yield heads of q and of picks, as many at once as fit into `HELD` bytes.

    Args:
        extra: bytes for each sample and head, beside the sums, (N, D) in fp32.
    """
    B, H, N, D = q.shape
    heads = max(1, HELD // (B * (4 * N * D + extra)))
    for first in range(0, H, heads):
        some = slice(first, first + heads)
        yield some, some if picks.shape[1] > 1 else slice(None)


def _members(group: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """List the key blocks of each of C groups, in the form of `block_lists`, from (Kk,) groups."""
    of_group = group == torch.arange(C, device=group.device)[:, None]
    return block_lists(of_group[None, None], of_group[None, None], len(group))


def _launch(
    kind: str,
    kernel: Any,
    tensors: tuple[Tensor, ...],
    slots: Tensor,
    picks: Tensor,
    members: tuple[Tensor, Tensor],
    block_k: int,
    scale: float,
) -> None:
    """Run one of the two kernels whose programs own queries.

    Args:
        tensors: arguments of the kernel before `slots`; tensors of strided rows come first.
    """
    q = tensors[0]
    B, H, N, D = q.shape
    owned = owned_slots(q.device)
    config = _config(kind, q, block_k)
    picked, ranges = owners_of(picks, slots, owned)
    launch(
        kernel,
        (picked.shape[2], B * H),
        q,
        *tensors,
        slots,
        picked,
        ranges,
        *members,
        *(step for x in tensors if x.ndim == 4 for step in x.stride()[:3]),
        *configs.pattern_strides(picks),
        H,
        N,
        slots.numel(),
        picks.shape[3],
        scale / math.log(2),
        D=D,
        BLOCK_D=configs.padded_dim(D),
        BLOCK_K=block_k,
        OWNED=owned,
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        **(
            {"WIDTH": configs.width(configs.architecture(q.device), config, D)}
            if kind == "forward"
            else {}
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _delta(out: Tensor, grad: Tensor, lse: Tensor, grad_lse: Tensor) -> Tensor:
    """Compute delta, (B, H, N) fp32, which the softmax subtracts from a row's score gradients."""
    B, H, N, D = out.shape
    delta = torch.empty_like(lse)
    launch(
        delta_kernel,
        (triton.cdiv(N, configs.DELTA_TILE), B * H),
        out,
        *(out, grad, lse, grad_lse.contiguous(), delta),
        *(step for x in (out, grad) for step in x.stride()[:3]),
        H,
        N,
        D=D,
        BLOCK_D=configs.padded_dim(D),
        TILE=configs.DELTA_TILE,
    )
    return delta


def _launch_dkdv(
    tensors: tuple[Tensor, ...],
    slots: Tensor,
    columns: tuple[Tensor, Tensor],
    block_k: int,
    scale: float,
) -> None:
    """Run the block kernel for keys and values over query blocks of one slot.

    Args:
        tensors: q, k, v, grad, dk, dv, lse and delta.
        columns: result of `_columns`.
    """
    q = tensors[0]
    B, H, N, D = q.shape
    index, counts = columns
    config = _config("dkdv", q, block_k)
    launch(
        dkdv_kernel,
        (counts.shape[2] * triton.cdiv(block_k, config.tile_n), B * H),
        q,
        *tensors,
        *(slots, index, counts, slots, slots, slots),  # no rule and no gain
        *(step for x in tensors if x.ndim == 4 for step in x.stride()[:3]),
        *configs.pattern_strides(index),
        *(0, 0, 0, 0),
        index.shape[2],
        H,
        N,
        slots.numel(),
        1,
        scale / math.log(2),
        D=D,
        BLOCK_D=configs.padded_dim(D),
        BLOCK_Q=1,
        BLOCK_K=block_k,
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        RULE=NONE.value,
        AXES=0,
        GAIN=False,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@torch.library.custom_op("gen_accel::triton_gathered", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    picks: Tensor,
    group: Tensor,
    block_k: int,
    scale: float,
    *,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the output, (B, H, N, D) laid out like q, and the log-sum-exp, (B, H, N) fp32.

    Args:
        slots: (S,), the token of each slot, -1 for padding.
        picks: (B or 1, H or 1, S, C) bool, whether a slot sees a group.
        group: (S / block_k,), the group of each key block.
        wide: return the output in fp32.
    """
    q, k, v = (rowwise(x) for x in (q, k, v))
    out = empty_out(q, wide)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    slots = slots.int()
    members = _members(group, picks.shape[3])
    for some, of_picks in _by_heads(q, picks, 2 * picks[0, 0].numel()):
        *given, own = (x[:, some] for x in (q, k, v, out))
        sums = torch.empty(own.shape, dtype=torch.float32, device=q.device)
        total, highest = sums.new_empty(2, *own.shape[:3])
        tensors = *given, own, highest, sums.flatten(), total
        part = slots, picks[:, of_picks], members, block_k, scale
        _launch("forward", gathered_forward_kernel, tensors, *part)
        lse[:, some] = highest
    return out, lse


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any, wide: bool = False) -> tuple[Tensor, Tensor]:
    return empty_out(rowwise(q), wide), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("gen_accel::triton_gathered_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slots: Tensor,
    picks: Tensor,
    group: Tensor,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad = (rowwise(x) for x in (q, k, v, grad.to(q.dtype)))
    delta = _delta(out, grad, lse, grad_lse)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    slots = slots.int()
    members = _members(group, picks.shape[3])
    for some, of_picks in _by_heads(q, picks, 6 * picks[0, 0].numel()):
        of_head = picks[:, of_picks]
        rows = tuple(x[:, some] for x in (q, k, v, grad))
        statistics = tuple(x[:, some].contiguous() for x in (lse, delta))
        sums = torch.empty(rows[0].shape, dtype=torch.float32, device=q.device)
        tensors = *rows, dq[:, some], *statistics, sums.flatten()
        _launch("dq", gathered_dq_kernel, tensors, slots, of_head, members, block_k, scale)
        tensors = *rows, dk[:, some], dv[:, some], *statistics
        _launch_dkdv(tensors, slots, _columns(of_head, group), block_k, scale)
    return dq, dk, dv


def _columns(picks: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """List the slots that picked each key block's group, as query blocks of one slot:
    (B', H', S * C) int32 and (B', H', Kk, 4) int32. Key blocks of a group share one list."""
    index, counts = block_lists(picks.mT, picks.mT, picks[0, 0].numel())
    counts = counts.index_select(2, group)
    blocks = len(group)
    # Text comes first, since all queries see it.
    counts[..., 3] = torch.arange(blocks - 1, -1, -1, device=group.device)
    return index, counts


@attention_backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(rowwise(x)) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Any, output: Any) -> None:
    *tensors, ctx.block_k, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    grads = attention_backward(grad, grad_lse, *ctx.saved_tensors, ctx.block_k, ctx.scale)
    return *grads, *[None] * 5


attention.register_autograd(_differentiate, setup_context=_save)
