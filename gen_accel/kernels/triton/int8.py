"""Attention with products of 8 bits in Triton, for generating on cards for games, and its error.

Queries and keys become whole numbers, keys off the common key of their head, at a step of 1/127 of
the largest of their token. Weights, values and the sums of a tile are fp16. `int8_forward` has the
kernel, and what it owes to others. These cards multiply 8 bits four times as fast as bf16, and
fp16 with sums in fp16 twice as fast.
"""

import torch
from torch import Tensor

from gen_accel.kernels import rounding, triton
from gen_accel.kernels.base import Attended, Facts, Kernel
from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.lists import prepare
from gen_accel.plan import Plan

HALF = 2.0**-10  # the step of fp16 at a number from 1 to 2, at most the spacing of any number
TINY = 2.0**-24  # its smallest step


class TritonInt8(Kernel):
    """Block-sparse attention with products of 8 bits. It rounds, so "auto" never takes it."""

    def unsupported(self, facts: Facts) -> list[str]:
        reasons = triton.kernel.unsupported(facts)
        if facts.grad:
            reasons.append(
                "it is for generating, rounding has no gradient; train with kernel 'triton'"
            )
        if not triton.device_reasons(facts.device):
            arch = configs.architecture(facts.device)
            if arch not in (*configs.ROUNDED, "interpreted"):
                reasons.append(
                    f"is for {', '.join(configs.ROUNDED)}, whose products with sums in fp32 run "
                    f"at half rate, got {arch}; kernel 'triton' does without"
                )
        return reasons

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        from gen_accel.kernels.triton import block_sparse  # imports triton
        from gen_accel.kernels.triton.launch import operate

        made = prepare(plan)
        lists = made.slots, made.rows, made.row_counts, made.rule, made.gain
        sizes = plan.block_q, plan.block_k, scale, wide
        return operate(block_sparse.int8_attention, q, k, v, *lists, *sizes)

    def continued(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, begun: Attended, *, scale: float
    ) -> bool:
        return triton.continued(q, k, v, plan, begun, scale=scale, rounds=True)

    def allowance(
        self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, *, plan: Plan, scale: float
    ) -> float:
        deviations = deviation(q, k, v, weights, plan=plan, scale=scale)
        return rounding.largest(deviations, v[plan.real.to(v.device)])


kernel = TritonInt8()


def deviation(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, *, plan: Plan, scale: float
) -> Tensor:
    """Standard deviation of each output, (R, D), due to rounding to 8 bits and to fp16.

    Queries and keys are as in `rounding.of_scores`, with keys off the common key. Numbers of fp16
    have steps of at most u = 2^-10 of themselves, or 2^-24 of the largest weight of a query and of
    the largest value of a channel. A tile of T keys is summed by T / 8 additions, whose steps are
    at most u times the sum of its w |v|. The squares of these sums of all tiles are at most the
    largest times all of them, and the largest is at most the T largest weights of the query times
    the largest value. So beside the scores there are

        sum (u w + 2^-24 w_max)^2 v^2 + sum w^2 (u v + 2^-24 v_max)^2
            + T / 8 u^2 w_top v_max sum w |v|

    Args:
        q: (R, D), some queries of one head.
        k, v: (S, D), in the order of the slots.
        weights: (R, S), the softmax weights of the queries.
        plan: plan whose slots these are.
    """
    q, k, v, w = (x.double() for x in (q, k, v, weights))
    real, tile = plan.real.to(k.device), min(configs.MOST_SUMMED, len(k))
    some = torch.arange(configs.SOME, device=k.device) * plan.tokens // configs.SOME
    common = k[plan.places.to(k.device)[some]].mean(0)
    keys = (k - common).masked_fill(~real[:, None], 0)
    v = v.masked_fill(~real[:, None], 0)
    most = v.abs().amax(0)
    of_weights = (HALF * w + TINY * w.amax(-1, keepdim=True) * (w > 0)).square() @ v.square()
    of_v = w.square() @ (HALF * v.abs() + TINY * most).square()
    top = w.topk(tile, -1).values.sum(-1, keepdim=True)
    of_sums = tile / 8 * HALF**2 * top * most * (w @ v.abs())
    of_scores = rounding.of_scores(q, keys, v, w, scale=scale)
    return ((of_scores + of_weights + of_v + of_sums) / 12).sqrt()
