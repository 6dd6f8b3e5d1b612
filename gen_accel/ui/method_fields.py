"""Controls of the options of a method: menus, sliders and boxes for what `--set` takes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.components import Component

from gen_accel.ui.form import WITHOUT, label_of
from gen_accel.ui.page import QUIETLY
from gen_accel.ui.worker import Options

SHARE = "in (0, 1]"  # limits of a slider
BOOLEAN = ["true", "false"]


# Writes what differs from the defaults, in the browser: what is pressed next finds it there. Lines
# of a method within, such as "method.every=5", have no control and stay.
WRITTEN = """(text, ...entered) => {
  const usual = USUAL;
  const within = (text ?? '').split('\\n').filter((line) => line.split('=')[0].includes('.'));
  const lines = Object.keys(usual).map((name, i) => [name, entered[i] ?? '', usual[name]])
    .map(([name, value, rest]) => [name, String(value).trim(), rest, typeof value === 'number'])
    .filter(([, told, rest, number]) => number ? Number(told) !== Number(rest) : told !== rest)
    .filter(([, told]) => told !== '')
    .map(([name, told]) => `${name}=${told}`);
  return [...lines, ...within].join('\\n');
}"""


def build(known: Mapping[str, Options], lines: gr.Textbox, given: str) -> None:
    """Build a control for each option of a method, which write what differs from the defaults.

    Args:
        known: options by name, as `gen-accel list --json` has them.
        lines: field=value of each option, which the controls write.
        given: its text so far.
    """
    pairs = (line.partition("=") for line in given.splitlines())
    values = {name.strip(): text.strip() for name, _, text in pairs}
    usual = {name: one["default"] or "" for name, one in known.items()}
    made: list[Any] = []  # gradio makes the events of components as it starts
    with gr.Row(elem_classes="ga-fields"):
        for name, one in known.items():
            made.append(_control(name, one, values.get(name, usual[name])))
    written = WRITTEN.replace("USUAL", json.dumps(usual))
    for part in made:
        part.change(None, [lines, *made], [lines], js=written, **QUIETLY)


def _control(name: str, one: Options, text: str) -> Component:
    words: Sequence[str] = one["words"]
    told = {"label": label_of(name), "info": one["meaning"] or None, "min_width": 200}
    if [*words] == BOOLEAN:
        return gr.Checkbox(text.lower() == "true", interactive=True, **told)
    if words:
        value = text.lower() if text.lower() in words else text
        return gr.Dropdown([*words], value=value, interactive=True, **told)
    if one["limits"] == SHARE and text.replace(".", "", 1).isdigit():
        return gr.Slider(0.01, 1, float(text), step=0.01, interactive=True, **told)
    shown = "" if text == one["default"] else text
    usual = one["default"].replace("None", WITHOUT)
    return gr.Textbox(shown, placeholder=usual, max_lines=1, interactive=True, **told)
