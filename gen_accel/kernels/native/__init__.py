"""FlashAttention over lists of key blocks in C++, for the CPU; optional, as it must be built.

`gen-accel build` compiles it once for this machine; without it `gather` and `routed` do
the same. Nothing of the size of the scores is held, keys are not copied for each query block, and
queries that pick their keys compute the picked pairs alone. Forward and backward accumulate in
fp32. For bf16 inputs the weights are rounded to bf16 where the processor multiplies bf16 (AMX,
AVX512_BF16); elsewhere everything is fp32. The backward pass adds up in an order that depends
only on the number of threads.

References:
    Dao, "FlashAttention-2", arXiv 2307.08691: the softmax carried from tile to tile, and the
    backward pass that computes the scores again. Here a tile is cut from a list of key blocks.
"""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from gen_accel.kernels import lists
from gen_accel.kernels.base import AutoPlace, Context, Facts, Kernel, Values, alike
from gen_accel.kernels.lists import has_tiles
from gen_accel.kernels.native import build
from gen_accel.kernels.native.arguments import DTYPES, NativeCall, check, names
from gen_accel.kernels.native.selection import kept_blocks
from gen_accel.plan import Plan, Route


class Native(Kernel):
    """FlashAttention over lists of key blocks in C++."""

    def unsupported(self, facts: Facts) -> list[str]:
        reasons = []
        if facts.device.type != "cpu":
            reasons.append(f"it is for the CPU, got {facts.device.type}")
        elif build.library() is None:
            reasons.append(build.why_not())
        if facts.dtype not in DTYPES:
            reasons.append(f"it takes {names()}, got {facts.dtype}")
        if not reasons and facts.pattern == "route":
            if facts.gain:
                return ["it takes no gain on scores where each query picks its key blocks"]
            if facts.plan is not None and facts.plan.leaves_out_picks:
                return ["the plan leaves out blocks that its queries picked"]
        return reasons

    def place(self, facts: Facts) -> AutoPlace | None:
        if facts.device.type != "cpu":
            return None
        return AutoPlace(10) if build.is_built() else AutoPlace(70, build.why_not())

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        out, lse, _ = _attention(q, k, v, *prepare(plan), scale, wide)
        return out, lse


kernel = Native()


@torch.inference_mode(False)
def prepare(plan: Plan) -> lists.Lists:
    """Make the lists with an index in int32. With a route, index and counts are empty, and the
    rule is slack, picks (B', H', S, C) bool and group (Kk,)."""
    if plan.dynamic:
        return _lists(plan)
    return plan.prepared(prepare, lambda: _lists(plan))


def _lists(plan: Plan) -> lists.Lists:
    slots = None if plan.is_raster else plan.slots
    route, blocks = plan.partial, (plan.block_q, plan.block_k)
    if isinstance(route, Route):
        none = plan.slots.new_zeros(0)
        slack = plan.slots.new_zeros(plan.slots.shape, dtype=torch.float32)
        slack = slack.masked_fill_(~plan.real, -lists.FAR)
        return lists.Lists(slots, none, none, [slack, route.picks, route.group], None, *blocks)
    gain = None if plan.gain is None else plan.gain.float()
    rule = [x.float() for x in lists.rule(plan)]  # whatever torch's default is
    # A transform of `torch.func`, perhaps finished, may wrap tensors, which then have no memory.
    if plan.runs is not None:
        index, counts = lists.blocks_of_runs(plan, torch.int32)
    elif any(map(is_functorch_wrapped_tensor, (plan.keep, plan.whole))):
        index, counts = lists.kept_blocks(plan)
        index = index.int()
    else:
        index, counts = kept_blocks(plan.keep, plan.whole)
    return lists.Lists(slots, index, counts, rule, gain, *blocks)


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
    call = NativeCall("attention", scale=scale, wide=wide)
    call.rows(q=q, k=k, v=v)
    call.lists(slots, index, counts, rule, gain, block_q, block_k)
    out, lse, stats = _results(q, wide)
    call.writes(o=out, lse=lse, stats=stats)
    call.run("forward", int(multiplies_bf16()))
    return out, lse, stats


def _results(q: Tensor, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty(q.shape, dtype=torch.float32 if wide else q.dtype)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return out, lse, q.new_empty((2, *q.shape[:3]), dtype=torch.float32)


_attention.register_fake(lambda q, *given: _results(q, given[-1]))


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
    call = NativeCall("attention", scale=scale)
    call.rows(q=q, k=k, v=v)
    call.lists(slots, index, counts, rule, gain, block_q, block_k)
    call.grad(grad, q)
    check("out", out, None, q.shape)
    call.args.wide = out.dtype == torch.float32
    call.read("out", out, torch.float32 if call.args.wide else q.dtype, q.shape)
    call.read("stats", stats, torch.float32, (2, *q.shape[:3]))
    call.read("of_lse", of_lse, torch.float32, q.shape[:3], optional=True)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    call.writes(dq=dq, dk=dk, dv=dv)
    call.run("backward", int(multiplies_bf16()))
    return dq, dk, dv


_backward.register_fake(alike(2))


def _save(ctx: Context, inputs: Values, output: tuple[Tensor, ...]) -> None:
    q, k, v, slots, index, counts, rule, gain, *ctx.sizes, _ = inputs
    out, _, stats = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, stats, slots, index, counts, gain, *rule)


def _differentiate(ctx: Context, grad: Tensor | None, of_lse: Tensor | None, _: object) -> Values:
    q, k, v, out, stats, slots, index, counts, gain, *rule = ctx.saved_tensors
    lists = slots, index, counts, rule, gain
    grad = torch.zeros_like(out) if grad is None else grad
    if of_lse is not None:  # it may be any number for a row that sees nothing
        of_lse = of_lse.masked_fill(stats[1] == 0, 0.0)
    grads = _backward(grad, of_lse, q, k, v, out, stats, *lists, *ctx.sizes)
    return *grads, None, None, None, [None] * len(rule), None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)
