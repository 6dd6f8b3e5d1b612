"""Kernel: how to compute a plan. Its contract, with each optional part and its default.

A kernel is a module of this package. It imports without its optional dependency, imports no method
and no other kernel, and never changes the answer: an error budget holds it to `reference`, forward
and gradient. The budget is twice the error of the reference in the same dtype. A kernel that
rounds more coarsely than that dtype, and says so by its name, adds its `allowance`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from gen_accel.plan import Plan, Route

Pattern = Literal["blocks", "windows", "route"]
PATTERNS: tuple[Pattern, ...] = ("blocks", "windows", "route")


@dataclass(frozen=True)
class Facts:
    """Facts of a call that decide which kernels can run it.

    Args:
        shapes, dtypes, devices: of q, k and v; the shapes are (B, H, N, D).
        pattern: what a plan keeps of its blocks: whole "blocks", or pairs by a rule, "windows"
            or a "route" of each query.
        block_q, block_k: slots in a query and in a key block.
        gain: whether the plan dampens scores.
        dynamic: whether the plan was made from the q and k of this call.
        grad: whether a gradient of q, k or v is needed.
        forward_mode: whether forward-mode differentiation is on.
        lse: whether the log-sum-exp of each row is requested too.
        rest: whether the plan pools the blocks that it does not keep.
        plan: for facts that only its numbers tell, which may wait for the device; None where
            the question is about any plan of this kind.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]
    pattern: Pattern = "blocks"
    block_q: int = 64
    block_k: int = 64
    gain: bool = False
    dynamic: bool = False
    grad: bool = False
    forward_mode: bool = False
    lse: bool = False
    rest: bool = False
    plan: Plan | None = None

    @property
    def device(self) -> torch.device:
        """Device of q."""
        return self.devices[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of q."""
        return self.dtypes[0]

    @property
    def dim(self) -> int:
        """Head dim of q."""
        return self.shapes[0][-1]


def facts_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    grad: bool | None = None,
    lse: bool = False,
) -> Facts:
    """Collect the facts of one call, without waiting for the device.

    Args:
        grad: whether a gradient is needed; by default, whether one is recorded.
        lse: whether the log-sum-exp is requested.
    """
    if grad is None:
        trains = q.requires_grad or k.requires_grad or v.requires_grad
        grad = torch.is_grad_enabled() and trains
    rule = plan.partial
    return Facts(
        shapes=(tuple(q.shape), tuple(k.shape), tuple(v.shape)),
        dtypes=(q.dtype, k.dtype, v.dtype),
        devices=(q.device, k.device, v.device),
        pattern="blocks" if rule is None else "route" if isinstance(rule, Route) else "windows",
        block_q=plan.block_q,
        block_k=plan.block_k,
        gain=plan.gain is not None,
        dynamic=plan.dynamic,
        grad=grad,
        forward_mode=is_forward_mode(),
        lse=lse,
        rest=plan.rest is not None,
        plan=plan,
    )


def is_forward_mode() -> bool:
    """Whether forward-mode differentiation is on, including `torch.func.jvp`."""
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def must_be_deterministic() -> bool:
    """Whether `torch.use_deterministic_algorithms` bars sums in no fixed order."""
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled() and not warns


class Place(NamedTuple):
    """Place of a kernel in the order of "auto".

    Args:
        order: the lowest is tried first.
        against: why it is not tried earlier, in a few words for users.
    """

    order: int
    against: str = ""


class Kernel(Protocol):
    """Functions that every kernel has. Optional parts are in `KernelParts`."""

    def unsupported(self, facts: Facts) -> list[str]:
        """List the reasons why the kernel cannot run, in words; empty where it can.

        `why_not` refuses q, k and v that differ, and forward-mode differentiation where the
        kernel has no derivative.
        """
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> Tensor:
        """Compute softmax(scale q k^T) v over the plan's pairs, (B, H, N, D) in and out, in q's
        dtype. A query that sees nothing gets zeros. Backward by autograd.

        Raises:
            KernelFailed: only trying showed that the kernel cannot run; "auto" goes on.
        """
        ...


class KernelParts(NamedTuple):
    """Optional parts of a kernel. A missing part has the default given here.

    Args:
        forward_lse: (q, k, v, plan, *, scale, wide=False) -> (Tensor, Tensor), the output of
            `forward` and the natural log-sum-exp of each row's scaled scores, (B, H, N)
            fp32 or wider. Both have gradients where `forward` has one, or `unsupported` refuses
            them. A row that sees nothing gives zeros and -inf. The incoming gradient of that
            -inf is ignored, since it is NaN where two parts are merged. With `wide` the
            output is fp32 or wider, before rounding, where the kernel can return it so.
            `gen_accel.kernels.rest` adds the rest of a plan to these two, for every kernel
            that has them. Default: None.
        RESTS: whether `forward` and `forward_lse` take plans with a rest as they are.
        place: (facts) -> Place, where "auto" tries the kernel, or None where it does not.
            Default: "auto" never takes it.
        FORWARD_MODE: whether there is a forward-mode derivative; torch would take a missing one
            for zero.
        allowance: (q, k, v, weights, *, plan, scale) -> float, in units of v: how far the outputs
            of some queries of one head may be off, beyond twice the error of the reference in q's
            dtype. q is (R, D), k and v (S, D) in the order of the plan's slots, and weights
            (R, S) the softmax weights; a row that sees nothing is zero. A kernel with an
            allowance has no place. Default: 0.
    """

    forward_lse: Callable[..., tuple[Tensor, Tensor]] | None = None
    RESTS: bool = False
    place: Callable[[Facts], Place | None] = lambda facts: None
    FORWARD_MODE: bool = False
    allowance: Callable[..., float] = lambda q, k, v, weights, *, plan, scale: 0.0


# Arguments of each function: positional, then keywords.
CALLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unsupported": (("facts",), ()),
    "forward": (("q", "k", "v", "plan"), ("scale",)),
    "forward_lse": (("q", "k", "v", "plan"), ("scale", "wide")),
    "place": (("facts",), ()),
    "allowance": (("q", "k", "v", "weights"), ("plan", "scale")),
}
REQUIRED = ("unsupported", "forward")
PARTS = (*REQUIRED, *KernelParts._fields)
# A public name this similar to a missing part counts as a misspelling of that part.
NEAR = 0.8


@cache
def parts_of(kernel: Kernel) -> KernelParts:
    """Read the optional parts of `kernel`, once."""
    defaults = KernelParts._field_defaults
    return KernelParts._make(getattr(kernel, name, default) for name, default in defaults.items())


def checked(name: str, module: ModuleType) -> Kernel:
    """Return the module as a kernel, after checking the contract.

    Raises:
        ValueError: a part is missing, misspelt, of another type or has other arguments.
    """
    own = [one for one, value in vars(module).items() if _is_own(module, one, value)]
    missing = [part for part in PARTS if not hasattr(module, part)]
    for other in own:
        near = [] if other in PARTS else _nearest(other, missing)
        if near:
            raise ValueError(
                f"no part of a kernel is called {other!r}, got kernel {name!r}; did you mean "
                f"{near[0]!r}? For another purpose choose another name, or one that begins with _"
            )
    for part in REQUIRED:
        if part in missing:
            raise ValueError(f"kernel {name!r} has no {part}{_written(part)}")
    for part in PARTS:
        if part not in missing:
            _check_part(name, part, getattr(module, part))
    if "place" not in missing and "allowance" not in missing:
        raise ValueError(
            f"kernel {name!r} has an allowance and a place: a kernel that rounds more coarsely "
            "than its inputs runs by its name alone; leave out the place"
        )
    return cast(Kernel, module)


def why_not(name: str, kernel: Kernel, facts: Facts) -> list[str]:
    """List the reasons against running a kernel on a call with these facts; empty if none."""
    about = list(zip(facts.shapes, facts.dtypes, facts.devices, strict=True))
    if about.count(about[0]) < len(about):
        words = ", ".join(f"{shape} {dtype} {device}" for shape, dtype, device in about)
        return [f"q, k and v must be alike, got {words}"]
    reasons = kernel.unsupported(facts)
    if (facts.lse or facts.rest) and parts_of(kernel).forward_lse is None:
        what = "adds no rest" if facts.rest else "gives no log-sum-exp"
        reasons = [*reasons, f"it {what}"]
    if facts.forward_mode and not parts_of(kernel).FORWARD_MODE:
        reasons = [*reasons, "it has no forward-mode derivative"]
    return reasons


def _is_own(module: ModuleType, name: str, value: Any) -> bool:
    """Whether a name is public and made in the module: a function of its own, or a constant."""
    if name.startswith("_"):
        return False
    if inspect.isfunction(value):
        return value.__module__.startswith(module.__name__)
    return name.isupper()


def _nearest(name: str, parts: list[str]) -> list[str]:
    known = {part.lower(): part for part in parts}
    return [known[near] for near in get_close_matches(name.lower(), known, n=1, cutoff=NEAR)]


def _check_part(name: str, part: str, value: Any) -> None:
    if part not in CALLS:
        wanted = type(KernelParts._field_defaults[part])
        if not isinstance(value, wanted):
            raise ValueError(
                f"{part} of kernel {name!r} must be a {wanted.__name__}, got {value!r}"
            )
        return
    if not callable(value):
        raise ValueError(
            f"{part} of kernel {name!r} must be a function {part}{_written(part)}, got {value!r}"
        )
    positional, keywords = CALLS[part]
    taken = inspect.signature(value)
    try:
        taken.bind(*positional, **dict.fromkeys(keywords))
    except TypeError:
        names = ", ".join(map(str, taken.parameters))
        raise ValueError(
            f"{part} of kernel {name!r} must take {_written(part)}, it takes ({names})"
        ) from None


def _written(part: str) -> str:
    positional, keywords = CALLS[part]
    star = ", *, " if keywords else ""
    return f"({', '.join(positional)}{star}{', '.join(keywords)})"
