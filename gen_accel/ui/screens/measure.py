"""The screen Measure & doctor: figures of videos, what a run costs, presets, and this machine."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from gen_accel.cli.printing import fidelity_rows, what_is_missing
from gen_accel.io import read_fields, read_json
from gen_accel.measure.cost.figures import card_names
from gen_accel.registry import METRICS, PRESETS, PUBLISHED
from gen_accel.ui.page import PRIVATELY, QUIETLY, Held, Page, charted, html, json_link, refusing
from gen_accel.ui.screens.longer import motion_words
from gen_accel.ui.worker import Options, Refused, Values

HERE = "this machine"
METHODS = ("radial", "neighborhood", "piecewise", "sparse_linear")
SIZE = (81, 480, 832)  # frames, height and width, at which models are published
SMALL = (33, 96, 96)  # of the demo model
FIGURES = ("figure", "value", "what it says")
MEANING = {
    "frames": "of each",
    "PSNR": "higher is closer; above 30 dB differences are hard to see",
    "SSIM": "1 is identical",
    "LPIPS": "0 is identical",
    "VMAF": "100 is as good as the reference, as people said of films",
    "ColorVideoVDP": "10 for no visible difference",
}
CURVE = {"frames": "num_frames", "speed-up": "speedup", "density": "density"}
COPY = "(text) => { navigator.clipboard.writeText(text); return text; }"


def build(page: Page) -> None:
    with gr.Tabs(elem_id="meas-parts"):
        with gr.Tab("Videos"):
            _videos(page)
        with gr.Tab("What a run costs"):
            _costs(page)
        with gr.Tab("Presets"):
            _presets(page)
        with gr.Tab("This machine"):
            _machine(page)


def _videos(page: Page) -> None:
    about = "One video: does it loop, drift, move, flicker? Two: how close are they to each other?"
    gr.HTML(html("hint", about))
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            video = gr.File(label="Video", elem_id="meas-video", height=140)
            reference = gr.File(label="Reference, if any", elem_id="meas-reference", height=140)
            metrics = gr.CheckboxGroup(
                [*METRICS],
                label="Beside PSNR and SSIM",
                info="Of two videos. None chosen: what can be computed here, but cvvdp.",
                elem_id="meas-metrics",
            )
            run = gr.Button("Measure", variant="primary", elem_id="meas-run")
        with gr.Column(scale=7, min_width=300):
            error = gr.HTML(elem_id="meas-error")
            figures = gr.HTML(elem_id="meas-figures")

    def measure(held: Held) -> Held:
        given = [Path(held[one]) for one in (video, reference) if held[one]]
        if not held[video]:
            raise ValueError("choose a video first")
        options: Values = {"videos": [str(page.places.readable(one)) for one in given]}
        if held[reference] and held[metrics]:
            options["metrics"] = ",".join(held[metrics])
        try:
            found = page.questions.ask("metrics", options)
        except Refused as refused:  # uploaded files go by their names
            sentence = str(refused)
            for file in given:
                sentence = sentence.replace(str(file), file.name)
            raise Refused(sentence) from refused
        rows = motion_words(found, None)
        if held[reference]:
            told = {"frames": str(found["frames"]), **fidelity_rows(found)}
            rows = [[name, value, MEANING[name]] for name, value in told.items()]
        saved = json_link("Download as JSON", found, "metrics.json")
        return {
            figures: html("table", FIGURES, rows) + html("notes", what_is_missing(found)) + saved
        }

    inputs = {video, reference, metrics}
    run.click(refusing(measure, error), inputs, [error, figures], **PRIVATELY)


def _sizes(prefix: str, sizes: Sequence[int]) -> dict[str, gr.Number]:
    with gr.Row():
        return {
            name: gr.Number(
                value,
                label=name.capitalize(),
                precision=0,
                min_width=90,
                elem_id=f"{prefix}-{name}",
            )
            for name, value in zip(("frames", "height", "width"), sizes, strict=True)
        }


def _model(page: Page, first: str, name: str) -> gr.Dropdown:
    known = [*dict.fromkeys((*page.models, *PUBLISHED))]
    about: Values = {"label": "Model", "allow_custom_value": True, "elem_id": name}
    return gr.Dropdown(known, value=first, **about)


def _costs(page: Page) -> None:
    about = (
        "What a run would take, before any model is loaded: seconds, memory, and from how many "
        "frames on sparse attention pays."
    )
    gr.HTML(html("hint", about))
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            model = _model(page, PUBLISHED[0], "meas-model")
            card = gr.Dropdown(
                [HERE, *card_names()], value="h100", label="Graphics card", elem_id="meas-card"
            )
            method = gr.Dropdown(
                [*METHODS], value=METHODS[0], label="Method", elem_id="meas-method"
            )
            sizes = _sizes("meas", SIZE)
            dense = gr.Slider(
                0,
                1,
                0.25,
                step=0.05,
                label="Share of the first steps that stay dense",
                elem_id="meas-dense-start",
            )
            run = gr.Button("Estimate", variant="primary", elem_id="meas-estimate")
        with gr.Column(scale=7, min_width=300):
            error = gr.HTML(elem_id="meas-estimate-error")
            with gr.Column(visible=False) as charts, gr.Row():
                speed, density = (
                    gr.LinePlot(
                        x="frames",
                        y=name,
                        title=title,
                        height=240,
                        min_width=260,
                        elem_id=f"meas-{place}",
                    )
                    for name, place, title in (
                        ("speed-up", "speed", "Speed-up of the denoising, by frames"),
                        ("density", "density", "Density: share of pairs computed"),
                    )
                )
            told = gr.HTML(elem_id="meas-cost")

    def estimate(held: Held) -> Held:
        options = {name: held[part] for name, part in sizes.items()}
        if None in options.values():
            raise ValueError("give frames, height and width")
        options |= {"model": held[model], "method": held[method], "dense_start": held[dense]}
        options |= {"gpu": None if held[card] == HERE else held[card], "curve": True}
        found = page.questions.known("estimate", options)
        shown = charted({name: [x[key] for x in found["curve"]] for name, key in CURVE.items()})
        saved = json_link("Download as JSON", found, "estimate.json")
        rows = _cost_rows(found)
        shows: Held = {charts: gr.update(visible=True), speed: shown, density: shown}
        return {**shows, told: html("table", ("what", "figure", ""), rows) + saved}

    inputs = {model, card, method, dense, *sizes.values()}
    outputs = [error, charts, speed, density, told]
    run.click(refusing(estimate, error), inputs, outputs, **PRIVATELY)


def _cost_rows(found: Options) -> list[list[str]]:
    """Rows of what `gen-accel estimate --json` says."""

    def span(ends: Sequence[float], unit: str) -> str:
        first, last = (f"{float(f'{x:.3g}'):,g}" for x in ends)
        return f"{first}{unit}" if first == last else f"{first} to {last}{unit}"

    seconds, peak = found["seconds"], found["peak_bytes"][found["offload"]]
    pays = f"none up to {found['searched_to_frames']} does"
    if found["pays_from_frames"]:
        pays = f"{found['pays_from_frames']} frames"
    share, times = f"{found['attention_share']:.0%}", "\N{MULTIPLICATION SIGN}"
    limit = "of a dense step's work; what else there is limits the gain"
    return [
        ["Speed-up", span(found["speedup_range"], times), "of the denoising, expected"],
        ["Pays from", pays, "1.1 times as fast or more"],
        ["Density", f"{found['density']:.3f}", f"of {found['tokens']:,} tokens"],
        ["Attention", share, limit],
        ["Dense", span(seconds["dense_total"], " s"), f"in all, on {found['device']}"],
        ["Sparse", span(seconds["sparse_total"], " s"), "in all"],
        ["Memory", span([x / 1e9 for x in peak], " GB"), "at most"],
    ]


def _presets(page: Page) -> None:
    about = (
        "What `gen-accel tune` found: which method each head of each layer runs at each step, and "
        "the frontier between speed and closeness. A name is what was tuned for the model, or a "
        "rule if nothing was."
    )
    gr.HTML(html("hint", about))
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            preset = gr.Dropdown(
                [*PRESETS],
                value=PRESETS[-1],
                label="Preset",
                info="A name, or a file in a folder of this page.",
                allow_custom_value=True,
                elem_id="meas-preset",
            )
            model = _model(page, page.models[0], "meas-preset-model")
            sizes = _sizes("meas-preset", SMALL)
            run = gr.Button("Show", variant="primary", elem_id="meas-show")
            find = gr.Button("Find presets in the output folder", size="sm", elem_id="meas-find")
        with gr.Column(scale=8, min_width=300):
            error = gr.HTML(elem_id="meas-preset-error")
            picture = gr.Image(
                show_label=False, interactive=False, visible=False, elem_id="meas-frontier"
            )
            curve = gr.HTML(elem_id="meas-curve")
            words = gr.HTML(elem_id="meas-rules")

    def show(held: Held) -> Held:
        options: Values = {"preset": held[preset]}
        if held[preset] in PRESETS:
            options["model"] = held[model]
        with TemporaryDirectory(dir=page.places.folder) as folder:
            file = Path(folder) / "shown.png"
            options["out"] = str(file)
            try:
                text, found = _answered(page, "show", options, folder)
            except Refused:  # a rule, which needs sizes
                if held[preset] not in PRESETS:
                    raise
                options |= {name: held[part] for name, part in sizes.items()}
                text, found = _answered(page, "show", options, folder)
            pixels = np.asarray(Image.open(file).convert("RGB"))
        rows = _curve_rows(found[0]) if isinstance(found, list) else []
        head = ("attention", "density", "predicted error", "mean score", "worst", "")
        return {
            picture: gr.update(value=pixels, visible=True),
            curve: html("table", head, rows, 0) if rows else "",
            words: html("pre", text),
        }

    def found(now: str) -> Held:
        files = [str(one) for one in _preset_files(page)]
        shown = gr.update(choices=[*PRESETS, *files], value=files[0] if files else now)
        return {preset: shown}

    inputs, outputs = {preset, model, *sizes.values()}, [error, picture, curve, words]
    run.click(refusing(show, error), inputs, outputs, **PRIVATELY)
    find.click(found, [preset], [preset], **QUIETLY)


def _answered(page: Page, verb: str, options: Options, folder: str) -> tuple[str, Any]:
    """Run a verb once, for its text and its JSON.

    Args:
        folder: takes the JSON; lines of the text that name it are left out.
    """
    file = Path(folder) / "answer.json"
    text = page.questions.said(verb, {**options, "json": str(file)})
    told = "\n".join(line for line in text.splitlines() if folder not in line)
    return told, read_json(file)


def _curve_rows(preset: Options) -> list[list[str]]:
    """Rows of the frontier of a preset, by rising cost, with the scores of what was measured."""
    runs = {run["predicted"]: run for run in preset["measured"].get("runs", [])}
    points = {one["predicted_error"]: one for one in preset["curve"]}
    # The preset itself was searched for between two of them.
    points[preset["predicted"]] = {name: preset[name] for name in ("cost", "density")}
    rows = []
    for error in sorted({*runs, *points}, reverse=True):
        run, one = runs.get(error, {}), runs.get(error) or points[error]
        scores = [f"{run[name]:.1f}" if run else "" for name in ("mean", "worst")]
        taken = "taken" if one["cost"] == preset["cost"] else ""
        rows.append(
            [f"{one['cost']:.3f}", f"{one['density']:.3f}", f"{error:.3g}", *scores, taken]
        )
    return rows


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
    about = "What is installed and what is missing, and which kernels run here or why not."
    gr.HTML(html("hint", about))
    look = gr.Button("Look at this machine", variant="primary", elem_id="meas-doctor")
    error = gr.HTML(elem_id="meas-doctor-error")
    parts = gr.HTML(elem_id="meas-checks")
    kernels = gr.HTML(elem_id="meas-kernels")
    saved = gr.HTML(elem_id="meas-doctor-json")
    with gr.Column(visible=False) as as_text:
        copy = gr.Button("Copy as issue text", size="sm", elem_id="meas-copy")
        about: Any = {"lines": 6, "max_lines": 12, "interactive": False}
        issue = gr.Textbox(label="For an issue", elem_id="meas-issue", **about)

    def doctor() -> Held:
        with TemporaryDirectory(dir=page.places.folder) as folder:
            text, found = _answered(page, "doctor", {}, folder)
        known = page.questions.known("list")["kernels"]
        checks = [
            [x["name"], x["found"] or "missing", (x["found"] and "") or x["fix"]] for x in found
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
