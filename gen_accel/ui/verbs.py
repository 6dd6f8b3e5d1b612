"""Verbs of the command line as data: their fields, and the arguments that options come to."""

import shlex
from collections.abc import Mapping
from functools import cache
from typing import Any

import typer

from gen_accel.cli.app import app
from gen_accel.cli.verb_fields import fields_of
from gen_accel.config_files import Field
from gen_accel.names import nearest_to


@cache
def group() -> Any:
    """Return the command `gen-accel` with all of its verbs."""
    return typer.main.get_command(app)


def command_of(verb: str) -> Any:
    """Return the command of a verb. Raises ValueError, with the nearest name, where there is
    none."""
    known = group().commands
    if verb not in known:
        raise ValueError(f"gen-accel has no verb {verb!r}{nearest_to(verb, [*known])}")
    return known[verb]


@cache
def fields(verb: str) -> dict[str, Field]:
    """Map the options of a verb, by the names that a file of --config has, to their fields.

    The fields of a training are these of `gen_accel.lora.config.TrainConfig`.
    """
    command = command_of(verb)
    context = typer.Context(command, info_name=verb)
    return {field.name: field for field in fields_of(context).values()}


def arguments(verb: str, options: Mapping[str, Any]) -> list[str]:
    """Write options as arguments of a command line, without those that have their defaults.

    Args:
        options: by name, as in a file of --config; None is not given.

    Raises:
        ValueError: an option that the verb does not have; the error names the nearest.
    """
    parameters = {_name(one): one for one in command_of(verb).params}
    if unknown := [name for name in options if name not in parameters]:
        hint = nearest_to(unknown[0], [*parameters])
        raise ValueError(f"gen-accel {verb} has no option {unknown[0]!r}{hint}")
    written, last = [], []
    for name, one in parameters.items():
        value = options.get(name)
        if value is None or value == one.default:
            continue
        if one.param_type_name == "argument":
            last += [*map(_text, value)] if isinstance(value, list | tuple) else [_text(value)]
        elif isinstance(value, bool) and one.is_flag:
            written += _flag(one, on=value)
        elif isinstance(value, list | tuple):
            written += [part for item in value for part in _pair(one.opts[0], _text(item))]
        else:
            written += _pair(one.opts[0], _text(value))
    if any(argument.startswith("-") for argument in last):
        last = ["--", *last]
    return [verb, *written, *last]


def command_line(verb: str, options: Mapping[str, Any]) -> str:
    """Write the command that does the same, as a shell takes it."""
    return shlex.join(["gen-accel", *arguments(verb, options)])


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.name)
    return parameter.opts[0].lstrip("-").replace("-", "_")


def _flag(parameter: Any, *, on: bool) -> list[str]:
    if on:
        return [parameter.opts[0]]
    return [parameter.secondary_opts[0]] if parameter.secondary_opts else []


def _pair(option: str, value: str) -> list[str]:
    return [f"{option}={value}"] if value.startswith("-") else [option, value]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
