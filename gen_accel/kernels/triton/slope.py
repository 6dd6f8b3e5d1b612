"""First order of a rest, the term that the slope of its values adds to the output of its columns:
see `Rest`. Prefixes of names as in `tiles`.

With x_t a query (around queries, its offset from the mean of its block), and k'_t and v'_t a key
and a value as offsets from the means of their blocks:

    y_t = factor x_t H,  H = sum_t k'_t^T v_t,  factor = scale / N

The share of the columns in the softmax over them and the kept keys weighs it as it weighs their
output. Without a gradient `rest_columns` adds it. Backward, with g_t the gradient of y_t:

    dq_t = factor (g_t - m) H^T, with m around queries the mean of g over the block, else 0
    G = sum_t x_t^T g_t
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

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.base import Context, Values
from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.launch import laid_out_alike, launch_blocks, operate, rows, rowwise
from gen_accel.kernels.triton.pooling import (
    BlockSquares,
    counted_tokens,
    deviation,
    room_of_squares,
)
from gen_accel.kernels.triton.tiles import (
    block_mean,
    load_columns,
    matrix,
    mixed_dot,
    of_head,
    off_mean,
    own_tile,
    place_of_chunk,
    store_columns,
)
from gen_accel.plan import Plan

SIZES = ("H", "K")


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
def _both_means(
    x, y, slots, i_block, o_d, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Compute what `block_mean` does, of two tensors at once: their loads overlap."""
    b_x = tl.zeros([o_d.shape[0]], tl.float32)
    b_y = tl.zeros([o_d.shape[0]], tl.float32)
    b_held = tl.full((), 0, tl.int32)
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_row, b_other = load_columns(x, o_t, o_d, D), load_columns(y, o_t, o_d, D)
        b_x += tl.sum(b_row.to(tl.float32), 0)
        b_y += tl.sum(b_other.to(tl.float32), 0)
        b_held += tl.sum((o_t >= 0).to(tl.int32), 0)
    b_held = tl.maximum(b_held, 1).to(tl.float32)
    return b_x / b_held, b_y / b_held, b_held


@triton.jit(do_not_specialize=(*SIZES, "tokens"))
def slope_parts_kernel(
    x,
    y,
    parts,
    wide_means,
    squares,
    counted,
    deviations,
    slots,
    H,
    K,
    tokens,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
    CENTRED: tl.constexpr,
    FACTS: tl.constexpr,
):
    """Sum x^T y over the tokens of BLOCKS blocks, with the mean subtracted from x if CENTRED. If
    FACTS, write `pooling.BlockSquares` of x, and `pooling.deviation` of y, in the same pass."""
    i_part, i_chunk, i_b, i_h = place_of_chunk(H, D, CHUNK)
    i_head = i_b * H + i_h
    x = of_head(x, i_b, i_h)
    y = of_head(y, i_b, i_h)
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_sum = tl.zeros([BLOCK_D, CHUNK], tl.float32)
    TILES: tl.constexpr = (BLOCK + TILE - 1) // TILE
    for i_block in range(i_part * BLOCKS, tl.minimum((i_part + 1) * BLOCKS, K)):
        if FACTS:
            b_square = tl.zeros([BLOCK_D], tl.float32)
            b_apart = tl.zeros([TILE], tl.float32)
            b_mean, b_mid, b_held = b_square, b_square, 1.0
            if TILES > 1:
                b_mean, b_mid, b_held = _both_means(x, y, slots, i_block, o_d, D, BLOCK, TILE)
        else:
            b_mean = _mean(x, slots, i_block, o_d, D, BLOCK, TILE, CENTRED)
        for i_tile in range(TILES):
            _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
            b_y = load_columns(y, o_t, o_c, D)
            if FACTS:
                b_row = load_columns(x, o_t, o_d, D).to(tl.float32)
                b_off = b_y if CHUNK >= BLOCK_D else load_columns(y, o_t, o_d, D)
                b_off = b_off.to(tl.float32)
                if TILES == 1:
                    b_held = tl.maximum(tl.sum((o_t >= 0).to(tl.float32), 0), 1.0)
                    b_mean, b_mid = tl.sum(b_row, 0) / b_held, tl.sum(b_off, 0) / b_held
                b_x = tl.where((o_t >= 0)[:, None], b_row - b_mean[None, :], 0.0)
                b_off = tl.where((o_t >= 0)[:, None], b_off - b_mid[None, :], 0.0)
                b_square += tl.sum(b_x * b_x, 0)
                b_apart += tl.sum(b_off * b_off, 1)
            else:
                b_x = off_mean(x, o_t, o_d, b_mean, D)
            b_sum = mixed_dot(tl.trans(b_x.to(b_y.dtype)), b_y, b_sum)
        if FACTS:
            i_row = i_head * K + i_block
            if i_chunk == 0:
                tl.store(wide_means + i_row * D + o_d, b_mean, mask=o_d < D)
                tl.store(squares + i_row * D + o_d, b_square, mask=o_d < D)
                tl.store(deviations + i_row, deviation(b_apart, b_mid, b_held))
                if i_head == 0:
                    b_count = counted_tokens(slots, i_block, tokens, b_held, BLOCK, TILE)
                    tl.store(counted + i_block, b_count)
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    parts += (i_head * (tl.num_programs(0) // CHUNKS) + i_part) * D * D
    mask = (o_d < D)[:, None] & (o_c < D)[None, :]
    tl.store(parts + o_d[:, None] * D + o_c[None, :], b_sum, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def slope_add_kernel(
    joint,
    q,
    state,
    out,
    slots,
    H,
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
    q = of_head(q, i_b, i_h)
    joint = of_head(joint, i_b, i_h)
    out = of_head(out, i_b, i_h)
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_mean = _mean(q, slots, i_block, o_d, D, BLOCK, TILE, CENTRED)
    b_h = matrix(state + (i_b * H + i_h) * D * D, o_d, o_c, D)
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_x = off_mean(q, o_t, o_d, b_mean, D).to(q[0].dtype.element_ty)
        b_y = mixed_dot(b_x, b_h, tl.zeros([TILE, CHUNK], tl.float32))
        store_columns(out, o_t, o_c, load_columns(joint, o_t, o_c, D) + scale * b_y, D)


@triton.jit(do_not_specialize=SIZES)
def slope_queries_backward_kernel(
    grad,
    state,
    dq,
    slots,
    H,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Write CHUNK columns of dq of one query block."""
    i_block, i_chunk, i_b, i_h = place_of_chunk(H, D, CHUNK)
    grad = of_head(grad, i_b, i_h)
    dq = of_head(dq, i_b, i_h)
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_h = matrix(state + (i_b * H + i_h) * D * D, o_c, o_d, D)
    b_mean = _mean(grad, slots, i_block, o_d, D, BLOCK, TILE, CENTRED)
    b_less = tl.sum(b_h.to(tl.float32) * b_mean[None, :], 1)
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_g = load_columns(grad, o_t, o_d, D)
        b_made = mixed_dot(b_g, tl.trans(b_h), tl.zeros([TILE, CHUNK], tl.float32))
        store_columns(dq, o_t, o_c, scale * (b_made - b_less[None, :]), D)


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
    b_g = tl.trans(matrix(state, o_c, o_d, D)) if TRANSPOSED else matrix(state, o_d, o_c, D)
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_x = off_mean(x, o_t, o_d, b_mean, D).to(x[0].dtype.element_ty)
        b_y = scale * mixed_dot(b_x, b_g, tl.zeros([TILE, CHUNK], tl.float32))
        store_columns(y, o_t, o_c, b_y, D)


def added(out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> Tensor:
    """Add the slope to the output of the columns, (B, H, N, D) fp32, differentiable in all
    tensors."""
    assert plan.rest is not None
    numbers = plan.block_q, plan.block_k, plan.rest.centre == "query", scale / plan.tokens
    return torch.ops.gen_accel.triton_slope(out, q, k, v, plan.slots_int32, *numbers)[0]


def state_of(k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Compute H, (B, H, D, D), without a gradient."""
    return operate(_state, k, v, plan.slots_int32, plan.block_k)


@torch.library.custom_op("gen_accel::triton_slope_state", mutates_args=())
def _state(k: Tensor, v: Tensor, slots: Tensor, block_k: int) -> Tensor:
    return _sum_of_products(rowwise(k), rowwise(v), slots, block_k)


@_state.register_fake
def _(k: Tensor, v: Tensor, *given: object) -> Tensor:
    return matrices(k)


@torch.library.custom_op("gen_accel::triton_slope", mutates_args=())
def slope(
    joint: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    block_q: int,
    block_k: int,
    around_queries: bool,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Compute the output, fp32, laid out like `joint`; without a gradient H, (B, H, D, D).

    Args:
        joint: (B, H, N, D) fp32.
        slots: (S,) int32, the token of each slot, -1 for padding.
    """
    joint, q, k, v = (rowwise(x) for x in (joint, q, k, v))
    made = _sum_of_products(k, v, slots, block_k)
    out = torch.empty_like(joint)
    launch_blocks(
        slope_add_kernel,
        *(q, slots, block_q, (*rows(joint, q), made, *rows(out)), q.shape[1], factor),
        config=_config(q),
        CENTRED=around_queries,
    )
    return out, made


@slope.register_fake
def _(joint: Tensor, q: Tensor, *given: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rowwise(joint)), matrices(q)


@torch.library.custom_op("gen_accel::triton_slope_backward", mutates_args=())
def slope_backward(
    grad: Tensor,
    made: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    block_q: int,
    block_k: int,
    around_queries: bool,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v.

    Args:
        made: H of the forward pass.
    """
    grad, q, k, v = (rowwise(x) for x in (grad.to(q.dtype), q, k, v))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    config = _config(q)
    launch_blocks(
        slope_queries_backward_kernel,
        *(q, slots, block_q, (*rows(grad), made, *rows(dq)), q.shape[1], factor),
        config=config,
        CENTRED=around_queries,
    )
    back = _sum_of_products(q, grad, slots, block_q, centred=around_queries)
    for x, dx, transposed in ((k, dv, False), (v, dk, True)):
        launch_blocks(
            slope_keys_backward_kernel,
            *(x, slots, block_k, (*rows(x), back, *rows(dx)), q.shape[1], factor),
            config=config,
            TRANSPOSED=transposed,
        )
    return dq, dk, dv


slope_backward.register_fake(laid_out_alike(2))


def _save(ctx: Context, inputs: Values, output: tuple[Tensor, Tensor]) -> None:
    _, *tensors, ctx.block_q, ctx.block_k, ctx.around_queries, ctx.factor = inputs
    made = output[1]
    ctx.mark_non_differentiable(made)
    ctx.save_for_backward(made, *tensors)


def _differentiate(ctx: Context, grad: Tensor, _: object) -> Values:
    numbers = ctx.block_q, ctx.block_k, ctx.around_queries, ctx.factor
    return grad, *slope_backward(grad, *ctx.saved_tensors, *numbers), *[None] * 5


slope.register_autograd(_differentiate, setup_context=_save)


def matrices(x: Tensor) -> Tensor:
    """Allocate (B, H, D, D), uninitialised."""
    B, H, _, D = x.shape
    return x.new_empty(B, H, D, D, dtype=configs.state_dtype(x.dtype))


def _config(x: Tensor) -> configs.LinearConfig:
    return configs.slope(configs.architecture(x.device), x.shape[3], x.dtype)


def _sum_of_products(
    x: Tensor, y: Tensor, slots: Tensor, block: int, *, centred: bool = True
) -> Tensor:
    """Sum x^T y over all tokens, (B, H, D, D), with means of blocks subtracted from x if
    `centred`."""
    parts = _room_of_parts(x, slots, block)
    _launch_parts(x, y, slots, block, parts, *[parts] * 4, centred=centred)
    return matrices(x).copy_(parts.sum(2))


def parts_and_facts(
    k: Tensor, v: Tensor, slots: Tensor, block: int, tokens: int
) -> tuple[Tensor, BlockSquares, Tensor]:
    """Compute the parts of H, (B, H, parts, D, D) fp32, and facts of blocks in one pass over k and
    v, see `rowwise`: the numbers of key blocks, as in `pooling.block_squares`, and the deviations
    of values, (B, H, Kk) fp32."""
    parts, made = _room_of_parts(k, slots, block), room_of_squares(k, slots, block)
    deviations = parts.new_empty(made.means.shape[:3])
    _launch_parts(k, v, slots, block, parts, *made, deviations, tokens=tokens)
    return parts, made, deviations


def _room_of_parts(x: Tensor, slots: Tensor, block: int) -> Tensor:
    B, H, _, D = x.shape
    count = triton.cdiv(slots.numel() // block, configs.part_blocks(D, block))
    return x.new_empty(B, H, count, D, D, dtype=torch.float32)


def _launch_parts(
    x: Tensor,
    y: Tensor,
    slots: Tensor,
    block: int,
    parts: Tensor,
    *facts: Tensor,
    centred: bool = True,
    tokens: int | None = None,
) -> None:
    """Write the parts, and the facts if `tokens` are given."""
    arch, D = configs.architecture(x.device), x.shape[3]
    if tokens is None:
        config, stages = _config(x)._replace(tile=configs.part_tile(arch, x.dtype, block)), 1
    else:
        config, stages = configs.facts(arch, D, x.dtype, block)
    launch_blocks(
        slope_parts_kernel,
        *(x, slots, block, (*rows(x, y), parts, *facts)),
        *(x.shape[1], slots.numel() // block, tokens or 0),
        config=config,
        programs=parts.shape[2],
        num_stages=stages,
        BLOCKS=configs.part_blocks(D, block),
        CENTRED=centred,
        FACTS=tokens is not None,
    )
