"""Options of a verb as the fields of a config file, for --config and --print-config."""

import inspect
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from gen_accel.config_files import Field, as_yaml, checked, read_mapping, schema_of
from gen_accel.demo import NAME

EXTRA = "cli"
# Options that say where fields come from, or print them.
NO_FIELDS = ("config", "from_settings", "print_config", "print_schema")

# Options that take the place of others: typed on the line, they leave the others of a file out.
RIVALS = (
    (("method", "set"), ("preset", "from_lora")),
    (("preset", "from_lora"), ("method", "set")),
    (("prompt", "prompts"), ("prompt", "prompts")),
    (("image_prompt",), ("image_mask",)),
)


def fields_of(context: typer.Context) -> dict[str, Field]:
    """Map the parameters of a verb to their fields, which have the names of the options."""
    function: Any = inspect.unwrap(context.command.callback or (lambda: None))
    hints = get_type_hints(function, include_extras=True)
    found = {}
    for parameter in context.command.params:
        name, hint = str(parameter.name), _plain(hints.get(str(parameter.name)))
        if name in NO_FIELDS or name not in hints:
            continue
        option = parameter.opts[0].lstrip("-").replace("-", "_")
        told: Any = getattr(parameter, "help", None) or ""
        default = None if parameter.required else parameter.default
        found[name] = Field(option, hint, _as_given(default), told, none_is_text=True)
    return found


def load_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take the fields of a YAML file for options that the command line does not give."""
    if path is not None:
        held = read_mapping(path, verb=str(context.info_name), extra=EXTRA)
        take(context, held, origin=path.name)
    return path


def take(context: typer.Context, held: Mapping[Any, Any], *, origin: str) -> None:
    """Take values for options that the command line does not give.

    Args:
        held: by field, with hyphens or underscores.
        origin: the file that they came from, for errors.

    Raises:
        ValueError: an unknown field, a wrong type, or values from two files.
    """
    if earlier := context.meta.get("taken"):
        raise ValueError(f"settings come from one file, got {earlier} and {origin}: leave one out")
    context.meta["taken"] = origin
    fields = fields_of(context)
    given: dict[Any, Any] = {}
    for name, value in held.items():
        field = name.replace("-", "_") if isinstance(name, str) else name
        if field in given:
            raise ValueError(f"{origin}: {field} is given twice")
        given[field] = value
    values = checked([*fields.values()], given, extra=EXTRA, origin=origin)
    typed = typed_on(context)
    for options, others in RIVALS:
        if typed & {*options}:
            values = {name: value for name, value in values.items() if name not in others}
    names = {field.name: name for name, field in fields.items()}
    taken = {names[name]: value for name, value in values.items() if value is not None}
    context.default_map = {**(context.default_map or {}), **taken}


def typed_on(context: typer.Context) -> set[str]:
    """Return the options that the command line gives, as fields are written. They are not parsed
    yet when a file is read."""
    args = context.meta.get("args", ())
    return {arg.partition("=")[0][2:].replace("-", "_") for arg in args if arg.startswith("--")}


def template(context: typer.Context, asked: bool) -> bool:
    """Let --print-config stand alone: the embedded model is the example."""
    if asked:
        context.default_map = {"model": NAME, **(context.default_map or {})}
    return asked


def show_schema(context: typer.Context, asked: bool) -> None:
    if asked:
        fields, title = [*fields_of(context).values()], f"gen-accel {context.info_name}"
        typer.echo(schema_of(fields, extra=EXTRA, title=title), nl=False)
        raise typer.Exit


def show_config(context: typer.Context) -> None:
    """Print the options as resolved, from line and file, as a file for --config."""
    fields = fields_of(context)
    values = {field.name: _as_given(context.params[name]) for name, field in fields.items()}
    typer.echo(as_yaml([*fields.values()], values, extra=EXTRA), nl=False)


def other_than_default(context: typer.Context) -> dict[str, str]:
    """Map the parameters that a file gives another value than their default to their options."""
    fields = fields_of(context)
    return {
        str(parameter.name): parameter.opts[0]
        for parameter in context.command.params
        if getattr(context.get_parameter_source(str(parameter.name)), "name", "") == "DEFAULT_MAP"
        and _as_given(context.params[str(parameter.name)]) != fields[str(parameter.name)].default
    }


def _plain(hint: Any) -> Any:
    """Return the type of a field: paths are text in a file."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _plain(inner[0])
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_plain, inner))]  # noqa: UP007
    if origin is list:
        return list[_plain(inner[0])]
    return str if hint is Path else hint


def _as_given(value: Any) -> Any:
    """Return a value as YAML holds it; an empty list is none."""
    if isinstance(value, list | tuple):
        return [_as_given(one) for one in value] or None
    return str(value) if isinstance(value, Path) else value


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.yaml",
        is_eager=True,
        callback=load_file,
        help="Take options from a file; what is typed here wins.",
    ),
]

PrintConfig = Annotated[
    bool,
    typer.Option(
        "--print-config",
        is_eager=True,
        callback=template,
        help="Print all options as a file for --config, and end.",
    ),
]

PrintSchema = Annotated[
    bool,
    typer.Option(
        "--print-schema",
        is_eager=True,
        callback=show_schema,
        help="Print the JSON schema of such a file, and end.",
    ),
]
