"""Forms from the fields of a verb: a control for each, and the options that they come to.

A screen says which fields come first; all others fall under their groups by themselves.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

import gradio as gr
from gradio.components import Component

from gen_accel.cli.generate import GenerateLine
from gen_accel.config import Config, Option
from gen_accel.demo import NAME
from gen_accel.parsing import as_text, members
from gen_accel.pipelines.generation.config import GenerateConfig
from gen_accel.ui.page import Held

WITHOUT = "none"  # choice of no value
CONFIGS: dict[str, type[Config]] = {GenerateConfig.VERB: GenerateConfig}


@dataclass(frozen=True)
class FormField:
    """A field of a form.

    Args:
        kind: class of a value, `list` for several.
        is_open: whether it may have no value.
        words: to choose from; `is_closed` if no other word may be typed.
        joined: whether several values stand in one text, with commas between.
        accept: kind of file: "image", "images", "video" or "".
        numbers: whether a text holds several numbers, with commas between.
    """

    name: str
    kind: type
    default: Any
    help: str
    group: str
    is_open: bool = False
    words: tuple[str, ...] = ()
    is_closed: bool = False
    joined: bool = False
    accept: str = ""
    numbers: bool = False

    def control(self, prefix: str, value: Any, /, **changed: Any) -> Component:
        """Make the control, `#PREFIX-NAME`.

        Args:
            changed: options of the control, in the place of what the field says.
        """
        label = self.name.replace("_", " ").capitalize()
        told: dict[str, Any] = {"label": label, "elem_id": f"{prefix}-{_dashed(self.name)}"}
        if self.accept:
            held: dict[str, Any] = {"height": 150, **told, **changed}
            if self.accept == "images":
                return gr.File(file_count="multiple", file_types=["image"], **held)
            if self.accept == "video":
                return gr.Video(sources=["upload"], **held)
            return gr.Image(type="filepath", sources=["upload"], **held)
        told |= {"info": self.help or None, "value": self.to_part(value)}
        if "choices" in changed or (self.words and not self.joined):
            more = {"choices": [*self._choices()], "allow_custom_value": not self.is_closed}
            return gr.Dropdown(**told | more | changed)
        if self.joined:
            more = {"choices": [*self.words], "allow_custom_value": True, "multiselect": True}
            return gr.Dropdown(**told | more | changed)
        if self.kind is bool:
            return gr.Checkbox(**told | changed)
        if self.kind in (int, float):
            return gr.Number(**told | changed)  # without a precision, which would round silently
        if self.kind is list:
            told["info"] = f"{self.help} One on each line.".strip()
        return gr.Textbox(**{"max_lines": 6, **told, **changed})

    def to_part(self, value: Any) -> Any:
        """Return what the control shows of a value."""
        if self.accept or self.kind is bool:
            return value or (None if self.accept else False)
        if self.numbers and isinstance(value, list | tuple):
            return as_text(tuple(value))
        if self.joined:
            several = value.split(",") if isinstance(value, str) else value
            return [one for one in several or () if one]
        if self.kind is list:
            return "\n".join(map(str, value or ()))
        if self.words:
            return WITHOUT if value is None and self.is_closed else value
        return "" if value is None and self.kind is str else value

    def from_part(self, entered: Any) -> Any:
        """Return what was entered as a file of --config would hold it."""
        if self.joined:
            return ",".join(entered or ()) or None
        if self.kind is list and not self.accept:
            return [line.strip() for line in str(entered or "").splitlines() if line.strip()]
        if self.kind is int and isinstance(entered, float) and entered.is_integer():
            return int(entered)
        if isinstance(entered, str):
            entered = entered.strip()
            if self.numbers and not entered and not self.is_open:
                return []
            if self.is_open and entered in ("", *((WITHOUT,) if self.is_closed else ())):
                return None
        return entered

    def _choices(self) -> tuple[str, ...]:
        return (WITHOUT, *self.words) if self.is_open and self.is_closed else self.words


class Form:
    """Controls of the fields of a verb, `#PREFIX-NAME` each.

    Args:
        start: values that are shown at first, if other than the defaults.

    Attributes:
        parts: the controls that were added, by name.
    """

    def __init__(
        self,
        fields: Mapping[str, FormField],
        prefix: str,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self.fields, self.prefix, self.start = fields, prefix, {**(start or {})}
        self.parts: dict[str, Any] = {}  # gradio makes the events of components as it starts

    def add(self, name: str, **changed: Any) -> Any:
        """Make the control of a field where this is called."""
        field = self.fields[name]
        value = self.start.get(name, field.default)
        self.parts[name] = field.control(self.prefix, value, **changed)
        return self.parts[name]

    def row(self, *fields: str, **changed: Any) -> None:
        with gr.Row(elem_classes="ga-fields"):
            for name in fields:
                self.add(name, **{"min_width": 130, **changed})

    def rest(self, without: Collection[str] = ()) -> None:
        """Add all other fields under their groups, each folded.

        Args:
            without: fields that the screen sets by itself.
        """
        groups: dict[str, list[str]] = {}
        for name, field in self.fields.items():
            if name not in self.parts and name not in without:
                groups.setdefault(field.group, []).append(name)
        for group, some in groups.items():
            told = f"{self.prefix}-{_dashed(group.lower())}"
            with gr.Accordion(group, open=False, elem_id=told):
                self.row(*some)

    def entered(self, held: Held) -> dict[str, Any]:
        """Values of all controls, as a file of --config would hold them."""
        return {name: self.fields[name].from_part(held[x]) for name, x in self.parts.items()}

    def given(self, held: Held) -> dict[str, Any]:
        """Values that are neither empty nor the defaults."""
        return {
            name: value
            for name, value in self.entered(held).items()
            if value not in (None, "", []) and value != self.fields[name].default
        }

    def shown(self, values: Mapping[str, Any]) -> Held:
        """Return what the controls show of values; of a missing one, its default."""
        return {
            part: self.fields[name].to_part(values.get(name, self.fields[name].default))
            for name, part in self.parts.items()
        }


@cache
def fields_of_verb(verb: str) -> dict[str, FormField]:
    """Map the options of a verb to their fields, by the names that a file of --config has."""
    known = {**CONFIGS[verb].options(), **GenerateLine.options()}
    return {name: option_field(one) for name, one in known.items()}


def option_field(one: Option) -> FormField:
    """Say how a field of a config is entered."""
    several = one.kind is tuple
    in_text = several and one.joined and not one.choices  # of numbers
    kind = str if in_text or one.kind is Path else list if several else one.kind
    return FormField(
        one.name,
        kind,
        one.written(one.default),
        one.help,
        one.group,
        NoneType in members(one.hint),
        tuple(map(str, one.words)) or one.choices,
        bool(one.words),
        several and one.joined and not in_text,
        "images" if one.accept and several else one.accept,
        in_text,
    )


def typed(verb: str, given: Mapping[str, Any], *, origin: str, without: Collection[str]) -> Any:
    """Convert options to the types of their fields.

    Args:
        origin: what errors call the place that the values came from.
        without: options that are unknown there.

    Raises:
        ValueError: an unknown option, or a value of the wrong type.
    """
    config = CONFIGS[verb]
    if wrong := [name for name in given if name in without]:
        raise ValueError(f"{origin}: unknown field {wrong[0]!r}")
    read = config.read({"model": NAME, **given}, origin=origin)
    known = config.options()
    return {name: known[name].written(getattr(read, known[name].attribute)) for name in given}


def _dashed(name: str) -> str:
    return name.replace("_", "-").replace(" ", "-")
