"""Rotary modules with other frequencies on the time axis, in the place of a model's own."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["OtherRotary", "check_shape", "set_rotary", "stock_rotary"]


class OtherRotary(nn.Module):
    """A rotary module in the place of the model's own, which it holds.

    Args:
        stock: the model's own.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.stock = stock


def stock_rotary(transformer: Any) -> Any:
    """Return the model's own rotary module, also after `set_rotary`."""
    rope = transformer.rope
    return rope.stock if isinstance(rope, OtherRotary) else rope


def set_rotary(
    transformer: Any,
    freqs: Tensor | None,
    shape: Sequence[int],
    make: Callable[[Any, Tensor], OtherRotary],
) -> None:
    """Put a rotary module of other frequencies in the place of the model's own.

    Args:
        freqs: None brings back the model's own module.
        shape: that freqs must have.
        make: (stock, freqs) to the module.

    Raises:
        ValueError: freqs of another shape.
    """
    stock = stock_rotary(transformer)
    if freqs is None:
        transformer.rope = stock
        return
    check_shape(freqs, shape)
    transformer.rope = make(stock, freqs)


def check_shape(freqs: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError for frequencies of another shape."""
    if tuple(freqs.shape) != tuple(shape):
        raise ValueError(f"freqs must be of shape {tuple(shape)}, got {tuple(freqs.shape)}")
