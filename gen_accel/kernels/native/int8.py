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

from gen_accel.kernels import native
from gen_accel.kernels.base import Facts, Kernel
from gen_accel.kernels.native import build, prepare
from gen_accel.kernels.native.arguments import NativeCall
from gen_accel.plan import Plan

STEPS = 127  # from 0 to the largest of q, k and v
WEIGHT_STEPS = 255  # from 0 to the largest weight
# Standard deviations of the error: the largest of 1e8 numbers from a normal distribution.
DEVIATIONS = 6
HELD = 1 << 24  # numbers that `deviation` holds at once


class Int8(Kernel):
    """Attention with products of 8 bits. It rounds, so "auto" never takes it."""

    def unsupported(self, facts: Facts) -> list[str]:
        found = native.kernel.unsupported(facts)
        if missing := lacks():
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
        values = v[plan.real.to(v.device)].double()
        span = values.amax(0) - values.amin(0)
        return torch.minimum(DEVIATIONS * deviations, span).max().item()


kernel = Int8()


def lacks() -> str | None:
    """Name the instructions that this processor lacks; None where it has them, or where the
    library that tells is not built."""
    library = build.library()
    missing = None if library is None else library.gen_accel_int8_lacks()
    return None if missing is None else missing.decode()


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

    A number that is rounded at a step of h errs by h / sqrt(12), and independently of the others.
    To first order, an error e of a score moves the output o = sum w v by w e (v - o), so that

        var o = (h_q^2 scale^2 |sum w (v - o) k'|^2 + sum h_k^2 scale^2 |q|^2 w^2 (v - o)^2
                 + sum (w_max / 255)^2 v'^2 + sum w^2 h_v^2) / 12

    for the rounding of q, k, the weights and v, with k' and v' without the mean of their block and
    w_max the largest weight of the block. Beyond first order a weight is off by the factor exp(e),
    so that with x = var e the first two terms grow by (exp(2x) - 2 exp(x / 2) + 1) / x, here at
    the largest x of a query.

    Args:
        q: (R, D), some queries of one head.
        k, v: (S, D), in the order of the slots.
        weights: (R, S), the softmax weights of the queries.
        plan: plan whose slots and key blocks these are.
    """
    q, k, v, w = (x.double() for x in (q, k, v, weights))
    keys, values = _without_means(k, plan), _without_means(v, plan)
    out, block = w @ v, plan.block_k
    h_q, h_k = (x.abs().amax(-1) / STEPS for x in (q, keys))
    h_v = (values.unflatten(0, (-1, block)).abs().amax(1) / STEPS).repeat_interleave(block, 0)
    step = w.unflatten(1, (-1, block)).amax(-1).repeat_interleave(block, 1) / WEIGHT_STEPS

    moved = _moments(w, v, keys) - out[..., None] * (w @ keys)[:, None]
    of_q = (h_q * scale)[:, None].square() * moved.square().sum(-1)
    far = (w * h_k).square()
    of_k = far @ v.square() - 2 * out * (far @ v) + out.square() * far.sum(-1, keepdim=True)
    of_k = of_k.clamp_min(0) * scale**2 * q.square().sum(-1, keepdim=True)
    of_weights = (step * (w > 0)).square() @ values.square()
    of_v = w.square() @ h_v.square()

    x = h_k.square() * q.square().sum(-1, keepdim=True)
    x = x + h_q[:, None].square() * keys.square().sum(-1)
    x = (x * (w > 0)).amax(-1, keepdim=True) * scale**2 / 12
    x = x.clamp(1e-6, 100)  # where too near to 0 to divide by, or past all bounds
    growth = ((2 * x).exp() - 2 * (x / 2).exp() + 1) / x
    return (((of_q + of_k) * growth + of_weights + of_v) / 12).sqrt()


def _without_means(x: Tensor, plan: Plan) -> Tensor:
    """Take the mean of the tokens of each key block off, (S, D); zero for padding."""
    real = plan.real.to(x.device).view(-1, plan.block_k, 1)
    blocks = x.unflatten(0, (-1, plan.block_k)).masked_fill(~real, 0)
    means = blocks.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    return (blocks - means).masked_fill(~real, 0).flatten(0, 1)


def _moments(w: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """Sum w v k' over the keys, (R, D, D)."""
    some = max(1, HELD // max(1, v.numel()))
    return torch.cat([(rows[:, None] * v.T) @ keys for rows in w.split(some)])
