"""The screen Train: clips with their captions, settings, a plan, and the training itself."""

import html
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.context import Context

from gen_accel.demo import TRAINED_FRAMES
from gen_accel.locks import check_free
from gen_accel.lora.config import TrainConfig, print_config
from gen_accel.measure.cost.rates import card_names
from gen_accel.text_files import read_text
from gen_accel.ui.generate import OWN
from gen_accel.ui.page import PRIVATELY, QUIETLY, TELLING, Page, error_box, follow, refusing
from gen_accel.ui.queue import GIVEN, QueuedJob
from gen_accel.ui.tables import charted
from gen_accel.ui.train_fields import config_of
from gen_accel.ui.train_form import IN_TURN, Form, filling
from gen_accel.ui.train_points import LINE, STEP, VALUE, Point
from gen_accel.ui.train_words import changes_of, found_html, plan_html, result_html, samples_html

if TYPE_CHECKING:  # they import torch, which a page that trains nothing can do without
    from gen_accel.ui.train_clips import Clips, Found, Row

KIND = "train"
CONFIG = "config"  # option of the verb, and name of the file that a job was given
CLIPS = "clips"  # folder in the output folder that has clips which were sent or made
EXAMPLES = 6  # clips of the embedded model's world
A_PAGE = 50  # clips
EVERY = 2.0  # seconds between two looks at a training's folder
HEADS = ["", "clip", "length", "size", "what becomes of it", "caption"]
WIDTHS: list[str | int] = ["112px", "130px", "120px", "90px", "230px", "320px"]
CAPTION, NAME = 5, 1  # places of columns
ABOUT = (
    "A LoRA is a small file that teaches a model a length, a look or a movement from your own "
    "clips. **1** Choose the clips and read their captions. **2** Say what for; the rest has "
    "values. **3** See whether it fits your card. **4** Start. Nothing is lost by Stop: Resume "
    "goes on at the same step."
)


def build(page: Page) -> None:
    form = Form(page)
    gr.Markdown(ABOUT)
    gr.Markdown("### 1 Clips")
    wire_clips = _build_clips(page, form)
    gr.Markdown("### 2 Settings")
    form.settings()
    gr.Markdown("### 3 Plan")
    _build_plan(page, form)
    gr.Markdown("### 4 Training")
    _build_run(page, form)
    wire_clips()


def _build_clips(page: Page, form: Form) -> Callable[[], None]:
    """Build the section, and return what connects it once the form is whole."""
    clips = cache(lambda: _clips(page))
    with gr.Row(equal_height=True):
        data = form.add("data", label="Folder of clips", scale=4)
        look = gr.Button("Look at the clips", variant="primary", elem_id="train-look", scale=1)
    with gr.Row():
        sent = gr.UploadButton(
            "Send clips and captions",
            file_count="multiple",
            file_types=["video", "image", ".txt"],
            elem_id="train-send",
        )
        example = gr.Button("Make example clips", elem_id="train-example")
    error = gr.HTML(elem_id="train-clips-error")
    told = gr.HTML(elem_id="train-found")
    pages = gr.Dropdown([], label="clips", visible=False, elem_id="train-page")
    table = gr.Dataframe(
        headers=HEADS,
        datatype=["html", "str", "str", "str", "str", "str"],
        static_columns=[0, 1, 2, 3, 4],
        column_widths=WIDTHS,
        type="array",
        wrap=True,
        interactive=True,
        visible=False,
        max_height=560,
        elem_id="train-clips",
        label="Double-click a caption to edit it",
    )
    with gr.Row():
        save = gr.Button("Save captions", visible=False, elem_id="train-save")
        saved = gr.HTML(elem_id="train-saved")
    found, edits = gr.State(None), gr.State({})

    def show(one: "Found", number: int, kept: Mapping[str, str]) -> list[Any]:
        rows = one.rows[A_PAGE * number : A_PAGE * (number + 1)]
        cells = [_cells(clips(), one, row, kept.get(row.name)) for row in rows]
        starts = range(0, len(one.rows), A_PAGE)
        names = [f"{i + 1} to {min(i + A_PAGE, len(one.rows))}" for i in starts]
        chosen = gr.update(choices=names, value=names[number], visible=len(names) > 1)
        can_edit = one.fixed is None
        return [
            chosen,
            gr.update(value=cells, visible=True, interactive=can_edit),
            gr.update(visible=can_edit),
            "" if can_edit else f'<p class="ga-empty">{html.escape(one.fixed or "")}</p>',
        ]

    def find(*values: Any) -> Any:
        config = form.read(*values)
        page.places.check("train", {"data": config.data, "model": config.model})
        one = clips().find(config)
        return [found_html(one), one, {}, *show(one, 0, {})]

    def turn(name: str, one: "Found | None", cells: Any, kept: dict[str, str]) -> Any:
        if one is None:
            return [gr.skip()] * 5
        kept = _edited(one, cells, kept)
        return [kept, *show(one, (int(name.partition(" ")[0]) - 1) // A_PAGE, kept)]

    def keep(one: "Found | None", cells: Any, kept: dict[str, str], *values: Any) -> Any:
        from gen_accel.ui.train_clips import save_captions

        if one is None:
            raise ValueError("look at the clips first")
        config = form.read(*values)
        page.places.check("train", {"data": config.data})
        rows = {row.name: row for row in one.rows}
        kept = _edited(one, cells, kept)
        given = {
            rows[name].file: (rows[name].caption, text)
            for name, text in kept.items()
            if rows[name].file is not None
        }
        changed = {file: edit for file, edit in given.items() if file}
        files = save_captions(config, changed, page.places.editable)
        again = clips().find(config)
        names = ", ".join(file.name for file in files) or "nothing was changed"
        shown = show(again, 0, {})
        return [
            found_html(again),
            again,
            {},
            *shown[:3],
            f'<p class="ga-empty">saved: {html.escape(names)}</p>',
        ]

    def send(files: list[str] | None) -> Any:
        folder = _new_folder(page.places.folder / CLIPS, "sent")
        for file in files or ():
            shutil.copyfile(file, folder / Path(file).name)
        return str(folder)

    def make() -> Any:
        from gen_accel.demo.clips import write_clips

        folder = page.places.folder / CLIPS / "example"
        write_clips(folder, frames=TRAINED_FRAMES, count=EXAMPLES)
        return str(folder)

    def wire() -> None:
        outputs = [error, told, found, edits, pages, table, save, saved]
        looked: Any = {"fn": refusing(find, 7), "inputs": form.inputs, "outputs": outputs}
        look.click(**looked, show_progress_on=[told], **PRIVATELY)
        turned = [edits, pages, table, save, saved]
        pages.input(turn, [pages, found, table, edits], turned, **PRIVATELY)
        save.click(refusing(keep, 7), [found, table, edits, *form.inputs], outputs, **PRIVATELY)
        for event, function, inputs in (
            (sent.upload, send, [sent]),
            (example.click, make, []),
        ):
            done = event(refusing(function, 1), inputs, [error, data], **PRIVATELY)
            done.success(form.from_fields, form.inputs, form.written, **IN_TURN)
            done.success(**looked, show_progress_on=[told], **PRIVATELY)

    return wire


def _build_plan(page: Page, form: Form) -> None:
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

    def ask(cards: list[str], *values: Any) -> Any:
        config = form.allowed(form.read(*values))
        with _as_file(page, config) as file:
            found = page.questions.ask("train", {CONFIG: file, "plan": True, "gpu": cards})
        changes = changes_of(found)
        return [plan_html(found), changes, gr.update(visible=bool(changes))]

    def try_out(*values: Any) -> Any:
        config = form.allowed(form.read(*values))
        with _as_file(page, config) as file:
            said = page.questions.said("train", {CONFIG: file, "dry_run": True})
        return f"<pre style='white-space:pre-wrap'>{html.escape(said)}</pre>"

    def turn_on(changes: dict[str, str], *values: Any) -> Any:
        return form.fill_with({**vars(form.read(*values)), **changes})

    outputs = [error, told, advice, take]
    plan.click(
        refusing(ask, 3), [cards, *form.inputs], outputs, show_progress_on=[told], **PRIVATELY
    )
    dry.click(
        refusing(try_out, 1), form.inputs, [error, told], show_progress_on=[told], **PRIVATELY
    )
    take.click(filling(turn_on, form), [advice, *form.inputs], form.filled, **PRIVATELY)


def _build_run(page: Page, form: Form) -> None:
    with gr.Row():
        start = gr.Button("Start", variant="primary", elem_id="train-start")
        resume = gr.Button("Resume", elem_id="train-resume")
    view = follow(page, "train", kind=KIND)
    shown = gr.State("")  # YAML of the training that is shown
    timer = gr.Timer(EVERY, active=False)
    stands = gr.HTML(elem_id="train-state")
    with gr.Row():
        loss = _plot("loss", "Loss of training", "train-loss")
        fixed = _plot("loss", "Loss at fixed noise", "train-fixed-loss")
        rate = _plot("learning rate", "Learning rate", "train-rate")
    samples = gr.HTML(elem_id="train-samples")
    result = gr.HTML(elem_id="train-result")
    use = gr.Button("Use in Generate", visible=False, elem_id="train-use")
    folder = gr.Textbox(visible="hidden", elem_id="train-result-folder")
    seen = gr.State("")

    def submit(resume: bool, tab: str, *values: Any) -> Any:
        from gen_accel.lora.trainer import check_out

        config = form.checked(form.read(*values))
        check_out(config, resume)
        if Path(config.out).exists():
            check_free(Path(config.out))
        with _as_file(page, config) as file:
            job = page.submit(
                "train",
                {"resume": resume},
                title=Path(config.out).name,
                tab=tab,
                kind=KIND,
                about={"out": config.out},
                given={CONFIG: file},
            )
        return [job.id, print_config(config), gr.update(choices=form.earlier())]

    def look(text: str, name: str, before: str) -> Any:
        if not text:
            return [gr.skip()] * 9
        mark = f"{text} {_state_of_job(page, name)} {_mark(config_of(text))}"
        if mark == before:
            return [gr.skip()] * 9
        from gen_accel.ui import train_run

        config = config_of(text)
        state = train_run.state_of(config)
        done = state.result
        return [
            f'<p class="ga-empty">{html.escape(train_run.stands(state, config))}</p>',
            _drawn(state.loss),
            _drawn(state.fixed, "Held-out loss" if state.is_held_out else "Loss at fixed noise"),
            _drawn(state.rate),
            samples_html(state),
            result_html(state, "" if done is None else _command(config, done)),
            gr.update(visible=done is not None and config.adapter == "lora"),
            "" if done is None else str(done),
            mark,
        ]

    def come_back(name: str, text: str) -> Any:
        """Show the training of a job that another page of this tab began, and its settings."""
        try:
            now = _yaml_of(page, page.queue.job(name))
        except KeyError:
            now = ""
        if not now or now == text:
            return [*[gr.skip()] * (2 + form.count), gr.skip()]
        return [*form.fill(now), now]

    def open_run(name: str) -> Any:
        from gen_accel.ui.train_run import config_of_run

        values = config_of_run(form.trainings / Path(name).name)
        filled = form.fill_with(values)
        return [*filled, "", filled[2]]

    begun = [view.error, view.job, shown, form.runs]
    for button, again in ((start, False), (resume, True)):
        button.click(
            refusing(partial(submit, again), 3), [page.tab, *form.inputs], begun, **PRIVATELY
        )
    outputs = [stands, loss, fixed, rate, samples, result, use, folder, seen]
    looks: Any = {"fn": look, "inputs": [shown, view.job, seen], "outputs": outputs, **QUIETLY}
    timer.tick(**looks)
    shown.change(lambda text: gr.Timer(active=bool(text)), [shown], [timer], **QUIETLY)
    gr.on([shown.change, view.ended.change], **looks)
    view.job.change(come_back, [view.job, shown], [*form.filled, shown], **TELLING)
    opened = [*form.filled, view.job, shown]
    form.runs.input(filling(open_run, form, more=2), [form.runs], opened, **PRIVATELY)
    used = _parts_of_generate()

    def fill_generate(text: str, folder: str) -> Any:
        config = config_of(text)
        size = {"frames": config.longest, "height": config.height, "width": config.width}
        values = {"model": config.model, "quality": OWN, "from_lora": folder, **size}
        opened = gr.update(open=True)  # where the LoRA is shown
        return [values.get(name, opened) for name in used]

    if used:
        use.click(fill_generate, [shown, folder], [*used.values()], **QUIETLY).then(
            None, js=SHOW_GENERATE, **PRIVATELY
        )


def _parts_of_generate() -> dict[str, Any]:
    """The controls of the screen Generate that a LoRA sets, by the names of their options, and the
    folds around its own."""
    root = Context.root_block
    names = ("model", "quality", "from_lora", "frames", "height", "width")
    folds = ("advanced", "lora_and_longer_video")
    ids = {f"gen-{name.replace('_', '-')}": name for name in (*names, *folds)}
    parts = [] if root is None else root.blocks.values()
    return {ids[one.elem_id]: one for one in parts if one.elem_id in ids}


# The first tab, which is never behind the dots of a small window.
SHOW_GENERATE = """() => {
  document.querySelector('#screens button[role=tab]').click();
  window.scrollTo(0, 0);
}"""


def _clips(page: Page) -> "Clips":
    from gen_accel.ui.train_clips import Clips

    return Clips(page.places.readable)


def _plot(unit: str, title: str, name: str) -> Any:
    return gr.LinePlot(
        x=STEP,
        y=VALUE,
        color=LINE,
        y_title=unit,
        color_title="",
        title=title,
        height=260,
        min_width=300,
        visible=False,
        elem_id=name,
    )


def _drawn(points: list[Point], title: str | None = None) -> Any:
    columns = zip(*points, strict=True) if points else ((), (), ())
    table = charted(dict(zip((STEP, VALUE, LINE), columns, strict=True)))
    named: dict[str, Any] = {} if title is None else {"title": title}
    return gr.LinePlot(value=table, visible=bool(points), **named)


def _cells(clips: "Clips", found: "Found", row: "Row", edited: str | None) -> list[str]:
    picture = clips.thumbnail(found.videos[row.clip]) if row.name == row.clip else ""
    image = f'<img src="{picture}" alt="" style="max-width:96px">' if picture else ""
    caption = row.caption if edited is None else edited
    return [image, row.name, row.length, row.size, row.fate, caption]


def _edited(found: "Found", cells: Any, kept: Mapping[str, str]) -> dict[str, str]:
    """Map the names of rows to captions that were edited, also on other pages of the table."""
    rows = {row.name: row for row in found.rows}
    now = {**kept}
    for one in cells:
        row = rows.get(str(one[NAME]))
        if row is None or row.file is None:
            continue
        text = str(one[CAPTION] or "").strip()
        if text != row.caption:
            now[row.name] = text
        else:
            now.pop(row.name, None)
    return now


def _new_folder(place: Path, name: str) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = place / f"{name}{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        return folder


@contextmanager
def _as_file(page: Page, config: TrainConfig) -> Iterator[str]:
    """A file of a config, for the time that it is read."""
    with tempfile.TemporaryDirectory(prefix=".asked-", dir=page.places.folder) as folder:
        file = Path(folder) / f"{CONFIG}.yaml"
        file.write_text(print_config(config), encoding="utf-8")
        yield str(file)


def _yaml_of(page: Page, job: QueuedJob) -> str:
    try:
        return read_text(page.queue.store.place(job) / GIVEN / f"{CONFIG}.yaml")
    except (OSError, ValueError):  # it was removed meanwhile
        return ""


def _state_of_job(page: Page, name: str) -> str:
    try:
        return page.queue.job(name).state
    except KeyError:
        return ""


def _mark(config: TrainConfig) -> str:
    """Return a text that changes when a training's folder has something new to show."""
    out = Path(config.out)
    files = [out / "metrics.jsonl", out / "report.html", *sorted(out.glob("validation/step-*/*"))]
    files += [*sorted(out.glob("checkpoints/step-*")), out / "lora", out / "image_prompt"]
    marks = []
    for file in files:
        try:
            marks.append(f"{file.name} {file.stat().st_mtime_ns}")
        except OSError:  # not written yet, or removed meanwhile
            continue
    return " ".join(marks)


def _command(config: TrainConfig, result: Path) -> str:
    from gen_accel.ui.train_run import command_of

    try:
        return command_of(config, result)
    except (ValueError, OSError) as error:
        return error_box(error)
