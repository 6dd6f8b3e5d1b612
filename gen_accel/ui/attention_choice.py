"""Choice of the attention: a preset by name, dense, or a method of one's own with its options."""

import time

import gradio as gr
from gradio.components import Component

from gen_accel.io import read_fields
from gen_accel.pipelines.generation.config import preset_files
from gen_accel.registry import METHODS, PRESET, PRESETS, RULES
from gen_accel.ui import method_fields
from gen_accel.ui.form import Form
from gen_accel.ui.page import QUIETLY, Held, Page
from gen_accel.ui.worker import Values

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
                    method_fields.build(fields, lines, given)

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
