"""Kernel: how to compute a plan, and the facts of a call that decide which kernels can.

A kernel is a module of this package, whose `kernel` is an instance of a subclass of `Kernel`. The
module imports without its optional dependency, imports no method and no other kernel.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gen_accel.plan import Plan, Route
from gen_accel.registry import check_subclass

Context = Any  # that autograd passes to the functions of an operator; it takes any attribute
Attended = tuple[Tensor, Tensor]  # output, (B, H, N, D), and log-sum-exp, (B, H, N)
Values = tuple[Any, ...]  # inputs of an operator, or their gradients
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


class BlockFacts(NamedTuple):
    """What a rest of the second order needs of a call, and the choice of its blocks, whatever is
    kept; fp32 but for the state, without a gradient.

    Args:
        query_means, key_means: (B, H, Kq, D) and (B, H, Kk, D), means of blocks.
        deviations: (B, H, Kk), see `choosing.block_deviations`, of the values.
        rise, weight: fields of a `Curve`.
        squares: (B, H, N), squared offsets of keys from the means of their blocks, weighed and
            summed over the channels.
        common: (B, H, D), a key near those of a head.
        state: (B, H, D, D), the slope H of `Rest`.
    """

    query_means: Tensor
    key_means: Tensor
    deviations: Tensor
    rise: Tensor
    weight: Tensor
    squares: Tensor
    common: Tensor
    state: Tensor

    def of_heads(self, some: slice) -> "BlockFacts":
        return BlockFacts(*(x[:, some].contiguous() for x in self))


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


def order_reasons(facts: Facts) -> list[str]:
    """List the reason against a kernel whose backward adds up in no fixed order, if a gradient is
    needed."""
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if not facts.grad or warns or not torch.are_deterministic_algorithms_enabled():
        return []
    return [
        "its backward adds up in no fixed order, which torch.use_deterministic_algorithms bars"
    ]


class AutoPlace(NamedTuple):
    """Place of a kernel in the order of "auto".

    Args:
        order: the lowest is tried first.
        against: why it is not tried earlier, in a few words for users.
    """

    order: int
    against: str = ""


class KernelFailed(RuntimeError):
    """Error of a kernel that finds out only by trying that it cannot run; "auto" goes on."""


class Kernel:
    """Base class of kernels, which compute a plan and never change the answer.

    An error budget holds a kernel to `reference`, forward and gradient: twice the error of the
    reference in the same dtype. A kernel that rounds more coarsely than that dtype, and says so by
    its name, adds its `allowance`.

    Attributes:
        takes_rest: whether `forward` and `forward_lse` take plans with a rest as they are. Else
            `gen_accel.kernels.rest` adds it to what `forward_lse` returns.
    """

    takes_rest: bool = False

    def __init_subclass__(cls) -> None:
        """Refuse a misspelt part, and a class that computes nothing, with ValueError."""
        check_subclass(cls, Kernel, "kernel")
        if cls.forward is Kernel.forward and cls.forward_lse is Kernel.forward_lse:
            raise ValueError(f"{cls.__name__} has no forward(q, k, v, plan, *, scale)")
        if cls.place is not Kernel.place and cls.allowance is not Kernel.allowance:
            raise ValueError(
                f"{cls.__name__} has an allowance and a place: a kernel that rounds more coarsely "
                "than its inputs runs by its name alone; leave out the place"
            )

    def unsupported(self, facts: Facts) -> list[str]:
        """List the reasons why the kernel cannot run, in words; empty if it can.
        `kernels.unsupported` adds the reasons that hold for every kernel."""
        return []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> Tensor:
        """Compute softmax(scale q k^T) v over the plan's pairs, (B, H, N, D) in and out, in q's
        dtype. A query that sees nothing gets zeros. Backward by autograd.

        Raises:
            KernelFailed: only trying showed that the kernel cannot run; "auto" goes on.
        """
        return self.forward_lse(q, k, v, plan, scale=scale)[0]

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute the output of `forward`, and the natural log-sum-exp of each row's scaled
        scores, (B, H, N) fp32 or wider.

        Both have gradients if `forward` has one, or `unsupported` refuses them. A row that sees
        nothing gives zeros and -inf. The incoming gradient of that -inf is ignored, since it is
        NaN where two parts are merged.

        Args:
            wide: return the output in fp32 or wider, before rounding, if the kernel can.
        """
        raise NotImplementedError

    def continued(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, begun: Attended, *, scale: float
    ) -> bool:
        """Go on with a softmax over other keys, and write over what has begun. Without a gradient,
        and of plans that `unsupported` lets pass.

        Args:
            begun: output over the other keys, in q's dtype, and log-sum-exp.

        Returns:
            False where nothing was done, as the kernel cannot.
        """
        return False

    def place(self, facts: Facts) -> AutoPlace | None:
        """Place in the order of "auto", or None if "auto" does not take the kernel."""
        return None

    def allowance(
        self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, *, plan: Plan, scale: float
    ) -> float:
        """Bound how far the outputs of some queries of one head may be off, in units of v, beyond
        twice the error of the reference in q's dtype.

        Args:
            q: (R, D).
            k, v: (S, D), in the order of the plan's slots.
            weights: (R, S), the softmax weights; a row that sees nothing is zero.
        """
        return 0.0


Attend = Callable[[Tensor, Tensor, Tensor, Plan], Tensor]


class Runner:
    """Callable `kernel(q, k, v, plan) -> Tensor`, with the name that the user asked for.

    A method calls it, and passes `name` to the code beside attention: `pooling`, `selection`
    and `linear`, so that a named kernel decides for these too.

    Args:
        attend: takes q, k, v (B, H, N, D) and a plan, returns (B, H, N, D).
        name: "auto" or one of `KERNELS`.
        scale: factor of q k^T in `attend`. None: 1 / sqrt(D).
        takes_answers: whether a method may choose a plan and compute its answer in one pass:
            nothing changes or checks the plan in between. It then calls `answered`.
    """

    def __init__(
        self,
        attend: Attend,
        name: str = "auto",
        scale: float | None = None,
        *,
        takes_answers: bool = False,
    ) -> None:
        self.attend = attend
        self.name = name
        self.scale = scale
        self.takes_answers = takes_answers

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        return self.attend(q, k, v, plan)

    def answered(self, out: Tensor, plan: Plan, kernel: str) -> Tensor:
        """Take note of the answer of a kernel, and return it."""
        return out


def name_of(kernel: Attend) -> str:
    """Name of a `Runner`; "auto" for a plain function, which has none."""
    return kernel.name if isinstance(kernel, Runner) else "auto"


def scale_of(kernel: Attend, q: Tensor) -> float:
    """Factor of q k^T in `kernel`, for q (B, H, N, D): 1 / sqrt(D) for a plain function, which has
    none."""
    return scale_or_default(kernel.scale if isinstance(kernel, Runner) else None, q)


def scale_or_default(scale: float | None, q: Tensor) -> float:
    """Return the scale, by default 1 / sqrt(D) of q, (B, H, N, D)."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def alike(first: int, count: int = 3) -> Callable[..., tuple[Tensor, ...]]:
    """Make the fake of an operator whose results are like some of its arguments: a gradient for
    each.

    Args:
        first: place of the first of these arguments; `count` follow each other.
    """
    return lambda *given: tuple(x.new_empty(x.shape) for x in given[first : first + count])


def cpp_compiler() -> str | None:
    """Find a C++ compiler of this machine, from $CXX or the usual names."""
    named = os.environ.get("CXX")
    names = [named] if named else ["g++", "clang++", "c++", "cl"]
    return next(filter(None, map(shutil.which, names)), None)
