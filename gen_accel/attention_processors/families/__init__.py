"""Model families of diffusers: `base.Family` has their parts, and the other files the families.

This file finds the family of a model. Families are imported when they are asked for.
"""

from functools import cache
from importlib import import_module

from gen_accel.attention_processors.families.base import (
    USES,
    Family,
    Given,
    PublishedModel,
    Sizes,
    argument_names,
    by_name,
)
from gen_accel.attention_processors.families.sites import (
    ImageAttention,
    ImageBranch,
    SelfAttention,
)
from gen_accel.served import FAMILIES, REFUSED

__all__ = [
    "FAMILIES",
    "REFUSED",
    "Family",
    "Given",
    "ImageAttention",
    "ImageBranch",
    "PublishedModel",
    "SelfAttention",
    "Sizes",
    "argument_names",
    "by_name",
    "classes_for",
    "families",
    "family_for",
    "family_named",
    "family_of",
    "served_classes",
    "video_classes",
]

FEW = 12  # classes that an error lists


@cache
def family_named(name: str) -> Family:
    """Import a family of `FAMILIES`."""
    module, _, kind = FAMILIES[name].home.partition(":")
    return getattr(import_module(f"{__package__}.{module}"), kind)(name)


def families() -> list[Family]:
    """Import all families."""
    return [family_named(name) for name in FAMILIES]


def served_classes() -> dict[str, str]:
    """Map each transformer class to the family that serves it."""
    return {kind: name for name, one in FAMILIES.items() for kind in one.transformers}


def video_classes() -> list[str]:
    """List the `served_classes` that make videos."""
    return [kind for one in families() if one.kind != "image" for kind in one.classes]


def classes_for(use: str) -> dict[str, str]:
    """Select the `served_classes` whose families have what a key of `base.USES` needs."""
    return {kind: one.name for one in families() if USES[use](one) for kind in one.classes}


def family_of(transformer: object) -> Family:
    """Return the family of a model; ValueError for a class that no family serves, with the reason
    if there is one."""
    for kind in type(transformer).__mro__:
        if kind.__name__ in REFUSED:
            raise ValueError(f"{kind.__name__} cannot be served: {REFUSED[kind.__name__]}")
    return _of(transformer, served_classes(), "no family serves")


def family_for(transformer: object, use: str) -> Family:
    """Return the family of a model; ValueError also for a class whose family lacks what a key of
    `base.USES` needs."""
    family = family_of(transformer)
    return family if USES[use](family) else _of(transformer, classes_for(use), f"no {use} for")


def _of(transformer: object, served: dict[str, str], refusal: str) -> Family:
    for kind in type(transformer).__mro__:  # sharding makes a subclass with a name of its own
        if kind.__name__ in served:
            return family_named(served[kind.__name__])
    name = type(transformer).__name__
    known = ", ".join(sorted(served)) if len(served) <= FEW else "see `gen-accel models`"
    raise ValueError(f"{refusal} {name}; served: {known}")
