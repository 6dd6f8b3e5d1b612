"""Kernel backends. A backend is one module here with two functions:

unsupported(q, k, v, plan) -> list[str]           reasons why it cannot run, empty when it can
forward(q, k, v, plan, *, scale) -> Tensor        (B, H, N, D) in and out

Those that also run inside a graph of torch.compile split `forward` in two: `prepare(plan)`, which
runs while tracing and whose result is a constant of the graph, and `compute(q, k, v, prepared, *,
scale)`.

A backend imports without its optional dependency, and never changes the answer: each is held to
`reference` by an error budget, forward and gradient.

Beside the backends, `lists` are the kept blocks of a plan as they read them, and `self_check`
holds some rows of a kernel's answer to the reference. `linear` is the linear branch of
sparse-linear attention, `pooling` and `selection` are what methods choose blocks by; `helpers`
says which code runs them, by the name of the kernel, which a method reads off its `Runner`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gen_accel.kernels import flex, gather, native, routed, triton
from gen_accel.kernels.failure import KernelFailed
from gen_accel.kernels.helpers import is_forward_mode
from gen_accel.kernels.native import build
from gen_accel.kernels.runner import Runner, name_of
from gen_accel.plan import Plan, Route, raster_slots
from gen_accel.video import VideoShape

__all__ = [
    "KERNELS",
    "Choice",
    "KernelFailed",
    "Runner",
    "check_name",
    "compute",
    "name_of",
    "preference",
    "prepare",
    "run",
]

KERNELS = ("triton", "native", "flex", "xformers", "routed", "gather", "reference")

# Those that run inside a graph of torch.compile.
IN_GRAPHS = {
    "triton": triton,
    "native": native,
    "flex": flex,
    "routed": routed,
    "gather": gather,
}


@dataclass(frozen=True)
class Choice:
    """Which kernel ran, and why the others did not.

    Args:
        refused: those that were tried before it, with their reasons.
        behind: those that "auto" would have tried after it, with what it holds against them.
    """

    kernel: str
    refused: Mapping[str, list[str]] = field(default_factory=dict)
    behind: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = {name: ", ".join(reasons) for name, reasons in self.refused.items()}
        why = "; ".join(f"{name}: {reason}" for name, reason in {**reasons, **self.behind}.items())
        return f"{self.kernel} (not {why})" if why else self.kernel


def check_name(kernel: str) -> None:
    if kernel != "auto" and kernel not in KERNELS:
        near = get_close_matches(kernel, KERNELS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"kernel must be 'auto' or one of {KERNELS}, got {kernel!r}{hint}")


def preference(q: Tensor, plan: Plan) -> Mapping[str, str]:
    """The order in which "auto" tries the kernels, each with what speaks against it.

    On the CPU `native` comes first where it is built. `gather` comes before `flex` because it
    compiles nothing and was the faster one on radial plans, and `routed` before both where queries
    pick for themselves: see benchmarks/results/.
    """
    slow = "it computes every pair"
    if q.device.type == "cpu" and build.is_built():
        return {
            "native": "",
            "gather": "it copies keys for each query block",
            "routed": "it is for patterns that each query picks",
            "flex": "it has to compile first",
            "triton": "it needs a GPU",
            "xformers": "it needs CUDA",
            "reference": slow,
        }
    if q.device.type == "cpu":
        first = {"gather": "", "routed": "it is for patterns that each query picks"}
        if isinstance(plan.partial, Route):
            first = {"routed": "", "gather": "it computes what any query of a block picked"}
        return first | {
            "flex": "it has to compile first",
            "triton": "it needs a GPU",
            "xformers": "it needs CUDA",
            "native": "it has to be built: gen-accel build",
            "reference": slow,
        }
    return {
        "triton": "",
        "flex": "it compiles for each plan, and takes none of a single call",
        "xformers": "it copies keys that several runs of queries see",
        "gather": "it runs many small operations",
        "reference": slow,
    }


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
    kernel: str = "auto",
    report: Callable[[Choice], None] | None = None,
) -> Tensor:
    """Run `plan` by the named kernel, or by the first that can.

    Args:
        report: is told which kernel ran, and why others did not.

    Raises:
        ValueError: a plan for other samples, heads or tokens than q has; the named kernel cannot
            run this, or none can, and all reasons are listed.
    """
    _check_fit(q, plan)
    with torch.autocast(q.device.type, enabled=False):  # kernels choose their own precision
        return _first(q, k, v, plan, scale, kernel, report)


def _first(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float,
    kernel: str,
    report: Callable[[Choice], None] | None,
) -> Tensor:
    refused: dict[str, list[str]] = {}
    order = preference(q, plan) if kernel == "auto" else {kernel: ""}
    for place, name in enumerate(order, 1):
        backend = import_module(f"gen_accel.kernels.{name}")
        reasons = backend.unsupported(q, k, v, plan)
        if name != "reference" and is_forward_mode():  # torch would take it for zero
            reasons = [*reasons, "it has no forward-mode derivative"]
        if not reasons:
            try:
                out = backend.forward(q, k, v, plan, scale=scale)
            except KernelFailed as error:
                reasons = [str(error)]
            else:
                if report is not None and not torch.compiler.is_compiling():
                    report(Choice(name, refused, dict(list(order.items())[place:])))
                return out
        refused[name] = reasons
    lines = "\n".join(f"  {name}: {'; '.join(reasons)}" for name, reasons in refused.items())
    raise ValueError(f"no kernel for q {tuple(q.shape)} {q.dtype} on {q.device}:\n{lines}")


def _check_fit(q: Tensor, plan: Plan) -> None:
    B, H, N, _ = q.shape
    patterns = [plan.keep]
    if isinstance(plan.partial, Route):
        patterns.append(plan.partial.picks)
    if plan.gain is not None:
        patterns.append(plan.gain)
    for pattern in patterns:
        for name, have, planned in zip(("samples", "heads"), (B, H), pattern.shape, strict=False):
            if planned not in (1, have):
                raise ValueError(f"q has {have} {name}, the plan is for {planned}")
    if plan.tokens != N:
        raise ValueError(f"q has {N} tokens, the plan is for {plan.tokens}")


def prepare(plan: Plan, device: torch.device, kernel: str = "auto") -> tuple[str, Any]:
    """What `compute` needs of a plan inside a graph: the kernel's name and its own data."""
    by_query = isinstance(plan.partial, Route)
    altered = plan.gain is not None or plan.trimmed
    if kernel == "auto":
        kernel = "gather"
        if device.type != "cpu":
            kernel = "gather" if triton.device_reasons(device) else "triton"
        elif not (by_query and altered):
            without = "routed" if by_query else "gather"
            kernel = "native" if build.is_built() else without
    if kernel not in IN_GRAPHS:
        raise ValueError(
            f"kernel {kernel!r} does not run inside torch.compile; use 'auto' or one of "
            f"{tuple(IN_GRAPHS)}"
        )
    if kernel == "flex" and plan.dynamic:
        raise ValueError(
            "kernel 'flex' compiles for a plan, and this method makes one a call; use 'auto'"
        )
    if plan.gain is not None and kernel in ("flex", "routed"):
        raise ValueError(f"kernel {kernel!r} takes no gain on scores; use 'auto'")
    if plan.trimmed and kernel == "routed":
        raise ValueError("kernel 'routed' takes no plan that leaves out blocks; use 'auto'")
    if kernel == "native" and device.type != "cpu":
        raise ValueError(f"kernel 'native' is for the CPU, got {device}; use 'auto'")
    if by_query and altered and kernel == "native":
        raise ValueError(
            "kernel 'native' takes neither gains nor left out blocks where each query picks its "
            "own; use 'auto'"
        )
    return kernel, IN_GRAPHS[kernel].prepare(plan)


def compute(q: Tensor, k: Tensor, v: Tensor, prepared: tuple[str, Any], *, scale: float) -> Tensor:
    """`run` inside a graph of torch.compile."""
    kernel, data = prepared
    with torch.autocast(q.device.type, enabled=False):
        return IN_GRAPHS[kernel].compute(q, k, v, data, scale=scale)


def check_kernel(name: str, device: torch.device) -> None:
    """Raises ValueError where a kernel cannot run on `device`, whatever the method."""
    if name == "auto" or (device.type != "cpu" and not torch.accelerator.is_available()):
        return
    video = VideoShape(2, 8, 8)
    slots = raster_slots(video, 64).to(device)
    keep = slots.new_ones(1, 1, len(slots) // 64, len(slots) // 64, dtype=torch.bool)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q = torch.zeros(1, 1, video.tokens, 64, dtype=dtype, device=device)
    plan = Plan(slots, keep, 64, 64)
    if name == "routed":  # for plans of another kind
        return
    reasons = import_module(f"{__name__}.{name}").unsupported(q, q, q, plan)
    if reasons:
        raise ValueError(f"kernel {name!r} cannot run on {device}: {'; '.join(reasons)}")
