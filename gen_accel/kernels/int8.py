"""Attention with products of 8 bits in C++, for generating on a CPU; rounds, so only by its name.

Unlike other kernels, its answer differs by more than the order of its sums. `quantised` describes
the rounding of q, k, v and the weights to 8 bits, and derives how far an answer may be off. So
"auto" never takes it.
"""

from torch import Tensor

from gen_accel.kernels import quantised
from gen_accel.kernels.contract import Facts
from gen_accel.kernels.quantised import allowance as allowance
from gen_accel.plan import Plan


def unsupported(facts: Facts) -> list[str]:
    return quantised.reasons(facts)


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> Tensor:
    return quantised.attention(q, k, v, plan, scale=scale)[0]


def forward_lse(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
) -> tuple[Tensor, Tensor]:
    return quantised.attention(q, k, v, plan, scale=scale, wide=wide)
