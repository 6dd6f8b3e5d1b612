"""The screen Compare: the same prompt and seed, dense and sparse, side by side."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
import numpy as np

from gen_accel.io import read_fields
from gen_accel.measure.clip_settings import read_settings
from gen_accel.measure.report import comparison_files, headline, without_times, write_report
from gen_accel.measure.video_io import read_stream, video_fps
from gen_accel.ui.page import (
    ADDING,
    PRIVATELY,
    QUIETLY,
    Held,
    Page,
    charted,
    follow,
    html,
    refusing,
)
from gen_accel.ui.queue import DONE
from gen_accel.ui.screens.generate import OWN, RunForm
from gen_accel.ui.worker import Options, Values, line_of

KIND, FRAMES = "compare", 33
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
        self.dense, self.together, self.path = comparison_files(self.sparse)
        self.report = read_fields(self.path)
        for film in (self.sparse, self.dense, self.together):
            if not film.is_file():
                raise FileNotFoundError(f"the comparison {self.path} lacks a film: {film}")

    @property
    def busy(self) -> str:
        """Say that the machine was busy, in the library's words; "" if it was not."""
        busy = self.report.get("busy")
        return f"{busy[:1].upper()}{busy[1:]}, so that no speed-up is told." if busy else ""


class _Screen:
    """The screen: a form, the results, and one frame both ways."""

    def __init__(self, page: Page) -> None:
        self.page = page
        gr.HTML(html("hint", WHAT))
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                self.form = RunForm(
                    page,
                    "cmp",
                    qualities=("quality", "balanced", "fast", OWN),
                    start={"timed": True},
                    frames={"minimum": 9, "maximum": 129, "value": FRAMES, "step": 4},
                )
                self.form.add("timed", label="Time attention by itself")
                self.run = gr.Button("Compare", variant="primary", elem_id="cmp-run")
                with gr.Accordion("Earlier comparisons", open=False) as self.before:
                    label = "Of this page's output folder"
                    self.earlier = gr.Dropdown([], label=label, elem_id="cmp-earlier")
                    self.open_it = gr.Button("Open", elem_id="cmp-open", size="sm")
            with gr.Column(scale=7, min_width=300):
                self.view = follow(page, "cmp", kind=KIND)
                self.busy = gr.HTML(elem_id="cmp-busy")
                self.players = gr.HTML(
                    elem_id="cmp-players", js_on_load=IN_STEP.read_text(encoding="utf-8")
                )
                self.figures = gr.HTML(elem_id="cmp-figures")
                self.downloads = gr.HTML(elem_id="cmp-downloads")
        self.shown = gr.State("")
        with gr.Column(visible=False, elem_id="cmp-frame-parts") as self.by_frame:
            gr.Markdown("### One frame, both ways")
            self.frame = gr.Slider(
                0,
                1,
                0,
                step=1,
                label="Frame",
                info="It begins at the frame in which the clips differ most.",
                elem_id="cmp-frame",
            )
            with gr.Row():
                self.slider = gr.ImageSlider(
                    label="Drag: dense left, sparse right",
                    elem_id="cmp-slider",
                    interactive=False,
                    max_height=420,
                )
                label = "Difference of the two"
                self.heat = gr.Image(
                    label=label, elem_id="cmp-heat", interactive=False, height=420
                )
            self.apart = gr.HTML(elem_id="cmp-apart")
            self.chart = gr.LinePlot(
                x="frame",
                y="PSNR (dB)",
                title="PSNR of each frame, of the coded films: higher is closer",
                height=220,
                elem_id="cmp-chart",
            )
            gr.Markdown("### What the method keeps")
            self.mask = gr.HTML(elem_id="cmp-mask")
        self._listen()

    def submit(self, held: Held) -> Held:
        options, files = self.form.asked(held)
        options |= {"compare": True, "out": "{job}/video.mp4"}
        about = {"title": f"{' '.join(options['prompt'])}, dense and sparse", "kind": KIND}
        job = self.page.submit("generate", options, tab=held[self.page.tab], given=files, **about)
        return {self.view.job: job.id}

    def show(self, name: str | None) -> Held:
        if not name:
            raise ValueError("choose a comparison; there is none yet before the first run")
        job = self.page.queue.job(name)
        if job.state != DONE:  # its own error stays
            return {self.view.error: gr.skip()}
        compared = self._opened(name)
        decibels, drawn = self._decibels(compared), self._drawn(compared)
        place = compared.path.parent
        write_page(compared, place / PAGE, None if drawn else place / MASK)
        at = int(np.argmin([float(x) for x in decibels]))  # the frame in which they differ most
        films = {"Dense": compared.dense, "Sparse": compared.sparse}
        sides = {
            f"{name}, {compared.report[f'{name.lower()}_seconds']:.1f} s": self.page.url(job, film)
            for name, film in films.items()
        }
        files = (compared.path, compared.sparse, compared.dense, compared.together)
        names = [PAGE, *(file.name for file in files)]
        links = [
            (words, f"{self.page.url(job, name)}&download=true", name)
            for words, name in zip(DOWNLOADS, names, strict=True)
        ]
        rows = figures(compared.report)
        kept = self.page.url(job, MASK)
        fps = video_fps(compared.sparse) or 16
        return {
            self.busy: html("notes", [compared.busy]),
            self.players: html("players", sides, fps),
            self.figures: html("table", ("figure", "value", "what it says"), rows),
            self.downloads: html("links", links),
            self.by_frame: gr.update(visible=True),
            self.frame: gr.update(maximum=max(1, len(decibels) - 1), value=at),
            self.chart: charted(chart_of(decibels)),
            self.mask: html("notes", [drawn]) or html("image", kept, "pattern of the method"),
            self.shown: name,
            **self._frame(compared, at),
        }

    def frame_at(self, held: Held) -> Held:
        if not held[self.shown]:
            return {self.apart: gr.skip()}
        return self._frame(self._opened(held[self.shown]), round(held[self.frame]))

    def listed(self) -> Held:
        jobs = [one for one in self.page.queue.jobs() if (one.kind, one.state) == (KIND, DONE)]
        choices = [(f"{job.title} ({job.id[:15]})", job.id) for job in reversed(jobs)]
        return {self.earlier: gr.update(choices=choices, value=choices[0][1] if choices else None)}

    def _frame(self, compared: Compared, number: int) -> Held:
        dense, sparse = (frame_of(film, number) for film in (compared.dense, compared.sparse))
        return {
            self.slider: (enlarged(dense), enlarged(sparse)),
            self.heat: heat_map(dense, sparse),
            self.apart: html("hint", difference_words(dense, sparse, number)),
        }

    def _opened(self, name: str) -> Compared:
        return Compared(self.page.queue.place(name))

    def _decibels(self, compared: Compared) -> list[float | str]:
        """PSNR by frame, as `gen-accel metrics --by-frame` says it; infinite ones as words."""
        films = [str(compared.sparse), str(compared.dense)]
        asked = {"videos": films, "by_frame": True, "metrics": ""}
        return self.page.questions.ask("metrics", asked)["by_frame"]["psnr_db"]

    def _drawn(self, compared: Compared) -> str:
        """Draw the pattern of the method into the job's folder; why that cannot be, or ""."""
        try:
            place = compared.path.with_name(MASK)
            self.page.questions.said("show", {**mask_options(compared), "out": str(place)})
        except (ValueError, OSError) as error:
            return f"No picture of the pattern: {line_of(error)}"
        return ""

    def _listen(self) -> None:
        view, page = self.view, self.page
        both = [self.slider, self.heat, self.apart]
        results = [view.error, self.busy, self.players, self.figures, self.downloads, self.shown]
        results += [self.by_frame, self.frame, self.chart, self.mask, *both]

        def told(function: Callable[..., Held]) -> Callable[..., Held]:
            return refusing(function, view.error)

        inputs = {*self.form.inputs, page.tab}
        self.run.click(told(self.submit), inputs, [view.error, view.job], **ADDING)
        view.ended.change(told(self.show), [view.ended], results, **PRIVATELY)
        self.before.expand(self.listed, None, [self.earlier], **QUIETLY)
        self.open_it.click(told(self.show), [self.earlier], results, **PRIVATELY)
        at = {self.shown, self.frame}
        self.frame.input(self.frame_at, at, both, trigger_mode="always_last", **PRIVATELY)
        self.form.watch()


def build(page: Page) -> None:
    _Screen(page)


def figures(report: Options) -> list[list[str]]:
    """Rows of figure, value and meaning, as the library words them."""
    speed, *rest = [[tile.name, tile.figure, tile.meaning] for tile in headline(_told(report))]
    attention, work = [], []
    spent = report.get("attention_seconds")
    if isinstance(spent, dict) and spent.get("sparse"):
        dense, sparse = spent["dense"], spent["sparse"]
        ratio = (
            "not told" if report.get("busy") else f"{dense / sparse:.3g}\N{MULTIPLICATION SIGN}"
        )
        told = f"attention alone: {dense:.2f} s dense, {sparse:.2f} s sparse"
        attention = [["Attention speed-up", ratio, told]]
    if (share := report.get("attention_flops_share")) is not None:
        work = [["Attention's work", f"{share:.1%}", "of dense, all steps"]]
    seconds = f"{report['dense_seconds']:.2f} s dense, {report['sparse_seconds']:.2f} s sparse"
    size = f"{report['frames']} frames of {report['width']} x {report['height']} pixels"
    whole = f"{report['method']} {report.get('schedule', '')}".strip()
    return [
        speed,
        *attention,
        *rest,
        *work,
        ["Denoising", seconds, f"{report['steps']} steps each, without decoding"],
        ["Tokens", f"{report['tokens']:,}", size],
        ["Method", report["method"].split("(")[0], whole],
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
    held, report = read_settings(compared.path).fields, compared.report
    names = ("preset",) if "preset" in held else ("method", "set")
    chosen = {name: held[name] for name in names if name in held}
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
        notes=[*filter(None, [f"Sparse attention: {about['method']}", compared.busy])],
    )
    return path


def _told(report: Options) -> Values:
    """The report without times that tell nothing."""
    # JSON has no infinity: it is "Infinity" there.
    return without_times({**report, "psnr_db": float(report["psnr_db"])})
