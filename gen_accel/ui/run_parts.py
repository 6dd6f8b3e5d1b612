"""Parts that the screens Compare and Longer share: what is generated, and by which attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from gen_accel.demo import NAME
from gen_accel.demo.words import PROMPT, SEED
from gen_accel.names import METHODS, PRESETS
from gen_accel.ui.page import QUIETLY, Page

OWN = "a method"  # of the setting, in the place of a preset's name
SIZE, STEPS, GUIDANCE = 96, 20, 3.0  # of the demo model; others have their own
DENSE = "dense"
MEANING = {
    "fast": "fast: most speed",
    "balanced": "balanced",
    "quality": "quality: closest to dense",
    OWN: "a method of your choice",
}


@dataclass(frozen=True)
class RunParts:
    """Components that describe a run, and what they come to.

    Args:
        sizes: frames, height, width, steps, guidance scale and seed.
    """

    model: gr.Dropdown
    prompt: gr.Textbox
    setting: gr.Radio
    method: gr.Dropdown
    settings: gr.Textbox
    dense_start: gr.Slider
    sizes: tuple[gr.Number | gr.Slider, ...]

    @property
    def inputs(self) -> list[Any]:
        attention = [self.setting, self.method, self.settings, self.dense_start]
        return [self.model, self.prompt, *attention, *self.sizes]

    @property
    def heavy(self) -> list[Any]:
        """Parts that the cost of a run depends on."""
        return [one for one in self.inputs if one not in (self.prompt, self.sizes[-1])]


def run_parts(
    page: Page,
    prefix: str,
    *,
    frames: Any,
    settings: Sequence[str],
    methods: Sequence[str] = METHODS,
    method: str = "radial",
) -> RunParts:
    """Build `#PREFIX-model`, `-prompt`, `-setting`, `-method`, `-settings`, `-dense-start`,
    `-height`, `-width`, `-steps`, `-guidance` and `-seed`.

    Args:
        frames: the component of the frames, which is placed here.
        settings: to choose from, of `PRESETS` and `OWN`; the first is chosen.
        methods: to choose from.
        method: that is chosen at first.
    """
    model = gr.Dropdown(
        [*page.models],
        value=page.models[0],
        label="Model",
        elem_id=f"{prefix}-model",
        allow_custom_value=True,
    )
    prompt = gr.Textbox(PROMPT, label="Prompt", elem_id=f"{prefix}-prompt", lines=2)
    setting = gr.Radio(
        [(MEANING[one], one) for one in settings],
        value=settings[0],
        label="Sparse attention",
        info="A preset is what was tuned for the model, or a rule where nothing was.",
        elem_id=f"{prefix}-setting",
    )
    with gr.Group(visible=settings[0] == OWN) as group:
        with gr.Row():
            chosen = gr.Dropdown(
                [*methods],
                value=method,
                label="Method",
                elem_id=f"{prefix}-method",
            )
            fields = gr.Textbox(
                label="Its options",
                placeholder="decay_factor=0.5",
                info="Several with a space between.",
                elem_id=f"{prefix}-settings",
            )
        dense_start = gr.Slider(
            0,
            1,
            0.25,
            step=0.05,
            label="Share of the first steps that stay dense",
            elem_id=f"{prefix}-dense-start",
        )
    setting.change(lambda one: gr.update(visible=one == OWN), [setting], [group], **QUIETLY)
    if not frames.is_rendered:
        frames.render()
    with gr.Accordion("Size, steps and seed", open=False), gr.Row():
        sizes = [
            gr.Number(value, label=label, precision=digits, min_width=100, elem_id=f"{prefix}-{n}")
            for n, label, value, digits in (
                ("height", "Height, pixels", SIZE, 0),
                ("width", "Width, pixels", SIZE, 0),
                ("steps", "Steps", STEPS, 0),
                ("guidance", "Guidance", GUIDANCE, None),
                ("seed", "Seed", SEED, 0),
            )
        ]
    # Sizes of the demo model fit no other, which has its own.
    model.change(
        lambda name: [SIZE, SIZE, STEPS, GUIDANCE] if name == NAME else [None] * 4,
        [model],
        sizes[:4],
        **QUIETLY,
    )
    return RunParts(model, prompt, setting, chosen, fields, dense_start, (frames, *sizes))


def options_of(values: Sequence[Any]) -> dict[str, Any]:
    """Options of `gen-accel generate` that the values of `RunParts.inputs` come to."""
    model, prompt, setting, method, settings, dense_start, *sizes = values
    frames, height, width, steps, guidance, seed = sizes
    found: dict[str, Any] = {"model": model, "prompt": [prompt]}
    if setting in PRESETS:
        found["preset"] = setting
    else:
        found |= {"method": method, "set": (settings or "").split()}
        found["dense_start"] = dense_start if method != DENSE else 0.0
    found |= {"height": whole(height), "width": whole(width), "steps": whole(steps)}
    return found | {
        "frames": whole(frames),
        "guidance_scale": guidance,
        "seed": whole(seed) or 0,
    }


def whole(value: float | None) -> int | None:
    """A number of a page, which may be empty or 33.0, as a whole one."""
    return None if value is None else round(value)
