"""Controls of the options of a method: menus, sliders and boxes for what `--set` takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.components import Component

from gen_accel.parsing import as_text
from gen_accel.ui.form import label_of
from gen_accel.ui.page import QUIETLY
from gen_accel.ui.worker import Options, Values

SHARE = "in (0, 1]"  # limits of a slider
BOOLEAN = ["true", "false"]


def build(known: Mapping[str, Options], lines: gr.Textbox, given: str) -> None:
    """Build a control for each option of a method, which write what differs from the defaults.

    Args:
        known: options by name, as `gen-accel list --json` has them.
        lines: field=value of each option, which follows the controls.
        given: its text so far.
    """
    values: Values = dict(map(parted, given.splitlines()))
    made: dict[str, Any] = {}  # gradio makes the events of components as it starts
    with gr.Row(elem_classes="ga-fields"):
        for name, one in known.items():
            made[name] = _control(name, one, values.get(name, one["default"]))

    def written(*entered: object) -> str:
        of_controls = dict(zip(made, entered, strict=True))
        others = {name: text for name, text in values.items() if "." in name}  # of a method within
        return lines_of(known, of_controls | others)

    for part in made.values():
        part.change(written, [*made.values()], [lines], **QUIETLY)


def parted(line: str) -> tuple[str, str]:
    """Split "field = value"."""
    name, _, text = line.partition("=")
    return name.strip(), text.strip()


def lines_of(known: Mapping[str, Options], entered: Options) -> str:
    """Write values of options as lines, but for defaults and empty ones."""
    texts = {name: as_text(value).strip() for name, value in entered.items() if value is not None}
    usual = {name: one["default"] for name, one in known.items()}
    return "\n".join(f"{n}={x}" for n, x in texts.items() if x not in ("", usual.get(n)))


def _control(name: str, one: Options, text: str) -> Component:
    words: Sequence[str] = one["words"]
    told = {"label": label_of(name), "info": one["meaning"] or None, "min_width": 200}
    if [*words] == BOOLEAN:
        return gr.Checkbox(text.lower() == "true", interactive=True, **told)
    if words:
        value = text.lower() if text.lower() in words else text
        return gr.Dropdown([*words], value=value, interactive=True, **told)
    if one["limits"] == SHARE:
        return gr.Slider(0.01, 1, float(text), step=0.01, interactive=True, **told)
    shown = "" if text == one["default"] else text
    return gr.Textbox(shown, placeholder=one["default"], max_lines=1, interactive=True, **told)
