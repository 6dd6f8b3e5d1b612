"""The screen Train: clips with captions, a form beside its YAML, a plan, and the training."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import gradio as gr
from gradio.context import Context

from gen_accel.config import read_mapping
from gen_accel.demo import NAME, TRAINED_FRAMES
from gen_accel.io import read_fields, read_text
from gen_accel.lora.config import TrainConfig, print_config
from gen_accel.measure.cost.figures import card_names, gigabytes
from gen_accel.process import check_free
from gen_accel.registry import PUBLISHED
from gen_accel.ui.form import Form, option_field
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
MOST_NAMES = 8  # of clips that are left out; the report of the cache has all
# Files of a training that the page shows.
SHOWN = (
    *("metrics.jsonl", "report.html", "cache/report.json", "validation/step-*/*"),
    *("checkpoints/step-*", "lora", "image_prompt"),
)
MOST_SAMPLES, MOST_POINTS = 12, 400  # videos, and points of a curve; the report has more
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
LINES = ("step", "value", "line")  # columns of a chart


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
    _Run(page, form)
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
        fields = {name: option_field(one) for name, one in TrainConfig.options().items()}
        super().__init__(fields, "train", start | (DEMO if page.models[0] == NAME else {}))

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
                self.words = gr.HTML(elem_id="train-words")
        self._listen()

    @property
    def inputs(self) -> set[Any]:
        """Components whose values `read` takes."""
        return {self.yaml, self.written, *self.parts.values()}

    @property
    def outputs(self) -> list[Any]:
        return [self.error, self.words, *self.inputs]

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

    def allowed(self, config: TrainConfig) -> TrainConfig:
        """Return a config whose files this page may use. Raises ValueError for another one."""
        self.page.places.check("train", vars(config))
        return config

    def checked(self, config: TrainConfig) -> TrainConfig:
        """Return a config that can train: its files are there, and this page may use them.

        Raises ValueError or OSError for another one.
        """
        self.allowed(config)
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

    def write(self, config: TrainConfig) -> Held:
        """Show a config as YAML, and in words."""
        text = print_config(config)
        words = html("quiet", in_words(config))
        return {self.error: "", self.words: words, self.yaml: text, self.written: text}

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

        shown = [self.error, self.words, self.yaml, self.written]
        return {"fn": refusing(written, self.error), "inputs": self.inputs, "outputs": shown}

    def _listen(self) -> None:
        def from_text(held: Held) -> Held:
            if held[self.yaml].strip() == held[self.written].strip():
                return {self.words: gr.skip()}
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
        gr.on(
            [self.page.tab.change, self.runs.focus],
            lambda: gr.update(choices=self.earlier()),
            None,
            [self.runs],
            **IN_TURN,
        )


def in_words(config: TrainConfig) -> str:
    """Say in a line what a config trains."""
    stages = ", then ".join(
        f"{one.steps:,} steps at {one.frames} frames" for one in config.curriculum
    )
    sizes = " and ".join(f"{height} x {width}" for height, width in config.clip_sizes)
    what = f"a LoRA of rank {config.rank}" if config.adapter == "lora" else "an image prompt"
    clips = config.batch_size * config.gradient_accumulation
    each = f"{clips} clip{'s' if clips > 1 else ''} a step"
    return f"{what} for {config.model}: {stages}, of {sizes} pixels, {each}"


def _build_plan(page: Page, form: TrainForm) -> None:
    with gr.Row(equal_height=True):
        cards = gr.Dropdown(
            card_names(),
            value=["4090"],
            multiselect=True,
            label="cards",
            info="Beside this machine.",
            elem_id="train-cards",
            scale=3,
        )
        plan = gr.Button("Plan: does it fit?", elem_id="train-plan", variant="primary", scale=1)
        dry = gr.Button("Dry run: two steps on a tiny model", elem_id="train-dry-run", scale=1)
    error = gr.HTML(elem_id="train-plan-error")
    told = gr.HTML(elem_id="train-plan-told")
    advice = gr.State({})
    take = gr.Button("Turn on what the plan says", visible=False, elem_id="train-take")

    def ask(held: Held) -> Held:
        config = form.allowed(form.read(held))
        with _as_file(page, config) as file:
            found = page.questions.ask("train", {CONFIG: file, "plan": True, "gpu": held[cards]})
        changes = changes_of(found)
        shown = {told: plan_html(found), advice: changes}
        return {**shown, take: gr.update(visible=bool(changes))}

    def try_out(held: Held) -> Held:
        config = form.allowed(form.read(held))
        with _as_file(page, config) as file:
            said = page.questions.said("train", {CONFIG: file, "dry_run": True})
        return {told: html("pre", said)}

    def turn_on(held: Held) -> Held:
        return form.fill({**vars(form.read(held)), **held[advice]})

    outputs = [error, told, advice, take]
    shown: Values = {"outputs": outputs, "show_progress_on": [told], **PRIVATELY}
    plan.click(refusing(ask, error), {cards, *form.inputs}, **shown)
    dry.click(refusing(try_out, error), form.inputs, **shown)
    turned = refusing(turn_on, error)
    take.click(turned, {advice, *form.inputs}, [error, *form.outputs], **PRIVATELY)


def plan_html(plan: Options) -> str:
    """Show whether a training fits each device, what to turn on, and the memory of each stage.

    Args:
        plan: as `gen-accel train --plan --json -` prints it.
    """
    stages = plan["stages"]
    sizes, memory = [one["size"] for one in stages], [one["memory"] for one in stages]
    head = ["memory of a stage", *(f"{size['frames']} frames" for size in sizes)]
    rows = [["pixels", *(f"{size['height']} x {size['width']}" for size in sizes)]]
    rows += [["tokens of a clip", *(f"{one['tokens']:,}" for one in stages)]]
    named = plan["rows"] | {"total": "at most"}
    named |= {"host": "in CPU memory"} if any(one["host"] for one in memory) else {}
    rows += [[words, *(gigabytes(one[name]) for one in memory)] for name, words in named.items()]
    for device in stages[0]["seconds"]:
        spans = [one["seconds"][device] for one in stages]
        rows += [[f"a step, {device}", *("{low:.3g} to {high:.3g} s".format(**x) for x in spans)]]
    notes = [f"not counted: {note}" for note in plan["notes"]]
    return html("training_plan", [*map(_device, plan["verdicts"])], head, rows, notes)


def _device(one: Options) -> Values:
    """What a plan says of a device, in words."""
    room = "" if one["memory"] is None else f" of {gigabytes(one['memory'])}"
    fits = {True: "fits", False: "does not fit", None: "its memory is not known"}[one["fits"]]
    told = {"name": one["device"], "fits": fits, "steps": [], "end": "", "lasts": ""}
    told["peak"] = f"{gigabytes(one['peak'])}{room}, {one['moment']}"
    if (advice := one["advice"]) is not None:
        told["steps"] = [
            f"{change['option']} saves {gigabytes(change['saves'])}"
            for change in advice["changes"]
        ]
        smaller = "a lower height and width"
        if advice["frames"]:
            smaller = f"stages of at most {advice['frames']} frames"
        fitting = "With all of them it fits." if advice["fits"] else f"It fits with {smaller}."
        told["end"] = fitting
    if one["fits"] is not False or (one["advice"] or {}).get("fits"):
        ends = one["hours"]["low"], one["hours"]["high"]
        hours = [f"{60 * x:.2g} min" if x < 2 else f"{x:.2g} h" for x in ends]
        told["lasts"] = f"{' to '.join(hours)} in all"
    return told


def changes_of(plan: Options) -> dict[str, str]:
    """Return the fields that the plan advises for the first device that it does not fit."""
    for one in plan["verdicts"]:
        if one["fits"] is False and one["advice"]:
            return dict(change["option"].split(" ", 1) for change in one["advice"]["changes"])
    return {}


class _Run:
    """The section of the training itself: its progress, curves, samples and result."""

    def __init__(self, page: Page, form: TrainForm) -> None:
        self.page, self.form = page, form
        with gr.Row():
            self.start = gr.Button("Start", variant="primary", elem_id="train-start")
            self.resume = gr.Button("Resume", elem_id="train-resume")
        self.view = follow(page, "train", kind=KIND)
        self.text = gr.State("")  # YAML of the training that is shown
        self.timer = gr.Timer(EVERY, active=False)
        self.stands = gr.HTML(elem_id="train-state")
        with gr.Row():
            self.loss = _plot("loss", "Loss of training", "train-loss")
            self.fixed = _plot("loss", "Loss at fixed noise", "train-fixed-loss")
            self.rate = _plot("learning rate", "Learning rate", "train-rate")
        self.clips = gr.HTML(elem_id="train-told")
        self.samples = gr.HTML(elem_id="train-samples")
        self.result = gr.HTML(elem_id="train-result")
        self.use = gr.Button("Use in Generate", visible=False, elem_id="train-use")
        self.folder = gr.Textbox(visible="hidden", elem_id="train-result-folder")
        self.seen = gr.State("")
        self._listen()

    def submit(self, resume: bool, held: Held) -> Held:
        from gen_accel.lora.trainer import check_out

        config = self.form.checked(self.form.read(held))
        check_out(config, resume)
        out = Path(config.out)
        if out.exists():
            check_free(out)
        about = {"title": out.name, "kind": KIND, "about": {"out": config.out}}
        with _as_file(self.page, config) as file:
            given = {"tab": held[self.page.tab], "given": {CONFIG: file}}
            job = self.page.submit("train", {"resume": resume}, **about, **given)
        runs = gr.update(choices=self.form.earlier())
        return {self.view.job: job.id, self.text: print_config(config), self.form.runs: runs}

    def look(self, held: Held) -> Held:
        """Show what is new in the folder of the training."""
        if not held[self.text]:
            return {self.seen: gr.skip()}
        config = self.form.config(self.form.fields_in(held[self.text]))
        job = self.page.find(held[self.view.job])
        mark = f"{held[self.text]} {job.state if job else ''} {_mark(folder_of(config))}"
        if mark == held[self.seen]:
            return {self.seen: gr.skip()}
        state = state_of(config)
        done = state.result is not None
        report = "" if state.report is None else address(state.report)
        fixed = "Held-out loss" if state.is_held_out else "Loss at fixed noise"
        return {
            self.stands: html("quiet", stands(state, config)),
            self.loss: _drawn(state.loss, "Loss of training"),
            self.fixed: _drawn(state.fixed, fixed),
            self.rate: _drawn(state.rate, "Learning rate"),
            self.clips: found_html(state.clips),
            self.samples: samples_html(state.samples),
            self.result: html("result", report, command_of(config, state)),
            self.use: gr.update(visible=done and config.adapter == "lora"),
            self.folder: str(state.result) if done else "",
            self.seen: mark,
        }

    def come_back(self, held: Held) -> Held:
        """Show the training of a job that another page of this tab began, and its settings."""
        job = self.page.find(held[self.view.job])
        now = "" if job is None else _yaml_of(self.page, job)
        if not now or now == held[self.text]:
            return {self.text: gr.skip()}
        return {**self.form.fill(self.form.fields_in(now)), self.text: now}

    def open_run(self, name: str) -> Held:
        shown = self.form.fill(config_of_run(self.form.trainings / Path(name).name))
        return {**shown, self.view.job: "", self.text: shown[self.form.yaml]}

    def _listen(self) -> None:
        view, form, error = self.view, self.form, self.view.error
        for button, again in ((self.start, False), (self.resume, True)):
            submit = refusing(partial(self.submit, again), error)
            begun = [error, view.job, self.text, form.runs]
            button.click(submit, {self.page.tab, *form.inputs}, begun, **ADDING)
        shown = [self.stands, self.clips, self.loss, self.fixed, self.rate, self.samples]
        looks: Values = {
            "fn": self.look,
            "inputs": {self.text, view.job, self.seen},
            "outputs": [*shown, self.result, self.use, self.folder, self.seen],
            **QUIETLY,
        }
        self.timer.tick(**looks)
        self.text.change(
            lambda text: gr.Timer(active=bool(text)), [self.text], [self.timer], **QUIETLY
        )
        gr.on([self.text.change, view.ended.change], **looks)
        filled = [*form.outputs, self.text]
        back = refusing(self.come_back, form.error)
        view.job.change(back, {view.job, self.text}, filled, **TELLING)
        opened = refusing(self.open_run, form.error)
        form.runs.input(opened, [form.runs], [*filled, view.job], **PRIVATELY)
        if used := _parts_of_generate():
            self.use.click(
                partial(self._fill_generate, used),
                {self.text, self.folder},
                [*used.values()],
                **QUIETLY,
            ).then(None, js=SHOW_GENERATE, **PRIVATELY)

    def _fill_generate(self, used: Options, held: Held) -> Held:
        config = self.form.config(self.form.fields_in(held[self.text]))
        values = {"model": config.model, "quality": OWN, "from_lora": held[self.folder]}
        values |= {"frames": config.longest, "height": config.height, "width": config.width}
        opened = gr.update(open=True)  # the folds in which the LoRA is shown
        return {part: values.get(name, opened) for name, part in used.items()}


def _parts_of_generate() -> Values:
    """Controls of the screen Generate that a LoRA sets, by name, and the folds around its own."""
    root = Context.root_block
    found = {
        str(one.elem_id).removeprefix("gen-").replace("-", "_"): one
        for one in (root.blocks.values() if root else ())
        if str(one.elem_id).startswith("gen-")
    }
    names = ["model", "quality", "from_lora", "frames", "height", "width", "advanced"]
    lora: Any = found.get("from_lora")
    while lora is not None and not isinstance(lora, gr.Accordion):
        lora = lora.parent
    return {name: found[name] for name in names if name in found} | (
        {} if lora is None else {"fold": lora}
    )


def _plot(unit: str, title: str, name: str) -> gr.LinePlot:
    step, value, line = LINES
    about: Values = {"y_title": unit, "color_title": "", "height": 260, "min_width": 300}
    return gr.LinePlot(
        x=step, y=value, color=line, title=title, visible=False, elem_id=name, **about
    )


def _drawn(points: Sequence[Point], title: str) -> gr.LinePlot:
    columns = zip(*points, strict=True) if points else ((), (), ())
    table = charted(dict(zip(LINES, columns, strict=True)))
    return gr.LinePlot(value=table, visible=bool(points), title=title)


@contextmanager
def _as_file(page: Page, config: TrainConfig) -> Iterator[str]:
    """A file of a config, for the time that it is read."""
    with tempfile.TemporaryDirectory(prefix=".asked-", dir=page.places.folder) as folder:
        file = Path(folder) / FILE
        file.write_text(print_config(config), encoding="utf-8")
        yield str(file)


def _yaml_of(page: Page, job: QueuedJob) -> str:
    try:
        return read_text(page.queue.place(job) / GIVEN / FILE)
    except (OSError, ValueError):  # it was removed meanwhile
        return ""


def _mark(out: Path) -> str:
    """Return a text that changes when a training's folder has something new to show."""
    marks = []
    for file in sorted(file for pattern in SHOWN for file in out.glob(pattern)):
        with suppress(OSError):  # removed meanwhile
            marks.append(f"{file.name} {file.stat().st_mtime_ns}")
    return " ".join(marks)


def folder_of(config: TrainConfig) -> Path:
    """Folder of a run; of two experts, that of the run which began last."""
    from gen_accel.lora.experts import NOISE

    out = Path(config.out)
    runs = [out / name for name in NOISE.values()] if config.part == "both" else []
    return next((run for run in reversed(runs) if run.is_dir()), out)


class State(NamedTuple):
    """Folder of a training.

    Args:
        done: number of steps in the metrics.
        saved: step of the newest checkpoint; None without one.
        result: folder of the adapter that is complete; None before.
        report: the page of the run; None before there is one.
        loss, fixed, rate: the curves. Fixed is the loss at fixed noise.
        is_held_out: whether `fixed` is of clips that never train.
        samples: validation videos with step and prompt, the newest step first.
        clips: report of the clips, as `gen-accel cache` writes it; empty before.
    """

    done: int
    saved: int | None
    result: Path | None
    report: Path | None
    loss: list[Point]
    fixed: list[Point]
    rate: list[Point]
    is_held_out: bool
    samples: list[tuple[Path, str]]
    clips: Options


def state_of(config: TrainConfig) -> State:
    """Read the folder of a training, which may be under way, or not there."""
    from gen_accel.lora import checkpoint
    from gen_accel.lora.data.report import REPORT as CLIPS
    from gen_accel.lora.progress import STEADY, running_mean
    from gen_accel.lora.report import METRICS, REPORT, read_metrics
    from gen_accel.lora.trainer import CHECKPOINTS

    out = folder_of(config)
    lines, fixed = read_metrics(out / METRICS)
    steps = [one for one in lines if isinstance(one.get("step"), int) and "loss" in one]
    numbers = [one["step"] + 1 for one in steps]
    raw = [float(one["loss"]) for one in steps]
    rates = [float(one.get("learning_rate", math.nan)) for one in steps]
    means = running_mean(raw, STEADY)
    saved = checkpoint.found(out / CHECKPOINTS)
    result = out / ("lora" if config.adapter == "lora" else "image_prompt")
    report, clips = out / REPORT, Path(config.cache or f"{config.out}/cache") / CLIPS
    return State(
        done=numbers[-1] if numbers else 0,
        saved=int(saved[-1].name.removeprefix("step-")) if saved else None,
        result=result if result.is_dir() else None,
        report=report if report.is_file() else None,
        loss=[*_curve(numbers, raw, "each step"), *_curve(numbers, means, "running mean")],
        fixed=_fixed(fixed),
        rate=_curve(numbers, rates, "learning rate"),
        is_held_out=bool(fixed and fixed[-1].get("held_out")),
        samples=_samples(config),
        clips=read_fields(clips) if clips.is_file() else {},
    )


def found_html(report: Options) -> str:
    """Say what is trained on, and what is lost and left out of the clips."""
    if not report:
        return ""
    lasts = "" if report["seconds"] is None else f", {report['seconds']:,.1f} s"
    unused, frames = report["unused_frames"], report["frames"]
    lost = f"{report['lost_picture']:.0%} of the picture is cropped on average"
    lost += f", and {unused:,} of {frames:,} frames are unused" if frames else ""
    names = [f"{name}: {reason}" for name, reason in report["left_out"].items()]
    shown = names[:MOST_NAMES]
    shown += [f"and {len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else []
    total = f"{report['clips']:,} to train on{lasts}, of {report['videos']:,} found."
    return html("found", total, lost, len(names), shown)


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


def command_of(config: TrainConfig, state: State) -> str:
    """Return the command that generates with the result; "" before there is one."""
    from gen_accel.attention_processors.attached.recipe import read_recipe
    from gen_accel.lora.report import use_of

    if state.result is None:
        return ""
    try:
        return use_of(config, read_recipe(state.result), state.result)
    except (ValueError, OSError) as error:
        return line_of(error)


def stands(state: State, config: TrainConfig) -> str:
    """Say how far a training is, in a line."""
    if not state.done and state.saved is None:
        return f"Nothing was trained in {config.out} yet."
    said = f"{state.done} of {config.total_steps} steps are done in {config.out}"
    if state.result is not None:
        return f"{said}; the result is {state.result}."
    if state.saved is not None:
        return f"{said}; Resume goes on after step {state.saved}."
    return f"{said}; no checkpoint is there yet."


def samples_html(samples: Sequence[tuple[Path, str]]) -> str:
    """Show the newest validation videos."""
    shown = [(address(path), words) for path, words in samples[:MOST_SAMPLES]]
    return html("samples", shown, max(0, len(samples) - MOST_SAMPLES))


def address(path: Path) -> str:
    """Address of a file of a training, from the page; it changes with the file."""
    stamp = path.stat().st_mtime_ns if path.exists() else 0
    return f"gradio_api/file={quote(str(path))}?{stamp}"


def _samples(config: TrainConfig) -> list[tuple[Path, str]]:
    from gen_accel.lora.evaluate import BESIDE, FOLDER

    found = []
    for folder in (folder_of(config) / FOLDER).glob("step-*"):
        number = folder.name.removeprefix("step-")
        for i, prompt in enumerate(config.validation_prompts) if number.isdigit() else ():
            videos = [folder / f"{i:02d}{end}" for end in (BESIDE, ".mp4")]
            shown = next((path for path in videos if path.is_file()), None)
            if shown is not None:
                beside = ", beside step 0" if shown.name.endswith(BESIDE) else ""
                words = f"step {int(number)}{beside}: {prompt}"
                found.append((-int(number), i, shown, words))
    return [(path, words) for _, _, path, words in sorted(found)]


def _fixed(records: Sequence[Options]) -> list[Point]:
    """Losses at fixed noise: their mean, and each noise level."""
    points: list[Point] = []
    for one in records:
        levels = one.get("levels")
        if isinstance(one.get("after"), int) and isinstance(levels, dict):
            named = {"mean": one.get("fixed_loss"), **{f"at noise {x}": levels[x] for x in levels}}
            for name, value in named.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    points.append((one["after"], float(value), name))
    return points


def _curve(steps: Sequence[int], values: Sequence[float], line: str) -> list[Point]:
    """Points of a line, of which some are left out if there are many."""
    from gen_accel.lora.caching.preview import evenly

    rows = zip(steps, values, strict=True)
    kept = [(step, value, line) for step, value in rows if math.isfinite(value)]
    return [kept[place] for place in evenly(len(kept), MOST_POINTS)]
