"""Our own Triton kernels for block-sparse attention, forward and backward.

q, k and v are read where they lie, by stride and through the plan's slots. On Hopper and Blackwell
they are first copied into slot order where that costs less than it saves, see `packing.pays`.
Importing this package imports no triton, which may be missing.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from gen_accel.kernels.base import Attended, AutoPlace, Facts, Kernel
from gen_accel.kernels.triton.lists import prepare
from gen_accel.plan import Plan

__all__ = ["DTYPES", "LARGEST_DIM", "MOST_HEADS", "device_reasons", "installed", "kernel"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_DIM = 256
MOST_HEADS = 65535  # of all samples: the second axis of CUDA's grids


def installed() -> bool:
    return find_spec("triton") is not None


def device_reasons(device: torch.device) -> list[str]:
    """List the reasons why no kernel of this package can run there; empty where they can."""
    if not installed():
        return ["triton is not installed"]
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return ["needs a GPU; on the CPU only under TRITON_INTERPRET=1"]
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return [f"needs compute capability 8.0 or later, got {major}.{minor}"]
    if device.type not in ("cpu", "cuda"):
        return [f"has no form for {device.type}"]
    return []


class TritonKernel(Kernel):
    """Block-sparse attention in Triton."""

    def unsupported(self, facts: Facts) -> list[str]:
        reasons = device_reasons(facts.device)
        if facts.dtype not in DTYPES:
            reasons.append(f"takes bfloat16, float16 and float32, got {facts.dtype}")
        if facts.dim > LARGEST_DIM:
            reasons.append(f"takes head dims up to {LARGEST_DIM}, got {facts.dim}")
        samples, heads = facts.shapes[0][:2]
        if samples * heads > MOST_HEADS:
            reasons.append(
                f"takes up to {MOST_HEADS:,} heads of all samples, got {samples:,} x {heads:,}"
            )
        return reasons

    def place(self, facts: Facts) -> AutoPlace:
        return AutoPlace(50, "it needs a GPU") if facts.device.type == "cpu" else AutoPlace(10)

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Gather queries that pick long groups of keys for themselves, see `gathered.serves`; go
        block by block for all other plans."""
        from gen_accel.kernels.triton import block_sparse, gathered  # import triton
        from gen_accel.kernels.triton.launch import operate

        if gathered.serves(plan):
            return gathered.forward_lse(q, k, v, plan, scale=scale, wide=wide)
        return operate(block_sparse.attention, q, k, v, *prepare(plan), scale, wide=wide)

    def continued(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, begun: Attended, *, scale: float
    ) -> bool:
        from gen_accel.kernels.triton import gathered  # imports triton

        return not gathered.serves(plan) and continued(q, k, v, plan, begun, scale=scale)


def continued(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    begun: Attended,
    *,
    scale: float,
    rounds: bool = False,
) -> bool:
    """Run `Kernel.continued` block by block, with products of 8 bits if it `rounds`."""
    from gen_accel.kernels.triton import block_sparse  # imports triton
    from gen_accel.kernels.triton.launch import operate

    made = prepare(plan)
    lists = made.slots, made.rows, made.row_counts, made.rule, made.gain
    numbers = made.block_q, made.block_k, made.raster, scale, rounds
    operate(block_sparse.continued, *begun, q, k, v, *lists, *numbers)
    return True


kernel = TritonKernel()
