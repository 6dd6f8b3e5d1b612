"""Attention with products of 8 bits in C++, for generating on a CPU, and how far it errs.

q, k and v become whole numbers, k and v off the mean of their block, at a step of 1/127 of
the largest: of a token in q and k, of a channel of a block in v. Weights become whole
numbers at a step of 1/255 of the largest of their query and block. Everything else is floats:
the means are added back by products in fp32, so that they cancel out of the softmax as exactly as
they do in the reference, with a gain on the scores too.

References:
    Zhang et al., "SageAttention", arXiv 2410.02367: products of 8 bits with one scale a token or a
    block, and the mean key taken off. There it is the mean of a head; the mean of a block leaves
    less to round, and no key counts that a query does not see.
    Zhang et al., "SageAttention2", arXiv 2411.10958: means that are taken off block by block and
    come back as a product of their own; there, means of queries.
"""

import torch
from torch import Tensor

from gen_accel.kernels import native, rounding
from gen_accel.kernels.base import Facts, Kernel
from gen_accel.kernels.native import build, prepare
from gen_accel.kernels.native.arguments import NativeCall
from gen_accel.kernels.rounding import STEPS
from gen_accel.plan import Plan

WEIGHT_STEPS = 255  # from 0 to the largest weight


class Int8(Kernel):
    """Attention with products of 8 bits. It rounds, so "auto" never takes it."""

    def unsupported(self, facts: Facts) -> list[str]:
        found = native.kernel.unsupported(facts)
        if missing := build.lacks_bytes():
            found.append(f"the processor lacks {missing}; kernel 'native' does without")
        if facts.grad:
            found.append(
                "it is for generating, rounding has no gradient; train with kernel 'native'"
            )
        return found

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        return _attention(q, k, v, *prepare(plan), scale, wide)

    def allowance(
        self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, *, plan: Plan, scale: float
    ) -> float:
        """Bound how far rounding to 8 bits may move an answer, at most the range of a channel's
        values, since an answer is a mean of them."""
        deviations = deviation(q, k, v, weights, plan=plan, scale=scale)
        return rounding.largest(deviations, v[plan.real.to(v.device)])


kernel = Int8()


@torch.library.custom_op("gen_accel::native_int8", mutates_args=())
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
) -> tuple[Tensor, Tensor]:
    call = NativeCall("attention", "int8", scale=scale, wide=wide)
    call.rows(q=q, k=k, v=v)
    call.lists(slots, index, counts, rule, gain, block_q, block_k)
    out, lse = _results(q, wide)
    call.writes(o=out, lse=lse)
    call.run("int8")
    return out, lse


def _results(q: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape, dtype=torch.float32 if wide else q.dtype)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


_attention.register_fake(lambda q, *given: _results(q, given[-1]))


def deviation(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, *, plan: Plan, scale: float
) -> Tensor:
    """Standard deviation of each output, (R, D), due to rounding to 8 bits.

    Queries and keys are as in `rounding.of_scores`; beside them weights and values give

        12 var o = sum (w_max / 255)^2 v'^2 + sum w^2 h_v^2

    with k' and v' without the mean of their block and w_max the largest weight of the block.

    Args:
        q: (R, D), some queries of one head.
        k, v: (S, D), in the order of the slots.
        weights: (R, S), the softmax weights of the queries.
        plan: plan whose slots and key blocks these are.
    """
    q, k, v, w = (x.double() for x in (q, k, v, weights))
    keys, values, block = _without_means(k, plan), _without_means(v, plan), plan.block_k
    h_v = (values.unflatten(0, (-1, block)).abs().amax(1) / STEPS).repeat_interleave(block, 0)
    step = w.unflatten(1, (-1, block)).amax(-1).repeat_interleave(block, 1) / WEIGHT_STEPS
    of_weights = (step * (w > 0)).square() @ values.square()
    of_v = w.square() @ h_v.square()
    of_scores = rounding.of_scores(q, keys, v, w, scale=scale)
    return ((of_scores + of_weights + of_v) / 12).sqrt()


def _without_means(x: Tensor, plan: Plan) -> Tensor:
    """Take the mean of the tokens of each key block off, (S, D); zero for padding."""
    real = plan.real.to(x.device).view(-1, plan.block_k, 1)
    blocks = x.unflatten(0, (-1, plan.block_k)).masked_fill(~real, 0)
    means = blocks.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    return (blocks - means).masked_fill(~real, 0).flatten(0, 1)
