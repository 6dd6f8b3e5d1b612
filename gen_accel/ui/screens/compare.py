"""The screen Compare: the same prompt and seed, dense and sparse, side by side."""

import math
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
import numpy as np
from pandas import DataFrame

from gen_accel.io import read_fields
from gen_accel.measure.clip_settings import read_settings
from gen_accel.measure.report import headline, without_times, write_report
from gen_accel.measure.video_io import read_stream, video_fps
from gen_accel.paths import comparison_files
from gen_accel.ui.page import (
    ADDING,
    BUTTONS,
    PRIVATELY,
    QUIETLY,
    Held,
    Page,
    follow,
    html,
    refusing,
)
from gen_accel.ui.queue import DONE
from gen_accel.ui.screens.generate import RunForm
from gen_accel.ui.worker import Options, Values, line_of

KIND = "compare"
FRAMES, MOST_FRAMES = 129, 257  # 4,752 tokens of the demo at first, more than `LEAST_TOKENS`
MASK, PAGE = "mask.png", "report.html"  # written into the folder of the job
SHOWN = 384  # pixels: narrower frames are enlarged, pixel by pixel
SCALE = 64  # levels of 255: the difference that the brightest colour stands for
# Colours of a heat map, from no difference to `SCALE` and more.
RAMP = ((8, 10, 24), (44, 27, 110), (150, 38, 120), (236, 104, 52), (252, 244, 178))
LEGEND = 10  # pixels: height of the bar below a heat map
DOWNLOADS = ("Report (HTML)", "Report (JSON)", "Sparse clip", "Dense clip", "Side by side")
WHAT = (
    "Makes one clip twice from the same noise: with full (dense) attention, and with sparse "
    "attention, which leaves pairs of tokens out. Shows how much faster that was, and what it "
    "changed in the picture."
)
IN_STEP = Path(__file__).with_name("players.js")  # does to one player what is done to the other


class Compared:
    """A comparison that `generate --compare` wrote into a folder.

    Raises OSError or ValueError for a folder without one.
    """

    def __init__(self, place: Path) -> None:
        self.sparse = place / "video.mp4"
        self.dense, self.together, self.path = comparison_files(self.sparse).values()
        self.report = read_fields(self.path)
        for film in (self.sparse, self.dense, self.together):
            if not film.is_file():
                raise FileNotFoundError(f"the comparison {self.path} lacks a film: {film}")

    @property
    def busy(self) -> str:
        """Say that the machine was busy, in the library's words; "" if it was not."""
        busy = self.report.get("busy")
        return f"{busy[:1].upper()}{busy[1:]}, so that no speed-up is shown." if busy else ""


def build(page: Page) -> None:
    gr.HTML(html("hint", WHAT))
    with gr.Row(elem_classes="ga-columns"):
        with gr.Column(scale=5, min_width=300):
            form = RunForm(
                page,
                "cmp",
                compares=True,
                start={"timed": True},
                first=("timed",),
                frames={"minimum": 9, "maximum": MOST_FRAMES, "value": FRAMES, "step": 4},
            )
            run = gr.Button("Compare", variant="primary", elem_id="cmp-run")
            with gr.Accordion("Earlier comparisons", open=False) as before:
                label = "Of this page's output folder"
                earlier = gr.Dropdown([], label=label, elem_id="cmp-earlier")
                open_it = gr.Button("Open", elem_id="cmp-open", size="sm")
        with gr.Column(scale=7, min_width=300):
            view = follow(page, "cmp", kind=KIND)
            in_step = IN_STEP.read_text(encoding="utf-8")
            blank = html("blank", "Both clips appear")
            players = gr.HTML(blank, elem_id="cmp-players", js_on_load=in_step)
            told = gr.HTML(elem_id="cmp-figures")
    shown = gr.State("")
    with gr.Column(visible=False, elem_id="cmp-frame-parts") as by_frame:
        gr.Markdown("### One frame, both ways")
        about: Values = {"info": "It begins at the frame in which the clips differ most."}
        frame = gr.Slider(0, 1, 0, step=1, label="Frame", elem_id="cmp-frame", **about)
        with gr.Row():
            about = {"interactive": False, "label": "Drag: dense left, sparse right"}
            slider = gr.ImageSlider(elem_id="cmp-slider", max_height=420, **about)
            about = {"interactive": False, "label": "Difference of the two"}
            heat = gr.Image(elem_id="cmp-heat", height=420, buttons=[*BUTTONS], **about)
        apart = gr.HTML(elem_id="cmp-apart")
        about = {"x": "frame", "y": "PSNR (dB)", "height": 220}
        # A title that is wider than a small window takes the width of the curve.
        chart = gr.LinePlot(title="Closeness of each frame", elem_id="cmp-chart", **about)
        gr.HTML(html("hint", "Of the coded films; higher is closer."))
        gr.Markdown("### What the method keeps")
        mask = gr.HTML(elem_id="cmp-mask")

    def submit(held: Held) -> Held:
        return {view.job: form.submit(held, KIND, ", dense and sparse", compare=True).id}

    def show(name: str | None) -> Held:
        if not name:
            raise ValueError("choose a comparison; there is none yet before the first run")
        job = page.queue.job(name)
        if job.state != DONE:  # its own error stays
            return {view.error: gr.skip()}
        compared = Compared(page.queue.place(name))
        place = compared.path.parent
        # As `gen-accel metrics --by-frame` says it; infinite ones as words.
        films = {"videos": [str(compared.sparse), str(compared.dense)], "metrics": ""}
        found = page.questions.ask("metrics", {**films, "by_frame": True})
        decibels = found["by_frame"]["psnr_db"]
        drawn = ""
        try:
            drawing = {**mask_options(compared), "out": str(place / MASK), "overwrite": True}
            page.questions.said("show", drawing)
        except (ValueError, OSError) as error:
            drawn = f"No picture of the pattern: {line_of(error)}"
        write_page(compared, place / PAGE, None if drawn else place / MASK)
        at = int(np.argmin([float(x) for x in decibels]))  # the frame in which they differ most
        sides = {
            f"{kind}, {compared.report[f'{kind.lower()}_seconds']:.1f} s": page.url(job, film)
            for kind, film in {"Dense": compared.dense, "Sparse": compared.sparse}.items()
        }
        files = (compared.path, compared.sparse, compared.dense, compared.together)
        links = [
            (words, f"{page.url(job, file)}&download=true", file)
            for words, file in zip(DOWNLOADS, (PAGE, *(x.name for x in files)), strict=True)
        ]
        head = ("figure", "value", "what it says")
        table = html("table", head, figures(compared.report)) + html("links", links)
        pattern = html("image", page.url(job, MASK), "pattern of the method")
        return {
            players: html("players", sides, video_fps(compared.sparse) or 16),
            told: html("notes", [compared.busy]) + table,
            by_frame: gr.update(visible=True),
            frame: gr.update(maximum=max(1, len(decibels) - 1), value=at),
            chart: DataFrame(chart_of(decibels)),
            mask: html("notes", [drawn]) or pattern,
            shown: name,
            **frame_both_ways(compared, at),
        }

    def frame_both_ways(compared: Compared, number: int) -> Held:
        dense, sparse = (frame_of(film, number) for film in (compared.dense, compared.sparse))
        return {
            slider: (enlarged(dense), enlarged(sparse)),
            heat: heat_map(dense, sparse),
            apart: html("hint", difference_words(dense, sparse, number)),
        }

    def frame_at(held: Held) -> Held:
        if not held[shown]:
            return {apart: gr.skip()}
        return frame_both_ways(Compared(page.queue.place(held[shown])), round(held[frame]))

    def listed() -> Held:
        jobs = [one for one in page.queue.jobs() if (one.kind, one.state) == (KIND, DONE)]
        choices = [(f"{job.title} ({job.id[:15]})", job.id) for job in reversed(jobs)]
        return {earlier: gr.update(choices=choices, value=choices[0][1] if choices else None)}

    both = [slider, heat, apart]
    results = [players, told, shown, by_frame, frame, chart, mask, *both]
    asked = refusing(submit, view.error)
    run.click(asked, {*form.inputs, page.tab}, [view.error, view.job], **ADDING)
    view.at_end(show, results)
    before.expand(listed, None, [earlier], **QUIETLY)
    opened = refusing(show, view.error)
    open_it.click(opened, [earlier], [view.error, *results], **PRIVATELY)
    frame.input(frame_at, {shown, frame}, both, trigger_mode="always_last", **PRIVATELY)
    form.come_back(KIND)
    form.watch()


def figures(report: Options) -> list[list[str]]:
    """Rows of figure, value and meaning, as the library words them."""
    speed, *rest = [[tile.name, tile.figure, tile.meaning] for tile in headline(_told(report))]
    attention, work = [], []
    spent = report.get("attention_seconds")
    if isinstance(spent, dict) and spent.get("sparse"):
        dense, sparse = spent["dense"], spent["sparse"]
        ratio = (
            "not shown" if report.get("busy") else f"{dense / sparse:.3g}\N{MULTIPLICATION SIGN}"
        )
        told = f"attention alone: {dense:.2f} s dense, {sparse:.2f} s sparse"
        attention = [["Attention speed-up", ratio, told]]
    if (share := report.get("attention_flops_share")) is not None:
        work = [["Attention's work", f"{100 * share:.3g} %", "of dense, all steps"]]
    if "cache" in report:
        told = f"{len(report['skipped_steps'])} of {report['steps']} steps"
        work += [["Skipped", told, f"by cache {report['cache']}, in the sparse clip alone"]]
    seconds = f"{report['dense_seconds']:.2f} s dense, {report['sparse_seconds']:.2f} s sparse"
    size = f"{report['frames']} frames of {report['width']} x {report['height']} pixels"
    return [
        speed,
        *attention,
        *rest,
        *work,
        ["Denoising", seconds, f"{report['steps']} steps each, without decoding"],
        ["Tokens", f"{report['tokens']:,}", size],
        ["Method", report["method"].split("(")[0], report["attention"]],
        ["Kernel", report["kernel"], "how it was computed; the answer does not depend on it"],
        ["Seed", str(report["seed"]), f"the same for both; prompt: {report['prompt']}"],
    ]


def frame_of(film: Path, frame: int) -> np.ndarray:
    """Frame of a film by its number, (H, W, 3) uint8; ValueError for a number that it lacks."""
    before = 0
    for chunk in read_stream(film):
        if frame < before + len(chunk):
            return chunk[frame - before]
        before += len(chunk)
    raise ValueError(f"frame must be from 0 to {before - 1}, got {frame}")


def enlarged(frame: np.ndarray, width: int = SHOWN) -> np.ndarray:
    """Repeat the pixels of a narrower frame, so that it is about `width` pixels wide."""
    factor = max(1, width // frame.shape[1])
    return frame.repeat(factor, 0).repeat(factor, 1)


def heat_map(dense: np.ndarray, sparse: np.ndarray) -> np.ndarray:
    """Colours of the mean difference over R, G and B of each pixel, with the scale below.

    Args:
        dense, sparse: (H, W, 3) uint8.

    Returns:
        (H', W', 3) uint8: dark for equal pixels, brightest from 64 of 255 levels on.
    """

    def coloured(share: np.ndarray) -> np.ndarray:
        stops = np.linspace(0, 1, len(RAMP))
        channels = [np.interp(share, stops, [colour[i] for colour in RAMP]) for i in range(3)]
        return np.stack(channels, 2).round().astype(np.uint8)

    levels = np.abs(dense.astype(np.float32) - sparse.astype(np.float32)).mean(2)
    picture = enlarged(coloured(levels / SCALE))
    across = np.linspace(0, 1, picture.shape[1])[None].repeat(LEGEND, 0)
    gap = np.full((LEGEND // 2, picture.shape[1], 3), 255, np.uint8)
    return np.concatenate([picture, gap, coloured(across)])


def difference_words(dense: np.ndarray, sparse: np.ndarray, frame: int) -> str:
    """Say how far frames of one number lie apart."""
    levels = np.abs(dense.astype(np.int16) - sparse.astype(np.int16))
    if not levels.any():
        return f"Frame {frame} is equal in both clips."
    return (
        f"Frame {frame}: {levels.mean():.1f} of 255 levels apart on average, "
        f"{levels.max()} at most. The bar below the map runs from 0 levels, dark, to {SCALE} and "
        "more, bright."
    )


def chart_of(decibels: Sequence[float | str]) -> dict[str, list[float]]:
    """Columns of a chart of PSNR by frame, without frames that are equal."""
    shown = [(i, float(x)) for i, x in enumerate(decibels) if math.isfinite(float(x))]
    return {"frame": [i for i, _ in shown], "PSNR (dB)": [x for _, x in shown]}


def mask_options(compared: Compared) -> Values:
    """Options of `gen-accel show` that draw what the method of a comparison keeps at its sizes.

    Raises ValueError for a report without settings, or of a method that has no words.
    """
    settings, report = read_settings(compared.path), compared.report
    held, ran = settings.fields, settings.ran
    said = ran if "method" in ran else held  # what ran, which a preset by name does not say
    names = ("method", "set") if "method" in said else ("preset",)
    chosen = {name: said[name] for name in names if name in said}
    if names[0] not in chosen or "model" not in held:
        raise ValueError(f"{compared.path.name} does not say its method in words")
    sizes = {name: report[name] for name in ("frames", "height", "width")}
    return {**chosen, "model": held["model"], **sizes}


def write_page(compared: Compared, path: Path, mask: Path | None = None) -> Path:
    """Write a comparison as one HTML file, films and picture within."""
    films = {
        "Dense attention left, sparse right": compared.together,
        "Dense attention": compared.dense,
        "Sparse attention": compared.sparse,
    }
    about = compared.report
    write_report(
        path,
        {name: value for name, value in _told(about).items() if name != "settings"},
        title=f"{about['prompt']}: dense and sparse attention",
        videos=films,
        pictures={} if mask is None else {"Which pairs of tokens the method keeps": mask},
        notes=[*filter(None, [f"Sparse attention: {about['attention']}", compared.busy])],
    )
    return path


def _told(report: Options) -> Values:
    """The report without times that tell nothing."""
    # JSON has no infinity: it is "Infinity" there.
    return without_times({**report, "psnr_db": float(report["psnr_db"])})
