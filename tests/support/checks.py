"""How far a result may be from the exact one."""

import torch
from torch import Tensor


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """NaN when `actual` holds one, which no budget allows."""
    return (actual.double() - exact.double()).abs().max().item()


def budget(low: Tensor, exact: Tensor, factor: float = 2.0) -> float:
    """What a result may err: `factor` times as much as `low`, and one spacing of floats more.

    No tolerance is guessed: `low` is the same mathematics by other means in the same precision,
    `exact` is in fp64. The spacing is that of `low`'s dtype at the largest value.
    """
    spacing = torch.finfo(low.dtype).eps * exact.abs().max().item()
    return factor * (largest_error(low, exact) + spacing)


def assert_no_worse(
    actual: Tensor, low: Tensor, exact: Tensor, factor: float = 2.0, more: float = 0.0
) -> None:
    """`actual` is finite and within the budget that the plain `low` sets.

    Args:
        more: the allowance of a kernel, see `allowed` in problems.py.
    """
    assert actual.dtype == low.dtype
    assert actual.shape == exact.shape
    assert torch.isfinite(actual).all()
    error, allowed = largest_error(actual, exact), budget(low, exact, factor) + more
    assert error <= allowed, f"error {error:.2e} over budget {allowed:.2e}"
