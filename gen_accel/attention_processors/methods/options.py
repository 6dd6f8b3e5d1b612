"""Methods built from text or from a file: a name, and values for the options."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, get_type_hints

from gen_accel.attention_processors import method_class, method_name
from gen_accel.method import Method, check_method
from gen_accel.values import as_text, convert, example, wrong_type


def method_from(name: str, settings: Sequence[str] = ()) -> Any:
    """Build the method called `name` with some fields set.

        method_from("neighborhood", ["window=3,8,8", "is_causal=true,false,false"])
        method_from("reuse", ["method=radial", "method.decay_factor=0.5", "every=5"])

    Args:
        name: of `METHODS`, one that is registered, or "module:Class", whose module is imported.
        settings: "field=value" each; a tuple is written "3,8,8". A field that holds a method is
            set by the method's name, and the fields of the inner method as
            "field.of_method=value".

    Raises:
        ValueError: no such method or field, a value of the wrong type, or one that the method
            refuses; the message lists the valid names, and the nearest.
    """
    kind = method_class(name)
    return _made(kind, name, values_of(kind, name, settings))


def values_of(kind: type, name: str, settings: Sequence[str]) -> dict[str, Any]:
    """Parse "field=value" settings into values of the fields of a dataclass; errors as in
    `method_from`.

    Args:
        name: of the class, in errors.
    """
    defaults = {one.name: one.default for one in options_of(kind)}
    known = [*defaults]
    hints = _hints(kind, name) if settings else {}
    values: dict[str, Any] = {}
    inner: dict[str, list[str]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key, text = key.strip(), text.strip()
        key, dot, of_inner = key.partition(".")
        if not equals:
            raise ValueError(f"a setting is written field=value, got {setting!r}")
        if key not in known:
            raise _no_field(name, key, known)
        if dot:
            if hints[key] is not Method:
                raise ValueError(f"{key} of {name} holds no method, got {setting!r}")
            inner.setdefault(key, []).append(f"{of_inner}={text}")
            continue
        if key in values:
            raise ValueError(f"{key} is set twice")
        if hints[key] is Method:
            values[key] = method_from(text)
            continue
        try:
            values[key] = convert(text, hints[key], is_text=True)
        except (TypeError, ValueError, OverflowError):
            right = f"{key}={as_text(example(hints[key], defaults[key]))}"
            raise wrong_type(f"{key} of {name}", hints[key], text, right) from None
    for key, some in inner.items():
        method: Any = values.get(key, defaults[key])
        if method is MISSING:
            raise ValueError(f"{name} needs a value for {key}, before {key}.{some[0]}")
        values[key] = replace(method, **values_of(type(method), method_name(method), some))
    return values


def method_of_file(name: str, options: Mapping[str, Any]) -> Any:
    """Build the method that a file names, with its options as JSON holds them. Imports nothing.

    Raises:
        ValueError: no such method or option, or a "module:Class" whose module is not imported.
    """
    kind = method_class(name, from_file=True)
    known = [field.name for field in options_of(kind)]
    for key in options:
        if key not in known:
            raise _no_field(name, key, known)
    values = with_tuples(options)
    for key in _holding_methods(kind) & values.keys():
        held = values[key]
        if not isinstance(held, Mapping) or {*held} != {"name", "options"}:
            raise ValueError(f"{key} of {name} must hold a name and options, got {held!r}")
        values[key] = method_of_file(held["name"], held["options"])
    return _made(kind, name, values)


def options_of(kind: type) -> tuple[Field[Any], ...]:
    """Return the fields that a method of this class is made with; none if it is no dataclass."""
    return tuple(one for one in fields(kind) if one.init) if is_dataclass(kind) else ()


def saved_options(method: Method) -> dict[str, Any]:
    """Return a method's options, as JSON holds them.

    Raises:
        ValueError: an option that JSON cannot hold, or a method that is no dataclass and has
            state, which would be lost.
    """
    kind = type(method)
    if not is_dataclass(kind):
        _check_stateless(method)
        return {}
    values = {one.name: getattr(method, one.name) for one in options_of(kind)}
    inner = _holding_methods(kind)
    for name, value in values.items():
        if name in inner:
            values[name] = {"name": method_name(value), "options": saved_options(value)}
            continue
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


def _holding_methods(kind: type) -> set[str]:
    """Return the names of a class's options that hold a method."""
    try:
        hints = get_type_hints(kind)
    except (NameError, TypeError):  # of a class of one's own, whose options are saved as they are
        return set()
    return {one.name for one in options_of(kind) if hints[one.name] is Method}


def with_tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields as JSON holds them, with tuples instead of lists."""
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
    except Exception:  # it cannot be made so, or its state cannot be compared
        same = False
    if not same:
        held = ", ".join(f"{name}={value!r}" for name, value in vars(method).items())
        raise ValueError(
            f"{kind.__name__} is not a dataclass, so that its values would be lost, {held}: make "
            "the class a frozen dataclass, whose fields are saved"
        )
