"""A method from words, or from a file: its name, and a value for each of its options."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

from gen_accel.attention_processors import method_class
from gen_accel.method import Method, check_method
from gen_accel.values import convert, written_type


def method_from(name: str, settings: Sequence[str] = ()) -> Any:
    """The method called `name` with some fields set.

        method_from("neighborhood", ["window=3,8,8", "is_causal=true,false,false"])

    Args:
        name: of `METHODS`, one that is registered, or "module:Class", whose module is imported.
        settings: "field=value" each; a tuple is written "3,8,8".

    Raises:
        ValueError: no such method or field, a value of the wrong type, or one that the method
            refuses; the message names what there is, and the nearest.
    """
    kind = method_class(name)
    known = [field.name for field in options_of(kind)]
    hints = _hints(kind, name) if settings else {}
    values = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals:
            raise ValueError(f"a setting is written field=value, got {setting!r}")
        if key not in known:
            raise _no_field(name, key, known)
        if key in values:
            raise ValueError(f"{key} is set twice")
        try:
            values[key] = convert(text.strip(), hints[key], is_text=True)
        except (TypeError, ValueError, OverflowError):
            wanted = written_type(hints[key])
            raise ValueError(f"{key} of {name} must be {wanted}, got {text!r}") from None
    return _made(kind, name, values)


def method_of_file(name: str, options: Mapping[str, Any]) -> Any:
    """The method that a file names, with its options as JSON holds them. It imports nothing.

    Raises:
        ValueError: no such method or option, or a "module:Class" whose module is not imported.
    """
    kind = method_class(name, from_file=True)
    known = [field.name for field in options_of(kind)]
    for key in options:
        if key not in known:
            raise _no_field(name, key, known)
    return _made(kind, name, with_tuples(options))


def options_of(kind: type) -> tuple[Field[Any], ...]:
    """The fields that a method of this class is made with; none of what is no dataclass."""
    return tuple(one for one in fields(kind) if one.init) if is_dataclass(kind) else ()


def saved_options(method: Method) -> dict[str, Any]:
    """Its options, as JSON holds them.

    Raises:
        ValueError: an option that JSON cannot hold, or what is no dataclass and has state, which
            would be lost.
    """
    kind = type(method)
    if not is_dataclass(kind):
        _check_stateless(method)
        return {}
    values = {one.name: getattr(method, one.name) for one in options_of(kind)}
    for name, value in values.items():
        try:
            values[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            values[name] = None
        if _with_tuples(values[name]) != getattr(method, name):
            raise ValueError(
                f"{name} of {kind.__name__} is not the same after JSON, got "
                f"{getattr(method, name)!r}: options are numbers, words, booleans, None and tuples"
            )
    return values


def with_tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as JSON holds them, with tuples where it has lists."""
    return {name: _with_tuples(value) for name, value in options.items()}


def _with_tuples(value: Any) -> Any:
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _hints(kind: type, name: str) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except (NameError, TypeError) as error:
        raise ValueError(f"the types of the fields of {name} cannot be read: {error}") from error


def _no_field(name: str, key: str, known: Sequence[str]) -> ValueError:
    near = get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    have = ", ".join(known) or "none"
    return ValueError(f"{name} has no field {key!r}; its fields: {have}{hint}")


def _made(kind: type, name: str, values: Mapping[str, Any]) -> Any:
    lacking = [
        one.name
        for one in options_of(kind)
        if one.default is one.default_factory is MISSING and one.name not in values
    ]
    if lacking:
        raise ValueError(f"{name} needs a value for {', '.join(lacking)}")
    try:
        method = kind(**values)
    except TypeError as error:
        if is_dataclass(kind):
            raise
        raise ValueError(
            f"{name} cannot be made without arguments: {error}; the options of a method are the "
            "fields of a dataclass"
        ) from error
    check_method(method)
    return method


def _check_stateless(method: Method) -> None:
    """Raise ValueError unless `type(method)()` makes the same."""
    kind = type(method)
    try:
        same = bool(vars(kind()) == vars(method))
    except Exception:  # it cannot be made so, or what it holds cannot be compared
        same = False
    if not same:
        held = ", ".join(f"{name}={value!r}" for name, value in vars(method).items())
        raise ValueError(
            f"{kind.__name__} is no dataclass, so that what it holds would be lost, {held}: make "
            "the class a frozen dataclass, whose fields are saved"
        )
