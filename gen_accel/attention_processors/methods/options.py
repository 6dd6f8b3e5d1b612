"""A method from words: its name, and "field=value" for each of its options."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gen_accel.attention_processors import METHODS, method_class

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def method_from(name: str, settings: Sequence[str] = ()) -> Any:
    """The method called `name` with some fields set.

        method_from("neighborhood", ["window=3,8,8", "is_causal=true,false,false"])

    Args:
        settings: "field=value" each; a tuple is written "3,8,8".

    Raises:
        ValueError: no such method or field, a value of the wrong type, or one that the method
            refuses; the message names what there is, and the nearest.
    """
    kind = method_class(name)
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    values = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals:
            raise ValueError(f"a setting is written field=value, got {setting!r}")
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            have = ", ".join(known) or "none"
            raise ValueError(f"{name} has no field {key!r}; its fields: {have}{hint}")
        if key in values:
            raise ValueError(f"{key} is set twice")
        try:
            values[key] = _convert(text.strip(), hints[key])
        except ValueError:
            wanted = written_type(hints[key])
            raise ValueError(f"{key} of {name} must be {wanted}, got {text!r}") from None
    return kind(**values)


def method_name(method: Any) -> str:
    """What `method_from` calls it; ValueError for a method of the user's own."""
    names = {kind: name for name, kind in METHODS.items()}
    if type(method) not in names:
        raise ValueError(f"{method!r} is none of the package's methods {tuple(METHODS)}")
    return names[type(method)]


def with_tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as JSON holds them, with tuples where it has lists."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def written_type(hint: Any) -> str:
    """How the type of a field reads to a user: "int,int,int"."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if inner[-1] is Ellipsis:
            return f"any number of {written_type(inner[0])}, with commas between"
        return ",".join(map(written_type, inner))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(written_type(part) for part in get_args(hint))
    if hint is bool:
        return "true/false"
    return "none" if hint is types.NoneType else getattr(hint, "__name__", str(hint))


def _convert(text: str, hint: Any) -> Any:
    """Raises ValueError for what is no such type."""
    if get_origin(hint) is Literal:
        for option in get_args(hint):
            if text == str(option):
                return option
    elif get_origin(hint) is tuple:
        inner = get_args(hint)
        parts = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
        if inner[-1] is Ellipsis:
            inner = (inner[0],) * len(parts)
        if len(parts) == len(inner):
            return tuple(_convert(part, kind) for part, kind in zip(parts, inner, strict=True))
    elif get_origin(hint) in (Union, types.UnionType):
        for kind in get_args(hint):
            try:
                return _convert(text, kind)
            except ValueError:
                continue
    elif hint is bool:
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
    elif hint is types.NoneType:
        if text.lower() == "none":
            return None
    else:
        return hint(text)
    raise ValueError(text)
