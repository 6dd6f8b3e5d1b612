"""Runner: the function that a method receives to run its plan with."""

from collections.abc import Callable

from torch import Tensor

from gen_accel.plan import Plan

Attend = Callable[[Tensor, Tensor, Tensor, Plan], Tensor]


class Runner:
    """Callable `kernel(q, k, v, plan) -> Tensor`, with the name that the user asked for.

    A method calls it, and passes `name` to the code beside attention: `pooling`, `selection`
    and `linear`, so that a named kernel decides for these too.

    Args:
        attend: takes q, k, v (B, H, N, D) and a plan, returns (B, H, N, D).
        name: "auto" or one of `KERNELS`.
        scale: factor of q k^T in `attend`. None: 1 / sqrt(D).
    """

    def __init__(self, attend: Attend, name: str = "auto", scale: float | None = None) -> None:
        self.attend = attend
        self.name = name
        self.scale = scale

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        return self.attend(q, k, v, plan)


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
