"""The screen Compare: the same prompt and seed, dense and sparse, side by side."""

import html
from pathlib import Path
from typing import Any

import gradio as gr

from gen_accel.names import METHODS, PRESETS
from gen_accel.ui import comparisons
from gen_accel.ui.comparisons import Compared
from gen_accel.ui.page import PRIVATELY, QUIETLY, Page, error_box, follow, refusing
from gen_accel.ui.queue import DONE, QueuedJob
from gen_accel.ui.run_parts import DENSE, OWN, options_of, run_parts
from gen_accel.ui.tables import CSS, charted, hint, image, links, note, table, video
from gen_accel.ui.worker import line_of

FRAMES = 33
MASK, PAGE = "mask.png", "report.html"  # written into the folder of the job
WHAT = (
    "Makes one clip twice from the same noise: with full (dense) attention, and with sparse "
    "attention, which leaves pairs of tokens out. Shows how much faster that was, and what it "
    "changed in the picture."
)
PLAYERS_CSS = (
    CSS
    + """
.ga-pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0.75rem; }
.ga-pair figure { margin: 0; }
.ga-pair figcaption { font-weight: 600; margin-bottom: 0.25rem; }
.ga-controls { display: flex; gap: 0.75rem; align-items: center; margin-top: 0.5rem; }
.ga-controls button { border: 1px solid var(--border-color-primary); border-radius: 8px;
  padding: 0.3rem 1rem; cursor: pointer; min-width: 6rem; }
.ga-controls input { flex: 1; min-width: 0; }
@media (max-width: 480px) { .ga-pair { grid-template-columns: 1fr; } }
"""
)
# Whatever is done to one player is done to the other. Events of media do not bubble, but they are
# seen on their way down.
IN_STEP = """
const both = () => [...element.querySelectorAll('video')];
const other = (one) => both().find((video) => video !== one);
const place = () => element.querySelector('input');
const button = () => element.querySelector('button');
const words = () => {
  const [one] = both();
  if (!one || !button()) return;
  button().textContent = one.paused ? 'Play both' : 'Pause both';
  const frame = Math.round(one.currentTime * Number(place().dataset.fps));
  element.querySelector('output').textContent = `frame ${frame}`;
  if (one.duration) place().value = 1000 * one.currentTime / one.duration;
};
// Players that are being set here, whose seeking is nobody's wish.
const led = new Set();
const set = (video, time) => {
  if (Math.abs(video.currentTime - time) < 0.01) return;
  led.add(video);
  video.currentTime = time;
};
const follow = (event) => {
  const [one, two] = [event.target, other(event.target)];
  if (!two) return;
  const [kind, apart] = [event.type, Math.abs(two.currentTime - one.currentTime)];
  if (kind === 'seeking' && !led.delete(one)) set(two, one.currentTime);
  if (kind === 'play' && two.paused) { set(two, one.currentTime); two.play(); }
  if (kind === 'pause' && !two.paused && !one.ended) { two.pause(); set(two, one.currentTime); }
  if (kind === 'timeupdate' && one === both()[0] && apart > 0.15 && !two.seeking) {
    set(two, one.currentTime);
  }
  words();
};
for (const kind of ['play', 'pause', 'seeking', 'timeupdate']) {
  element.addEventListener(kind, follow, true);
}
element.addEventListener('click', (event) => {
  if (!event.target.closest('.ga-controls button')) return;
  const [one] = both();
  if (one.paused) both().forEach((video) => video.play()); else both().forEach((v) => v.pause());
});
element.addEventListener('input', (event) => {
  if (event.target !== place()) return;
  for (const video of both()) video.currentTime = video.duration * event.target.value / 1000;
});
"""


def build(page: Page) -> None:
    gr.HTML(hint(WHAT), css_template=CSS)
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            frames = gr.Slider(
                9, 129, FRAMES, step=4, label="Frames", elem_id="cmp-frames", render=False
            )
            parts = run_parts(
                page,
                "cmp",
                frames=frames,
                settings=(*PRESETS[::-1], OWN),
                methods=[name for name in METHODS if name != DENSE],
            )
            timed = gr.Checkbox(
                True,
                label="Time attention by itself",
                info="On a graphics card this waits for each call.",
                elem_id="cmp-timed",
            )
            run = gr.Button("Compare", variant="primary", elem_id="cmp-run")
            with gr.Accordion("Earlier comparisons", open=False) as before:
                earlier = gr.Dropdown(
                    [], label="Of this page's output folder", elem_id="cmp-earlier"
                )
                open_it = gr.Button("Open", elem_id="cmp-open", size="sm")
        with gr.Column(scale=7, min_width=300):
            view = follow(page, "cmp", kind="compare")
            busy = gr.HTML(elem_id="cmp-busy", css_template=CSS)
            players = gr.HTML(elem_id="cmp-players", css_template=PLAYERS_CSS, js_on_load=IN_STEP)
            figures = gr.HTML(elem_id="cmp-figures", css_template=CSS)
            downloads = gr.HTML(elem_id="cmp-downloads", css_template=CSS)
    shown = gr.State("")
    with gr.Column(visible=False, elem_id="cmp-frame-parts") as by_frame:
        gr.Markdown("### One frame, both ways")
        frame = gr.Slider(
            0,
            1,
            0,
            step=1,
            label="Frame",
            info="It begins where the clips differ most.",
            elem_id="cmp-frame",
        )
        with gr.Row():
            slider = gr.ImageSlider(
                label="Drag: dense left, sparse right",
                elem_id="cmp-slider",
                interactive=False,
                show_label=True,
                max_height=420,
            )
            heat = gr.Image(
                label="Where they differ", elem_id="cmp-heat", interactive=False, height=420
            )
        apart = gr.HTML(elem_id="cmp-apart", css_template=CSS)
        chart = gr.LinePlot(
            x="frame",
            y="PSNR (dB)",
            title="PSNR of each frame, of the coded films: higher is closer",
            height=220,
            elem_id="cmp-chart",
        )
        gr.Markdown("### What the method keeps")
        mask = gr.HTML(elem_id="cmp-mask", css_template=CSS)

    def submit(*values: Any) -> Any:
        *run, timed, tab = values
        options = options_of(run) | {"compare": True, "timed": timed, "out": "{job}/video.mp4"}
        about = {"title": f"{options['prompt'][0]}, dense and sparse", "kind": "compare"}
        return page.submit("generate", options, tab=tab, **about).id

    def ended(name: str) -> Any:
        job = page.queue.job(name)
        return show(str(page.queue.store.place(job) / "video.json")) if job.state == DONE else none

    none = [gr.skip()] * 13

    def show(path: str) -> Any:
        compared, job = _opened(page, path)
        decibels, drawn = _decibels(page, compared), _mask(page, compared, job)
        place = page.queue.store.place(job)
        picture = place / MASK if drawn == "" else None
        comparisons.write_page(compared, place / PAGE, picture)
        at = comparisons.farthest(decibels)
        most = max(1, len(decibels) - 1)
        kept = image(page.url(job, MASK), "pattern of the method") if picture else note(drawn)
        return [
            note(comparisons.busy_words(compared.report)),
            _players(page, compared, job),
            table(("figure", "value", "what it says"), comparisons.figures(compared.report)),
            _downloads(page, compared, job),
            gr.update(visible=True),
            gr.update(maximum=most, value=at),
            charted(comparisons.chart_of(decibels)),
            kept,
            path,
            *frame_at(path, at),
            "",
        ]

    def frame_at(path: str, number: float) -> Any:
        if not path:
            return [gr.skip()] * 3
        compared, _ = _opened(page, path)
        dense, sparse = (
            comparisons.frame_of(film, round(number)) for film in (compared.dense, compared.sparse)
        )
        pair = comparisons.enlarged(dense), comparisons.enlarged(sparse)
        words = comparisons.difference_words(dense, sparse, round(number))
        return [pair, comparisons.heat_map(dense, sparse), hint(words)]

    def listed() -> Any:
        found = comparisons.comparisons_in(page.places.folder)
        choices = [(_title(page, report), str(report)) for report in found]
        return gr.update(choices=choices, value=choices[0][1] if choices else None)

    results = [busy, players, figures, downloads, by_frame, frame, chart, mask, shown]
    results += [slider, heat, apart]
    run.click(
        refusing(submit, 1), [*parts.inputs, timed, page.tab], [view.error, view.job], **PRIVATELY
    )
    view.ended.change(_told(ended), [view.ended], [*results, view.error], **PRIVATELY)
    before.expand(listed, [], [earlier], **QUIETLY)
    open_it.click(_told(show), [earlier], [*results, view.error], **PRIVATELY)
    frame.input(
        frame_at, [shown, frame], [slider, heat, apart], trigger_mode="always_last", **PRIVATELY
    )


def _told(function: Any) -> Any:
    """Wrap what shows a comparison: what it refuses is a sentence in the error box, its last
    output."""

    def call(path: Any) -> Any:
        try:
            if not path:
                raise ValueError("choose a comparison; there is none yet before the first run")
            return function(path)
        except (ValueError, OSError, KeyError) as error:
            return [*[gr.skip()] * 12, error_box(error)]

    return call


def _opened(page: Page, path: str) -> tuple[Compared, QueuedJob]:
    """Open a comparison of this page, and find its job."""
    found = page.places.readable(path)
    inside = found.relative_to(page.places.folder).parts
    return comparisons.open_comparison(found), page.queue.job(inside[0])


def _decibels(page: Page, compared: Compared) -> list[float]:
    """PSNR by frame, as `gen-accel metrics --by-frame` says it."""
    asked = {"videos": [str(compared.sparse), str(compared.dense)], "by_frame": True}
    found = page.questions.ask("metrics", {**asked, "metrics": ""})
    return found["by_frame"]["psnr_db"]


def _mask(page: Page, compared: Compared, job: QueuedJob) -> str:
    """Draw the pattern of the method into the job's folder; why that is not possible, or ""."""
    try:
        options = comparisons.mask_options(compared)
        place = page.queue.store.place(job) / MASK
        page.questions.said("show", {**options, "out": str(place)})
    except (ValueError, OSError) as error:
        return f"No picture of the pattern: {line_of(error)}"
    return ""


def _players(page: Page, compared: Compared, job: QueuedJob) -> str:
    report = compared.report
    sides = {
        f"Dense, {report['dense_seconds']:.1f} s": compared.dense,
        f"Sparse, {report['sparse_seconds']:.1f} s": compared.sparse,
    }
    figures = [
        f"<figure><figcaption>{html.escape(words)}</figcaption>"
        f"{video(page.url(job, film), words)}</figure>"
        for words, film in sides.items()
    ]
    return (
        f'<div class="ga-pair">{"".join(figures)}</div>'
        '<div class="ga-controls"><button type="button">Play both</button>'
        '<input type="range" min="0" max="1000" value="0" aria-label="Place in both clips" '
        f'data-fps="{compared.fps:g}"><output>frame 0</output></div>'
    )


def _downloads(page: Page, compared: Compared, job: QueuedJob) -> str:
    named = {
        "Report (HTML)": PAGE,
        "Report (JSON)": compared.path.name,
        "Sparse clip": compared.sparse.name,
        "Dense clip": compared.dense.name,
        "Side by side": compared.together.name,
    }
    return links(
        (words, f"{page.url(job, name)}&download=true", name) for words, name in named.items()
    )


def _title(page: Page, report: Path) -> str:
    inside = report.relative_to(page.places.folder).parts
    try:
        job = page.queue.job(inside[0])
    except KeyError:
        return str(report)
    return f"{job.title} ({job.id[:15]})"
