"""The screen Train: clips with captions, a form beside its YAML, a plan, and the training."""

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import quote

import gradio as gr
from gradio.context import Context
from pandas import DataFrame

from gen_accel.demo import TRAINED_FRAMES
from gen_accel.io import named, read_fields, read_text
from gen_accel.lora.config import TrainConfig, print_config
from gen_accel.measure.cost.figures import card_names
from gen_accel.paths import FILM_SUFFIXES
from gen_accel.process import check_free
from gen_accel.ui.choices import OWN
from gen_accel.ui.page import (
    ADDING,
    PRIVATELY,
    QUIETLY,
    TELLING,
    Followed,
    Held,
    Page,
    follow,
    html,
    refusing,
)
from gen_accel.ui.queue import GIVEN, QueuedJob
from gen_accel.ui.screens.clips import Found, find_clips, save_captions, size_of, thumbnail
from gen_accel.ui.screens.train_form import FILE, IN_TURN, TrainForm
from gen_accel.ui.worker import Options, Values

KIND = "train"
CONFIG = "config"  # option of the verb, and name of the file that a job was given
EVERY = 2.0  # seconds between two looks at a training's folder
CLIPS = "clips"  # folder in the output folder that has clips which were sent or made
EXAMPLES = 6  # clips of the embedded model's world
A_PAGE = 50  # clips
HEADS = ["", "caption", "clip", "length and size"]  # what a small window shows comes first
WIDTHS: list[str | int] = ["112px", "220px", "130px", "200px"]
CAPTION, CLIP = 1, 2  # places of columns
MOST_NAMES, MOST_POINTS = 8, 400  # of clips that are left out, and of a curve
ABOUT = (
    "A LoRA is a small file that teaches a model a length, a look or a movement from your own "
    "clips. Nothing is lost by Stop: Resume goes on at the same step."
)
# The first tab, which is never behind the dots of a small window.
SHOW_GENERATE = """() => {
  document.querySelector('#screens button[role=tab]').click();
  window.scrollTo(0, 0);
}"""

Point = tuple[int, float, str]  # step, value, name of the line
AXES = ("step", "value", "line")
# Charts of a training, by their ids.
CHARTS = {"loss": "Loss of training", "fixed-loss": "Loss at fixed noise", "rate": "Learning rate"}


def build(page: Page) -> None:
    form = TrainForm(page)
    gr.HTML(html("hint", ABOUT))
    with gr.Row(elem_classes="ga-columns"):
        with gr.Column(scale=6, min_width=320):
            table = ClipTable(page, form)
            form.settings()
        with gr.Column(scale=5, min_width=320):
            with gr.Row():
                start = gr.Button("Start", variant="primary", elem_id="train-start", scale=2)
                resume = gr.Button("Resume", elem_id="train-resume", scale=1)
            view = follow(page, "train", kind=KIND)
            _build_plan(page, form)
    _build_run(page, form, view, start, resume)
    table.listen()


class ClipTable:
    """The clips: their folder, and a table of them, whose captions are edited in it."""

    def __init__(self, page: Page, form: TrainForm) -> None:
        self.page, self.form = page, form
        form.add("data", placeholder="/data/clips", info="Videos, with clip.txt beside clip.mp4.")
        with gr.Row():
            small: Values = {"size": "sm", "min_width": 140}
            self.look = gr.Button("Look at the clips", elem_id="train-look", **small)
            self.sent = gr.UploadButton(
                "Send clips and captions",
                file_count="multiple",
                file_types=["video", "image", ".txt", *FILM_SUFFIXES],
                elem_id="train-send",
                **small,
            )
            self.example = gr.Button("Make example clips", elem_id="train-example", **small)
        self.error = gr.HTML(elem_id="train-clips-error")
        self.told = gr.HTML(elem_id="train-found")
        self.pages = gr.Dropdown([], label="clips", visible=False, elem_id="train-page")
        self.table = gr.Dataframe(
            headers=HEADS,
            datatype=["html", "str", "str", "str"],
            static_columns=[0, 2, 3],
            column_widths=WIDTHS,
            type="array",
            wrap=True,
            interactive=True,
            visible=False,
            max_height=400,
            elem_id="train-clips",
            label="Double-click a caption to edit it",
        )
        self.save = gr.Button("Save captions", visible=False, elem_id="train-save")
        self.found, self.edits, self.news = gr.State(None), gr.State({}), gr.State("")

    def listen(self) -> None:
        """Connect the section, once the form is whole."""
        form, error = self.form, self.error
        shown = [self.told, self.pages, self.table, self.save, self.edits, self.found, self.news]
        looked: Values = {"fn": refusing(self.find, error), "inputs": {*form.inputs, self.news}}
        looked |= {"outputs": [error, *shown], "show_progress_on": [self.told]}
        self.look.click(**looked, **PRIVATELY)
        state = {self.pages, self.found, self.table, self.edits}
        self.pages.input(refusing(self.turn, error), state, [error, *shown], **PRIVATELY)
        saved = {*state, *form.inputs, self.news}
        self.save.click(refusing(self.keep, error), saved, [error, *shown], **PRIVATELY)
        place: Values = {"outputs": [error, form.parts["data"], self.news], **PRIVATELY}
        for done in (
            self.sent.upload(refusing(self.send, error), [self.sent], **place),
            self.example.click(refusing(self.make, error), None, **place),
        ):
            done.success(**form.from_fields, **IN_TURN).success(**looked, **PRIVATELY)

    def find(self, held: Held) -> Held:
        config = self.form.read(held)
        self.page.places.check("train", {"data": config.data})
        found = find_clips(config, self.page.places.readable)
        silent = found.silent
        told = [held[self.news]] if held[self.news] else []
        clips = sum(not video.is_prompt for video in found.videos.values())
        told += [f"{clips:,} clips, {len(found.rows):,} captions"]
        told += [f"{len(silent)} have no caption, as {silent[0]}"] if silent else []
        told += [f"not taken: {named(found.others, MOST_NAMES)}"] if found.others else []
        told += [found.fixed] if found.fixed else []
        shown = {self.told: html("listed", told), self.found: found, self.news: ""}
        return {**self._rows(found, 0, {}), **shown}

    def turn(self, held: Held) -> Held:
        found: Found | None = held[self.found]
        if found is None:
            return {self.pages: gr.skip()}
        number = (int(held[self.pages].partition(" ")[0]) - 1) // A_PAGE
        return self._rows(found, number, self._edited(found, held))

    def keep(self, held: Held) -> Held:
        found: Found | None = held[self.found]
        if found is None:
            raise ValueError("look at the clips first")
        config = self.form.read(held)
        self.page.places.check("train", {"data": config.data})
        rows = {row.name: row for row in found.rows}
        texts = self._edited(found, held).items()
        edits = {rows[name].file: (rows[name].caption, text) for name, text in texts}
        written = {file: edit for file, edit in edits.items() if file is not None}
        files = save_captions(config, written, self.page.places.editable)
        names = ", ".join(file.name for file in files) or "nothing was changed"
        return {**self.find(held), self.told: html("quiet", f"saved: {names}")}

    def send(self, files: Sequence[str] | None) -> Held:
        place, number = self.page.places.folder / CLIPS, 1
        place.mkdir(parents=True, exist_ok=True)
        while (folder := place / f"sent{number}").exists():
            number += 1
        folder.mkdir()
        for file in files or ():
            shutil.copyfile(file, folder / Path(file).name)
        return {self.form.parts["data"]: str(folder), self.news: f"{len(files or ())} files sent"}

    def make(self) -> Held:
        from gen_accel.demo.world import write_clips

        folder = self.page.places.folder / CLIPS / "example"
        write_clips(folder, frames=TRAINED_FRAMES, count=EXAMPLES)
        return {self.form.parts["data"]: str(folder), self.news: f"{EXAMPLES} clips made"}

    def _rows(self, found: Found, number: int, kept: Mapping[str, str]) -> Held:
        """Show a page of the table, and keep what was edited on the others."""
        cells = []
        for row in found.rows[A_PAGE * number : A_PAGE * (number + 1)]:
            video = found.videos[row.clip] if row.name == row.clip else None
            first = ["", ""] if video is None else [thumbnail(video), size_of(video)]
            caption = kept.get(row.name, row.caption)
            cells.append([html("image", first[0], ""), caption, row.name, first[1]])
        starts = range(0, len(found.rows), A_PAGE)
        names = [f"{i + 1} to {min(i + A_PAGE, len(found.rows))}" for i in starts]
        shown = {"choices": names, "value": names[number], "visible": len(names) > 1}
        can_edit = found.fixed is None
        return {
            self.pages: gr.update(**shown),
            self.table: gr.update(value=cells, visible=True, interactive=can_edit),
            self.save: gr.update(visible=can_edit),
            self.edits: {**kept},
        }

    def _edited(self, found: Found, held: Held) -> dict[str, str]:
        """Map the names of rows to captions that were edited, also on other pages of the table."""
        rows = {row.name: row for row in found.rows if row.file is not None}
        now = {**held[self.edits]}
        for one in held[self.table]:
            row, text = rows.get(str(one[CLIP])), str(one[CAPTION] or "").strip()
            if row is not None:
                now.pop(row.name, None)
                now |= {row.name: text} if text != row.caption else {}
        return now


def _build_plan(page: Page, form: TrainForm) -> None:
    about: Values = {"label": "Graphics cards", "info": "Beside this machine."}
    cards = gr.Dropdown(
        card_names(), value=["4090"], multiselect=True, elem_id="train-cards", **about
    )
    with gr.Row():
        plan = gr.Button("Does it fit?", elem_id="train-plan", size="sm")
        dry = gr.Button("Try two steps on a tiny model", elem_id="train-dry-run", size="sm")
    error, told = gr.HTML(elem_id="train-plan-error"), gr.HTML(elem_id="train-plan-told")
    advice = gr.State({})
    take = gr.Button("Turn on what the plan says", visible=False, elem_id="train-turn-on")

    def ask(held: Held) -> Held:
        with form.as_file(form.read(held)) as file:
            asked = {CONFIG: file, "plan": True, "gpu": ",".join(held[cards]) or None}
            text, found = page.questions.both("train", asked)
        changes = changes_of(found)
        shown = {told: html("pre", text), advice: changes}
        return {**shown, take: gr.update(visible=bool(changes))}

    def try_out(held: Held) -> Held:
        with form.as_file(form.read(held)) as file:
            return {
                told: html("pre", page.questions.said("train", {CONFIG: file, "dry_run": True}))
            }

    def turn_on(held: Held) -> Held:
        return form.fill({**vars(form.read(held)), **held[advice]})

    shown: Values = {"outputs": [error, told, advice, take], "show_progress_on": [told]}
    plan.click(refusing(ask, error), {cards, *form.inputs}, **shown, **PRIVATELY)
    dry.click(refusing(try_out, error), form.inputs, **shown, **PRIVATELY)
    turned = refusing(turn_on, error)
    take.click(turned, {advice, *form.inputs}, [error, *form.outputs], **PRIVATELY)


def changes_of(plan: Options) -> dict[str, str]:
    """Return the fields that the plan advises for the first device that it does not fit."""
    for one in plan["verdicts"]:
        if one["fits"] is False and one["advice"]:
            return dict(change["option"].split(" ", 1) for change in one["advice"]["changes"])
    return {}


def _build_run(
    page: Page, form: TrainForm, view: Followed, start: gr.Button, resume: gr.Button
) -> None:
    """Build what a training shows: its curves and its report."""
    text, seen = gr.State(""), gr.State("")  # YAML of the training that is shown, and its mark
    timer = gr.Timer(EVERY, active=False)
    with gr.Row():
        about: Values = dict(zip(("x", "y", "color"), AXES, strict=True))
        about |= {"height": 260, "min_width": 300, "color_title": "", "visible": False}
        charts = [
            gr.LinePlot(title=title, elem_id=f"train-{name}", **about)
            for name, title in CHARTS.items()
        ]
    clips, report = gr.HTML(elem_id="train-told"), gr.HTML(elem_id="train-report")
    use = gr.Button("Use in Generate", visible=False, elem_id="train-use")
    result = gr.Textbox(visible="hidden", elem_id="train-result-folder")

    def submit(again: bool, held: Held) -> Held:
        from gen_accel.lora.trainer import check_out

        config = form.checked(form.read(held))
        check_out(config, again)
        out = Path(config.out)
        if out.exists():
            check_free(out)
        about = {"title": out.name, "kind": KIND, "about": {"out": config.out}}
        with form.as_file(config) as file:
            given = {"tab": held[page.tab], "given": {CONFIG: file}}
            job = page.queue.submit("train", {"resume": again}, **about, **given)
        runs = gr.update(choices=form.earlier())
        return {view.job: job.id, text: print_config(config), form.runs: runs}

    def look(held: Held) -> Held:
        """Show what is new in the folder of the training."""
        if not held[text]:
            return {seen: gr.skip()}
        config = form.config(form.fields_in(held[text]))
        out, job = folder_of(config), page.find(held[view.job])
        mark = f"{held[text]} {job.state if job else ''} {_mark(out)}"
        if mark == held[seen]:
            return {seen: gr.skip()}
        shown: Held = {
            seen: mark,
            report: html("report", address(out / "report.html", page.places.folder)),
        }
        shown |= {clips: html("listed", clips_told(config))}
        for chart, points in zip(charts, curves(out), strict=True):
            columns = zip(*points, strict=True) if points else ((), (), ())
            table = DataFrame(dict(zip(AXES, columns, strict=True)))
            shown[chart] = gr.LinePlot(value=table, visible=bool(points))
        made = [one for name in ("lora", "image_prompt") if (one := out / name).is_dir()]
        is_lora = bool(made) and made[0].name == "lora"
        return {**shown, result: str(made[0]) if made else "", use: gr.update(visible=is_lora)}

    def come_back(held: Held) -> Held:
        """Show the settings of a job, if it is another one than the page knows."""
        job = page.find(held[view.job])
        now = "" if job is None else _yaml_of(page, job)
        if not now or now == held[text]:
            return {text: gr.skip()}
        return {**form.fill(form.fields_in(now)), text: now}

    def open_run(name: str | None) -> Held:
        if name is None:  # the menu was left without a choice
            return {}
        shown = form.fill(config_of_run(form.trainings / Path(name).name))
        return {**shown, view.job: "", text: shown[form.yaml]}

    for button, again in ((start, False), (resume, True)):
        asked = refusing(partial(submit, again), view.error)
        begun = [view.error, view.job, text, form.runs]
        button.click(asked, {page.tab, *form.inputs}, begun, **ADDING)
    looks: Values = {"fn": look, "inputs": {text, view.job, seen}, **QUIETLY}
    looks["outputs"] = [*charts, clips, report, result, use, seen]
    timer.tick(**looks)
    text.change(lambda now: gr.Timer(active=bool(now)), [text], [timer], **QUIETLY)
    gr.on([text.change, view.ended.change], **looks)
    filled = [*form.outputs, text]
    view.job.change(refusing(come_back, form.error), {view.job, text}, filled, **TELLING)
    opened = refusing(open_run, form.error)
    form.runs.input(opened, [form.runs], [*filled, view.job], **PRIVATELY)
    used = _parts_of_generate()

    def generate(held: Held) -> Held:
        config = form.config(form.fields_in(held[text]))
        values = {"model": config.model, "quality": OWN, "from_lora": held[result]}
        values |= {"frames": config.longest, "height": config.height, "width": config.width}
        opened = gr.update(open=True)  # the folds in which the LoRA is shown
        return {part: values.get(name, opened) for name, part in used.items()}

    if used:
        done = use.click(generate, {text, result}, [*used.values()], **QUIETLY)
        done.then(None, js=SHOW_GENERATE, **PRIVATELY)


def _parts_of_generate() -> Values:
    """Controls of the screen Generate that a LoRA sets, by name, and the folds around its own."""
    root = Context.root_block
    found = {
        str(one.elem_id).removeprefix("gen-").replace("-", "_"): one
        for one in (root.blocks.values() if root else ())
        if str(one.elem_id).startswith("gen-")
    }
    names = ["model", "quality", "from_lora", "frames", "height", "width"]
    names += ["advanced", "attention_fold"]
    return {name: found[name] for name in names if name in found}


def _yaml_of(page: Page, job: QueuedJob) -> str:
    try:
        return read_text(page.queue.place(job) / GIVEN / FILE)
    except (OSError, ValueError):  # it was removed meanwhile
        return ""


def _mark(out: Path) -> str:
    """Return a text that changes when a training's folder has something new to show."""
    marks = []
    for name in ("metrics.jsonl", "report.html", "lora", "image_prompt"):
        with suppress(OSError):  # not there yet
            marks.append(f"{name} {(out / name).stat().st_mtime_ns}")
    return " ".join(marks)


def clips_told(config: TrainConfig) -> list[str]:
    """Say what is trained on, and what is lost and left out of the clips."""
    from gen_accel.lora.data.report import REPORT

    try:
        found = read_fields(Path(config.cache or f"{config.out}/cache") / REPORT)
    except (OSError, ValueError):  # not there yet
        return []
    lost, frames = found["lost_picture"], found["frames"]
    told = [f"{found['clips']:,} to train on, of {found['videos']:,} found"]
    told += [f"{lost:.0%} of the picture is cropped on average"] if found["lost"] else []
    told += [f"{found['unused_frames']:,} of {frames:,} frames are unused"] if frames else []
    names = [f"left out: {name}, {reason}" for name, reason in found["left_out"].items()]
    names += [f"converted: {name}, {how}" for name, how in found.get("converted", {}).items()]
    rest = len(names) - MOST_NAMES
    return [*told, *names[:MOST_NAMES], *([f"and {rest} more"] if rest > 0 else [])]


def folder_of(config: TrainConfig) -> Path:
    """Folder of a run; of two experts, the run's which began last."""
    from gen_accel.lora.experts import NOISE

    out = Path(config.out)
    runs = [out / name for name in NOISE.values()] if config.part == "both" else []
    return next((run for run in reversed(runs) if run.is_dir()), out)


def curves(out: Path) -> list[list[Point]]:
    """Points of the charts of a training, by `CHARTS`, from its `metrics.jsonl`."""
    from gen_accel.lora.progress import STEADY, running_mean
    from gen_accel.lora.report import METRICS, read_metrics

    lines, fixed = read_metrics(out / METRICS)
    steps = [one["step"] + 1 for one in lines]
    losses = [float(one["loss"]) for one in lines]
    rates = [float(one.get("learning_rate", math.nan)) for one in lines]
    levels: dict[str, list[tuple[int, float]]] = {}
    for one in (one for one in fixed if "after" in one):
        for name, loss in ({"mean": one["fixed_loss"]} | one["levels"]).items():
            levels.setdefault(name, []).append((one["after"], loss))
    return [
        [
            *_curve(zip(steps, losses, strict=True), "each step"),
            *_curve(zip(steps, running_mean(losses, STEADY), strict=True), "running mean"),
        ],
        [point for name, held in levels.items() for point in _curve(held, name)],
        _curve(zip(steps, rates, strict=True), "learning rate"),
    ]


def _curve(points: Iterable[tuple[int, float]], line: str) -> list[Point]:
    """Points of a line, of which some are left out if there are many."""
    from gen_accel.lora.caching.preview import evenly

    kept = [(step, value, line) for step, value in points if math.isfinite(value)]
    return [kept[place] for place in evenly(len(kept), MOST_POINTS)]


def config_of_run(out: Path) -> Values:
    """Return the fields that the newest checkpoint of a run records.

    Raises FileNotFoundError for a folder without a checkpoint, ValueError for one that cannot be
    read.
    """
    from gen_accel.lora import checkpoint
    from gen_accel.lora.trainer import CHECKPOINTS

    saved = checkpoint.found(out / CHECKPOINTS)
    if not saved:
        raise FileNotFoundError(f"{out / CHECKPOINTS} holds no checkpoint")
    state = read_fields(saved[-1] / checkpoint.STATE)
    if not isinstance(state.get("config"), dict):
        raise ValueError(f"{saved[-1] / checkpoint.STATE} holds no config")
    return {**state["config"], "out": str(out)}


def address(path: Path, folder: Path) -> str:
    """Address of a file of a training, from the page; it changes with the file; "" for none.

    Args:
        folder: output folder of the page.
    """
    found = path.resolve()
    if not path.is_file() or not found.is_relative_to(folder):
        return ""
    return f"trainings/{quote(found.relative_to(folder).as_posix())}?{path.stat().st_mtime_ns}"
