"""Checks of a class against the base class whose parts it overrides, when the class is made."""

import inspect
from difflib import get_close_matches
from typing import Any

# A public name this similar to a part that a class leaves at its default is a misspelling.
NEAR = 0.85


def check_subclass(kind: type, base: type, what: str) -> None:
    """Check what a class adds to `base`, whose public attributes and `__call__` are the parts.

    Args:
        what: a noun for instances of `base`, for errors: "method".

    Raises:
        ValueError: a part of the wrong type, a part that does not take the arguments that `base`
            declares, or a public name that looks like a misspelt part. Options, which are
            annotated, may have any name.
    """
    parts = {name for name in vars(base) if not name.startswith("_")}
    own = dict(vars(kind))
    for name, value in own.items():
        if name in parts or (name == "__call__" and name in vars(base)):
            _check_part(kind, base, name, value)
    left = [name for name in parts if getattr(kind, name) is getattr(base, name)]
    plain = {name.replace("_", ""): name for name in left}
    for name in own.keys() - parts - _annotated(kind):
        near = get_close_matches(name.replace("_", "").lower(), plain, n=1, cutoff=NEAR)
        if near and not name.startswith("_"):
            raise ValueError(
                f"no part of a {what} is called {name!r}, got {kind.__name__}.{name}; did you "
                f"mean {plain[near[0]]!r}? For another purpose choose another name, or one that "
                "begins with _"
            )


def check_takes(kind: type, name: str, *positional: str, **keywords: None) -> None:
    """Raise ValueError unless the function `name` of a class takes these arguments beside self."""
    taken = inspect.signature(getattr(kind, name))
    try:
        taken.bind(None, *positional, **keywords)
    except TypeError:
        star = ", *, " if positional and keywords else ""
        names = ", ".join([*taken.parameters][1:])
        raise ValueError(
            f"{name} of {kind.__name__} must take ({', '.join(positional)}{star}"
            f"{', '.join(keywords)}), it takes ({names})"
        ) from None


def _check_part(kind: type, base: type, name: str, value: Any) -> None:
    declared = vars(base)[name]
    if not callable(declared) and not isinstance(declared, classmethod):
        default = getattr(base(), name)
        plain = isinstance(value, bool | int | float | str | tuple | list | dict | None)
        wrong = plain and type(value) is not type(default)
        short = isinstance(value, tuple) and default and len(value) != len(default)
        if wrong or short or inspect.isfunction(value):
            raise ValueError(
                f"{name} of {kind.__name__} must be of type {type(default).__name__}, such as "
                f"{default!r}, got {value!r}"
            )
        return
    wanted = [*inspect.signature(getattr(base, name)).parameters.values()]
    if isinstance(declared, classmethod):
        wanted = [inspect.Parameter("cls", inspect.Parameter.POSITIONAL_ONLY), *wanted]
    positional = [one.name for one in wanted[1:] if one.kind is not one.KEYWORD_ONLY]
    keywords = [one.name for one in wanted[1:] if one.kind is one.KEYWORD_ONLY]
    if not callable(value) and not isinstance(value, classmethod | property):
        said = ", ".join(positional + keywords)
        raise ValueError(
            f"{name} of {kind.__name__} must be a method {name}({said}), got {value!r}"
        )
    if inspect.isfunction(value):
        check_takes(kind, name, *positional, **dict.fromkeys(keywords))


def _annotated(kind: type) -> set[str]:
    try:
        return {*inspect.get_annotations(kind)}
    except NameError:  # Python 3.14 evaluates them, and one may be known to type checkers alone
        return {*vars(kind)}
