"""The screen Train: clips with captions, a form beside its YAML, a plan, and the training."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from gradio.context import Context

from gen_accel.config import read_mapping
from gen_accel.demo import NAME, TRAINED_FRAMES
from gen_accel.io import read_fields, read_text
from gen_accel.lora.config import TrainConfig, print_config
from gen_accel.measure.cost.figures import card_names
from gen_accel.process import check_free
from gen_accel.registry import PUBLISHED
from gen_accel.ui.form import Form
from gen_accel.ui.page import (
    ADDING,
    PRIVATELY,
    QUIETLY,
    TELLING,
    Held,
    Page,
    charted,
    follow,
    html,
    refusing,
)
from gen_accel.ui.queue import GIVEN, QueuedJob
from gen_accel.ui.screens.clips import IN_TURN, ClipTable, check_readable, videos_of
from gen_accel.ui.screens.generate import OWN
from gen_accel.ui.worker import Options, Values, line_of

KIND = "train"
CONFIG = "config"  # option of the verb, and name of the file that a job was given
FILE = "config.yaml"  # what errors call the YAML on the page
TRAININGS, FIRST = "trainings", "lora"  # folder with one for each training, and the first of them
EVERY = 2.0  # seconds between two looks at a training's folder
MOST_NAMES, MOST_POINTS = 8, 400  # of clips that are left out, and of a curve
# Fields that matter first, in this order; all others are folded, by their groups.
MATTER = (
    *("stages", "height", "width", "fps", "rank", "learning_rate", "batch_size"),
    *("base", "blocks_to_swap", "gradient_checkpointing"),
    *("held_out", "loss_every", "validate_every", "validation_prompts", "checkpoint_every"),
)
# Of the embedded model's clips, which knows no others.
DEMO: Values = {"height": 96, "width": 96, "stages": [f"{TRAINED_FRAMES}:200"]}
ABOUT = (
    "A LoRA is a small file that teaches a model a length, a look or a movement from your own "
    "clips. **1** Choose the clips and read their captions. **2** Say what for; the rest has "
    "values. **3** See whether it fits your card. **4** Start. Nothing is lost by Stop: Resume "
    "goes on at the same step."
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
    gr.Markdown(ABOUT)
    gr.Markdown("### 1 Clips")
    table = ClipTable(page, form)
    gr.Markdown("### 2 Settings")
    form.settings()
    gr.Markdown("### 3 Plan")
    _build_plan(page, form)
    gr.Markdown("### 4 Training")
    _build_run(page, form)
    table.listen()


class TrainForm(Form):
    """Form of all fields of a training, with the YAML that they are beside it.

    Attributes:
        yaml: the text, which a person may edit.
        written: the text as it was last written from here. A YAML that differs was edited, and
            is what counts.
    """

    def __init__(self, page: Page) -> None:
        self.page, self.trainings = page, page.places.folder / TRAININGS
        self.trainings.mkdir(parents=True, exist_ok=True)
        gr.set_static_paths([self.trainings])  # videos and reports, shown from where they lie
        start = {"model": page.models[0], "out": str(self.trainings / FIRST)}
        super().__init__(TrainConfig, "train", start | (DEMO if page.models[0] == NAME else {}))

    def settings(self) -> None:
        """Build what is left of the form, with the YAML beside it."""
        with gr.Row():
            with gr.Column(scale=6, min_width=320):
                models = [*dict.fromkeys((*self.page.models, *PUBLISHED))]
                with gr.Row():
                    self.add("model", choices=models)
                    self.add("out", info="A folder for each training, in the folder of this page.")
                for i in range(0, len(MATTER), 2):
                    self.row(*MATTER[i : i + 2])
                self.rest()
            text = print_config(TrainConfig.read(self.start))
            with gr.Column(scale=5, min_width=320):
                self.yaml = gr.Code(
                    text,
                    language="yaml",
                    label="The same as a file: gen-accel train FILE.yaml",
                    elem_id="train-yaml",
                    lines=20,
                    max_lines=34,
                    interactive=True,
                )
                self.written = gr.Textbox(text, visible="hidden", elem_id="train-written")
                with gr.Row():
                    self.load = gr.UploadButton(
                        "Load a YAML file", file_types=[".yaml", ".yml"], elem_id="train-load"
                    )
                    self.runs = gr.Dropdown(
                        self.earlier(),
                        value=None,
                        label="earlier trainings",
                        info="Shows one, and takes its settings.",
                        elem_id="train-runs",
                    )
                self.error = gr.HTML(elem_id="train-config-error")
        self._listen()

    @property
    def inputs(self) -> set[Any]:
        """Components whose values `read` takes."""
        return {self.yaml, self.written, *self.parts.values()}

    @property
    def outputs(self) -> list[Any]:
        return [self.error, *self.inputs]

    def read(self, held: Held) -> TrainConfig:
        """Make the config of the form, or of the YAML if that was edited last.

        Raises ValueError or OSError for what the library refuses, or for a missing package.
        """
        if held[self.yaml].strip() != held[self.written].strip():
            return self.config(self.fields_in(held[self.yaml]))
        return self.config(self.entered(held))

    def config(self, values: Options) -> TrainConfig:
        """Make a config of values, which must name no code and no model from elsewhere.

        Raises ValueError or OSError.
        """
        self.page.places.check_sources(values)  # before the library imports what they name
        try:
            made = TrainConfig.read(values)
            from gen_accel.attention_processors.methods.registry import method_from

            method_from(made.method, made.settings)
            return made
        except (ValueError, OSError):
            raise
        except Exception as error:
            raise ValueError(f"this cannot be checked: {line_of(error)}") from error

    def fields_in(self, text: str) -> Values:
        """Read the fields that a YAML text gives. Raises ValueError."""
        with tempfile.TemporaryDirectory(prefix="gen-accel-") as folder:
            path = Path(folder) / FILE
            path.write_text(text, encoding="utf-8")
            try:
                return read_mapping(path, verb="train")
            except ValueError as error:
                raise ValueError(str(error).replace(str(path), FILE)) from None

    def checked(self, config: TrainConfig) -> TrainConfig:
        """Return a config that can train: its files are there, and this page may use them.

        Raises ValueError or OSError for another one.
        """
        self.page.places.check("train", vars(config))
        config.check()
        out = Path(config.out).resolve()
        if not out.is_relative_to(self.trainings) or out == self.trainings:
            raise ValueError(
                f"out is {config.out}, and this page trains in {self.trainings}: give "
                f"{self.trainings / out.name}"
            )
        config.check_files()
        if config.data is not None:
            check_readable(videos_of(config), self.page.places.readable)
        return config

    @contextmanager
    def as_file(self, config: TrainConfig) -> Iterator[str]:
        """Write the file of a config, for the time that it is read.

        Raises ValueError for one that names files which this page may not use.
        """
        self.page.places.check("train", vars(config))
        with tempfile.TemporaryDirectory(prefix=".asked-", dir=self.page.places.folder) as folder:
            file = Path(folder) / FILE
            file.write_text(print_config(config), encoding="utf-8")
            yield str(file)

    def write(self, config: TrainConfig) -> Held:
        """Show a config as YAML."""
        text = print_config(config)
        return {self.error: "", self.yaml: text, self.written: text}

    def fill(self, given: Options) -> Held:
        """Show values, and the defaults of all others.

        A folder elsewhere for the result becomes one of this page. Raises ValueError or OSError.
        """
        out = Path(str(given.get("out", FIRST)))
        if not out.resolve().is_relative_to(self.trainings):
            given = {**given, "out": str(self.trainings / (out.name or FIRST))}
        config = self.config(given)
        return {**self.shown(vars(config)), **self.write(config)}

    def earlier(self) -> list[str]:
        """Names of the trainings that are there."""
        folders = [one for one in self.trainings.iterdir() if one.is_dir()]
        return sorted(one.name for one in folders if not one.name.startswith("."))

    @property
    def from_fields(self) -> Values:
        """The event that writes the YAML of the fields."""

        def written(held: Held) -> Held:
            return self.write(self.config(self.entered(held)))

        shown = [self.error, self.yaml, self.written]
        return {"fn": refusing(written, self.error), "inputs": self.inputs, "outputs": shown}

    def _listen(self) -> None:
        def from_text(held: Held) -> Held:
            if held[self.yaml].strip() == held[self.written].strip():
                return {self.error: ""}
            return self.fill(self.fields_in(held[self.yaml]))

        def from_file(path: str) -> Held:
            return self.fill(self.fields_in(read_text(path)))

        fields = [*self.parts.values()]
        # Gradio tells no input of a text that is pasted or deleted.
        texts = [one.blur for one in fields if isinstance(one, gr.Textbox)]
        gr.on([*(one.input for one in fields), *texts], **self.from_fields, **IN_TURN)
        # Not at each letter: the editor also says input if the text was set from here.
        filled = refusing(from_text, self.error)
        self.yaml.blur(filled, self.inputs, self.outputs, **IN_TURN)
        loaded = refusing(from_file, self.error)
        self.load.upload(loaded, [self.load], self.outputs, **IN_TURN)
        seen = [self.page.tab.change, self.runs.focus]
        gr.on(seen, lambda: gr.update(choices=self.earlier()), None, [self.runs], **IN_TURN)


def _build_plan(page: Page, form: TrainForm) -> None:
    with gr.Row(equal_height=True):
        about: Values = {"label": "cards", "info": "Beside this machine.", "scale": 3}
        cards = gr.Dropdown(
            card_names(), value=["4090"], multiselect=True, elem_id="train-cards", **about
        )
        plan = gr.Button("Plan: does it fit?", elem_id="train-plan", variant="primary", scale=1)
        dry = gr.Button("Dry run: two steps on a tiny model", elem_id="train-dry-run", scale=1)
    error, told = gr.HTML(elem_id="train-plan-error"), gr.HTML(elem_id="train-plan-told")
    advice = gr.State({})
    take = gr.Button("Turn on what the plan says", visible=False, elem_id="train-take")

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


def _build_run(page: Page, form: TrainForm) -> None:
    """Build the section of the training itself: its progress, curves and report."""
    with gr.Row():
        start = gr.Button("Start", variant="primary", elem_id="train-start")
        resume = gr.Button("Resume", elem_id="train-resume")
    view = follow(page, "train", kind=KIND)
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
            job = page.submit("train", {"resume": again}, **about, **given)
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
        shown: Held = {seen: mark, report: html("report", address(out / "report.html"))}
        shown |= {clips: html("listed", clips_told(config))}
        for chart, points in zip(charts, curves(out), strict=True):
            columns = zip(*points, strict=True) if points else ((), (), ())
            table = charted(dict(zip(AXES, columns, strict=True)))
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

    def open_run(name: str) -> Held:
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
    names = ["model", "quality", "from_lora", "frames", "height", "width", "advanced", "attention"]
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
    told = [f"{found['clips']:,} clips to train on, of {found['videos']:,} videos"]
    told += [f"{lost:.0%} of the picture is cropped on average"]
    told += [f"{found['unused_frames']:,} of {frames:,} frames are unused"] if frames else []
    names = [f"left out: {name}, {reason}" for name, reason in found["left_out"].items()]
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
        named = {f"at noise {x}": loss for x, loss in one["levels"].items()}
        for name, loss in ({"mean": one["fixed_loss"]} | named).items():
            levels.setdefault(name, []).append((one["after"], loss))
    return [
        [
            *_curve(zip(steps, losses, strict=True), "each step"),
            *_curve(zip(steps, running_mean(losses, STEADY), strict=True), "running mean"),
        ],
        [point for name, held in levels.items() for point in _curve(held, name)],
        _curve(zip(steps, rates, strict=True), "learning rate"),
    ]


def _curve(points: Any, line: str) -> list[Point]:
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


def address(path: Path) -> str:
    """Address of a file of a training, from the page; it changes with the file; "" for none."""
    if not path.is_file():
        return ""
    return f"gradio_api/file={quote(str(path))}?{path.stat().st_mtime_ns}"
