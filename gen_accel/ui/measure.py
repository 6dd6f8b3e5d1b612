"""The screen Measure & doctor: figures of videos, what a run costs, presets, and this machine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from gen_accel.cli.printing import fidelity_rows, what_is_missing
from gen_accel.json_files import read_fields, read_json
from gen_accel.measure.cost.rates import card_names
from gen_accel.names import METRICS, PRESETS, PUBLISHED
from gen_accel.ui.lengths import motion_words
from gen_accel.ui.page import PRIVATELY, QUIETLY, Page, error_box
from gen_accel.ui.run_parts import whole
from gen_accel.ui.tables import CSS, charted, hint, json_link, lines, note, table
from gen_accel.ui.worker import Refused

HERE = "this machine"
OPTIONS = ("radial", "neighborhood", "piecewise", "sparse_linear")
SIZE = (81, 480, 832)  # frames, height and width, at which models are published
SMALL = (33, 96, 96)  # of the demo model
MEANING = {
    "PSNR": "higher is closer; above 30 dB differences are hard to see",
    "SSIM": "1 is identical",
    "LPIPS": "0 is identical",
    "VMAF": "100 is as good as the reference, as people said of films",
    "ColorVideoVDP": "10 where no difference can be seen",
}
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
    gr.HTML(
        hint(
            "One video: does it loop, drift, move, flicker? Two: how close is the first to the "
            "second, made another way?"
        ),
        css_template=CSS,
    )
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
            figures = gr.HTML(elem_id="meas-figures", css_template=CSS)

    def measure(video: str | None, reference: str | None, metrics: list[str]) -> Any:
        given = [Path(one) for one in (video, reference) if one]
        try:
            if not video:
                raise ValueError("choose a video first")
            options: dict[str, Any] = {"videos": [str(page.places.readable(p)) for p in given]}
            if reference and metrics:
                options["metrics"] = ",".join(metrics)
            found = page.questions.ask("metrics", options)
        except (ValueError, OSError) as wrong:
            return [error_box(_named(str(wrong), given)), ""]
        told = note(*what_is_missing(found))
        if reference:
            rows = [[name, value, MEANING[name]] for name, value in fidelity_rows(found).items()]
            rows.insert(0, ["frames", str(found["frames"]), "of each"])
        else:
            rows = motion_words(found, None)
        head = ("figure", "value", "what it says")
        return [
            "",
            table(head, rows) + told + json_link("Download as JSON", found, "metrics.json"),
        ]

    run.click(measure, [video, reference, metrics], [error, figures], **PRIVATELY)


def _sizes(prefix: str, sizes: tuple[int, int, int]) -> list[Any]:
    return [
        gr.Number(value, label=name, precision=0, min_width=90, elem_id=f"{prefix}-{name.lower()}")
        for name, value in zip(("Frames", "Height", "Width"), sizes, strict=True)
    ]


def _costs(page: Page) -> None:
    gr.HTML(
        hint(
            "What a run would take, before any model is loaded: seconds, memory, and from how "
            "many frames on sparse attention pays."
        ),
        css_template=CSS,
    )
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            model = gr.Dropdown(
                [*dict.fromkeys((*page.models, *PUBLISHED))],
                value=PUBLISHED[0],
                label="Model",
                allow_custom_value=True,
                elem_id="meas-model",
            )
            card = gr.Dropdown(
                [HERE, *card_names()], value="h100", label="Graphics card", elem_id="meas-card"
            )
            method = gr.Dropdown(
                [*OPTIONS], value=OPTIONS[0], label="Method", elem_id="meas-method"
            )
            with gr.Row():
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
                speed = gr.LinePlot(
                    x="frames",
                    y="speed-up",
                    title="Speed-up of the denoising, by frames",
                    height=240,
                    min_width=260,
                    elem_id="meas-speed",
                )
                density = gr.LinePlot(
                    x="frames",
                    y="density",
                    title="Density: share of pairs computed",
                    height=240,
                    min_width=260,
                    elem_id="meas-density",
                )
            told = gr.HTML(elem_id="meas-cost", css_template=CSS)

    def estimate(model: str, card: str, method: str, *rest: Any) -> Any:
        frames, height, width, dense = rest
        options: dict[str, Any] = {"model": model, "method": method, "dense_start": dense}
        options |= {"frames": whole(frames), "height": whole(height), "width": whole(width)}
        options |= {"gpu": None if card == HERE else card, "curve": True}
        try:
            if None in (frames, height, width):
                raise ValueError("give frames, height and width")
            found = page.questions.known("estimate", options)
        except (ValueError, OSError) as wrong:
            return [error_box(wrong), *[gr.skip()] * 4]
        curve = {name: [one[key] for one in found["curve"]] for name, key in CURVE.items()}
        rows = _cost_rows(found)
        saved = json_link("Download as JSON", found, "estimate.json")
        shown = charted(curve)
        return [
            "",
            gr.update(visible=True),
            shown,
            shown,
            table(("what", "figure", ""), rows) + saved,
        ]

    run.click(
        estimate,
        [model, card, method, *sizes, dense],
        [error, charts, speed, density, told],
        **PRIVATELY,
    )


CURVE = {"frames": "num_frames", "speed-up": "speedup", "density": "density"}


def _cost_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of what `gen-accel estimate --json` says."""
    pays = found["pays_from_frames"]
    seconds, peak = found["seconds"], found["peak_bytes"][found["offload"]]
    until = f"none up to {found['searched_to_frames']} does"
    return [
        [
            "Speed-up",
            _span(found["speedup_range"], "\N{MULTIPLICATION SIGN}"),
            "of the denoising, expected",
        ],
        ["Pays from", f"{pays} frames" if pays else until, "1.1 times as fast or more"],
        ["Density", f"{found['density']:.3f}", f"of {found['tokens']:,} tokens"],
        [
            "Attention",
            f"{found['attention_share']:.0%}",
            "of a dense step's work; what else there is limits the gain",
        ],
        ["Dense", _span(seconds["dense_total"], " s"), f"in all, on {found['device']}"],
        ["Sparse", _span(seconds["sparse_total"], " s"), "in all"],
        ["Memory", _span([x / 1e9 for x in peak], " GB"), "at most"],
    ]


def _span(ends: Sequence[float], unit: str) -> str:
    """Write a range with three digits."""
    first, last = (f"{float(f'{x:.3g}'):,g}" for x in ends)
    return f"{first}{unit}" if first == last else f"{first} to {last}{unit}"


def _presets(page: Page) -> None:
    gr.HTML(
        hint(
            "What `gen-accel tune` found: which method each head of each layer runs at each step, "
            "and the frontier between speed and closeness. A name is what was tuned for the "
            "model, or a rule where nothing was."
        ),
        css_template=CSS,
    )
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
            model = gr.Dropdown(
                [*dict.fromkeys((*page.models, *PUBLISHED))],
                value=page.models[0],
                label="Model, for a name",
                allow_custom_value=True,
                elem_id="meas-preset-model",
            )
            with gr.Row():
                sizes = _sizes("meas-preset", SMALL)
            run = gr.Button("Show", variant="primary", elem_id="meas-show")
            find = gr.Button("Find presets in the output folder", size="sm", elem_id="meas-find")
        with gr.Column(scale=8, min_width=300):
            error = gr.HTML(elem_id="meas-preset-error")
            picture = gr.Image(
                show_label=False,
                interactive=False,
                visible=False,
                elem_id="meas-frontier",
            )
            curve = gr.HTML(elem_id="meas-curve", css_template=CSS)
            words = gr.HTML(elem_id="meas-rules", css_template=CSS)

    def show(preset: str, model: str, *sizes: float | None) -> Any:
        options: dict[str, Any] = {"preset": preset}
        try:
            if preset not in PRESETS:
                text, pixels, found = _shown(page, options)
            else:
                options["model"] = model
                try:
                    text, pixels, found = _shown(page, options)
                except Refused:  # a rule, which needs sizes
                    names = ("frames", "height", "width")
                    options |= dict(zip(names, map(whole, sizes), strict=True))
                    text, pixels, found = _shown(page, options)
        except (ValueError, OSError) as wrong:
            return [error_box(wrong), *[gr.skip()] * 3]
        rows = _curve_rows(found[0]) if isinstance(found, list) else []
        head = ("attention", "density", "predicted error", "mean score", "worst", "")
        return [
            "",
            gr.update(value=pixels, visible=True),
            table(head, rows, figure=0) if rows else "",
            lines(text),
        ]

    def found(now: str) -> Any:
        files = [str(one) for one in _preset_files(page)]
        return gr.update(choices=[*PRESETS, *files], value=files[0] if files else now)

    run.click(show, [preset, model, *sizes], [error, picture, curve, words], **PRIVATELY)
    find.click(found, [preset], [preset], **QUIETLY)


def _shown(page: Page, options: Mapping[str, Any]) -> tuple[str, np.ndarray, Any]:
    """Run `gen-accel show` once, for its text, its picture and its JSON."""
    with TemporaryDirectory(dir=page.places.folder) as folder:
        file = Path(folder) / "shown.png"
        text, found = _answered(page, "show", {**options, "out": str(file)}, folder)
        return text, np.asarray(Image.open(file).convert("RGB")), found


def _answered(page: Page, verb: str, options: Mapping[str, Any], folder: str) -> tuple[str, Any]:
    """Run a verb once, for its text and its JSON.

    Args:
        folder: takes the JSON; lines of the text that name it are left out.
    """
    file = Path(folder) / "answer.json"
    text = page.questions.said(verb, {**options, "json": str(file)})
    told = "\n".join(line for line in text.splitlines() if folder not in line)
    return told, read_json(file)


def _curve_rows(preset: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the frontier of a preset, by rising cost, with the scores of what was measured."""
    runs = {run["predicted"]: run for run in preset["measured"].get("runs", [])}
    points = {one["predicted_error"]: one for one in preset["curve"]}
    own = {name: preset[name] for name in ("cost", "density")}
    points |= {preset["predicted"]: own}  # which was searched for between two of them
    rows = []
    for error in sorted({*runs, *points}, reverse=True):
        one = runs.get(error) or points[error]
        scores = [
            f"{runs[error][name]:.1f}" if error in runs else "" for name in ("mean", "worst")
        ]
        taken = "taken" if one["cost"] == preset["cost"] else ""
        shares = f"{one['cost']:.3f}", f"{one['density']:.3f}"
        rows.append([*shares, f"{error:.3g}", *scores, taken])
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
    gr.HTML(
        hint("What is installed and what is missing, and which kernels run here or why not."),
        css_template=CSS,
    )
    look = gr.Button("Look at this machine", variant="primary", elem_id="meas-doctor")
    error = gr.HTML(elem_id="meas-doctor-error")
    parts = gr.HTML(elem_id="meas-checks", css_template=CSS)
    kernels = gr.HTML(elem_id="meas-kernels", css_template=CSS)
    saved = gr.HTML(elem_id="meas-doctor-json", css_template=CSS)
    with gr.Column(visible=False) as as_text:
        copy = gr.Button("Copy as issue text", size="sm", elem_id="meas-copy")
        issue = gr.Textbox(
            label="For an issue", lines=6, max_lines=12, interactive=False, elem_id="meas-issue"
        )

    def doctor() -> Any:
        try:
            with TemporaryDirectory(dir=page.places.folder) as folder:
                text, found = _answered(page, "doctor", {}, folder)
            listed = page.questions.known("list")["kernels"]
        except (ValueError, OSError) as wrong:
            return [error_box(wrong), *[gr.skip()] * 5]
        checks = [
            [one["name"], one["found"] or "missing", "" if one["found"] else one["fix"]]
            for one in found
        ]
        runs = [
            [one["name"], where, "; ".join(reasons) or "runs"]
            for one in listed
            for where, reasons in one["refused"].items()
        ]
        told = "\n".join(f"{name}, {where}: {why}" for name, where, why in runs)
        return [
            "",
            table(("part", "found", "adds it"), checks),
            table(("kernel", "where", "runs, or why not"), runs, figure=0),
            json_link("Download as JSON", {"checks": found, "kernels": listed}, "machine.json"),
            gr.update(visible=True),
            f"```text\n{text.rstrip()}\n\nKernels:\n{told}\n```",
        ]

    look.click(doctor, [], [error, parts, kernels, saved, as_text, issue], **PRIVATELY)
    copy.click(None, [issue], [issue], js=COPY, **PRIVATELY)


def _named(sentence: str, files: list[Path]) -> str:
    """Write the sentence with the names of uploaded files in the place of where they lie."""
    for file in files:
        sentence = sentence.replace(str(file), file.name)
    return " ".join(sentence.split())
