"""Features of images: a tensor, or several by name."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

# (I, E) or (I, sequence, E), I images, or several of them by name
Features = Tensor | Mapping[str, Tensor]


def mapped(function: Callable, features: Features, *more: Any) -> Any:
    if isinstance(features, Mapping):
        return {
            name: function(x, *(other[name] for other in more)) for name, x in features.items()
        }
    return function(features, *more)


def count(features: Features) -> int:
    if isinstance(features, Mapping):
        counts = {name: len(x) for name, x in features.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"features must be of as many images each, got {counts}")
        return next(iter(counts.values()))
    if not isinstance(features, Tensor) or features.ndim < 2 or not len(features):
        shape = tuple(features.shape) if isinstance(features, Tensor) else features
        raise ValueError(
            f"features must be a tensor, (images, ...), or tensors by name, got {shape!r}"
        )
    return len(features)


def alike(one: Features, other: Features) -> bool:
    """Whether two features have the same shape, up to the number of images."""
    if isinstance(one, Mapping) != isinstance(other, Mapping):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(alike(one[k], other[k]) for k in one)  # pyright: ignore
    return one.shape[1:] == other.shape[1:]  # pyright: ignore[reportAttributeAccessIssue]


def shapes(features: Features) -> str:
    return str(mapped(lambda x: tuple(x.shape), features))
