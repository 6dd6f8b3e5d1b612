"""First order of a rest, the term that the slope of its values adds: see `Rest`. Prefixes of names
as in `tiles`.

With x_t a query (around queries, its offset from the mean of its block), k'_t and v'_t a key and a
value as offsets from the means of their blocks, and r_t = 1 - exp(lse_t - total_t):

    y_t = r_t factor x_t H,  H = sum_t k'_t^T v_t,  factor = scale / N

Backward, with g_t the gradient of y_t:

    dr_t = factor x_t . (g_t H^T)
    dq_t = factor (r_t g_t - m) H^T, with m around queries the mean of r g over the block, else 0
    G = sum_t r_t x_t^T g_t
    dv_t = factor k'_t G
    dk_t = factor v'_t G^T

A mean is subtracted before the product where the gradient is with respect to offsets from the
mean: both operations are linear.

H and G are made in parts of equally many tokens, each by one program, and then added up: no
atomics, and always in one order. A program makes CHUNK columns of its result. H and G are bf16
where inputs are; where inputs are fp16, whose range is too small for these sums, they are fp32.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.base import Context, Values
from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.launch import launch_blocks, rows, rowwise
from gen_accel.kernels.triton.tiles import (
    LOG2E,
    block_mean,
    load_columns,
    mixed_dot,
    of_head,
    off_mean,
    own_tile,
    place_of_chunk,
    store_columns,
)
from gen_accel.plan import Plan

SIZES = ("H", "N", "K")


@triton.jit
def _mean(
    x,
    slots,
    i_block,
    o_d,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Load columns o_d of the mean of a block's tokens; 0 if not CENTRED."""
    if CENTRED:
        return block_mean(x, slots, i_block, o_d, D, BLOCK, TILE)[0]
    else:
        return tl.zeros([o_d.shape[0]], tl.float32)


@triton.jit
def _shares(lse, joint_lse, o_t):
    """Compute r of tokens o_t, 0 where nothing is left out."""
    b_lse = tl.load(lse + o_t, mask=o_t >= 0, other=0.0)
    b_total = tl.load(joint_lse + o_t, mask=o_t >= 0, other=0.0)
    return tl.where(b_total > b_lse, 1.0 - tl.exp2((b_lse - b_total) * LOG2E), 0.0)


@triton.jit
def _matrix(x, o_r, o_c, D: tl.constexpr):
    """Load [len(o_r), len(o_c)] of a matrix (D, D); zeros past D."""
    mask = (o_r < D)[:, None] & (o_c < D)[None, :]
    return tl.load(x + o_r[:, None] * D + o_c[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def slope_parts_kernel(
    x,
    y,
    lse,
    joint_lse,
    parts,
    slots,
    H,
    N,
    K,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHED: tl.constexpr,
):
    """Sum x^T y over the tokens of BLOCKS blocks, with the mean subtracted from x if CENTRED and x
    times r if WEIGHED."""
    i_part, i_chunk, i_b, i_h = place_of_chunk(H, D, CHUNK)
    i_head = i_b * H + i_h
    x = of_head(x, i_b, i_h)
    y = of_head(y, i_b, i_h)
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_sum = tl.zeros([BLOCK_D, CHUNK], tl.float32)
    for i_block in range(i_part * BLOCKS, tl.minimum((i_part + 1) * BLOCKS, K)):
        b_mean = _mean(x, slots, i_block, o_d, D, BLOCK, TILE, CENTRED)
        for i_tile in range((BLOCK + TILE - 1) // TILE):
            _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
            b_x = off_mean(x, o_t, o_d, b_mean, D)
            if WEIGHED:
                b_x *= _shares(lse + i_head * N, joint_lse + i_head * N, o_t)[:, None]
            b_y = load_columns(y, o_t, o_c, D)
            b_sum = mixed_dot(tl.trans(b_x.to(b_y.dtype)), b_y, b_sum)
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    parts += (i_head * (tl.num_programs(0) // CHUNKS) + i_part) * D * D
    mask = (o_d < D)[:, None] & (o_c < D)[None, :]
    tl.store(parts + o_d[:, None] * D + o_c[None, :], b_sum, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def slope_add_kernel(
    joint,
    lse,
    joint_lse,
    q,
    state,
    out,
    slots,
    H,
    N,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Write joint + y of one query block; `state` is H and `scale` the factor."""
    i_block, i_chunk, i_b, i_h = place_of_chunk(H, D, CHUNK)
    i_head = i_b * H + i_h
    q = of_head(q, i_b, i_h)
    joint = of_head(joint, i_b, i_h)
    out = of_head(out, i_b, i_h)
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_mean = _mean(q, slots, i_block, o_d, D, BLOCK, TILE, CENTRED)
    b_h = _matrix(state + i_head * D * D, o_d, o_c, D)
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_x = off_mean(q, o_t, o_d, b_mean, D).to(q[0].dtype.element_ty)
        b_y = mixed_dot(b_x, b_h, tl.zeros([TILE, CHUNK], tl.float32))
        b_r = _shares(lse + i_head * N, joint_lse + i_head * N, o_t)
        b_joint = load_columns(joint, o_t, o_c, D)
        b_out = b_joint + (scale * b_r)[:, None] * b_y
        # Unchanged bit for bit where nothing is left out, whatever y is there.
        b_out = tl.where((b_r > 0.0)[:, None], b_out, b_joint)
        store_columns(out, o_t, o_c, b_out, D)


@triton.jit(do_not_specialize=SIZES)
def slope_queries_backward_kernel(
    grad,
    lse,
    joint_lse,
    q,
    state,
    dtotal,
    dq,
    slots,
    H,
    N,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Write dq of one query block, and the terms of CHUNK columns in the gradient of joint_lse."""
    i_block, i_chunk, i_b, i_h = place_of_chunk(H, D, CHUNK)
    i_head = i_b * H + i_h
    lse += i_head * N
    joint_lse += i_head * N
    dtotal += (i_chunk * tl.num_programs(1).to(tl.int64) + i_head) * N
    q = of_head(q, i_b, i_h)
    grad = of_head(grad, i_b, i_h)
    dq = of_head(dq, i_b, i_h)
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_h = _matrix(state + i_head * D * D, o_c, o_d, D)
    b_mean = tl.zeros([CHUNK], tl.float32)
    b_less = tl.zeros([CHUNK], tl.float32)
    if CENTRED:
        b_mean, b_held = block_mean(q, slots, i_block, o_c, D, BLOCK, TILE)
        b_sum = tl.zeros([BLOCK_D], tl.float32)
        for i_tile in range((BLOCK + TILE - 1) // TILE):
            _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
            b_g = load_columns(grad, o_t, o_d, D).to(tl.float32)
            b_sum += tl.sum(_shares(lse, joint_lse, o_t)[:, None] * b_g, 0)
        b_less = tl.sum(b_h.to(tl.float32) * (b_sum / b_held)[None, :], 1)
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_g = load_columns(grad, o_t, o_d, D)
        b_made = mixed_dot(b_g, tl.trans(b_h), tl.zeros([TILE, CHUNK], tl.float32))
        b_r = _shares(lse, joint_lse, o_t)
        b_x = off_mean(q, o_t, o_c, b_mean, D)
        b_dtotal = scale * (1.0 - b_r) * tl.sum(b_x * b_made, 1)
        tl.store(dtotal + o_t, tl.where(b_r > 0.0, b_dtotal, 0.0), mask=o_t >= 0)
        b_dq = scale * (b_r[:, None] * b_made - b_less[None, :])
        store_columns(dq, o_t, o_c, b_dq, D)


@triton.jit(do_not_specialize=SIZES)
def slope_keys_backward_kernel(
    x,
    state,
    y,
    slots,
    H,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Write `scale` x G of one key block, or x G^T if TRANSPOSED, x off its mean; `state` is G."""
    i_block, i_chunk, i_b, i_h = place_of_chunk(H, D, CHUNK)
    x = of_head(x, i_b, i_h)
    y = of_head(y, i_b, i_h)
    state += (i_b * H + i_h) * D * D
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_mean, _held = block_mean(x, slots, i_block, o_d, D, BLOCK, TILE)
    b_g = tl.trans(_matrix(state, o_c, o_d, D)) if TRANSPOSED else _matrix(state, o_d, o_c, D)
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_x = off_mean(x, o_t, o_d, b_mean, D).to(x[0].dtype.element_ty)
        b_y = scale * mixed_dot(b_x, b_g, tl.zeros([TILE, CHUNK], tl.float32))
        store_columns(y, o_t, o_c, b_y, D)


def added(
    joint: Tensor,
    lse: Tensor,
    total: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
) -> Tensor:
    """Run `kernels.rest.plain_slope`, in q's dtype; `joint` is fp32. A row that leaves nothing out
    is rounded, and otherwise unchanged bit for bit."""
    assert plan.rest is not None
    numbers = plan.block_q, plan.block_k, plan.rest.centre == "query", scale / plan.tokens
    given = joint, lse, total, q, k, v, plan.slots_int32
    return torch.ops.gen_accel.triton_slope(*given, *numbers)[0]


class SlopeSide(NamedTuple):
    """Side of a call: blocks of queries or of keys.

    Args:
        slots: (S,) int32.
        block: slots in a block.
        centred: whether the mean of a block is subtracted from its tokens.
    """

    slots: Tensor
    block: int
    centred: bool = True

    @property
    def blocks(self) -> int:
        return self.slots.numel() // self.block

    def launch(
        self,
        kernel: triton.JITFunction,
        x: Tensor,
        tensors: Sequence[Tensor | tuple[Tensor | int, ...]],
        *numbers: float,
        **flags: int,
    ) -> None:
        """Run `launch_blocks` over the blocks of x, in q's dtype."""
        config = configs.slope(configs.architecture(x.device), x.shape[3], x.dtype)
        given = x, self.slots, self.block, tensors
        launch_blocks(kernel, *given, *numbers, config=config, **flags)


@torch.library.custom_op("gen_accel::triton_slope", mutates_args=())
def slope(
    joint: Tensor,
    lse: Tensor,
    total: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    block_q: int,
    block_k: int,
    around_queries: bool,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Compute the output, laid out like `joint`, in q's dtype; without a gradient H, (B, H, D, D).

    Args:
        joint: (B, H, N, D) fp32.
        lse, total: (B, H, N) fp32.
        slots: (S,) int32, the token of each slot, -1 for padding.
    """
    joint, q, k, v = (rowwise(x) for x in (joint, q, k, v))
    shares = lse.contiguous(), total.contiguous()
    made = _sum_of_products(k, v, SlopeSide(slots, block_k), shares, weighed=False)
    out = torch.empty_like(joint, dtype=q.dtype)
    tensors = *rows(joint), *shares, *rows(q), made, *rows(out)
    sizes, flags = (*q.shape[1:3], factor), {"CENTRED": around_queries}
    queries = SlopeSide(slots, block_q, around_queries)
    queries.launch(slope_add_kernel, q, tensors, *sizes, **flags)
    return out, made


@slope.register_fake
def _(
    joint: Tensor, lse: Tensor, total: Tensor, q: Tensor, *given: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rowwise(joint), dtype=q.dtype), _matrices(q)


@torch.library.custom_op("gen_accel::triton_slope_backward", mutates_args=())
def slope_backward(
    grad: Tensor,
    made: Tensor,
    lse: Tensor,
    total: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    block_q: int,
    block_k: int,
    around_queries: bool,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of lse, total, q, k and v.

    Args:
        made: H of the forward pass.
    """
    grad, q, k, v = (rowwise(x) for x in (grad, q, k, v))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    shares = lse.contiguous(), total.contiguous()
    queries, keys = SlopeSide(slots, block_q, around_queries), SlopeSide(slots, block_k)
    dtotal = total.new_empty(_chunks(q), *total.shape)
    tensors = *rows(grad), *shares, *rows(q), made, dtotal, *rows(dq)
    sizes, flags = (*q.shape[1:3], factor), {"CENTRED": around_queries}
    queries.launch(slope_queries_backward_kernel, q, tensors, *sizes, **flags)
    back = _sum_of_products(q, grad, queries, shares, weighed=True)
    for x, dx, transposed in ((k, dv, False), (v, dk, True)):
        tensors, flags = (*rows(x), back, *rows(dx)), {"TRANSPOSED": transposed}
        keys.launch(slope_keys_backward_kernel, x, tensors, q.shape[1], factor, **flags)
    dtotal = dtotal.sum(0)
    return -dtotal, dtotal, dq, dk, dv


@slope_backward.register_fake
def _(*given: Tensor) -> tuple[Tensor, ...]:
    lse, total, *inputs = given[2:7]
    of_rows = lse.new_empty(lse.shape), total.new_empty(total.shape)
    return *of_rows, *(torch.empty_like(rowwise(x)) for x in inputs)


def _save(ctx: Context, inputs: Values, output: tuple[Tensor, Tensor]) -> None:
    _, *tensors, ctx.block_q, ctx.block_k, ctx.around_queries, ctx.factor = inputs
    made = output[1]
    ctx.mark_non_differentiable(made)
    ctx.save_for_backward(made, *tensors)


def _differentiate(ctx: Context, grad: Tensor, _: object) -> Values:
    numbers = ctx.block_q, ctx.block_k, ctx.around_queries, ctx.factor
    grads = slope_backward(grad, *ctx.saved_tensors, *numbers)
    return grad.float(), *grads, *[None] * 5


slope.register_autograd(_differentiate, setup_context=_save)


def _matrices(x: Tensor) -> Tensor:
    """Allocate (B, H, D, D), uninitialised."""
    B, H, _, D = x.shape
    return x.new_empty(B, H, D, D, dtype=configs.state_dtype(x.dtype))


def _sum_of_products(
    x: Tensor, y: Tensor, side: SlopeSide, shares: Sequence[Tensor], *, weighed: bool
) -> Tensor:
    """Sum x^T y over all tokens, (B, H, D, D), with means subtracted from x where the side is
    centred.

    Args:
        shares: lse and total, by which x is weighed if `weighed`.
    """
    B, H, N, D = x.shape
    blocks = configs.part_blocks(D, side.block)
    count = triton.cdiv(side.blocks, blocks)
    parts = x.new_empty(B, H, count, D, D, dtype=torch.float32)
    side.launch(
        slope_parts_kernel,
        x,
        (*rows(x, y), *shares, parts),
        *(H, N, side.blocks),
        programs=count,
        TILE=configs.part_tile(configs.architecture(x.device), x.dtype, side.block),
        BLOCKS=blocks,
        CENTRED=side.centred,
        WEIGHED=weighed,
    )
    return _matrices(x).copy_(parts.sum(2))


def _chunks(x: Tensor) -> int:
    config = configs.slope(configs.architecture(x.device), x.shape[3], x.dtype)
    return triton.cdiv(x.shape[3], config.chunk)
