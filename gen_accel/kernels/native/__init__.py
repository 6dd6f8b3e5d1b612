"""FlashAttention over lists of key blocks in C++, for the CPU; optional, as it must be built.

`gen-accel build` compiles it once for this machine; without it `gather` and `routed` do
the same. Nothing of the size of the scores is held, keys are not copied for each query block, and
queries that pick their keys compute the picked pairs alone. Forward and backward accumulate in
fp32. For bf16 inputs the weights are rounded to bf16 where the processor multiplies bf16 (AMX,
AVX512_BF16); elsewhere everything is fp32. The backward pass adds up in an order that depends
only on the number of threads.

References:
    Dao, "FlashAttention-2", arXiv 2307.08691: the softmax carried from tile to tile, and the
    backward pass that computes the scores anew. Here a tile is cut from a list of key blocks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_accel.kernels import lists
from gen_accel.kernels.contract import Facts, Place
from gen_accel.kernels.lists import has_tiles
from gen_accel.kernels.native import build
from gen_accel.kernels.native.arguments import Call
from gen_accel.kernels.native.bounds import DTYPES, check, check_alike, check_if_given, names
from gen_accel.kernels.native.selection import kept_blocks
from gen_accel.plan import Plan, Route


def unsupported(facts: Facts) -> list[str]:
    reasons = []
    if facts.device.type != "cpu":
        reasons.append(f"it is for the CPU, got {facts.device.type}")
    elif build.library() is None:
        reasons.append(build.why_not())
    if facts.dtype not in DTYPES:
        reasons.append(f"it takes {names()}, got {facts.dtype}")
    return reasons or _of_route(facts)


def place(facts: Facts) -> Place | None:
    if facts.device.type != "cpu":
        return None
    return Place(10) if build.is_built() else Place(70, build.why_not())


def _of_route(facts: Facts) -> list[str]:
    """List the reasons against a plan in which each query picks its key blocks."""
    if facts.pattern != "route":
        return []
    if facts.gain:
        return ["it takes no gain on scores where each query picks its key blocks"]
    if facts.plan is not None and facts.plan.leaves_out_picks:
        return ["the plan leaves out blocks that its queries picked"]
    return []


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> Tensor:
    return _attention(q, k, v, *prepare(plan), scale, False)[0]


def forward_lse(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
) -> tuple[Tensor, Tensor]:
    out, lse, _ = _attention(q, k, v, *prepare(plan), scale, wide)
    return out, lse


class Lists(NamedTuple):
    """Kept blocks of a plan as index lists, with the other data of the plan that the operator
    needs.

    Args:
        slots: slots of the plan; None where every slot holds the token of its own number.
        index, counts, gain: as in `lists.Lists`, but index in int32; index and counts are empty
            with a route.
        rule: slack (S,); with windows also center, half and place, all (A, S) fp32; with a route
            also picks (B', H', S, C) bool and group (Kk,).
    """

    slots: Tensor | None
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    counts: Tensor
    rule: list[Tensor]
    gain: Tensor | None
    block_q: int
    block_k: int


@torch.inference_mode(False)
def prepare(plan: Plan) -> Lists:
    if plan.dynamic:
        return _lists(plan)
    return plan.prepared(Lists, lambda: _lists(plan))


def _lists(plan: Plan) -> Lists:
    slots = None if plan.is_raster else plan.slots
    route, blocks = plan.partial, (plan.block_q, plan.block_k)
    if isinstance(route, Route):
        none = plan.slots.new_zeros(0)
        slack = plan.slots.new_zeros(plan.slots.shape, dtype=torch.float32)
        slack = slack.masked_fill_(~plan.real, -lists.FAR)
        return Lists(slots, none, none, [slack, route.picks, route.group], None, *blocks)
    gain = None if plan.gain is None else plan.gain.float()
    rule = [x.float() for x in lists.rule(plan)]  # whatever torch's default is
    return Lists(slots, *_kept_blocks(plan), rule, gain, *blocks)


def _kept_blocks(plan: Plan) -> tuple[Tensor, Tensor]:
    if plan.runs is not None:
        return lists.blocks_of_runs(plan, torch.int32)
    if any(map(_is_wrapped, (plan.keep, plan.whole))):
        index, counts = lists.kept_blocks(plan)
        return index.int(), counts
    return kept_blocks(plan.keep, plan.whole)


def _is_wrapped(x: Tensor) -> bool:
    """Whether a transform of `torch.func`, perhaps finished, wraps x, so that it has no memory."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.is_functorch_wrapped_tensor(x)


def _run(name: str, call: Call, dtype: torch.dtype) -> None:
    build.run(name, call.args, DTYPES[dtype], int(multiplies_bf16()))


def multiplies_bf16() -> bool:
    """Whether the processor multiplies bf16 several times as fast as fp32."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return has_tiles(torch.device("cpu")) or (known is not None and known())


@torch.library.custom_op("gen_accel::native_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor | None,
    index: Tensor,
    counts: Tensor,
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (B, H, N, D), fp32 where `wide`, else in q's dtype; log-sum-exps (B, H, N) fp32; and
    (2, B, H, N) for the backward pass: see `stats` in blocks.h."""
    check_alike("native", q, k, v)
    out, lse, stats = _results(q, wide)
    call = Call(q, k, v, slots, index, counts, rule, gain, block_q, block_k, scale)
    call.args.wide = wide
    call.filled(o=out, lse=lse, stats=stats)
    _run("gen_accel_forward", call, q.dtype)
    return out, lse, stats


def _results(q: Tensor, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty(q.shape, dtype=torch.float32 if wide else q.dtype)
    lse, stats = (q.new_empty((*n, *q.shape[:3]), dtype=torch.float32) for n in ((), (2,)))
    return out, lse, stats


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor | None,
    index: Tensor,
    counts: Tensor,
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(q, wide)


@torch.library.custom_op("gen_accel::native_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    of_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    slots: Tensor | None,
    index: Tensor,
    counts: Tensor,
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_alike("native", q, k, v)
    check("grad", grad, None, q.shape)
    check("out", out, None, q.shape)
    if out.dtype != torch.float32:
        check("out", out, q.dtype, q.shape)
    check("stats", stats, torch.float32, (2, *q.shape[:3]))
    check_if_given("of_lse", of_lse, torch.float32, q.shape[:3])
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    call = Call(q, k, v, slots, index, counts, rule, gain, block_q, block_k, scale)
    call.args.wide = out.dtype == torch.float32
    call.strided(grad=grad.to(q.dtype))
    call.whole(out=out, stats=stats, of_lse=of_lse)
    call.filled(dq=dq, dk=dk, dv=dv)
    _run("gen_accel_backward", call, q.dtype)
    return dq, dk, dv


@_backward.register_fake
def _(
    grad: Tensor,
    of_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    slots: Tensor | None,
    index: Tensor,
    counts: Tensor,
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, slots, index, counts, rule, gain, *ctx.sizes, _ = inputs
    out, _, stats = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, stats, slots, index, counts, gain, *rule)


def _differentiate(
    ctx: Any, grad: Tensor | None, of_lse: Tensor | None, _: Any
) -> tuple[Any, ...]:
    q, k, v, out, stats, slots, index, counts, gain, *rule = ctx.saved_tensors
    lists = slots, index, counts, rule, gain
    grad = torch.zeros_like(out) if grad is None else grad
    if of_lse is not None:  # it may be any number for a row that sees nothing
        of_lse = of_lse.masked_fill(stats[1] == 0, 0.0)
    grads = _backward(grad, of_lse, q, k, v, out, stats, *lists, *ctx.sizes)
    return *grads, None, None, None, [None] * len(rule), None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)
