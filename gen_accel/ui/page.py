"""The page that screens are built into, and the parts that they share.

Events have a set of components as inputs, so that a function takes their values by component, and
returns the components that change with their new values.
"""

import json
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import jinja2
from gradio.blocks import Block, BlockFunction
from gradio.state_holder import SessionState
from gradio.utils import get_upload_folder

from gen_accel.io import plain
from gen_accel.pipelines.generation.progress import PERCENT
from gen_accel.ui.files import Places
from gen_accel.ui.queue import DONE, RUNNING, WAITING, Outlook, Queue, QueuedJob
from gen_accel.ui.worker import Questions, Values, line_of

if TYPE_CHECKING:
    from pandas import DataFrame

Held = dict[Block, Any]  # components with their values
# Options of events that neither show that they run nor appear in gradio's own interface.
QUIETLY: Values = {
    "show_progress": "hidden",
    "queue": False,
    "api_visibility": "private",
}
# Of events that show that they run.
PRIVATELY: Values = {"api_visibility": "private"}
# Of events that set a State which others listen to: gradio tells its change in the queue alone.
TELLING: Values = {"show_progress": "hidden", "api_visibility": "private"}
# Of events that add a job: jobs come in the order of the presses, also of different buttons.
ADDING: Values = {**TELLING, "concurrency_id": "jobs"}
# Of events that ask again whenever something changes.
ASKING: Values = {**TELLING, "trigger_mode": "always_last", "concurrency_limit": 2}
SHOWN = 30  # jobs in the table of the queue, the newest first
CLICKED = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-act]');
  if (button) trigger('click', {act: button.dataset.act, job: button.dataset.job});
});
"""


@cache
def _parts() -> object:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
    )
    return environment.get_template("parts.html.j2").module  # its macros are attributes


def html(part: str, *values: object, **named: object) -> str:
    """Write a part of the page by its macro in `parts.html.j2`. Values are escaped."""
    return str(getattr(_parts(), part)(*values, **named))


class Screens(gr.Blocks):
    """Blocks whose events take files that were uploaded: a request may name any other file of the
    machine, or an address that gradio would fetch."""

    async def preprocess_data(
        self,
        block_fn: BlockFunction,
        inputs: list[Any],
        state: SessionState | None,
        explicit_call: bool = False,
    ) -> list[Any]:
        sent, left = Path(get_upload_folder()), list[object](inputs)
        while left:
            one = left.pop()
            if isinstance(one, Mapping):
                path = one.get("path")
                if isinstance(path, str) and not Path(path).resolve().is_relative_to(sent):
                    raise gr.Error("a file must be uploaded to be used", print_exception=False)
                left += one.values()
            elif isinstance(one, list):
                left += one
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


@dataclass(frozen=True)
class Page:
    """Parts of the page that a screen is given.

    Args:
        queue: where jobs go.
        questions: verbs that are asked at once.
        places: files that may be read and written.
        models: what to choose a model from, the first by default: folders and names on the hub,
            and "demo".
        tab: name of the browser's tab, which outlives a reload; an input of what submits.
        pulse: is clicked within a second of each change of a job, so that a page at rest asks one
            small thing a second.
        shown: id of the job that was chosen in the queue.
    """

    queue: Queue
    questions: Questions
    places: Places
    models: tuple[str, ...]
    tab: gr.Textbox
    pulse: gr.HTML
    shown: gr.Textbox

    def find(self, name: str) -> QueuedJob | None:
        """Find a job by its id; None if it is gone."""
        with suppress(KeyError):
            return self.queue.job(name)
        return None

    def url(self, job: QueuedJob, file: str | Path) -> str:
        """Address of a file of a job, from the page; it changes with the file.

        Args:
            file: its path, or its name in the job's folder.
        """
        place = self.queue.place(job)
        path = Path(file) if Path(file).is_absolute() else place / file
        stamp = path.stat().st_mtime_ns if path.exists() else 0
        return f"jobs/{job.id}/{path.relative_to(place).as_posix()}?{stamp}"

    def preview(self, job: QueuedJob) -> str:
        """Address of what there is so far of a video; "" for nothing."""
        files = self.queue.files(job) if job.state == RUNNING else []
        picture = next((file for file in files if file.match("*.preview.png")), None)
        return "" if picture is None else self.url(job, picture)

    def mark(self) -> str:
        """Return a text that changes with any job, as far as the page shows it."""
        seen = [self.queue.trouble]
        for job in self.queue.jobs():
            seen.append(f"{job.id} {job.state}")
            if job.is_live:
                seen.append(f"{job.progress} {job.notes[-1:]} {self.preview(job)}")
        return sha256(repr(seen).encode()).hexdigest()


@dataclass(frozen=True)
class Followed:
    """The parts of a screen that show one job; see `follow`.

    Args:
        job: id of the job that is shown; what submits sets it.
        ended: id of the last job that ended while it was shown; its `change` is where a screen
            shows what came out.
        error: shows one sentence; see `refusing`.
    """

    job: gr.Textbox
    ended: gr.Textbox
    error: gr.HTML


def follow(page: Page, prefix: str, *, kind: str) -> Followed:
    """Build what shows a job: `#PREFIX-progress`, `-error`, `-preview` and `-stop`.

    A page that is loaded again shows the last job of its tab and kind, and one that is chosen in
    the queue.

    Args:
        kind: of the jobs that the screen submits.
    """
    job = gr.Textbox(visible="hidden", elem_id=f"{prefix}-job")
    ended = gr.Textbox(visible="hidden", elem_id=f"{prefix}-ended")
    seen = gr.State("")
    error = gr.HTML(elem_id=f"{prefix}-error")
    with gr.Row(equal_height=True, elem_classes="ga-following"):
        status = gr.HTML(elem_id=f"{prefix}-progress")
        about: Values = {"variant": "stop", "size": "sm", "scale": 0, "min_width": 80}
        stop = gr.Button("Stop", elem_id=f"{prefix}-stop", visible=False, **about)
    preview = gr.HTML(elem_id=f"{prefix}-so-far")

    def look(held: Held) -> Held:
        one, before = page.find(held[job]), held[seen]
        if one is None:  # none is shown, or it was removed
            nothing: Held = {status: "", preview: "", stop: gr.update(visible=False), seen: ""}
            return nothing if before else {seen: gr.skip()}
        address = page.preview(one)
        ahead = page.queue.outlook().get(one.id, Outlook())
        now = f"{one.id} {one.state} {one.progress} {ahead.before} {address}"
        if now == before:
            return {seen: gr.skip()}
        shown: Held = {status: progress_box(one, ahead), seen: now}
        shown |= {preview: html("image", address, "what there is so far")}
        shown |= {stop: gr.update(visible=one.is_live)}
        return shown if one.is_live else {**shown, error: html("error", one.error), ended: one.id}

    outputs = [status, error, preview, stop, ended, seen]
    page.pulse.click(look, {job, seen}, outputs, **QUIETLY)
    job.change(look, {job, seen}, outputs, **QUIETLY)
    stop.click(page.queue.cancel, [job], [], **QUIETLY)

    def last(held: Held) -> Held:
        tab = held[page.tab]
        own = [one.id for one in page.queue.jobs() if one.kind == kind and one.tab == tab]
        return {job: own[-1] if tab and own and not held[job] else gr.skip()}

    def chosen(name: str) -> Held:
        one = page.find(name)
        return {job: gr.skip() if one is None or one.kind != kind else name}

    page.tab.change(last, {page.tab, job}, [job], **QUIETLY)
    page.shown.change(chosen, [page.shown], [job], **QUIETLY)
    return Followed(job, ended, error)


def build_queue(page: Page) -> None:
    """Build `#queue`: each job with its state, position and time left, to cancel or do again."""
    trouble = gr.HTML(elem_id="queue-error")
    table = gr.HTML(_table(page), elem_id="queue", js_on_load=CLICKED)
    seen = gr.State("")

    def look(before: str) -> Held:
        now, said = _table(page), html("error", page.queue.trouble)
        if now + said == before:
            return {seen: gr.skip()}
        return {table: now, trouble: said, seen: now + said}

    def act(event: gr.EventData, tab: str) -> Held:
        name, said = str(event.job), ""
        try:
            match event.act:
                case "show":
                    return {trouble: "", page.shown: name}
                case "cancel":
                    page.queue.cancel(name)
                case "again":
                    with suppress(KeyError):  # another tab removed it
                        page.queue.again(name, tab=tab)
                case "remove":
                    page.queue.remove(name)
        except (ValueError, OSError) as error:
            said = html("error", line_of(error))
        return {table: _table(page), trouble: said}

    page.pulse.click(look, [seen], [table, trouble, seen], **QUIETLY)
    table.click(act, [page.tab], [table, trouble, page.shown], **QUIETLY)


def _table(page: Page) -> str:
    jobs = page.queue.jobs()
    live = [job for job in jobs if job.is_live]
    over = [job for job in reversed(jobs) if not job.is_live]
    ahead = page.queue.outlook()
    rows = [_row(job, ahead.get(job.id, Outlook())) for job in [*live, *over][:SHOWN]]
    return html("queue", rows, len([job for job in live if job.state == WAITING]))


def _row(job: QueuedJob, ahead: Outlook) -> Values:
    if not job.is_live:
        time = "" if job.seconds is None else duration(job.seconds)
        acts = [("again", "Again"), ("remove", "Remove")]
        return {"job": job, "state": job.state, "time": time, "acts": acts}
    share, (before, left) = job.share, ahead
    how = f", {share:.0%}" if share is not None else f", {before} before" if before else ""
    time = "" if left is None else f"{duration(left)} left"
    acts = [("cancel", "Cancel" if job.state == WAITING else "Stop")]
    return {"job": job, "state": job.state + how, "time": time, "acts": acts}


def refusing(function: Callable[..., Held], error: gr.HTML) -> Callable[..., Held]:
    """Wrap a function of an event: its refusal is a sentence in `error`, which else is emptied."""

    def call(*held: object) -> Held:
        try:
            return {error: "", **function(*held)}
        except KeyError:
            return {error: html("error", "it is not there any more")}
        except (ValueError, OSError, ImportError) as wrong:
            return {error: html("error", line_of(wrong))}

    return call


def charted(columns: Mapping[str, Sequence[object]]) -> "DataFrame":
    """Make columns the data frame that a chart takes."""
    import pandas as pd

    return pd.DataFrame({**columns})


def json_link(words: str, data: object, name: str) -> str:
    """Write a link that downloads data as JSON; the data lies in the page."""
    text = json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False)
    held = b64encode(text.encode()).decode()
    return html("links", [(words, f"data:application/json;base64,{held}", name)])


def progress_box(job: QueuedJob, ahead: Outlook) -> str:
    """Show how far a job is: its words, a bar, and the time that is left."""
    progress, words = job.progress, job.state
    share, (before, left) = job.share, ahead
    if job.state == WAITING:
        words = f"waiting, {before} before it"
    elif job.state == RUNNING:
        words = progress.words or (job.notes[-1] if job.notes else "starting")
        if progress.total and progress.unit != PERCENT:
            words += f" {progress.done:g} of {progress.total:g} {progress.unit}".rstrip()
    elif job.seconds is not None:
        words += f" after {duration(job.seconds)}"
    rest = f"{duration(left)} left" if job.is_live and left is not None else ""
    width = 100 if job.state == DONE else 100 * (share or 0)
    return html("progress", job, words, rest, width, job.state == RUNNING and share is None)


def duration(seconds: float) -> str:
    """Write seconds as people say them: 8 s, 3 min, 1 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 100:
        return f"{whole} s"
    minutes = round(whole / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
