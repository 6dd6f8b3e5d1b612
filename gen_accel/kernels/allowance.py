"""Allowance of a kernel: how much more than others it may err, by its name."""

from torch import Tensor

from gen_accel.kernels import kernel_of
from gen_accel.kernels.contract import KernelParts, parts_of
from gen_accel.kernels.self_check import most_allowed
from gen_accel.plan import Plan


def allowance(kernel: str, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> float:
    """Largest allowance for any query of a call, in units of v. 0 for a kernel without an
    allowance, and for "auto", which takes no kernel that has one."""
    own = KernelParts().allowance if kernel == "auto" else parts_of(kernel_of(kernel)).allowance
    if own is KernelParts._field_defaults["allowance"]:
        return 0.0
    return most_allowed(own, q, k, v, plan, scale=scale)
