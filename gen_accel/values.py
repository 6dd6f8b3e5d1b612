"""Values by type hint: what a user writes for a field of a dataclass, as what the field holds."""

import types
from typing import Any, Literal, Union, get_args, get_origin

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def convert(value: Any, hint: Any, *, is_text: bool = False) -> Any:
    """`value` as a value of the type `hint`.

    Args:
        value: as YAML gives it, which reads 1e-4 as a string, 5 where 5.0 is meant, and one item
            where a list of one is.
        hint: a class, or a Literal, Union or tuple of some.
        is_text: whether it is a string as on a command line: a tuple with commas, "3,8,8",
            several with semicolons, "3,8,8;4,4,4", and a boolean in words, "true" or "no". Whole
            numbers are then without a point.

    Raises:
        ValueError, TypeError, OverflowError: it is no value of that type.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        said = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        found = [option for option in inner if said == option or (is_text and said == str(option))]
        if found:
            return found[0]
    elif origin in (Union, types.UnionType):
        return _one_of(value, inner, is_text)
    elif origin is tuple:
        return _tuple(value, inner, is_text)
    elif hint is types.NoneType:
        if _is_none(value):
            return None
    elif hint is bool:
        if is_text and value.lower() in TRUE + FALSE:
            return value.lower() in TRUE
        if isinstance(value, bool):
            return value
    elif isinstance(value, bool) or origin is not None:
        pass
    elif hint is str:
        if isinstance(value, str | int | float):
            return str(value)
    elif hint is int:
        if is_text:
            return int(value)
        if float(value) == int(float(value)):
            return int(float(value))
    else:
        return hint(value)
    raise ValueError(value)


def check_choices(options: Any, **kinds: Any) -> None:
    """Raise ValueError for a field of `options` that is none of the values of its Literal."""
    for name, kind in kinds.items():
        known, value = get_args(kind), getattr(options, name)
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")


def written_type(hint: Any) -> str:
    """How the type of a field reads to a user: "int,int,int"."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if inner[-1] is Ellipsis:
            between = {",": "commas", ";": "semicolons"}[_between(inner)]
            return f"any number of {written_type(inner[0])}, with {between} between"
        return ",".join(map(written_type, inner))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(written_type(part) for part in get_args(hint))
    if hint is bool:
        return "true/false"
    return "none" if hint is types.NoneType else getattr(hint, "__name__", str(hint))


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.lower() == "none")


def _one_of(value: Any, hints: tuple[Any, ...], is_text: bool) -> Any:
    if types.NoneType in hints and _is_none(value):
        return None
    for hint in hints:
        try:
            return convert(value, hint, is_text=is_text)
        except (TypeError, ValueError, OverflowError):
            continue
    raise ValueError(value)


def _between(hints: tuple[Any, ...]) -> str:
    """What parts a tuple in a text: of tuples with commas, semicolons."""
    return ";" if get_origin(hints[0]) is tuple else ","


def _tuple(value: Any, hints: tuple[Any, ...], is_text: bool) -> tuple[Any, ...]:
    if is_text:
        parts = value.strip("()[]").split(_between(hints))
        value = [part.strip() for part in parts if part.strip()]
    parts = value if isinstance(value, list | tuple) else [value]
    if hints[-1] is Ellipsis:
        hints = (hints[0],) * len(parts)
    if len(parts) != len(hints):
        raise ValueError(value)
    return tuple(
        convert(part, hint, is_text=is_text) for part, hint in zip(parts, hints, strict=True)
    )
