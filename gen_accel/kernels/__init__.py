"""Kernels: how a plan is computed, each in a module of its own; `base` says what a kernel is.

A new kernel is one file here and its name in `KERNELS`, of `names`. The file also says where
"auto" tries it, and what speaks against it.

Beside the kernels, `lists` holds the kept blocks of a plan in the form that kernels read.
`self_check` compares some rows of a kernel's output with the reference. `rest` adds the pooled
blocks of a plan, for every kernel that returns its log-sum-exp. `linear` is the linear branch of
sparse-linear attention. Methods choose blocks by the numbers of `choosing`. `dispatch` says which
code runs all of these, by the name of the kernel, which a method reads off its `Runner`.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from gen_accel.kernels.base import (
    PATTERNS,
    Facts,
    Kernel,
    KernelFailed,
    Runner,
    facts_of,
    name_of,
)
from gen_accel.kernels.self_check import NotFinite, SelfCheck, SelfCheckFailed, most_allowed
from gen_accel.plan import Plan, Route
from gen_accel.registry import KERNELS
from gen_accel.registry import check_kernel as check_name

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "KERNELS",
    "Choice",
    "Facts",
    "Kernel",
    "KernelFailed",
    "NotFinite",
    "RunOptions",
    "Runner",
    "SelfCheck",
    "SelfCheckFailed",
    "allowance",
    "check_kernel",
    "check_name",
    "facts_of",
    "kernel_of",
    "name_of",
    "preference",
    "refusals",
    "run",
    "run_lse",
    "unsupported",
]


# Modules of kernels that lie in the package of another kernel.
SHARED = {"int8": "native.int8", "triton_int8": "triton.int8"}


@dataclass(frozen=True)
class Choice:
    """Kernel that ran, and why the others did not.

    Args:
        refused: kernels that were tried before it, with their reasons.
        behind: kernels that "auto" would have tried after it, with what speaks against them.
    """

    kernel: str
    refused: Mapping[str, list[str]] = field(default_factory=dict)
    behind: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = {name: ", ".join(reasons) for name, reasons in self.refused.items()}
        why = "; ".join(f"{name}: {reason}" for name, reason in {**reasons, **self.behind}.items())
        return f"{self.kernel} (not {why})" if why else self.kernel


@cache
def kernel_of(name: str) -> Kernel:
    """Return the kernel of that name in `KERNELS`, imported the first time.

    Raises:
        ValueError: an unknown name, or a module without a kernel.
    """
    check_name(name)
    module = import_module(f"{__name__}.{SHARED.get(name, name)}")
    if not isinstance(found := getattr(module, "kernel", None), Kernel):
        raise ValueError(f"{module.__name__} has no `kernel`, an instance of a kind of Kernel")
    return found


def preference(facts: Facts) -> Mapping[str, str]:
    """Order in which "auto" tries the kernels, each with what speaks against it."""
    if facts.device.type != "cpu":
        return _placed(facts, KERNELS)
    from gen_accel.kernels.native import build  # kernels are imported when one is to run

    # On the CPU only a build changes it, and it is asked at each call.
    return _placed_on_cpu(replace(facts, plan=None), KERNELS, build.is_built())


@lru_cache(maxsize=64)
def _placed_on_cpu(facts: Facts, names: Sequence[str], built: bool) -> Mapping[str, str]:
    return _placed(facts, names)


def _placed(facts: Facts, names: Sequence[str]) -> Mapping[str, str]:
    places = {name: kernel_of(name).place(facts) for name in names}
    known = [(place.order, name, place.against) for name, place in places.items() if place]
    return {name: against for _, name, against in sorted(known)}


def unsupported(name: str, facts: Facts) -> list[str]:
    """List the reasons against running the named kernel on a call with these facts; empty if there
    are none."""
    about = list(zip(facts.shapes, facts.dtypes, facts.devices, strict=True))
    if about.count(about[0]) < len(about):
        words = ", ".join(f"{shape} {dtype} {device}" for shape, dtype, device in about)
        return [f"q, k and v must be alike, got {words}"]
    kernel = kernel_of(name)
    reasons = list(kernel.unsupported(facts))
    if (facts.lse or facts.rest) and type(kernel).forward_lse is Kernel.forward_lse:
        reasons.append("it adds no rest" if facts.rest else "it gives no log-sum-exp")
    if facts.forward_mode and name != "reference":  # torch would take a missing one for zero
        reasons.append("it has no forward-mode derivative")
    return reasons


def refusals(
    name: str, device: torch.device, dtype: torch.dtype, *, grad: bool = False
) -> list[str]:
    """Say why a kernel runs no plan of any kind on a device; empty where it runs some.

    Args:
        grad: whether a gradient is needed.
    """
    shape = (1, 2, 256, 64)
    every = [
        Facts((shape,) * 3, (dtype,) * 3, (device,) * 3, pattern, grad=grad)
        for pattern in PATTERNS
    ]
    return min((unsupported(name, facts) for facts in every), key=len)


def allowance(name: str, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> float:
    """Largest allowance for any query of a call, in units of v. 0 for a kernel without an
    allowance, and for "auto", which takes no kernel that has one."""
    if name == "auto" or type(kernel_of(name)).allowance is Kernel.allowance:
        return 0.0
    return most_allowed(kernel_of(name), q, k, v, plan, scale=scale)


def check_kernel(name: str, device: torch.device) -> None:
    """Raise ValueError where a kernel cannot run on `device`, whatever the method."""
    if name == "auto" or (device.type != "cpu" and not torch.accelerator.is_available()):
        return
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if reasons := refusals(name, device, dtype):
        raise ValueError(f"kernel {name!r} cannot run on {device}: {'; '.join(reasons)}")


class RunOptions(TypedDict, total=False):
    """Options of `run` and `run_lse`.

    Args:
        kernel: "auto", the default, or one of `KERNELS`.
        report: receives the kernel that ran, and why others did not.
        grad: whether the kernel must have a gradient; by default, whether one is recorded.
        self_check: compare some rows of the output with the reference, once. A kernel that
            errs too much is refused; on a GPU "auto" warns and goes on to the next.
    """

    kernel: str
    report: Callable[[Choice], None] | None
    grad: bool | None
    self_check: SelfCheck | None


@torch.compiler.disable(
    reason="a kernel runs between two graphs: compile without fullgraph, or attach a method to a "
    "model, whose attention is one operator"
)
def run(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, **options: "Unpack[RunOptions]"
) -> Tensor:
    """Run `plan` by the named kernel, or by the first that can.

    In a function compiled by `torch.compile` it runs as outside, between two graphs. Under
    autocast, q, k and v are cast to autocast's dtype, as torch casts them for its own attention.

    Args:
        options: see `RunOptions`.

    Raises:
        SelfCheckFailed, NotFinite: raised by `self_check`, with the figures.
        ValueError: the plan is for other samples, heads or tokens than q has; the named kernel
            cannot run this, or none can, and all reasons are listed.
    """
    return _run(q, k, v, plan, scale, lse=False, **options)[0]


@torch.compiler.disable(reason="a kernel runs between two graphs: compile without fullgraph")
def run_lse(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, **options: "Unpack[RunOptions]"
) -> tuple[Tensor, Tensor]:
    """Run `run`, and return the natural log-sum-exp of each row too, (B, H, N) fp32 or wider, with
    its gradient: over the kept keys, and over the rest if the plan has one."""
    out, lse = _run(q, k, v, plan, scale, lse=True, **options)
    assert lse is not None
    return out, lse


def as_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast q, k and v to the dtype of autocast where it is on, all but float64, as torch casts
    them for its own attention."""
    where = q.device.type
    if not torch.is_autocast_enabled(where):
        return q, k, v
    dtype = torch.get_autocast_dtype(where)
    q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    return q, k, v


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float,
    *,
    lse: bool,
    kernel: str = "auto",
    report: Callable[[Choice], None] | None = None,
    grad: bool | None = None,
    self_check: SelfCheck | None = None,
) -> tuple[Tensor, Tensor | None]:
    q, k, v = as_autocast(q, k, v)
    _check_fit(q, plan)
    with torch.autocast(q.device.type, enabled=False):  # kernels choose their own precision
        facts = facts_of(q, k, v, plan, grad=grad, lse=lse)
        passed: dict[str, list[str]] = {}
        order = preference(facts) if kernel == "auto" else {kernel: ""}
        for place, name in enumerate(order, 1):
            reasons = unsupported(name, facts)
            if not reasons and self_check is not None:
                reasons = self_check.distrusts(name)
            if not reasons:
                try:
                    chosen, total = kernel_of(name), None
                    if plan.rest is None and not lse:
                        out = chosen.forward(q, k, v, plan, scale=scale)
                    elif plan.rest is None or chosen.takes_rest:
                        out, total = chosen.forward_lse(q, k, v, plan, scale=scale)
                    else:
                        from gen_accel.kernels import rest as pooled_rest

                        # Pool the remaining blocks with the requested kernel; after a fallback,
                        # with the kernel that ran.
                        beside = name if passed else kernel
                        out, total = pooled_rest.attention(
                            chosen, q, k, v, plan, scale=scale, kernel=beside
                        )
                    if self_check is not None:
                        self_check.check(q, k, v, plan, out, scale=scale, name=name, kernel=chosen)
                except SelfCheckFailed as error:
                    if self_check is None or not self_check.falls_back:
                        raise
                    warnings.warn(f"{error}; going on with another kernel", stacklevel=2)
                    reasons = [str(error)]
                except KernelFailed as error:
                    reasons = [str(error)]
                else:
                    if report is not None:
                        behind = {one: order[one] for one in list(order)[place:]}
                        report(Choice(name, passed, behind))
                    return out, total
            passed[name] = reasons
    lines = "\n".join(f"  {name}: {'; '.join(reasons)}" for name, reasons in passed.items())
    raise ValueError(f"no kernel for q {tuple(q.shape)} {q.dtype} on {q.device}:\n{lines}")


def _check_fit(q: Tensor, plan: Plan) -> None:
    B, H, N, _ = q.shape
    patterns = [plan.patterns]
    if isinstance(plan.partial, Route):
        patterns.append(plan.partial.picks.shape)
    if plan.gain is not None:
        patterns.append(plan.gain.shape)
    for pattern in patterns:
        for name, have, planned in zip(("samples", "heads"), (B, H), pattern, strict=False):
            if planned not in (1, have):
                raise ValueError(f"q has {have} {name}, the plan is for {planned}")
    if plan.tokens != N:
        raise ValueError(f"q has {N} tokens, the plan is for {plan.tokens}")
