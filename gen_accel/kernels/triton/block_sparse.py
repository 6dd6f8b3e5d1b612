"""Attention over lists of blocks, in the manner of FlashAttention-2, forward and backward.

Dao, 2023, https://arxiv.org/abs/2307.08691. Unlike there, keys come from a list of blocks. Tokens
are addressed through the plan's slots, so that nothing is reordered or copied. The lengths of
blocks and tiles are independent: the blocks of a list are laid end to end and cut into tiles.
On Hopper and Blackwell, the operands of a loop are first copied into slot order where that pays.
"""

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from gen_accel.kernels.base import Context, Values
from gen_accel.kernels.triton import configs, packing
from gen_accel.kernels.triton.int8_forward import int8_forward_kernel, rounded
from gen_accel.kernels.triton.launch import laid_out_alike, launch, results, rows, rowwise
from gen_accel.kernels.triton.sparse_backward import delta_of, dkdv_kernel, dq_kernel
from gen_accel.kernels.triton.sparse_forward import forward_kernel
from gen_accel.kernels.triton.tiles import BITS, NONE, ROUTE, WINDOWS

KERNELS: dict[str, triton.JITFunction] = {
    prefix + kind: kernel
    for prefix in ("", configs.PACKING)
    for kind, kernel in {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}.items()
}
KERNELS[configs.ROUNDING + "forward"] = int8_forward_kernel
# Tensors of a kernel that are packed, and loaded by descriptor.
PACKED = {"packed forward": (1, 2), "packed dq": (1, 2), "packed dkdv": (0, 3)}


def launch_over(
    kind: str,
    tensors: Sequence[Tensor],
    lists: tuple[Tensor, Tensor, Tensor],
    rule: Sequence[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    config: configs.LaunchConfig | None = None,
    begun: bool = False,
) -> None:
    """Run one of KERNELS over the rows of `lists`.

    Args:
        tensors: arguments of the kernel before `slots`, of four axes first; packed ones are passed
            by descriptor.
        lists: slots, index and counts.
        config: by default the choice of `configs.choose`.
        begun: whether a forward pass goes on with the output and the log-sum-exp that are there.
    """
    packed = PACKED.get(kind, ())
    q = next(x for i, x in enumerate(tensors) if i not in packed)
    B, H, N, D = q.shape
    slots, index, counts = lists
    mode = mode_of(rule)
    if mode == BITS.value:
        rule = rule[2:] if configs.of_keys(kind) else rule[:2]
    picks, damps = rule[0] if mode == ROUTE.value else None, gain is not None
    config = config or configs.choose(kind, q, block_q, block_k, mode != NONE.value, damps)
    sizes = configs.sizes(kind, config, block_q, block_k)
    depth = configs.depth(kind, D)
    if kind.endswith("forward"):
        arch = configs.architecture(slots.device)
        sizes["WIDTH"] = configs.width(arch, config, depth, packed=bool(packed))
        sizes["BEGUN"] = begun
    block, tile, load = block_q, sizes["TILE_M"], sizes["TILE_N"]
    if configs.of_keys(kind):
        block, tile, load = block_k, load, tile
    given = [
        packing.described(x, load) if i in packed else next(rows(x)) if x.ndim == 4 else x
        for i, x in enumerate(tensors)
    ]
    launch(
        KERNELS[kind],
        (counts.shape[2] * triton.cdiv(block, tile), B * H),
        q,
        *(*given, *lists, *(rule or (slots, slots)), slots if gain is None else gain),
        *configs.pattern_strides(index, picks, gain),
        *(index.shape[2], H, N, slots.numel(), 1 if picks is None else picks.shape[3]),
        scale / math.log(2),
        **{"D": D, "BLOCK_D": configs.padded_dim(depth), **sizes, **config.stages},
        RULE=mode,
        AXES=rule[0].shape[1] if mode == WINDOWS.value else 0,
        GAIN=damps,
    )


def mode_of(rule: Sequence[Tensor]) -> int:
    """Kind of rule in `tiles` of the rule of `Lists`."""
    if not rule:
        return NONE.value
    if len(rule) == 4:
        return BITS.value
    return (ROUTE if rule[0].ndim == 4 else WINDOWS).value


def way(
    direction: str,
    tensors: Sequence[Tensor],
    lists: tuple[Tensor, Tensor, Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    raster: bool,
    scale: float,
) -> str:
    """Prefix of the kinds of one direction: `configs.PACKING` where packing pays and its kernels
    serve, else "". Those kernels take maxima before the scale, so the scale must not be negative.

    Args:
        direction: "forward" or "backward".
        tensors: operands that would be packed.
        lists: slots, rows and their counts.
    """
    x, (slots, rows, _) = tensors[0], lists
    B, H, _, D = x.shape
    arch = configs.architecture(x.device)
    kinds = ("forward",) if direction == "forward" else ("dq", "dkdv")
    facts = D, x.dtype, block_q, block_k, gain is not None
    if scale < 0 or not all(configs.packs(arch, configs.PACKING + kind, *facts) for kind in kinds):
        return ""
    ready = raster and all(map(packing.in_place, tensors))
    pairs = rows.shape[2] * block_q * block_k
    sizes = B * H, slots.numel(), D, x.element_size(), pairs
    return configs.PACKING if packing.pays(direction, arch, *sizes, ready) else ""


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
    raster: bool,
    scale: float,
    *,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the output, (B, H, N, D) laid out like q, and the log-sum-exp, (B, H, N) fp32.

    Args:
        wide: return the output in fp32.
    """
    q, k, v = (rowwise(x) for x in (q, k, v))
    out, lse = results(q, wide=wide)
    numbers = rule, gain, block_q, block_k, raster, scale
    _forward(q, k, v, out, lse, (slots, rows, row_counts), *numbers)
    return out, lse


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: tuple[Tensor, Tensor, Tensor],
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    raster: bool,
    scale: float,
    *,
    rounds: bool = False,
    begun: bool = False,
) -> None:
    """Write the output and the log-sum-exp, with products of 8 bits if it `rounds`."""
    numbers = rule, gain, block_q, block_k, scale
    if rounds:
        ints, halves, *others = rounded(k, v)
        tensors = q, ints, halves, out, lse, *others
        launch_over(configs.ROUNDING + "forward", tensors, lists, *numbers, begun=begun)
        return
    how = way("forward", (k, v), lists, gain, block_q, block_k, raster, scale)
    if how == configs.PACKING:
        k, v = packing.pack(k, v, lists[0], raster)
    launch_over(how + "forward", (q, k, v, out, lse), lists, *numbers, begun=begun)


attention.register_fake(results)


@torch.library.custom_op("gen_accel::triton_int8", mutates_args=())
def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    rows: Tensor,
    row_counts: Tensor,
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """Run `attention` with products of 8 bits, see `int8_forward`."""
    q, k, v = (rowwise(x) for x in (q, k, v))
    out, lse = results(q, wide=wide)
    numbers = rule, gain, block_q, block_k, False, scale
    _forward(q, k, v, out, lse, (slots, rows, row_counts), *numbers, rounds=True)
    return out, lse


int8_attention.register_fake(lambda q, *given: results(q, wide=given[-1]))


@torch.library.custom_op("gen_accel::triton_continued", mutates_args=("out", "lse"))
def continued(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    rows: Tensor,
    row_counts: Tensor,
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    raster: bool,
    scale: float,
    rounds: bool,
) -> None:
    """Go on with the softmax over other keys that gave `out`, in q's dtype, and `lse`, and write
    both over. Without a gradient.

    Args:
        rounds: multiply in 8 bits.
    """
    q, k, v = (rowwise(x) for x in (q, k, v))
    numbers = rule, gain, block_q, block_k, raster, scale
    lists = slots, rows, row_counts
    _forward(q, k, v, out, lse, lists, *numbers, rounds=rounds, begun=True)


@continued.register_fake
def _(out: Tensor, lse: Tensor, *given: object) -> None:
    return None


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
    raster: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad = (rowwise(x) for x in (q, k, v, grad.to(q.dtype)))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    rest = rule, gain, block_q, block_k, scale
    by_row, by_column = (slots, rows, row_counts), (slots, columns, column_counts)
    how = way("backward", (k, v, q, grad), by_row, gain, block_q, block_k, raster, scale)
    if how == configs.PACKING:
        q_S, grad_S, *sums = packing.pack_queries(q, out, grad, lse, grad_lse, slots, raster)
        k_S, v_S = packing.pack(k, v, slots, raster)
        launch_over("packed dq", (q, k_S, v_S, grad, dq, *sums), by_row, *rest)
        launch_over("packed dkdv", (q_S, k, v, grad_S, dk, dv, *sums), by_column, *rest)
        return dq, dk, dv
    delta = delta_of(out, grad, lse, grad_lse)
    launch_over("dq", (q, k, v, grad, dq, lse, delta), by_row, *rest)
    launch_over("dkdv", (q, k, v, grad, dk, dv, lse, delta), by_column, *rest)
    return dq, dk, dv


attention_backward.register_fake(laid_out_alike(2))


def _save(
    ctx: Context, inputs: Values, keyword_only_inputs: object, output: tuple[Tensor, ...]
) -> None:
    q, k, v, *lists, rule, gain, block_q, block_k, raster, scale = inputs
    ctx.numbers = block_q, block_k, raster, scale
    ctx.save_for_backward(q, k, v, *output, *lists, gain, *rule)


def _differentiate(ctx: Context, grad: Tensor, grad_lse: Tensor) -> Values:
    q, k, v, out, lse, *lists = ctx.saved_tensors
    lists, gain, rule = lists[:5], lists[5], lists[6:]
    rest = rule, gain, *ctx.numbers
    grads = attention_backward(grad, grad_lse, q, k, v, out, lse, *lists, *rest)
    return *grads, *[None] * 5, [None] * len(rule), *[None] * 5


attention.register_autograd(_differentiate, setup_context=_save)
