"""Where it is computed: one diffusers model family a file, with these names.

CLASSES                       the transformer classes it serves
ATTENTION_CALL                the global name of the attention call in their processors
self_attentions(transformer)  the attentions over the video's tokens, as `SelfAttention`s
video_shape(transformer, ...) the token grid, read from the arguments of a forward pass

A family holds geometry and names; the processors' code stays diffusers' own.
"""

from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["FAMILIES", "SelfAttention", "family_of", "served_classes"]

FAMILIES = ("wan",)


class SelfAttention(NamedTuple):
    """One attention over the video's tokens.

    Args:
        layer: the number of its block, which `Schedule.dense_layers` counts.
        heads, dim: attention heads, and the dim of one.
    """

    name: str
    module: Any
    layer: int
    heads: int
    dim: int


def served_classes() -> dict[str, str]:
    """Transformer class to the family that serves it."""
    return {name: family for family in FAMILIES for name in _module(family).CLASSES}


def family_of(transformer: Any) -> ModuleType:
    """Raises ValueError for a class that no family serves."""
    name, served = type(transformer).__name__, served_classes()
    if name not in served:
        raise ValueError(f"no family serves {name}; served: {', '.join(sorted(served))}")
    return _module(served[name])


def _module(family: str) -> ModuleType:
    return import_module(f"{__name__}.{family}")
