"""Choices that take more than a field: the attention, with the options of a method, and LoRAs."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from safetensors import SafetensorError, safe_open

from gen_accel.hub import parted
from gen_accel.io import read_fields
from gen_accel.pipelines.generation.config import preset_files
from gen_accel.registry import METHODS, PRESET, PRESETS, RULES
from gen_accel.ui.form import WITHOUT, Form, label_of
from gen_accel.ui.page import QUIETLY, TELLING, Held, Page
from gen_accel.ui.worker import Options, Values

# Of events that may come fast, each of which runs, one after another.
ORDERED: Values = {
    "show_progress": "hidden",
    "trigger_mode": "multiple",
    "concurrency_limit": 1,
}
DENSE, OWN = "dense", "own"  # beside the names of presets
# Presets from fast to exact, each with the share of the key blocks that its rule computes exactly.
CHOICES = {
    **{x: f"{x.capitalize()}, {100 * RULES[x].critical:.0f} %" for x in reversed(PRESETS)},
    DENSE: "Dense, 100 %",
    OWN: "Own settings",
}
METHOD_CHOICES = sorted((name for name in METHODS if name != DENSE), key="piecewise".__ne__)
FIELDS = ("method", "set", "preset", "dense_start", "dense_end", "dense_steps", "dense_layers")
OWN_START = {"method": "piecewise", "dense_start": 0.2}  # of own settings at first
SHARE = "in (0, 1]"  # limits of a slider
BOOLEAN = ["true", "false"]
MOST_LORAS = 6  # LoRAs at once
LOOKED_AT = 1000  # files of a folder
ABOUT_LORAS = "Of the folders that the page reads, each with a weight."
NO_LORA = "There is none in the folders that the page reads."
FOLDER_FILE = "pytorch_lora_weights.safetensors"  # which its folder stands for

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


def what_presets_lose() -> str:
    """Say how far the clips of each preset lie from the dense ones, as their files record it."""
    told = []
    for name in reversed(PRESETS):
        [file] = preset_files(name)  # of the embedded model
        scores = [one["score"] for one in read_fields(file)["measured"]["held_out"]]
        mean = sum(scores) / len(scores)
        told.append(f"{name.capitalize()} {mean:.0f} dB on average, {min(scores):.0f} at worst")
    return (
        "Share of the attention that is computed exactly. Less is faster, and farther from the "
        f"dense clip. Presets tuned for the demo, on other prompts: {'; '.join(told)}. From 30 dB "
        "on differences are hard to see."
    )


class AttentionChoice:
    """Radio of presets, dense and own settings, and below it what own settings are.

    Args:
        form: has the fields of the attention.
        dense: whether dense is a choice.
        text: field for options of the method, as text.
    """

    def __init__(
        self,
        page: Page,
        form: Form,
        *,
        dense: bool = True,
        text: str = "set",
    ) -> None:
        prefix, self.page, self.form = form.prefix, page, form
        self.quality = gr.Radio(
            [(words, name) for name, words in CHOICES.items() if dense or name != DENSE],
            value=PRESET,
            label="Attention",
            elem_id=f"{prefix}-quality",
            info=what_presets_lose(),
        )
        with gr.Group(visible=False) as own:
            method = form.add("method", choices=METHOD_CHOICES, allow_custom_value=False)
            place = gr.Column(elem_id=f"{prefix}-fields")
            with gr.Accordion("The same as text", open=False, elem_id=f"{prefix}-set-fold"):
                lines = form.add(text, show_label=False)
            form.row(*(name for name in FIELDS[2:] if name in form.fields))
        self.renewed = gr.State(0.0)  # when options of a method came from elsewhere
        shows = {"fn": lambda now: gr.update(visible=now == OWN), "inputs": [self.quality]}
        self.quality.change(**shows, outputs=[own], api_visibility="private", **ORDERED)
        method.input(None, None, [lines], js="() => ''", **QUIETLY)
        triggers = [self.quality.change, method.change, self.renewed.change]
        with place:

            @gr.render([self.quality, method, lines], triggers=triggers, **ORDERED)
            def show(quality: str, name: str, given: str) -> None:
                if quality == OWN:
                    known = page.questions.known("list")["methods"]
                    fields = {one["name"]: one["fields"] for one in known}.get(name, {})
                    _build_options(fields, lines, given)

    @property
    def parts(self) -> set[Component]:
        return {self.quality, self.renewed}

    def applied(self, found: Values, held: Held) -> Values:
        """Return options as the choice has them: a preset's name, dense, or own settings."""
        quality = held[self.quality]
        if quality == OWN:
            without = ("method", "set") if "preset" in found else ()
            return {name: value for name, value in found.items() if name not in without}
        others = {name: value for name, value in found.items() if name not in FIELDS}
        return {**others, **({"method": DENSE} if quality == DENSE else {"preset": quality})}

    def shown(self, quality: str) -> Held:
        return {self.quality: quality, self.renewed: time.monotonic()}


def _build_options(known: Mapping[str, Options], lines: gr.Textbox, given: str) -> None:
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


class LoraChoice:
    """Menu of the LoRAs below the folders of a page, and a slider for each that is chosen."""

    def __init__(self, page: Page, prefix: str) -> None:
        self.chosen = gr.Dropdown(
            [],
            value=[],
            multiselect=True,
            max_choices=MOST_LORAS,
            allow_custom_value=True,
            label="LoRAs",
            info=ABOUT_LORAS,
            elem_id=f"{prefix}-lora",
        )
        with gr.Row(elem_classes="ga-fields"):
            self.weights = [
                gr.Slider(-1, 2, 1, step=0.05, visible=False, elem_id=f"{prefix}-weight-{i + 1}")
                for i in range(MOST_LORAS)
            ]
        self._before = gr.State([])
        self.chosen.change(self._of_choice, {*self.parts}, [*self.parts], **TELLING)
        page.tab.change(lambda: self._listed(page), None, [self.chosen], **QUIETLY)

    @property
    def parts(self) -> set[Component]:
        return {self.chosen, self._before, *self.weights}

    def texts(self, held: Held) -> list[str]:
        """Write the choice as `--lora` takes it: "folder:0.8"."""
        # A weight of 1 goes without saying, unless the name would be split.
        return [
            f"{name}:{weight:g}" if weight != 1 or parted(name)[0] != name else name
            for name, weight in self._weighted(held).items()
        ]

    def shown(self, texts: Sequence[str]) -> Held:
        """Return what the controls show of such texts."""
        found = dict(map(parted, texts[:MOST_LORAS]))
        return {self.chosen: [*found], self._before: [*found], **self._sliders(found)}

    def _of_choice(self, held: Held) -> Held:
        """Keep the weight of each LoRA that stays."""
        found = self._weighted(held)
        return {self._before: [*found], self.chosen: gr.skip(), **self._sliders(found)}

    def _weighted(self, held: Held) -> dict[str, float]:
        """Map each LoRA that is chosen to its weight, whose slider may not have followed yet."""
        before = zip(held[self._before], (held[one] for one in self.weights), strict=False)
        known = dict(before)
        return {name: known.get(name, 1) for name in held[self.chosen] or ()}

    def _sliders(self, weights: dict[str, float]) -> Held:
        shown: list[object] = [
            gr.update(visible=True, value=weight, label=f"Weight of {Path(name).name}")
            for name, weight in weights.items()
        ]
        shown += [gr.update(visible=False, value=1)] * (MOST_LORAS - len(shown))
        return dict(zip(self.weights, shown, strict=True))

    def _listed(self, page: Page) -> Held:
        folders = [*page.places.read, page.places.folder]
        found = [*loras_in(folders), *page.places.hub]
        return {self.chosen: gr.update(choices=found, info=ABOUT_LORAS if found else NO_LORA)}


def loras_in(folders: Iterable[Path]) -> list[tuple[str, str]]:
    """Words and path of each LoRA below folders: its folder, if that holds one by the usual name,
    else its file."""
    found = dict[str, str]()
    for folder in folders:
        for file in islice(folder.rglob("*.safetensors"), LOOKED_AT):
            if not _holds_lora(file):
                continue
            place = file.parent if file.name == FOLDER_FILE else file
            within = place.relative_to(folder)
            found.setdefault(str(place), str(within) if within.parts else place.name)
    return sorted((words, place) for place, words in found.items())


def _holds_lora(file: Path) -> bool:
    """Whether a file has tensors by the names that LoRAs have in any format."""
    try:
        with safe_open(file, "np") as held:
            names = held.keys()
            return any("lora_" in name or ".lora." in name for name in names)
    except (OSError, SafetensorError):
        return False
