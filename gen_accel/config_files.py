"""Configs: fields that are read from YAML, checked by pydantic, and printed with their help."""

import json
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from gen_accel.extras import needed_for
from gen_accel.text_files import read_text
from gen_accel.values import as_text, example, wrong_type


@dataclass(frozen=True)
class Field:
    """A field of a config.

    Args:
        hint: a class, or a Literal, Union, list or tuple of some.
        help: one line for people.
        group: heading above the field where the config is printed.
        none_is_text: keep the word none as text. Else it stands for None where that is allowed.
    """

    name: str
    hint: Any
    default: Any
    help: str = ""
    group: str = ""
    none_is_text: bool = False


def read_mapping(path: str | Path, *, verb: str, extra: str) -> dict[Any, Any]:
    """Read a YAML file that holds fields as `name: value`.

    Args:
        verb: prints such a file by --print-config, for the message.
        extra: of pyproject.toml, which brings the package.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML mapping.
    """
    yaml = _yaml(extra)
    try:
        loaded = yaml.safe_load(read_text(path))
    except FileNotFoundError:
        command = f"gen-accel {verb} --print-config > {Path(path).name}"
        raise FileNotFoundError(f"no config at {path}; `{command}` writes one") from None
    except RecursionError:
        raise ValueError(f"{path} is no config: it is nested too deep") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} must hold fields as `name: value`, got {loaded!r}")
    return dict(loaded)


def checked(
    fields: Sequence[Field],
    given: Mapping[Any, Any],
    *,
    extra: str,
    origin: str = "",
    typed: Collection[str] = (),
) -> dict[str, Any]:
    """Convert the values that are given to the types of their fields.

    Args:
        given: values as YAML, JSON or a command line reads them.
        extra: of pyproject.toml, which brings pydantic.
        origin: the file that they came from, for errors.
        typed: names of the values from a command line, for errors.

    Raises:
        ValueError: a field is unknown (the error names the nearest), or a value has the wrong
            type.
    """
    known = {one.name: one for one in fields}
    if unknown := [name for name in given if name not in known]:
        raise _unknown(unknown[0], known, origin)
    with needed_for("a config", extra=extra):
        from pydantic import ValidationError
    try:
        found = model_of(fields, extra=extra).model_validate(dict(given))
    except ValidationError as error:
        name = str(error.errors(include_url=False, include_context=False)[0]["loc"][0])
        raise _wrong(known[name], given[name], origin, as_flag=name in typed) from None
    return {name: getattr(found, _attribute(name)) for name in given}


def model_of(fields: Sequence[Field], *, extra: str, title: str = "Config") -> Any:
    """Build the pydantic model of these fields. Each is optional there, and the model's attributes
    have an underscore behind their names, as some of the names are pydantic's own."""
    with needed_for("a config", extra=extra):
        import pydantic
    held: dict[str, Any] = {
        _attribute(one.name): (
            _checked_type(one.hint, one.none_is_text),
            pydantic.Field(one.default, alias=one.name, description=one.help or None),
        )
        for one in fields
    }
    config = pydantic.ConfigDict(
        extra="forbid",
        coerce_numbers_to_str=True,
        protected_namespaces=(),
    )
    return pydantic.create_model(title, __config__=config, **held)


def schema_of(fields: Sequence[Field], *, extra: str, title: str) -> str:
    """Write the JSON schema of these fields, which editors check a YAML file by."""
    schema = model_of(fields, extra=extra, title=title).model_json_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def as_yaml(fields: Sequence[Field], values: Mapping[str, Any], *, extra: str) -> str:
    """Write all fields as YAML, each with its help as a comment.

    Args:
        values: by name; a field without one has its default.
    """
    yaml, lines, group = _yaml(extra), [], ""
    for one in fields:
        if one.group != group:
            group = one.group
            lines += ["", f"# {group}"] if lines else [f"# {group}"]
        value = values.get(one.name, one.default)
        value = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix(
            "...\n"
        )
        lines.append(f"{one.name}: {text.strip()}  # {one.help}")
    return "\n".join(lines) + "\n"


def _yaml(extra: str) -> Any:
    with needed_for("a config file", extra=extra):
        import yaml
    return yaml


def _attribute(name: str) -> str:
    return f"{name}_"


def _unknown(name: Any, known: Collection[str], origin: str) -> ValueError:
    near = get_close_matches(str(name), known, n=1)
    if origin:
        hint = f", did you mean {near[0]!r}?" if near else ""
        return ValueError(f"{origin}: unknown field {name!r}{hint}")
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"there is no field {name!r}{hint}")


def _wrong(one: Field, value: Any, origin: str, *, as_flag: bool) -> ValueError:
    good = example(one.hint, one.default)
    flag = f"--{one.name.replace('_', '-')} {as_text(good)}"
    right = flag if as_flag else f"{one.name}: {json.dumps(good)}"
    what = f"{origin}: {one.name}" if origin else one.name
    return wrong_type(what, one.hint, value, right)


def _checked_type(hint: Any, none_is_text: bool) -> Any:
    """Return `hint` with the spellings that a person may use for it: 1e-4, which YAML reads as
    text, 5.0 for 5, no for "no", the word none, one item where a list of one is."""
    from pydantic import BeforeValidator, Strict

    origin, inner = get_origin(hint), get_args(hint)
    parts = [
        part if part is Ellipsis or origin is Literal else _checked_type(part, none_is_text)
        for part in inner
    ]
    if origin is Literal:
        return Annotated[hint, BeforeValidator(partial(_word, inner))]
    if origin in (Union, types.UnionType):
        union = Union[tuple(parts)]  # noqa: UP007
        is_text = none_is_text or types.NoneType not in inner
        return union if is_text else Annotated[union, BeforeValidator(_none)]
    if origin in (tuple, list):
        several: Any = tuple[tuple(parts)] if origin is tuple else list[parts[0]]
        return Annotated[several, BeforeValidator(_several)]
    if hint is bool:
        return Annotated[bool, Strict()]
    readers = {int: _whole, float: _number, str: _text}
    return Annotated[hint, BeforeValidator(readers[hint])] if hint in readers else hint


def _word(words: Sequence[Any], value: Any) -> Any:
    """Return the word that YAML reads as true or false."""
    if not isinstance(value, bool):
        return value
    said = ("yes", "on", "true") if value else ("no", "off", "false")
    return next((word for word in said if word in words), said[0])


def _none(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() == "none" else value


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _text(value: Any) -> Any:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError("no text")
    return str(value)


def _number(value: Any) -> Any:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError("no number")
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        raise ValueError("no number") from None


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _number(value)
    if not number.is_integer():
        raise ValueError("no whole number")
    return int(number)
