"""Values by type hint: convert user input for a field of a dataclass, and check its type."""

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
MOST_SHOWN = 200  # characters of a wrong value in an error


def convert(value: Any, hint: Any, *, is_text: bool = False) -> Any:
    """Convert `value` to the type `hint`.

    Args:
        value: as YAML reads it: 1e-4 as a string, 5 for 5.0, one item for a tuple of one, "none"
            for None, no for "no", and "0.9,0.99" for several numbers.
        hint: a class, or a Literal, Union or tuple of some.
        is_text: whether `value` is a string from a command line: a tuple with commas, "3,8,8",
            several with semicolons, "3,8,8;4,4,4", and a boolean in words, "true" or "no". Whole
            numbers are then without a point.

    Raises:
        ValueError, TypeError, OverflowError: `value` is not of that type.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _word(inner, value, is_text)
    if origin in (Union, types.UnionType):
        return _one_of(value, inner, is_text)
    if origin is tuple:
        return _tuple(value, inner, is_text)
    if hint is types.NoneType:
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
        if isinstance(value, str | int | float | Path):
            return str(value)
    elif hint is Path:
        if isinstance(value, str | Path):
            return Path(value)
    elif hint is int:
        return _whole(value, is_text)
    else:
        return hint(value)
    raise ValueError(value)


def members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union; of another type, itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint` as it is, without conversion.

    A list counts as a tuple, since JSON has none, and an int as a float. Values other than
    numbers, text, None and containers of these are not checked.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value is option or value == option for option in inner)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        hints = (inner[0],) * len(value) if inner[-1] is Ellipsis else inner
        return len(hints) == len(value) and all(map(fits, value, hints))
    if origin is dict:
        return isinstance(value, Mapping)
    if hint in (int, float):
        kind = Integral if hint is int else Real
        return isinstance(value, kind) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, types.NoneType) else True


def check_types(options: Any) -> None:
    """Raise ValueError for a field of the dataclass `options` with a value of another type, which
    would fail much later with another message. A Literal is left to `check_choices`."""
    kind = type(options)
    given = {one.name: getattr(options, one.name) for one in fields(options)}
    check_fields(given, kind, kind.__name__)


def check_fields(given: Mapping[str, Any], kind: type, origin: str) -> None:
    """Check types as `check_types` does, before an instance is made: the fields of the dataclass
    `kind` that `given`, which came from `origin`, has."""
    defaults = {one.name: one.default for one in fields(kind)}
    for name, hint in _hints(kind).items():
        if name in given and get_origin(hint) is not Literal and not fits(given[name], hint):
            right = f"{name}={example(hint, defaults[name])!r}"
            raise wrong_type(f"{name} of {origin}", hint, given[name], right)


def check_names(given: Mapping[str, Any], kind: type, origin: str) -> None:
    """Raise ValueError if `given`, which came from `origin`, has other names than the fields of
    the dataclass `kind`, or lacks one without a default."""
    known = {one.name: one for one in fields(kind)}
    if unknown := sorted(map(str, given.keys() - known.keys())):
        raise ValueError(f"{origin} has the unknown {', '.join(unknown)}, and may have {[*known]}")
    check_present(given, kind, origin)


def check_present(given: Mapping[str, Any], kind: type, origin: str) -> None:
    """Raise ValueError if `given`, which came from `origin`, lacks a field of the dataclass
    `kind` that has no default."""
    known = {one.name: one for one in fields(kind)}
    without = (MISSING, MISSING)
    needed = [name for name, one in known.items() if (one.default, one.default_factory) == without]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{origin} has no {', '.join(missing)}")


def wrong_type(what: str, hint: Any, came: Any, right: str) -> ValueError:
    """Make the error for a value of a wrong type.

    Args:
        what: the field, and what has it.
        right: example of a valid value.
    """
    came = shown(came)
    return ValueError(f"{what} must be {written_type(hint)}, got {came}; such as {right}")


def shown(value: Any) -> str:
    """Write a wrong value for an error, cut if it is long."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


@lru_cache(maxsize=64)
def _hints(kind: type) -> dict[str, Any]:
    """Type hints of the fields of a dataclass."""
    known = get_type_hints(kind)
    return {one.name: known[one.name] for one in fields(kind)}


# Types with limits, for fields of dataclasses: an interval, whose words the error holds.
Share = Annotated[float, "in (0, 1]"]
Count = Annotated[int, "at least 1"]
Natural = Annotated[int, "at least 0"]
Positive = Annotated[float, "positive"]
Finite = Annotated[float, "finite"]
LIMITS: dict[str, Callable[[float], bool]] = {
    "in (0, 1]": lambda x: 0 < x <= 1,
    "at least 1": lambda x: x >= 1,
    "at least 0": lambda x: x >= 0,
    "positive": lambda x: 0 < x < math.inf,
    "finite": math.isfinite,
}


def check_options(options: Any) -> None:
    """Raise ValueError for a field of the dataclass `options` with a value of another type, of
    none of the words of its Literal, or outside the limits of its type, such as `Share`. Lists, as
    JSON holds them, become tuples."""
    for one in fields(options):
        value = getattr(options, one.name)
        if isinstance(value, list | range):
            object.__setattr__(options, one.name, tuples([*value]))
    check_types(options)
    for name, hint in _limited(type(options)).items():
        value = getattr(options, name)
        if get_origin(hint) is Literal:
            check_choices(options, **{name: hint})
        elif limits := _outside(value, hint):
            raise ValueError(f"{name} must be {limits}, got {shown(value)}")


def _outside(value: Any, hint: Any) -> str:
    """Limits of the type `hint` that `value`, which is of that type, breaks; "": none."""
    if get_origin(hint) is Annotated:
        limits = hint.__metadata__[0]
        return "" if limits not in LIMITS or LIMITS[limits](value) else limits
    if get_origin(hint) is tuple and isinstance(value, tuple):
        inner = get_args(hint)
        hints = (inner[0],) * len(value) if inner[-1] is Ellipsis else inner
        return next(filter(None, map(_outside, value, hints)), "")
    if len(members(hint)) > 1:
        fit = [one for one in members(hint) if fits(value, _plain(one))]
        return _outside(value, fit[0]) if fit else ""
    return ""


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


@lru_cache(maxsize=64)
def _limited(kind: type) -> dict[str, Any]:
    known = get_type_hints(kind, include_extras=True)
    return {one.name: known[one.name] for one in fields(kind)}


def tuples(value: Any) -> Any:
    """Return `value` as JSON holds it, with tuples instead of lists at any depth."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def check_choices(options: Any, **kinds: Any) -> None:
    """Raise ValueError for a field of `options` whose value is not in its Literal."""
    for name, kind in kinds.items():
        known, value = get_args(kind), getattr(options, name)
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {shown(value)}")


def example(hint: Any, default: Any = None) -> Any:
    """Make an example of the type `hint`: `default` if that shows the form."""
    if default not in (None, (), MISSING) and fits(default, hint):
        return default
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return inner[0]
    if origin in (Union, types.UnionType):
        return example(next(one for one in inner if one is not types.NoneType))
    if origin in (tuple, list):
        return origin(example(one) for one in inner if one is not Ellipsis)
    return {int: 8, float: 0.5, bool: True, str: "name", Path: "file"}.get(hint, {})


def as_text(value: Any) -> str:
    """Format a value as text that `convert` reads."""
    if isinstance(value, tuple):
        between = ";" if value and isinstance(value[0], tuple) else ","
        return between.join(map(as_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def written_type(hint: Any) -> str:
    """Write the type of a field for a user: "int,int,int"."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if inner[-1] is Ellipsis:
            between = {",": "commas", ";": "semicolons"}[_between(inner)]
            return f"any number of {written_type(inner[0])}, with {between} between"
        return ",".join(map(written_type, inner))
    if get_origin(hint) is list:
        return f"a list of {written_type(get_args(hint)[0])}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(written_type(part) for part in get_args(hint))
    if get_origin(hint) is dict:
        return "names with values"
    if hint is bool:
        return "true/false"
    if hint is Path:
        return "a path"
    return "none" if hint is types.NoneType else getattr(hint, "__name__", str(hint))


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.lower() == "none")


def _word(known: tuple[Any, ...], value: Any, is_text: bool) -> Any:
    """Return the word of `known`, also of one that YAML reads as a boolean, or a person writes
    for one."""
    for option in known:
        if option is value or (option == value and type(option) is type(value)):
            return option
        if is_text and value == str(option):
            return option
    words = (("yes", "on", "true"), ("no", "off", "false"))
    for meant, said in zip((True, False), words, strict=True):
        if value is meant or (isinstance(value, str) and value in said):
            found = [word for word in said if word in known]
            if found:
                return found[0]
    raise ValueError(value)


def _whole(value: Any, is_text: bool) -> int:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            if is_text:
                raise
    elif isinstance(value, int):
        return value
    number = float(value)
    if not number.is_integer():
        raise ValueError(value)
    return int(number)


def _one_of(value: Any, hints: tuple[Any, ...], is_text: bool) -> Any:
    is_word = any(get_origin(one) is Literal and value in get_args(one) for one in hints)
    if types.NoneType in hints and _is_none(value) and not is_word:
        return None
    for hint in hints:
        try:
            return convert(value, hint, is_text=is_text)
        except (TypeError, ValueError, OverflowError):
            continue
    raise ValueError(value)


def _between(hints: tuple[Any, ...]) -> str:
    """Separator of the items of a tuple in text: semicolons between tuples, else commas."""
    return ";" if get_origin(hints[0]) is tuple else ","


def _tuple(value: Any, hints: tuple[Any, ...], is_text: bool) -> tuple[Any, ...]:
    if is_text:
        parts = value.strip("()[]").split(_between(hints))
        value = [part.strip() for part in parts if part.strip()]
    elif isinstance(value, str) and hints[0] in (int, float):
        value = value.strip("()[], ").split(",")
    parts = value if isinstance(value, list | tuple) else [value]
    if hints[-1] is Ellipsis:
        hints = (hints[0],) * len(parts)
    if len(parts) != len(hints):
        raise ValueError(value)
    return tuple(
        convert(part, hint, is_text=is_text) for part, hint in zip(parts, hints, strict=True)
    )
