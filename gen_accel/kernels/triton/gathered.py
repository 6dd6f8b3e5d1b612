"""Attention of queries that pick groups of keys for themselves, with the queries of each group
gathered into tiles; prefixes of names as in `tiles`.

After FlashMoBA (Xiao et al., 2025, https://arxiv.org/abs/2511.11571): nearly all of the computed
pairs were picked. A program owns a run of query slots. Group by group it gathers the slots that
picked the group into tiles, and adds to their sums, in fp32 in memory that no other program
touches, in the order of the groups: no atomics, the same from run to run.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.base import Context, Values
from gen_accel.kernels.triton import block_sparse, configs
from gen_accel.kernels.triton.launch import laid_out_alike, launch, results, rows, rowwise
from gen_accel.kernels.triton.listing import block_lists, owners_of
from gen_accel.kernels.triton.sparse_backward import delta_of, dq_tiles, statistics
from gen_accel.kernels.triton.sparse_forward import attend_tiles, ended
from gen_accel.kernels.triton.tiles import LN2, NONE, SIZES, load_rows, of_head, store_rows
from gen_accel.plan import Plan, Route

# Mean slots of a group from which on queries are gathered. Each group of a query reads and writes
# its sums, which costs as much as some tens of keys.
LEAST = 64
OWNED, INTERPRETED = 2048, 64  # slots of a program; fewer fill their tiles less, more balance less
TILE = 64  # the most queries in a tile, so that tiles are filled and work is balanced
# Instead of the block kernels' configurations, which would spill by compile_matrix; not timed.
INSTEAD = {
    ("sm_80", 64, "dq"): configs.LaunchConfig(64, 32, 4, 1),
    ("sm_80", 128, "forward"): configs.LaunchConfig(64, 32, 4, 1),
    ("sm_90", 128, "forward"): configs.LaunchConfig(64, 32, 4, 2),
    ("sm_100", 64, "forward"): configs.LaunchConfig(64, 64, 4, 2),
    ("sm_100", 64, "dq"): configs.LaunchConfig(64, 64, 4, 2),
    ("sm_86", 64, "forward"): configs.LaunchConfig(64, 32, 4, 2),
    ("sm_89", 64, "forward"): configs.LaunchConfig(64, 32, 4, 2),
    ("sm_120", 64, "forward"): configs.LaunchConfig(64, 32, 4, 2),
}
HELD = 1 << 30  # bytes of sums and lists that are held at once; at least one head's


@triton.jit
def _owned_tokens(slots, i_s, i_r, S, OWNED: tl.constexpr, TILE: tl.constexpr):
    """Load the tokens of one tile of an owner; -1 for padding and past its end."""
    o_r = i_r + tl.arange(0, TILE)
    m_r = (o_r < OWNED) & (i_s + o_r < S)
    return tl.load(slots + i_s + o_r, mask=m_r, other=-1)


@triton.jit
def _gathered_tokens(slots, picked, i_s, i_p, count, TILE: tl.constexpr):
    """Load the tokens of the tile at place i_p of a list of slots; -1 past its end."""
    o_p = i_p + tl.arange(0, TILE)
    o_r = tl.load(picked + o_p, mask=o_p < count, other=0).to(tl.int32)
    return tl.load(slots + i_s + o_r, mask=o_p < count, other=-1)


@triton.jit
def _group(ranges, members, i_c, BLOCK_K: tl.constexpr):
    """Load the i_c-th group: the start and length of its list of slots, the start of its list of
    key blocks and the number of their slots. A group without keys is seen by no query."""
    start, count = tl.load(ranges + 2 * i_c), tl.load(ranges + 2 * i_c + 1)
    blocks, first = tl.load(members + 4 * i_c + 1), tl.load(members + 4 * i_c + 2)
    return start, tl.where(blocks > 0, count, 0), first, blocks * BLOCK_K


@triton.jit(do_not_specialize=SIZES)
def gathered_forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    acc,
    total,
    slots,
    picked,
    ranges,
    blocks,
    members,
    pattern_b,
    pattern_h,
    H,
    N,
    S,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OWNED: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    FIRST: tl.constexpr = D if D < WIDTH else WIDTH
    i_owner = tl.num_programs(0) - 1 - tl.program_id(0)  # text, which sees all, lies at the end
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_list = (i_b * pattern_b + i_h * pattern_h) * tl.num_programs(0) + i_owner
    picked += i_list * OWNED * C
    ranges += i_list * C * 2
    q = of_head(q, i_b, i_h)
    k = of_head(k, i_b, i_h)
    v = of_head(v, i_b, i_h)
    out = of_head(out, i_b, i_h)
    i_row = tl.program_id(1).to(tl.int64) * N
    acc += i_row * D
    total += i_row
    lse += i_row  # base 2 and without the sum until the end
    i_s = i_owner * OWNED

    for i_r in range(0, OWNED, TILE_M):
        o_t = _owned_tokens(slots, i_s, i_r, S, OWNED, TILE_M)
        store_rows((acc, D), o_t, tl.zeros([TILE_M, BLOCK_D], tl.float32), D, BLOCK_D)
        tl.store(total + o_t, tl.zeros([TILE_M], tl.float32), mask=o_t >= 0)
        tl.store(lse + o_t, tl.full([TILE_M], -float("inf"), tl.float32), mask=o_t >= 0)
    for i_c in range(C):
        start, count, first, stop = _group(ranges, members, i_c, BLOCK_K)
        tl.debug_barrier()  # so that stores of other threads of the program are read
        for i_p in range(0, count, TILE_M):
            o_t = _gathered_tokens(slots, picked + start, i_s, i_p, count, TILE_M)
            b_q = load_rows(q, o_t, D, BLOCK_D, True)
            b_acc = load_rows((acc, D), o_t, FIRST, WIDTH, True)
            b_high = b_acc
            if WIDTH < BLOCK_D:
                b_high = load_rows((acc + WIDTH, D), o_t, D - WIDTH, WIDTH, True)
            b_sum = tl.load(total + o_t, mask=o_t >= 0, other=0.0)
            b_max = tl.load(lse + o_t, mask=o_t >= 0, other=-float("inf"))
            b_acc, b_high, b_sum, b_max = attend_tiles(
                *(b_acc, b_high, b_sum, b_max, b_q, o_t),
                *((k, v, i_b, i_h), (slots, blocks + first, 0, stop)),
                *((slots, slots, slots, S, C), scale),
                *(D, BLOCK_D, TILE_M, BLOCK_K, TILE_N, WIDTH, NONE, 0, False, True, False),
            )
            store_rows((acc, D), o_t, b_acc, FIRST, WIDTH)
            if WIDTH < BLOCK_D:
                store_rows((acc + WIDTH, D), o_t, b_high, D - WIDTH, WIDTH)
            tl.store(total + o_t, b_sum, mask=o_t >= 0)
            tl.store(lse + o_t, b_max, mask=o_t >= 0)
    tl.debug_barrier()
    for i_r in range(0, OWNED, TILE_M):
        o_t = _owned_tokens(slots, i_s, i_r, S, OWNED, TILE_M)
        b_sum = tl.load(total + o_t, mask=o_t >= 0, other=0.0)
        b_max = tl.load(lse + o_t, mask=o_t >= 0, other=0.0)
        b_acc = load_rows((acc, D), o_t, D, BLOCK_D, True)
        ended(out, lse, o_t, b_acc, b_acc, b_sum, b_max, D, BLOCK_D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def gathered_dq_kernel(
    q,
    k,
    v,
    grad,
    dq,
    lse,
    delta,
    acc,
    slots,
    picked,
    ranges,
    blocks,
    members,
    pattern_b,
    pattern_h,
    H,
    N,
    S,
    C,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OWNED: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    i_owner = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_list = (i_b * pattern_b + i_h * pattern_h) * tl.num_programs(0) + i_owner
    picked += i_list * OWNED * C
    ranges += i_list * C * 2
    q = of_head(q, i_b, i_h)
    k = of_head(k, i_b, i_h)
    v = of_head(v, i_b, i_h)
    grad = of_head(grad, i_b, i_h)
    dq = of_head(dq, i_b, i_h)
    i_row = tl.program_id(1).to(tl.int64) * N
    acc += i_row * D
    lse += i_row
    delta += i_row
    i_s = i_owner * OWNED

    for i_r in range(0, OWNED, TILE_M):
        o_t = _owned_tokens(slots, i_s, i_r, S, OWNED, TILE_M)
        store_rows((acc, D), o_t, tl.zeros([TILE_M, BLOCK_D], tl.float32), D, BLOCK_D)
    for i_c in range(C):
        start, count, first, stop = _group(ranges, members, i_c, BLOCK_K)
        tl.debug_barrier()
        for i_p in range(0, count, TILE_M):
            o_t = _gathered_tokens(slots, picked + start, i_s, i_p, count, TILE_M)
            b_q = load_rows(q, o_t, D, BLOCK_D, True)
            b_grad = load_rows(grad, o_t, D, BLOCK_D, True)
            b_lse, b_delta = statistics(lse, delta, o_t)
            b_dq = load_rows((acc, D), o_t, D, BLOCK_D, True)
            b_dq = dq_tiles(
                *(b_dq, b_q, b_grad, b_lse, b_delta, o_t),
                *((k, v, i_b, i_h), (slots, blocks + first, 0, stop)),
                *((slots, slots, slots, S, C), scale),
                *(D, BLOCK_D, TILE_M, BLOCK_K, TILE_N, NONE, 0, False, True, False),
            )
            store_rows((acc, D), o_t, b_dq, D, BLOCK_D)
    tl.debug_barrier()
    for i_r in range(0, OWNED, TILE_M):
        o_t = _owned_tokens(slots, i_s, i_r, S, OWNED, TILE_M)
        b_dq = load_rows((acc, D), o_t, D, BLOCK_D, True) * (scale * LN2)
        store_rows(dq, o_t, b_dq, D, BLOCK_D)


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


def from_table(
    arch: str, kind: str, D: int, dtype: torch.dtype, block_k: int
) -> configs.LaunchConfig:
    """Look up the configuration for "forward", "dq" or "dkdv", with tiles for short blocks."""
    block = min(block_k, TILE) if kind == "dkdv" else TILE
    if dtype == torch.float32 and kind != "dkdv":
        D = configs.BUCKETS[-1]  # the smallest tiles, since sums and indices take registers too
    config = configs.from_table(arch, kind, D, dtype, block)
    if dtype != torch.float32:
        config = INSTEAD.get((arch, configs.bucket(D), kind), config)
    return configs.cut(kind, config, block)


def _config(kind: str, q: Tensor, block_k: int) -> configs.LaunchConfig:
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
    kernel: triton.JITFunction,
    tensors: tuple[Tensor, ...],
    slots: Tensor,
    picks: Tensor,
    members: tuple[Tensor, Tensor],
    block_k: int,
    scale: float,
) -> None:
    """Run one of the two kernels whose programs own queries.

    Args:
        tensors: arguments of the kernel before `slots`.
    """
    q = tensors[0]
    B, H, N, D = q.shape
    owned = INTERPRETED if q.device.type == "cpu" else OWNED
    config = _config(kind, q, block_k)
    picked, ranges = owners_of(picks, slots, owned)
    sizes = {}
    if kind == "forward":
        sizes["WIDTH"] = configs.width(configs.architecture(q.device), config, D)
    launch(
        kernel,
        (picked.shape[2], B * H),
        q,
        *(next(rows(x)) if x.ndim == 4 else x for x in tensors),
        *(slots, picked, ranges, *members, *configs.pattern_strides(picks)),
        *(H, N, slots.numel(), picks.shape[3], scale / math.log(2)),
        **configs.dims(D),
        BLOCK_K=block_k,
        OWNED=owned,
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        **sizes,
        **config.stages,
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
    out, lse = results(q, wide=wide)
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


attention.register_fake(results)


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
    delta = delta_of(out, grad, lse, grad_lse)
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
        lists = slots, *_columns(of_head, group)
        config = _config("dkdv", q, block_k)
        block_sparse.launch_over("dkdv", tensors, lists, (), None, 1, block_k, scale, config)
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


attention_backward.register_fake(laid_out_alike(2))


def _save(
    ctx: Context, inputs: Values, keyword_only_inputs: object, output: tuple[Tensor, ...]
) -> None:
    *tensors, ctx.block_k, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _differentiate(ctx: Context, grad: Tensor, grad_lse: Tensor) -> Values:
    grads = attention_backward(grad, grad_lse, *ctx.saved_tensors, ctx.block_k, ctx.scale)
    return *grads, *[None] * 5


attention.register_autograd(_differentiate, setup_context=_save)
