"""The screen Measure & doctor: figures of videos, what a run costs, presets, and this machine.

Each part is a verb: its form left, and right what it says.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr
import numpy as np
from pandas import DataFrame
from PIL import Image

from gen_accel.cli.estimate import EstimateConfig
from gen_accel.cli.metrics import MetricsConfig
from gen_accel.cli.printing import CURVE, curve_rows, fidelity_rows, what_is_missing
from gen_accel.cli.show import ShowConfig
from gen_accel.demo import NAME
from gen_accel.io import read_fields
from gen_accel.measure.cost.figures import card_names
from gen_accel.paths import free_name
from gen_accel.pipelines.tuning.config import TuneConfig
from gen_accel.registry import PRESET, PRESETS
from gen_accel.served import PUBLISHED
from gen_accel.ui.choices import OWN_START, AttentionChoice
from gen_accel.ui.form import Form
from gen_accel.ui.page import (
    ADDING,
    BUTTONS,
    PRIVATELY,
    QUIETLY,
    Held,
    Page,
    by_names,
    follow,
    html,
    json_link,
    refusing,
)
from gen_accel.ui.screens.longer import motion_table
from gen_accel.ui.worker import Options, Refused, Values

TUNED = "presets/preset.json"  # in the output folder
HERE = ("this machine", "")  # choice of a card
SIZES = ("frames", "height", "width")
TUNED_AT = {"frames": 65}  # of the presets of the embedded model
MEANING = {
    "frames": "of each",
    "PSNR": "higher is closer; above 30 dB differences are hard to see",
    "SSIM": "1 is identical",
    "LPIPS": "0 is identical",
    "VMAF": "100 is as good as the reference, as people said of films",
    "ColorVideoVDP": "10 for no visible difference",
}
BY_FRAMES = {"frames": "num_frames", "speed-up": "speedup", "density": "density"}
LABELS = {
    "each": "Each by itself",
    "fps": "Frames a second",
    "lag": "Frames apart",
    "by_frame": "Figures of each frame",
    "gpu": "Graphics card",
    "text": "Tokens of the prompt",
    "set": "Settings of the method",
    "dense_start": "Dense share from the second step on",
    "dense_end": "Dense share at the end",
    "efficiency": "Efficiency of the kernel",
    "remeasure": "Measure this machine again",
    "bound": "Best window",
    "out": "File",
    "cost": "What is made small",
    "scale": "Over the prompts",
    "by": "Differs by",
    "quality": "Least PSNR on average",
    "worst": "Least PSNR of a prompt",
    "objective": "Measure of quality",
    "rows": "Queries that are compared",
    "levels": "Steps that are measured",
    "minutes": "Most minutes",
    "held_out": "Prompts to check on",
    "from_lora": "LoRA with its positions",
    "lora": "LoRA",
}
COPY = "(text) => { navigator.clipboard.writeText(text); return text; }"
ABOUT = {
    "Videos": "Does a video loop, drift, move, flicker? With a reference: how close is it to it?",
    "What a run costs": "Seconds, memory and speed-up of a run, before any model is loaded.",
    "Presets": "What a tuning found: which method each head of each layer runs at each step, and "
    "the frontier between speed and closeness. A name is what was tuned for the model, or a rule "
    "if nothing was.",
    "Tuning": "Finds the sparsest attention of a model that keeps a bound on quality. A prompt "
    "takes about as long as ten videos; a stop loses nothing.",
    "This machine": "What is installed and what is missing, and which kernels run here or why "
    "not.",
}


def build(page: Page) -> None:
    parts = (_videos, _costs, _presets, _tuning, _machine)
    with gr.Tabs(elem_id="meas-parts") as tabs:
        for (name, about), part in zip(ABOUT.items(), parts, strict=True):
            with gr.Tab(name, id=name):
                gr.HTML(html("hint", about))
                with gr.Row():
                    part(page)

    def chosen(told: str) -> Held:
        name = told.partition(" ")[0]  # of a job, or its kind
        job = page.find(name)
        is_tuning = "tune" in (name, job and job.kind)
        return {tabs: gr.Tabs(selected="Tuning") if is_tuning else gr.skip()}

    page.shown.change(chosen, [page.shown], [tabs], **QUIETLY)


def _videos(page: Page) -> None:
    with gr.Column(scale=5, min_width=300):
        form = Form(MetricsConfig, "meas", labels=LABELS)
        for name in ("videos", "reference", "metrics"):
            form.add(name)
        form.rest(("json", "overwrite"))
        run = gr.Button("Measure", variant="primary", elem_id="meas-run")
    with gr.Column(scale=7, min_width=300):
        error = gr.HTML(elem_id="meas-error")
        told = gr.HTML(html("blank", "The figures appear"), elem_id="meas-told")

    def measure(held: Held) -> Held:
        options = form.given(held)
        files = [*options.get("videos", ()), *filter(None, [options.get("reference")])]
        try:
            found = page.questions.ask("metrics", options)
        except Refused as refused:
            raise by_names(refused, files) from refused
        several = found.get("videos", {"": found}).items()
        shown = [html("hint", Path(name).name) + _figures(one) for name, one in several]
        return {told: "".join(shown) + json_link("Download as JSON", found, "metrics.json")}

    run.click(refusing(measure, error), {*form.parts.values()}, [error, told], **PRIVATELY)


def _figures(found: Options) -> str:
    """Table of the figures of a video, alone or beside its reference."""
    if "psnr_db" not in found:
        return motion_table(found) + html("notes", what_is_missing(found))
    rows = {"frames": str(found["frames"]), **fidelity_rows(found)}
    table = [[name, value, MEANING.get(name, "")] for name, value in rows.items()]
    head = ("figure", "value", "what it says")
    return html("table", head, table) + html("notes", what_is_missing(found))


def _costs(page: Page) -> None:
    with gr.Column(scale=5, min_width=300):
        chosen = PUBLISHED[0] if page.models[0] == NAME else page.models[0]
        start = {"model": chosen, "gpu": "h100", **OWN_START}
        form = Form(EstimateConfig, "meas", start, LABELS)
        form.add("model", choices=_models(page))
        form.add("gpu", choices=[HERE, *card_names()], info=None)
        form.row(*SIZES, info=None)
        attention = AttentionChoice(page, form)
        form.rest(("json", "overwrite", "curve", "stream", "zones"))
        run = gr.Button("Estimate", variant="primary", elem_id="meas-estimate")
    with gr.Column(scale=7, min_width=300):
        error = gr.HTML(elem_id="meas-estimate-error")
        with gr.Column(visible=False) as charts, gr.Row():
            about: Values = {"x": "frames", "height": 240, "min_width": 260}
            title = "Speed-up by FLOPs alone"
            speed = gr.LinePlot(y="speed-up", title=title, elem_id="meas-speed", **about)
            title = "Share of pairs computed"
            density = gr.LinePlot(y="density", title=title, elem_id="meas-density", **about)
        told = gr.HTML(html("blank", "The estimate appears"), elem_id="meas-cost")

    def estimate(held: Held) -> Held:
        options = attention.applied(form.given(held), held)
        with form.refused_in_words():
            text, found = page.questions.both("estimate", {**options, "curve": True})
        shown = DataFrame(
            {name: [x[key] for x in found["curve"]] for name, key in BY_FRAMES.items()}
        )
        saved = json_link("Download as JSON", found, "estimate.json")
        shows: Held = {charts: gr.update(visible=True), speed: shown, density: shown}
        return {**shows, told: html("pre", text) + saved}

    inputs = {*attention.parts, *form.parts.values()}
    outputs = [error, charts, speed, density, told]
    run.click(refusing(estimate, error), inputs, outputs, **PRIVATELY)


def _models(page: Page) -> list[str]:
    return [*dict.fromkeys((*page.models, *PUBLISHED))]


def _presets(page: Page) -> None:
    with gr.Column(scale=5, min_width=300):
        chosen = page.models[0]
        start = {"preset": PRESETS[-1], "model": chosen, **(TUNED_AT if chosen == NAME else {})}
        form = Form(ShowConfig, "meas-show", start, LABELS)
        form.add("preset", info="A name, or a file in a folder of this page.")
        form.add("model", choices=_models(page), info=None)
        form.row(*SIZES, info=None)
        form.rest(("out", "json", "overwrite", "extend", "trained_frames"))
        run = gr.Button("Show", variant="primary", elem_id="meas-show")
        find = gr.Button("Find presets in the output folder", size="sm", elem_id="meas-find")
    with gr.Column(scale=7, min_width=300):
        error = gr.HTML(elem_id="meas-preset-error")
        hidden: Values = {"show_label": False, "interactive": False, "visible": False}
        picture = gr.Image(elem_id="meas-frontier", buttons=[*BUTTONS], **hidden)
        curve = gr.HTML(elem_id="meas-curve")
        words = gr.HTML(html("blank", "The preset appears"), elem_id="meas-rules")

    def show(held: Held) -> Held:
        options = form.given(held)
        if options.get("preset", PRESET) not in PRESETS:  # of a file's own model and size
            for name in ("model", *SIZES):
                options.pop(name, None)
        with TemporaryDirectory(dir=page.places.folder) as folder:
            options["out"] = str(Path(folder) / "shown.png")
            with form.refused_in_words():
                text, found = page.questions.both("show", options)
            pixels = np.asarray(Image.open(options["out"]).convert("RGB"))
        rows = curve_rows(found[0]) if isinstance(found, list) else []
        return {
            picture: gr.update(value=pixels, visible=True),
            curve: html("table", CURVE, rows, 0) if rows else "",
            words: html("pre", "\n".join(x for x in text.splitlines() if "shown.png" not in x)),
        }

    def found(now: str) -> Held:
        files = [str(one) for one in _preset_files(page)]
        shown = gr.update(choices=[*PRESETS, *files], value=files[0] if files else now)
        return {form.parts["preset"]: shown}

    outputs = [error, picture, curve, words]
    run.click(refusing(show, error), {*form.parts.values()}, outputs, **PRIVATELY)
    find.click(found, [form.parts["preset"]], [form.parts["preset"]], **QUIETLY)


def _tuning(page: Page) -> None:
    with gr.Column(scale=5, min_width=300):
        start = {"model": page.models[0], "out": str(page.places.folder / TUNED)}
        form = Form(TuneConfig, "tune", start, LABELS)
        form.add("model", choices=[*page.models])
        form.add("prompts", info="A text file in a folder of this page, one prompt on each line.")
        form.row(*SIZES, info=None)
        form.row("steps", "quality")
        form.add("out", info="A file in the folder of this page, which Presets shows.")
        form.rest()
        run = gr.Button("Tune", variant="primary", elem_id="tune-run")
    with gr.Column(scale=7, min_width=300):
        view = follow(page, "tune", kind="tune")
        told = gr.HTML(html("blank", "What was found appears"), elem_id="tune-told")

    def submit(held: Held) -> Held:
        options = form.given(held)
        if "prompts" not in options:
            raise ValueError("give Prompts: a text file with one on each line")
        out = options.setdefault("out", str(free_name(page.places.folder / TUNED)))
        Path(page.places.writable(out)).parent.mkdir(parents=True, exist_ok=True)
        about = {"title": f"tuning, {Path(out).name}", "kind": "tune", "tab": held[page.tab]}
        return {view.job: page.queue.submit("tune", options, **about).id}

    def show(name: str) -> Held:
        job = page.find(name)
        return {told: html("pre", job.said) if job and job.said else ""}

    inputs = {page.tab, *form.parts.values()}
    run.click(refusing(submit, view.error), inputs, [view.error, view.job], **ADDING)
    view.at_end(show, [told])


def _preset_files(page: Page) -> list[Path]:
    """Presets below the folders of a page."""
    found = []
    for folder in (page.places.folder, *page.places.read):
        for file in folder.rglob("*.json"):
            try:
                held = read_fields(file)
            except (OSError, ValueError):
                continue  # of another program, or cut off
            if held.get("gen_accel") == "preset":
                found.append(file)
    return sorted(found)


def _machine(page: Page) -> None:
    with gr.Column():
        look = gr.Button("Look at this machine", variant="primary", elem_id="meas-doctor")
        error = gr.HTML(elem_id="meas-doctor-error")
        parts, kernels = gr.HTML(elem_id="meas-checks"), gr.HTML(elem_id="meas-kernels")
        saved = gr.HTML(elem_id="meas-doctor-json")
        with gr.Column(visible=False) as as_text:
            copy = gr.Button("Copy as issue text", size="sm", elem_id="meas-copy")
            issue = gr.Textbox(
                label="For an issue",
                lines=6,
                max_lines=12,
                interactive=False,
                elem_id="meas-issue",
            )

    def doctor() -> Held:
        text, found = page.questions.both("doctor")
        known = page.questions.known("list")["kernels"]
        checks = [
            [x["name"], x["found"] or "missing", "" if x["found"] else x["fix"]] for x in found
        ]
        runs = [
            [one["name"], device, "; ".join(reasons) or "runs"]
            for one in known
            for device, reasons in one["refused"].items()
        ]
        told = "\n".join(f"{name}, {device}: {why}" for name, device, why in runs)
        data = {"checks": found, "kernels": known}
        return {
            parts: html("table", ("part", "found", "adds it"), checks),
            kernels: html("table", ("kernel", "device", "runs, or why not"), runs, 0),
            saved: json_link("Download as JSON", data, "machine.json"),
            as_text: gr.update(visible=True),
            issue: f"```text\n{text.rstrip()}\n\nKernels:\n{told}\n```",
        }

    outputs = [error, parts, kernels, saved, as_text, issue]
    look.click(refusing(doctor, error), None, outputs, **PRIVATELY)
    copy.click(None, [issue], [issue], js=COPY, **PRIVATELY)
