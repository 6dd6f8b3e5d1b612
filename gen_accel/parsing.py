"""Values by type hint: convert user input for a field of a dataclass, and check its type."""

import math
import reprlib
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Kind = type[DataclassInstance]

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
UNIONS = (Union, types.UnionType)
MOST_SHOWN = 200  # characters of a wrong value in an error
WHOLE = 2**63  # below it whole numbers are, and their negatives, as in tensors

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


def convert(value: object, hint: object, *, is_text: bool = False) -> Any:
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
    if origin in UNIONS:
        return _one_of(value, inner, is_text)
    if origin is tuple:
        return _tuple(value, inner, is_text)
    if hint is types.NoneType:
        if _is_none(value):
            return None
    elif hint is bool:
        if is_text and str(value).lower() in TRUE + FALSE:
            return str(value).lower() in TRUE
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
    elif callable(hint):
        return hint(value)
    raise ValueError(value)


def members(hint: object) -> tuple[object, ...]:
    """Return the members of a union; of another type, itself."""
    return get_args(hint) if get_origin(hint) in UNIONS else (hint,)


def fits(value: object, hint: object) -> bool:
    """Whether `value` is of the type `hint` as it is, without conversion.

    A list counts as a tuple, since JSON has none, and an int that a float can hold as a float.
    Values other than numbers, text, None and containers of these are not checked.
    """
    return _broken(value, hint) is not None


def _broken(value: object, hint: object) -> str | None:
    """Return the limits of the type `hint` that `value` breaks; "" for none, and None for a value
    of another type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found, (limits, *_) = _broken(value, inner[0]), inner[1:]
        breaks = found == "" and limits in LIMITS and not LIMITS[limits](value)  # pyright: ignore
        return limits if breaks else found
    if origin in UNIONS:
        return next((x for x in (_broken(value, one) for one in inner) if x is not None), None)
    if origin is tuple:
        count = len(value) if isinstance(value, list | tuple) else -1
        hints = (inner[0],) * count if inner[-1] is Ellipsis else inner
        if not isinstance(value, list | tuple) or len(hints) != count:
            return None
        several = [*map(_broken, value, hints)]
        return None if None in several else next(filter(None, several), "")
    if origin in (dict, list):
        if not isinstance(value, Mapping if origin is dict else list):
            return None
        keys, items = (value.keys(), value.values()) if isinstance(value, Mapping) else ((), value)
        several = [_broken(one, inner[0]) for one in keys]
        several += [_broken(one, inner[-1]) for one in items]
        return None if None in several else next(filter(None, several), "")
    if origin is Literal:
        right = any(value is option or value == option for option in inner)
    elif is_typeddict(hint):
        right = isinstance(value, Mapping)
    elif hint is int:
        right = is_whole(value)
    elif hint is float:
        right = isinstance(value, Real) and not isinstance(value, bool)
        if isinstance(value, int):
            right = right and abs(value) <= sys.float_info.max
    else:
        right = hint not in (bool, str, types.NoneType) or isinstance(value, hint)  # pyright: ignore
    return "" if right else None


def check_options(options: "DataclassInstance") -> None:
    """Raise ValueError for a field of the dataclass `options` with a value of another type, of
    none of the words of its Literal, or outside the limits of its type, such as `Share`. Lists, as
    JSON holds them, become tuples."""
    kind = type(options)
    for one in fields(options):
        value = getattr(options, one.name)
        if isinstance(value, list | range):
            object.__setattr__(options, one.name, tuples([*value]))
    check_fields(
        {one.name: getattr(options, one.name) for one in fields(kind)}, kind, kind.__name__
    )


def check_fields(given: Mapping[str, object], kind: "Kind", origin: str) -> None:
    """Check values as `check_options` does, before an instance of the dataclass `kind` is made of
    `given`, which came from `origin`. A field without a default must be there."""
    known, hints = {one.name: one for one in fields(kind)}, _hints(kind)
    without = (MISSING, MISSING)
    needed = [name for name, one in known.items() if (one.default, one.default_factory) == without]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{origin} has no {', '.join(missing)}")
    held = {name: (hint, given[name]) for name, hint in hints.items() if name in given}
    for name, (hint, value) in held.items():
        if get_origin(hint) is not Literal and not fits(value, hint):
            right = f"{name}={example(hint, known[name].default)!r}"
            raise wrong_type(f"{name} of {origin}", hint, value, right)
    for name, (hint, value) in held.items():
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{name} must be one of {get_args(hint)}, got {shown(value)}")
        if limits := _broken(value, hint):
            raise ValueError(f"{name} must be {limits}, got {shown(value)}")


def check_names(given: Mapping[str, object], kind: "Kind", origin: str) -> None:
    """Raise ValueError if `given`, which came from `origin`, has other names than the fields of
    the dataclass `kind`."""
    known = [one.name for one in fields(kind)]
    if unknown := sorted(map(str, given.keys() - {*known})):
        raise ValueError(f"{origin} has the unknown {', '.join(unknown)}, and may have {known}")


def wrong_type(what: str, hint: object, came: object, right: str) -> ValueError:
    """Make the error for a value of a wrong type.

    Args:
        what: the field, and what has it.
        right: example of a valid value.
    """
    return ValueError(f"{what} must be {written_type(hint)}, got {shown(came)}; such as {right}")


def is_whole(value: object) -> bool:
    """Whether `value` is a whole number that a tensor holds: no bool, none beyond 64 bits."""
    return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < WHOLE


def shown(value: object) -> str:
    """Write a wrong value for an error, cut before it is made: a long text in its midst, a list
    after its first items, at any depth."""
    return cut(_SHORT.repr(value))


def is_told(one: Field[Any], options: object) -> bool:
    """Whether a field is written with its options: it is not at its default, or "told" of its
    metadata, a function of the options, says so."""
    at_default = getattr(options, one.name) == one.default
    return not at_default or ("told" in one.metadata and one.metadata["told"](options))


def brief(options: object) -> str:
    """Write options as the call that makes them, with the fields that `is_told` names."""
    if not is_dataclass(options) or type(options).__str__ is not object.__str__:
        return str(options)
    given = []
    for one in fields(options):
        value = getattr(options, one.name)
        if one.repr and is_told(one, options):
            given.append(f"{one.name}={brief(value) if is_dataclass(value) else repr(value)}")
    return f"{type(options).__name__}({', '.join(given)})"


def cut(text: str) -> str:
    """Cut what is long of a name or a text, for an error."""
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, MOST_SHOWN, MOST_SHOWN
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 8

    def repr_int(self, x: int, level: int) -> str:
        if is_whole(x):
            return super().repr_int(x, level)
        digits = int(x.bit_length() * math.log10(2)) + 1  # of which Python writes at most 4,300
        return f"a number of about {digits:,} digits, which is too large"


_SHORT = _Short()


@lru_cache(maxsize=64)
def _hints(kind: "Kind") -> dict[str, object]:
    """Type hints of the fields of a dataclass, with their limits."""
    known = get_type_hints(kind, include_extras=True)
    return {one.name: known[one.name] for one in fields(kind)}


def tuples(value: Any) -> Any:
    """Return `value` as JSON holds it, with tuples instead of lists at any depth."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def example(hint: object, default: object = None) -> object:
    """Make an example of the type `hint`: `default` if that shows the form."""
    if default not in (None, (), MISSING) and fits(default, hint):
        return default
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Literal, Annotated):
        return inner[0] if origin is Literal else example(inner[0])
    if origin in UNIONS:
        return example(next(one for one in inner if one is not types.NoneType))
    if origin in (tuple, list):
        several = [example(one) for one in inner if one is not Ellipsis]
        return tuple(several) if origin is tuple else several
    known: dict[object, object] = {int: 8, float: 0.5, bool: True, str: "name", Path: "file"}
    return known.get(hint, {})


def as_text(value: object) -> str:
    """Format a value as text that `convert` reads."""
    if isinstance(value, tuple):
        between = ";" if value and isinstance(value[0], tuple) else ","
        return between.join(map(as_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def written_type(hint: object) -> str:
    """Write the type of a field for a user: "int,int,int"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return written_type(inner[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple and inner[-1] is Ellipsis:
        between = {",": "commas", ";": "semicolons"}[_between(inner)]
        return f"any number of {written_type(inner[0])}, with {between} between"
    if origin is tuple:
        return ",".join(map(written_type, inner))
    if origin is list:
        return f"a list of {written_type(inner[0])}"
    if origin in UNIONS:
        return " or ".join(map(written_type, inner))
    if origin is dict or is_typeddict(hint):
        return "names with values"
    known: dict[object, str] = {bool: "true/false", Path: "a path", types.NoneType: "none"}
    return known.get(hint) or getattr(hint, "__name__", str(hint))


def _is_none(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.lower() == "none")


def _word(known: tuple[object, ...], value: object, is_text: bool) -> object:
    """Return the word of `known`, also of one that YAML reads as a boolean, or a person writes
    for one."""
    for option in known:
        if option is value or (option == value and type(option) is type(value)):
            return option
        if is_text and value == str(option):
            return option
    for meant, said in ((True, ("yes", "on", "true")), (False, ("no", "off", "false"))):
        if value is meant or (isinstance(value, str) and value in said):
            found = [word for word in said if word in known]
            if found:
                return found[0]
    raise ValueError(value)


def _whole(value: object, is_text: bool) -> int:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            if is_text:
                raise
    elif isinstance(value, int):
        return value
    number = float(value)  # pyright: ignore[reportArgumentType]
    if not number.is_integer():
        raise ValueError(value)
    return int(number)


def _one_of(value: object, hints: tuple[object, ...], is_text: bool) -> object:
    is_word = any(get_origin(one) is Literal and value in get_args(one) for one in hints)
    if types.NoneType in hints and _is_none(value) and not is_word:
        return None
    for hint in hints:
        try:
            return convert(value, hint, is_text=is_text)
        except (TypeError, ValueError, OverflowError):
            continue
    raise ValueError(value)


def _between(hints: tuple[object, ...]) -> str:
    """Separator of the items of a tuple in text: semicolons between tuples, else commas."""
    return ";" if get_origin(hints[0]) is tuple else ","


def _tuple(value: object, hints: tuple[object, ...], is_text: bool) -> tuple[Any, ...]:
    if isinstance(value, str) and is_text:
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
