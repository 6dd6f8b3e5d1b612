"""Forms from the fields of a config: a control for each, and the options that they come to.

A screen says which fields come first; all others fall under their groups by themselves.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import NoneType
from typing import Any, Literal

import gradio as gr
from gradio.components import Component

from gen_accel.config import Config, Option, written
from gen_accel.parsing import as_text, members
from gen_accel.paths import FILM_SUFFIXES
from gen_accel.ui.page import BUTTONS, Held
from gen_accel.ui.worker import Options, Values

LABELS = {
    **{"extend": "Techniques", "fps": "Frames a second", "set": "Options"},
    **{"quantize": "Weights held in", "cache": "Cache of steps"},
    **{"dtype": "Precision", "offload": "In CPU memory", "max_tokens": "Longest prompt"},
    "lora": "LoRAs",
    **{"preview": "Steps between previews", "timed": "Time the attention"},
}
NAMES = {"num_frames": "Frames"}  # of fields, as a pipeline refuses them
TYPES = {"int": "a whole number", "float": "a number"}
WITHOUT = "none"  # choice of no value
Shape = Literal["files", "image", "video", "words", "lines", "word", "switch", "number", "text"]


class Form:
    """Controls of the fields of a config, `#PREFIX-NAME` each.

    Args:
        config: has the fields; a new one appears here by itself.
        start: values that are shown at first, if other than the defaults.
        labels: of fields whose names say too little.

    Attributes:
        parts: the controls that were added, by name.
    """

    def __init__(
        self,
        config: type[Config],
        prefix: str,
        start: Options | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.fields, self.prefix, self.start = config.options(), prefix, {**(start or {})}
        self.labels = NAMES | {name: label_of(name) for name in self.fields} | {**(labels or {})}
        self.parts: dict[str, Any] = {}  # gradio makes the events of components as it starts

    def add(self, name: str, **changed: object) -> Any:
        """Make the control of a field where this is called.

        Args:
            changed: options of the control, in the place of what the field says.
        """
        field = self.fields[name]
        about, usual = map(self.worded, words_of(field))
        told = {"label": self.labels[name], "info": about or None}
        told |= {"elem_id": f"{self.prefix}-{_dashed(name)}"}
        value = to_part(field, self.start.get(name, written(field.default)))
        self.parts[name] = control(field, value, usual, told, changed)
        return self.parts[name]

    def row(self, *fields: str, **changed: object) -> None:
        with gr.Row(elem_classes="ga-fields"):
            for name in fields:  # a box for files has room for its own words
                about = {} if self.fields[name].accept else {"min_width": 130}
                self.add(name, **{**about, **changed})

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
            about = f"{self.prefix}-{_dashed(group.lower())}-fold"  # a field may have the name
            with gr.Accordion(group, open=False, elem_id=about):
                self.row(*some)

    def entered(self, held: Held) -> Values:
        """Values of all controls, as a file of --config would hold them."""
        return {name: from_part(self.fields[name], held[x]) for name, x in self.parts.items()}

    def given(self, held: Held) -> Values:
        """Values that are neither empty nor the defaults."""
        usual = self.entered(self.shown({}))
        return {
            name: value
            for name, value in self.entered(held).items()
            if value not in (None, "", []) and value != usual[name]
            if str(value) != str(usual[name])  # a number, and its word
        }

    def shown(self, values: Options) -> Held:
        """Return what the controls show of values; of a missing one, its default."""
        return {
            part: to_part(self.fields[name], values.get(name, self._default(name)))
            for name, part in self.parts.items()
        }

    @contextmanager
    def refused_in_words(self) -> Iterator[None]:
        """Let what the library refuses inside be said in the words of the form."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise type(error)(self.worded(str(error))) from error

    def worded(self, sentence: str) -> str:
        """Write a sentence of the library with the labels of controls in place of names, flags and
        their placeholders: "give --last-image LAST.png" becomes "give Last image". Types are in
        words too."""

        def label(found: re.Match[str]) -> str:
            return self.labels.get((found[1] or found[0]).replace("-", "_"), found[0])

        flag, name = r"--([a-z][a-z-]*)(?: [A-Z]{2,}(?:[._|]\w+)*)?", r"\b[a-z]+(?:_[a-z]+)+\b"
        sentence = re.sub(f"{flag}|{name}", label, sentence)
        typed = r"must be (int|float)(?: or none)?, got (.*); such as .*"
        return re.sub(typed, lambda found: f"must be {TYPES[found[1]]}, got {found[2]}", sentence)

    def _default(self, name: str) -> object:
        return written(self.fields[name].default)


def label_of(name: str) -> str:
    """Label of the control of a field."""
    return LABELS.get(name, name.replace("_", " ").capitalize().replace("lora", "LoRA"))


def words_of(field: Option) -> tuple[str, str]:
    """Return the help of a field in a form, and what it is if it is left empty."""
    about, *usual = re.split(r"\.? Default: |; none: ", field.form, maxsplit=1)
    return f"{about.rstrip('.')}." * bool(about), "".join(usual).rstrip(".")


def shape_of(field: Option) -> Shape:
    """Kind of control that a field has."""
    if field.accept:
        return "files" if field.kind is tuple else field.accept
    if field.kind is tuple:
        return "words" if field.joined and field.choices else "text" if field.joined else "lines"
    if field.words or field.choices:
        return "word"
    if field.kind is bool:
        return "switch"
    # gradio makes a missing number 0
    return "number" if field.kind in (int, float) and not _is_open(field) else "text"


def control(field: Option, value: object, usual: str, told: Values, changed: Values) -> Component:
    """Make the control of a field.

    Args:
        usual: what it is if it is left empty.
        told: label, info and id.
        changed: options in the place of what the field says.
    """
    shape = "word" if "choices" in changed and not field.joined else shape_of(field)
    if shape in ("files", "image", "video"):
        about: Values = {"label": told["label"], "elem_id": told["elem_id"], "height": 180}
        if shape == "files":
            films = FILM_SUFFIXES if field.accept == "video" else ()  # not all have a MIME type
            about |= {"file_count": "multiple", "file_types": [field.accept, *films]}
            return gr.File(**about | changed)
        about["sources"] = ["upload"]
        if shape == "video":
            return gr.Video(**about | changed)
        return gr.Image(type="filepath", buttons=[*BUTTONS], **about | changed)
    told = {**told, "value": value}
    words: list[Any] = [*map(str, field.words)] or [*field.choices]
    if shape == "words":
        told |= {"choices": words, "allow_custom_value": True, "multiselect": True}
        return gr.Dropdown(**told | changed)
    if shape == "word":
        if field.words and _is_open(field):
            words = [(usual or WITHOUT, WITHOUT), *words]
        told |= {"choices": words, "allow_custom_value": not field.words}
        return gr.Dropdown(**told | changed)
    if shape == "switch":
        return gr.Checkbox(**told | changed)
    if shape == "number":
        return gr.Number(**told | changed)  # without a precision, which would round silently
    if shape == "lines":
        told["info"] = f"{told['info']} One on each line."
    most = 1 if field.kind in (int, float) else 6  # one line keeps its height
    return gr.Textbox(**{"max_lines": most, "placeholder": usual, **told, **changed})


def to_part(field: Option, value: Any) -> object:
    """Return what the control of a field shows of a value."""
    match shape_of(field):
        case "files" | "image" | "video":
            return value or None
        case "switch":
            return value or False
        case "words":
            several = value.split(",") if isinstance(value, str) else value
            return [one for one in several or () if one]
        case "lines":
            return "\n".join(map(str, value or ()))
    if isinstance(value, list | tuple):
        return as_text(tuple(value))
    if field.words:
        return WITHOUT if value is None else value
    return "" if value is None and field.kind not in (int, float) else value


def from_part(field: Option, entered: Any) -> object:
    """Return what was entered as a file of --config would hold it."""
    match shape_of(field):
        case "words":
            return ",".join(entered or ()) or None
        case "lines":
            return [line.strip() for line in str(entered or "").splitlines() if line.strip()]
    if field.kind is int and isinstance(entered, float) and entered.is_integer():
        return int(entered)
    if isinstance(entered, str):
        entered = entered.strip()
        if _is_open(field) and entered in ("", *((WITHOUT,) if field.words else ())):
            return None
        if field.kind is tuple and not field.accept and not entered:
            return []
        if field.kind in (int, float):
            for kind in (int, float):
                with suppress(ValueError):
                    return kind(entered)
    return entered


def _is_open(field: Option) -> bool:
    """Whether a field may have no value."""
    return NoneType in members(field.hint)


def _dashed(name: str) -> str:
    return name.replace("_", "-").replace(" ", "-")
