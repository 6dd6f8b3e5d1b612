"""Controls of a form, made from the fields of a verb, and the options that they come to."""

import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Union, get_args, get_origin

import gradio as gr
import typer

from gen_accel import names
from gen_accel.cli.verb_fields import fields_of
from gen_accel.config_files import Field, checked
from gen_accel.ui.worker import command_of

# What to choose from, of options that are words; any other word may be typed.
CHOICES: dict[str, tuple[str, ...]] = {
    "method": names.METHODS,
    "kernel": ("auto", *names.KERNELS),
    "dense_kernel": ("auto", *names.KERNELS),
    "dtype": ("auto", *names.DTYPES),
    "offload": names.OFFLOADS,
    "device": ("auto", *names.DEVICES[:3]),
    "preset": names.PRESETS,
}
SEVERAL = {"extend": names.TECHNIQUES}  # words with commas between
PICTURES = ("image", "last_image", "image_negative")
FILMS = ("video",)
FILES = ("image_prompt", "image_mask")  # several of them
UPLOADED = (*PICTURES, *FILMS, *FILES)


@cache
def fields_of_verb(verb: str) -> dict[str, Field]:
    """Map the options of a verb to their fields, by the names that a file of --config has."""
    context = typer.Context(command_of(verb), info_name=verb)
    return {field.name: field for field in fields_of(context).values()}


def typed(fields: Mapping[str, Field], given: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """Convert values to the types of their fields.

    Args:
        origin: what errors call the place that the values came from.

    Raises:
        ValueError: an unknown field, or a value of the wrong type.
    """
    return checked([*fields.values()], given, extra="ui", origin=origin)


def control(field: Field, prefix: str, **changed: Any) -> Any:
    """Make the control of a field, `#PREFIX-NAME`, with its name, help and default.

    Args:
        changed: of the control, in the place of what the field says.
    """
    part, own = _part(field)
    about: dict[str, Any] = {
        "label": field.name.replace("_", " ").capitalize(),
        "elem_id": f"{prefix}-{field.name.replace('_', '-')}",
    }
    return part(**about | own | changed)


def _part(field: Field) -> tuple[Any, dict[str, Any]]:
    """The class of a field's control, and its options."""
    name, kind = field.name, _kind(field.hint)
    if name in PICTURES:
        return gr.Image, {"type": "filepath", "sources": ["upload"], "height": 150}
    if name in FILMS:
        return gr.Video, {"sources": ["upload"], "height": 150}
    if name in FILES:
        return gr.File, {"file_count": "multiple", "file_types": ["image"], "height": 100}
    told: dict[str, Any] = {"info": field.help or None}
    if name in SEVERAL:
        some = {"choices": [*SEVERAL[name]], "multiselect": True, "allow_custom_value": True}
        return gr.Dropdown, told | some
    told["value"] = field.default
    if name in CHOICES:
        return gr.Dropdown, told | {"choices": [*CHOICES[name]], "allow_custom_value": True}
    if kind is bool:
        return gr.Checkbox, told | {"value": bool(field.default)}
    if kind is float:
        return gr.Number, told
    if kind is int:
        return gr.Number, told | {"precision": 0}
    if kind is list:
        told["info"] = f"{field.help} One on each line.".strip()
        return gr.Textbox, told | {"lines": 1, "max_lines": 6, "value": ""}
    return gr.Textbox, told | {"value": field.default or "", "max_lines": 4}


def options_of(fields: Mapping[str, Field], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what controls hold as options, without those that are empty or have their defaults.

    Args:
        values: of the controls, by the names of their fields.
    """
    found = {}
    for name, value in values.items():
        field = fields[name]
        if name in SEVERAL and isinstance(value, list):
            value = ",".join(value)
        elif _kind(field.hint) is list and isinstance(value, str):
            value = [line.strip() for line in value.splitlines() if line.strip()]
        elif isinstance(value, str):
            value = value.strip()
        if value in (None, "", []) or value == field.default:
            continue
        found[name] = value
    return found


def values_of(fields: Mapping[str, Field], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what controls show of options; the inverse of `options_of`."""
    found = {}
    for name, field in fields.items():
        value = options.get(name, field.default)
        if name in SEVERAL:
            value = value.split(",") if isinstance(value, str) and value else []
        elif name in FILES:
            value = value or None
        elif isinstance(value, list | tuple):
            value = "\n".join(map(str, value))
        elif value is None and _kind(field.hint) in (str, list) and name not in UPLOADED:
            value = None if name in CHOICES else ""
        found[name] = value
    return found


def _kind(hint: Any) -> Any:
    """The class behind a type that may be None; `list` for a list of anything."""
    if get_origin(hint) in (Union, types.UnionType):
        return _kind(next(part for part in get_args(hint) if part is not types.NoneType))
    return get_origin(hint) or hint
