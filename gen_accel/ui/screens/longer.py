"""The screen Longer: videos several times as long as a model was trained on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from gen_accel import demo
from gen_accel.cli.metrics import motion_rows
from gen_accel.io import read_fields
from gen_accel.measure.pictures import contact_sheet
from gen_accel.measure.video_io import read_stream
from gen_accel.registry import PRESETS, TECHNIQUES, split_technique
from gen_accel.ui.page import (
    ADDING,
    ASKING,
    PRIVATELY,
    QUIETLY,
    TELLING,
    Followed,
    Held,
    Page,
    charted,
    follow,
    html,
    json_link,
    refusing,
)
from gen_accel.ui.queue import DONE
from gen_accel.ui.screens.generate import ATTENTION, DENSE, OWN, RunForm, tab_of
from gen_accel.ui.worker import Options, Values

TIMES, MOST_TIMES, STEP = 4, 6, 4  # of the trained length, at first and at most; frames
SHEET = 9  # frames of a contact sheet
CHANNELS = {"red": "#dc2626", "green": "#16a34a", "blue": "#2563eb", "contrast": "#6b7280"}
WEIGHTS, CONFIG = "pytorch_lora_weights.safetensors", "gen_accel.json"  # of a trained LoRA
WHAT = (
    "Beyond the length that it was trained on, a model repeats itself, freezes or drifts. These "
    "techniques help without training; a LoRA that was trained at the new length helps most."
)
MEANING = {
    "loop score": "0: never returns, 1: repeats itself exactly",
    "colour drift": "0: colours stay as they were",
    "contrast drift": "0: contrast stays as it was",
    "dynamic degree": "share of the time in which something moves",
    "flicker": "1: each frame is like the one before",
}


def build(page: Page) -> None:
    gr.HTML(html("hint", WHAT))
    trained = demo.TRAINED_FRAMES
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            form = RunForm(
                page,
                "long",
                qualities=(OWN, *PRESETS[::-1], DENSE),
                start={"dense_start": 0.25},
                without=("extend", "trained_frames", "from_lora"),
                frames={**_lengths(trained), "step": STEP},
            )
            form.add("trained_frames", value=trained, label="Trained on, frames")
            lora = form.add("from_lora", choices=[], info="Brings its attention and techniques.")
            with gr.Group():
                boxes = {
                    name: gr.Checkbox(False, label=name, elem_id=f"long-technique-{name}")
                    for name in TECHNIQUES
                }
            settings = gr.Textbox(
                label="Settings of techniques",
                placeholder="fresh_noise:shift=22",
                info="Several with a comma between. Without: their defaults.",
                elem_id="long-settings-of",
            )
            effect = gr.HTML(elem_id="long-effect")
            run = gr.Button("Make it longer", variant="primary", elem_id="long-run")
        with gr.Column(scale=7, min_width=300):
            view = follow(page, "long", kind="longer")
            results = _Results(page, view)
    frames, own = form.parts["frames"], form.parts["trained_frames"]
    techniques = {settings, *boxes.values()}

    def chosen(held: Held) -> list[str]:
        ticked = [name for name, box in boxes.items() if held[box]]
        return with_settings(ticked, held[settings] or "")

    def asked(held: Held) -> tuple[Values, Values]:
        """Add the techniques and the LoRA to what the form holds."""
        options, files = form.asked(held)
        if options.get("from_lora"):
            for name in ATTENTION:
                options.pop(name, None)
        names = chosen(held)
        options["extend"] = ",".join(names) or "none"
        if not names:
            options.pop("trained_frames", None)
        return options, files

    def submit(held: Held) -> Held:
        options, files = asked(held)
        title = f"{' '.join(options['prompt'])}, {options['frames']} frames"
        about = {"title": title, "tab": held[page.tab], "kind": "longer", "given": files}
        options |= {"out": "{job}/video.mp4"}
        kept = {"trained": held[own]}
        return {view.job: page.submit("generate", options, about=kept, **about).id}

    def look(held: Held) -> Held:
        """Say what goes with the chosen techniques, and what they do."""
        options = {"model": held[form.model], "frames": held[frames], "trained_frames": held[own]}
        options["extend"] = ",".join(chosen(held)) or "all"
        found = page.questions.known("show", options)["techniques"]
        shown: Held = {}
        for one in found:
            why = f" Not now: {one['refused']}." if one["refused"] else ""
            about = {"info": one["does"] + why, "interactive": not why}
            shown[boxes[one["name"]]] = gr.update(**about)
        told = [f"{one['name']}: {one['effect']}" for one in found if one["effect"]]
        return {**shown, effect: html("notes", told)}

    def of_model(model: str) -> Held:
        """Set the length that a model was trained on, and a slider for it."""
        known = page.questions.known("show", {"extend": "all", "model": model})["trained_frames"]
        return {own: known, frames: gr.update(**_lengths(known))}

    def of_lora(folder: str) -> Held:
        """Tick the techniques of a LoRA, and count from its length."""
        found = {str(one.folder): one for one in loras_in(_folders(page))}.get(folder)
        held = () if found is None else found.techniques
        names = {one.partition(":")[0] for one in held}
        shown: Held = {box: name in names for name, box in boxes.items()}
        shown |= {settings: ",".join(one for one in held if ":" in one)}
        shown |= {form.quality: gr.update(interactive=found is None)}
        return shown if found is None else {**shown, own: found.trained_frames}

    def listed() -> Held:
        known = [(one.words, str(one.folder)) for one in loras_in(_folders(page))]
        return {lora: gr.update(choices=[("none", ""), *known])}

    inputs = {*form.inputs, *techniques, page.tab}
    run.click(refusing(submit, view.error), inputs, [view.error, view.job], **ADDING)
    what, looked = {form.model, frames, own, *techniques}, [view.error, effect, *boxes.values()]
    again: Values = {"fn": refusing(look, view.error), "inputs": what, "outputs": looked}
    events = [tab_of().select, frames.change, own.change]
    gr.on([*events, settings.blur, *(one.input for one in boxes.values())], **again, **ASKING)
    of_one: Any = {"outputs": [view.error, own, frames, form.quality, settings, *boxes.values()]}
    form.model.change(refusing(of_model, view.error), [form.model], **of_one, **TELLING).then(
        **again, **TELLING
    )
    lora.change(refusing(of_lora, view.error), [lora], **of_one, **TELLING).then(
        **again, **TELLING
    )
    page.tab.change(listed, None, [lora], **QUIETLY)
    view.ended.change(
        refusing(results.show, view.error),
        [view.ended],
        [view.error, *results.parts],
        **PRIVATELY,
    )
    form.watch(asked, techniques)


class _Results:
    """The right column: a video, whether it repeats itself and whether it drifts."""

    def __init__(self, page: Page, view: Followed) -> None:
        self.page, self.view = page, view
        self.film = gr.HTML(elem_id="long-video")
        self.figures = gr.HTML(elem_id="long-figures")
        about: Values = {"height": 240, "min_width": 280}
        with gr.Column(visible=False, elem_id="long-charts") as self.charts:
            with gr.Row():
                self.loop = gr.LinePlot(
                    x="frames apart",
                    y="similarity",
                    title="Does it repeat?",
                    elem_id="long-loop",
                    **about,
                )
                self.drift = gr.LinePlot(
                    x="frame",
                    y="drift",
                    color="of",
                    title="Does it drift from its first frame?",
                    color_map=CHANNELS,
                    elem_id="long-drift",
                    **about,
                )
            label = "The whole clip at a glance"
            self.sheet = gr.Image(label=label, interactive=False, elem_id="long-sheet")
        self.parts = [self.film, self.figures, self.charts, self.loop, self.drift, self.sheet]

    def show(self, name: str) -> Held:
        job = self.page.queue.job(name)
        if job.state != DONE:  # its own error stays
            return {self.view.error: gr.skip()}
        place, lag = self.page.queue.place(job) / "video.mp4", job.about.get("trained")
        options: Values = {"videos": [str(place)], "by_frame": True}
        if isinstance(lag, int) and lag < (job.options.get("frames") or 0):
            options["lag"] = lag
        found = self.page.questions.ask("metrics", options)
        course = found.pop("by_frame")
        saved = json_link("Figures (JSON)", found, "metrics.json")
        rows = motion_words(found, lag)
        return {
            self.film: html("video", self.page.url(job, "video.mp4"), job.title),
            self.figures: html("table", ("over time", "value", "what it says"), rows) + saved,
            self.charts: gr.update(visible=True),
            self.loop: charted(loop_table(course["similarity"])),
            self.drift: charted(drift_table(course["colors"], course["contrasts"])),
            self.sheet: sheet_of(place, job.title),
        }


@dataclass(frozen=True)
class LongLoRA:
    """A LoRA of `gen-accel train` that holds techniques for longer video.

    Args:
        techniques: with their settings.
        trained_frames: of the model that it was trained on.
        frames: of the longest clips that it saw.
    """

    folder: Path
    techniques: tuple[str, ...]
    trained_frames: int
    frames: int
    holds_guidance: bool

    @property
    def words(self) -> str:
        guided = ", without guidance" if self.holds_guidance else ""
        place = self.folder.parent.name if self.folder.name == "lora" else self.folder.name
        return f"{place}: {self.frames} frames, {', '.join(self.techniques)}{guided}"


def loras_in(folders: Iterable[Path]) -> list[LongLoRA]:
    """LoRAs below folders that were trained here and hold techniques for longer video."""
    found = {}
    for file in (file for folder in folders for file in sorted(folder.rglob(CONFIG))):
        try:
            data = read_fields(file)
        except (OSError, ValueError):
            continue  # of another program
        names, guidance = data.get("techniques"), data.get("teacher_guidance", 1.0)
        trained, frames = data.get("trained_frames"), data.get("frames")
        if not (isinstance(names, list) and names and (file.parent / WEIGHTS).is_file()):
            continue
        if isinstance(trained, int) and isinstance(frames, int):
            guided = isinstance(guidance, int | float) and guidance > 1
            named = tuple(map(str, names))
            found[file.parent] = LongLoRA(file.parent, named, trained, frames, guided)
    return [*found.values()]


def with_settings(chosen: Iterable[str], settings: str) -> list[str]:
    """Give settings, as in "fresh_noise:shift=22,riflex:k=4", to the chosen techniques.

    Raises ValueError for settings of a technique that is not chosen.
    """
    names, given = {*chosen}, {}
    for part in filter(None, (one.strip() for one in settings.split(","))):
        name, values = split_technique(part)
        if name not in names or not values:
            raise ValueError(
                "settings are of techniques that are chosen, as in fresh_noise:shift=22, got "
                f"{part!r}"
            )
        given[name] = part
    return [given.get(name, name) for name in TECHNIQUES if name in names]


def drift_table(
    colors: Sequence[Sequence[float]], contrasts: Sequence[float]
) -> dict[str, list[Any]]:
    """Columns of a chart: how far colours and contrast lie from the first frame's, by frame."""
    looks = [(*color, contrast) for color, contrast in zip(colors, contrasts, strict=True)]
    return {
        "frame": [i for i in range(len(looks)) for _ in CHANNELS],
        "drift": [x - start for row in looks for x, start in zip(row, looks[0], strict=True)],
        "of": [name for _ in looks for name in CHANNELS],
    }


def loop_table(similarity: Sequence[float | None]) -> dict[str, list[Any]]:
    """Columns of a chart: how alike frames are, by the number of frames between them.

    It goes to two thirds of the clip, as far as a loop is looked for.
    """
    lags = similarity[: 2 * len(similarity) // 3 + 1]
    seen = [(lag, x) for lag, x in enumerate(lags) if lag and x is not None]
    return {"frames apart": [lag for lag, _ in seen], "similarity": [x for _, x in seen]}


def motion_words(found: Options, trained: int | None) -> list[list[str]]:
    """Rows of what a video does over time, and what it means.

    Args:
        found: what `gen-accel metrics --json` writes of one video.
        trained: the lag that the similarity was asked at; None: none was.
    """
    apart = f"of frames {trained} apart, as far as it was trained: 1 is the same again"
    meaning = {**MEANING, "similarity": apart}
    return [[name, value, meaning.get(name, "")] for name, value in motion_rows(found).items()]


def sheet_of(video: Path, title: str, count: int = SHEET) -> np.ndarray:
    """Frames of a video, evenly spaced; see `contact_sheet`."""
    return contact_sheet([np.concatenate([*read_stream(video)])], [title], count=count)


def _lengths(trained: int) -> Values:
    """Range of the slider of frames, up to six times as many as a model was trained at."""
    most, value = MOST_TIMES * (trained - 1) + 1, TIMES * (trained - 1) + 1
    info = f"The model was trained on {trained}."
    return {"minimum": trained, "maximum": most, "value": value, "info": info}


def _folders(page: Page) -> list[Path]:
    """Folders of this page, and that of the embedded LoRAs."""
    return [Path(demo.__file__).parent, *page.places.read, page.places.folder]
