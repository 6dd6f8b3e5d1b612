"""The screen Longer: videos several times as long as a model was trained on."""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr
import numpy as np
from pandas import DataFrame

from gen_accel import demo
from gen_accel.cli.metrics import motion_rows
from gen_accel.io import read_fields
from gen_accel.measure.pictures import contact_sheet
from gen_accel.measure.video_io import read_stream
from gen_accel.ui.choices import FIELDS
from gen_accel.ui.form import from_part
from gen_accel.ui.page import (
    ADDING,
    ASKING,
    BUTTONS,
    QUIETLY,
    TELLING,
    Held,
    Page,
    follow,
    html,
    json_link,
    refusing,
)
from gen_accel.ui.queue import DONE
from gen_accel.ui.screens.generate import RunForm, tab_of
from gen_accel.ui.worker import Options, Values

TIMES, MOST_TIMES, STEP = 4, 6, 4  # of the trained length, at first and at most; frames
SHEET = 9  # frames of a contact sheet
CHANNELS = {"red": "#dc2626", "green": "#16a34a", "blue": "#2563eb", "contrast": "#6b7280"}
WHAT = (
    "Beyond the length that it was trained on, a model repeats itself, freezes or drifts. These "
    "techniques help without training; a LoRA that was trained at the new length helps most."
)
MEANING = {
    "loop score": "0: never returns, 1: repeats itself exactly",
    "colour drift": "0: colours stay as they were",
    "contrast drift": "0: contrast stays as it was",
    "dynamic degree": "share of the time in which something crosses over 2.3 % of the picture's "
    "smaller side in an eighth of a second; slower moves are below what it sees",
    "flicker": "1: each frame is like the one before",
    "similarity": "of frames that are the trained length apart; 1: it is the beginning again, 0: "
    "as unlike as any two frames, below 0: less alike than these",
}


class LongForm(RunForm):
    """Form of a run with techniques, which come first."""

    def asked(self, held: Held) -> tuple[Values, Values]:
        options, files = super().asked(held)
        if options.get("from_lora"):  # which brings its own
            options = {name: x for name, x in options.items() if name not in FIELDS}
        elif "extend" not in options:
            options["extend"] = "none"
            options.pop("trained_frames", None)
        return options, files

    def filled(self, options: Options) -> Held:
        shown = {name: x for name, x in options.items() if (name, x) != ("extend", "none")}
        trained = options.get("trained_frames") or self._trained(options["model"])
        frames = {**_lengths(trained), "value": options.get("frames")}
        found = super().filled({**shown, "trained_frames": trained})
        return {**found, self.parts["frames"]: gr.update(**frames)}

    def at_first(self) -> Held:
        model = self.page.models[0]
        return super().at_first() if model == demo.NAME else self.of_model(model)

    def of_model(self, model: str) -> Held:
        """Set the length that a model was trained on, and a slider for it."""
        known = self._trained(model)
        parts = self.parts
        return {parts["trained_frames"]: known, parts["frames"]: gr.update(**_lengths(known))}

    def _trained(self, model: str) -> int:
        asked = {"extend": "all", "model": model}
        return self.page.questions.known("show", asked)["trained_frames"]


def build(page: Page) -> None:
    gr.HTML(html("hint", WHAT))
    trained = demo.TRAINED_FRAMES
    with gr.Row(elem_classes="ga-columns"):
        with gr.Column(scale=5, min_width=300):
            form = LongForm(
                page,
                "long",
                start={"trained_frames": trained},
                first=("extend", "trained_frames", "from_lora"),
                frames={**_lengths(trained), "step": STEP},
            )
            techniques = gr.HTML(elem_id="long-techniques")
            run = gr.Button("Make it longer", variant="primary", elem_id="long-run")
        with gr.Column(scale=7, min_width=300):
            view = follow(page, "long", kind="longer")
            film = gr.HTML(html("blank", "The video appears"), elem_id="long-result")
            figures = gr.HTML(elem_id="long-figures")
            with gr.Column(visible=False, elem_id="long-charts") as charts:
                with gr.Row():
                    about: Values = {"height": 240, "min_width": 280}
                    about |= {"x": "frames apart", "y": "similarity"}
                    told = {"title": "Does it start again?", "y_title": "similarity, 1: the same"}
                    loop = gr.LinePlot(y_lim=[-1, 1], elem_id="long-loop", **told, **about)
                    about |= {"x": "frame", "y": "drift", "color": "of", "color_map": CHANNELS}
                    about |= {"title": "Does it drift from the start?", "color_title": ""}
                    drift = gr.LinePlot(elem_id="long-drift", **about)
                gr.Markdown("### The whole clip at a glance")
                hidden: Values = {"show_label": False, "interactive": False}
                sheet = gr.Image(elem_id="long-sheet", buttons=[*BUTTONS], **hidden)
    names = ("extend", "trained_frames", "from_lora", "frames")
    extend, own, lora, frames = (form.parts[name] for name in names)

    def trained_frames(held: Held) -> object:
        return from_part(form.fields["trained_frames"], held[own])

    def submit(held: Held) -> Held:
        kept = {"trained": trained_frames(held)}
        title = f", {held[frames]} frames"
        return {view.job: form.submit(held, "longer", title, about=kept).id}

    def look(held: Held) -> Held:
        """Say what each technique does, and which go with the chosen ones."""
        options = {
            "model": held[form.model],
            "frames": held[frames],
            "trained_frames": trained_frames(held),
        }
        options["extend"] = ",".join(held[extend] or ()) or "all"
        found = page.questions.known("show", options)["techniques"]
        rows = [
            [x["name"], x["effect"] or (x["refused"] and f"no: {x['refused']}") or x["does"]]
            for x in found
        ]
        return {techniques: html("table", ("technique", "what it does here"), rows, 0)}

    def listed() -> Held:
        folders = [Path(demo.__file__).parent, *page.places.read, page.places.folder]
        return {lora: gr.update(choices=[("none", ""), *long_loras(folders)])}

    def show(name: str) -> Held:
        job = page.queue.job(name)
        if job.state != DONE:  # its own error stays
            return {view.error: gr.skip()}
        place, lag = page.queue.place(job) / "video.mp4", job.about.get("trained")
        options: Values = {"videos": [str(place)], "by_frame": True}
        if isinstance(lag, int) and lag < (job.options.get("frames") or 0):
            options["lag"] = lag
        found = page.questions.ask("metrics", options)
        course = found.pop("by_frame")
        saved = json_link("Figures (JSON)", found, "metrics.json")
        pixels = np.concatenate([*read_stream(place)])
        return {
            film: html("video", page.url(job, "video.mp4"), job.title),
            figures: motion_table(found) + saved,
            charts: gr.update(visible=True),
            loop: DataFrame(loop_table(course["similarity"])),
            drift: DataFrame(drift_table(course["colors"], course["contrasts"])),
            sheet: contact_sheet([pixels], [job.title], count=SHEET),
        }

    inputs = {*form.inputs, page.tab}
    run.click(refusing(submit, view.error), inputs, [view.error, view.job], **ADDING)
    # Their refusals stand beside them: the error of a job stays while they come.
    events = [tab_of().select, frames.change, own.change, extend.change]
    asked = {form.model, frames, own, extend}
    gr.on(events, refusing(look, techniques), asked, [techniques], **ASKING)
    set_length = refusing(form.of_model, techniques)
    form.model.input(set_length, [form.model], [techniques, own, frames], **TELLING)
    page.tab.change(listed, None, [lora], **QUIETLY)
    view.at_end(show, [film, figures, charts, loop, drift, sheet])
    form.come_back("longer")
    form.watch()


def long_loras(folders: Sequence[Path]) -> list[tuple[str, str]]:
    """Words and folder of each LoRA below folders that holds techniques for longer video."""
    found = {}
    for file in (file for folder in folders for file in sorted(folder.rglob("gen_accel.json"))):
        try:
            data = read_fields(file)
        except (OSError, ValueError):
            continue  # of another program
        names, place = data.get("techniques"), file.parent
        if isinstance(names, list) and names and [*place.glob("*.safetensors")]:
            named = place.parent.name if place.name == "lora" else place.name
            words = f"{named}: {data.get('frames')} frames, {', '.join(map(str, names))}"
            found[str(place)] = words
    return [(words, place) for place, words in found.items()]


def drift_table(
    colors: Sequence[Sequence[float]], contrasts: Sequence[float]
) -> dict[str, list[float | str]]:
    """Columns of a chart: how far colours and contrast lie from the first frame's, by frame."""
    looks = [(*color, contrast) for color, contrast in zip(colors, contrasts, strict=True)]
    return {
        "frame": [i for i in range(len(looks)) for _ in CHANNELS],
        "drift": [x - start for row in looks for x, start in zip(row, looks[0], strict=True)],
        "of": [name for _ in looks for name in CHANNELS],
    }


def loop_table(similarity: Sequence[float | None]) -> dict[str, list[float]]:
    """Columns of a chart: how alike frames are, by the number of frames between them.

    It goes to two thirds of the clip, as far as a loop is looked for, and down to -1.
    """
    lags = similarity[: 2 * len(similarity) // 3 + 1]
    seen = [(lag, x) for lag, x in enumerate(lags) if lag and x is not None]
    return {
        "frames apart": [lag for lag, _ in seen],
        "similarity": [max(x, -1.0) for _, x in seen],
    }


def motion_table(found: Options) -> str:
    """Table of what a video does over time, with what it means.

    Args:
        found: what `gen-accel metrics --json` writes of one video.
    """
    rows = [[name, value, MEANING.get(name, "")] for name, value in motion_rows(found).items()]
    return html("table", ("over time", "value", "what it says"), rows)


def _lengths(trained: int) -> Values:
    """Range of the slider of frames, up to six times as many as a model was trained at."""
    most, value = MOST_TIMES * (trained - 1) + 1, TIMES * (trained - 1) + 1
    info = f"The model was trained on {trained}."
    return {"minimum": trained, "maximum": most, "value": value, "info": info}
