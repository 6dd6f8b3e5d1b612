"""The page that screens are built into, the parts that they share, and what stands around them.

Events have a set of components as inputs, so that a function takes their values by component, and
returns the components that change with their new values.
"""

import json
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import gradio as gr
import jinja2
from gradio.blocks import Block, BlockFunction
from gradio.state_holder import SessionState
from gradio.utils import get_upload_folder

from gen_accel.io import plain
from gen_accel.pipelines.generation.progress import PERCENT
from gen_accel.ui.files import Places
from gen_accel.ui.queue import DONE, RUNNING, WAITING, Outlook, Queue, QueuedJob, film_of
from gen_accel.ui.thumbnails import thumbnail
from gen_accel.ui.worker import Questions, Values, line_of

CLIPS, SHOWN = 12, 30  # in the gallery, and jobs in the queue; the newest first
Held = dict[Block, Any]  # components with their values
# Buttons of a picture. Gradio's third, "share", sends it to another server.
BUTTONS: tuple[Literal["download", "fullscreen"], ...] = ("download", "fullscreen")
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

# Tells which button with an act was clicked, and of which job.
CLICKED = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-act]');
  if (!button) return;
  trigger('click', {act: button.dataset.act, job: button.dataset.job});
  if (['show', 'open'].includes(button.dataset.act)) window.scrollTo({top: 0});
});
"""


# Plays a film that grows, and goes on where it ended: a browser reads no more than there was when
# it asked.
GROWS = """
const goOn = (event) => {
  const film = event.target, at = film.currentTime;
  if (!film.dataset.growing) return;
  if (event.type === 'loadeddata') return film.play().catch(() => {});
  setTimeout(() => {
    if (!film.isConnected) return;
    film.src = `${film.dataset.growing}?${Date.now()}`;
    film.currentTime = at;
  }, 1000);
};
for (const name of ['loadeddata', 'ended', 'error']) element.addEventListener(name, goOn, true);
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
        pulse: is clicked within two seconds of each change of a job; a page at rest asks one small
            thing a second.
        shown: id of the job that was chosen in the gallery or the queue, or the kind of jobs of
            the screen that was opened; then a space and when.
        clicked: parts whose buttons show a job, open a screen, or change the queue; see `linked`.
        looks: what looks at the queue at each pulse; see `at_pulse`.
    """

    queue: Queue
    questions: Questions
    places: Places
    models: tuple[str, ...]
    tab: gr.Textbox
    pulse: gr.HTML
    shown: gr.Textbox
    clicked: list[gr.HTML] = field(default_factory=list)
    looks: list[tuple[Callable[[Held], Held], set[Block], Sequence[Block]]] = field(
        default_factory=list
    )

    def at_pulse(
        self, look: Callable[[Held], Held], inputs: set[Block], outputs: Sequence[Block]
    ) -> None:
        """Call `look` with the values of `inputs` at each pulse.

        Args:
            outputs: components that `look` returns, each of one `look` alone.
        """
        self.looks.append((look, inputs, outputs))

    def listen(self) -> None:
        """Let each pulse ask all `looks` in one request: every answer costs a browser time, which
        on a machine without a GPU is taken from the job."""

        def look(held: Held) -> Held:
            return {part: x for one, _, _ in self.looks for part, x in one(held).items()}

        inputs = set[Block]().union(*(some for _, some, _ in self.looks))
        outputs = [part for _, _, some in self.looks for part in some]
        self.pulse.click(look, inputs, outputs, **QUIETLY)

    def linked(self, value: str, name: str, style: str | None = None) -> gr.HTML:
        """Make HTML `#name` whose buttons `Overview` answers, by `data-act` and
        `data-job`."""
        made = gr.HTML(value, elem_id=name, elem_classes=style, js_on_load=CLICKED)
        self.clicked.append(made)
        return made

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

    def so_far(self, job: QueuedJob) -> str:
        """Show what there is so far of a video; "" for nothing. The film of a stream plays while
        it grows, and stays where the stream was stopped."""
        file = film_of(self.queue.place(job))
        if job.state == DONE or file is None or not file.is_file():
            return html("image", self.preview(job), "what there is so far")
        if job.state != RUNNING:
            return html("video", self.url(job, file), "what was made")
        address = self.url(job, file).partition("?")[0]  # one, so that it stays on the page
        return html("growing", address, "what there is so far")

    def last(self, kind: str, tab: str) -> QueuedJob | None:
        """Find the last job of a kind that came from a tab of a browser; None for none."""
        jobs = (one for one in reversed(self.queue.jobs()) if one.kind == kind and one.tab == tab)
        return next(jobs, None) if tab else None

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
        ended: id of the job that is shown, once it has ended; "" before.
        error: shows one sentence; see `refusing`.
    """

    job: gr.Textbox
    ended: gr.Textbox
    error: gr.HTML

    def at_end(self, show: Callable[[str], Held], shown: Sequence[Block]) -> None:
        """Call `show` with the id of each job that has ended; its refusal stands in `error`.

        Args:
            shown: components that `show` changes, `error` aside.
        """

        def call(name: str) -> Held:  # the error of the job itself stays
            return {self.error: gr.skip(), **(show(name) if name else {})}

        outputs = [self.error, *shown]
        self.ended.change(refusing(call, self.error), [self.ended], outputs, **PRIVATELY)


def follow(page: Page, prefix: str, *, kind: str) -> Followed:
    """Build what shows a job: `#PREFIX-progress`, `-error`, `-preview` and `-stop`.

    A page that is loaded again shows the last job of its tab and kind, and one that is chosen in
    the gallery or the queue.

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
    preview = gr.HTML(elem_id=f"{prefix}-so-far", js_on_load=GROWS)

    def look(held: Held) -> Held:
        one, before = page.find(held[job]), held[seen]
        if one is None:  # none is shown, or it was removed
            nothing: Held = {status: "", preview: "", stop: gr.update(visible=False), seen: ""}
            return nothing if before else {seen: gr.skip()}
        so_far = page.so_far(one)
        ahead = page.queue.outlook().get(one.id, Outlook())
        now = f"{one.id} {one.state} {one.progress} {ahead.before} {so_far}"
        if now == before:
            return {seen: gr.skip()}
        shown: Held = {status: progress_box(one, ahead), seen: now}
        shown |= {preview: so_far}  # the same text leaves a film as it plays
        shown |= {stop: gr.update(visible=one.is_live)}
        if one.is_live:
            return {**shown, ended: ""}
        return {**shown, error: html("error", one.error), ended: one.id}

    outputs = [status, error, preview, stop, ended, seen]
    page.at_pulse(look, {job, seen}, outputs)
    job.change(look, {job, seen}, outputs, **QUIETLY)
    stop.click(page.queue.cancel, [job], [], **QUIETLY)

    def last(held: Held) -> Held:
        one = page.last(kind, held[page.tab])
        return {job: one.id if one and not held[job] else gr.skip()}

    def chosen(told: str) -> Held:
        one = page.find(told.partition(" ")[0])
        return {job: gr.skip() if one is None or one.kind != kind else one.id}

    page.tab.change(last, {page.tab, job}, [job], **QUIETLY)
    page.shown.change(chosen, [page.shown], [job], **QUIETLY)
    return Followed(job, ended, error)


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


def by_names(error: Exception, files: Iterable[str]) -> Exception:
    """Return an error in which uploaded files go by their names, without their folders."""
    sentence = str(error)
    for file in files:
        sentence = sentence.replace(file, Path(file).name)
    return type(error)(sentence)


def json_link(words: str, data: object, name: str) -> str:
    """Write a link that downloads data as JSON; the data lies in the page."""
    text = json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False)
    held = b64encode(text.encode()).decode()
    return html("links", [(words, f"data:application/json;base64,{held}", name)])


def progress_box(job: QueuedJob, ahead: Outlook, part: str = "progress", **more: object) -> str:
    """Show how far a job is: its words, a bar, and the time that is left.

    Args:
        part: macro that writes it.
        more: further values that the macro takes.
    """
    progress, words = job.progress, job.state
    share, (before, left) = job.share, ahead
    if job.state == WAITING:
        words = f"waiting, {before} before it"
    elif job.state == RUNNING:
        # A warning is no stage of the work; the result shows it.
        said = (one for one in reversed(job.notes) if not one.startswith("warning:"))
        words = progress.words or next(said, "starting")
        if progress.total and progress.unit != PERCENT:
            words += "," * words[-1:].isdigit()
            words += f" {progress.done:g} of {progress.total:g} {progress.unit}".rstrip()
    elif job.seconds is not None:
        words += f" after {duration(job.seconds)}"
    rest = f"{duration(left)} left" if job.is_live and left is not None else ""
    width = 100 if job.state == DONE else 100 * (share or 0)
    moving = job.state == RUNNING and share is None
    return html(part, job, words, rest, width, moving, **more)


def duration(seconds: float) -> str:
    """Write seconds as people say them: 8 s, 3 min, 1 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 100:
        return f"{whole} s"
    minutes = round(whole / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class Overview:
    """What stands around the screens: `#gallery`, what was made last, and `#status`, what runs,
    where this is called; `#queue` where `build_queue` is.

    A click on a clip or a job opens the screen that it came from, and shows it there.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.gallery = page.linked(html("gallery", []), "gallery")
        self.status = page.linked("", "status")

    def build_queue(self, screens: gr.Tabs) -> None:
        """Build each job with its state, position and time left, to cancel or do again.

        Args:
            screens: of which each has the kind of its jobs as its id.
        """
        page = self.page
        trouble = gr.HTML(elem_id="queue-error")
        table = page.linked("", "queue")
        seen = gr.State({})
        kinds = {tab.id for tab in screens.children if isinstance(tab, gr.Tab)}

        def look(held: Held) -> Held:
            now = {
                "gallery": (self.gallery, _gallery(page)),
                "status": (self.status, _status(page)),
                "queue": (table, _table(page)),
                "trouble": (trouble, html("error", page.queue.trouble)),
            }
            texts = {name: text for name, (_, text) in now.items()}
            changed = {part: x for name, (part, x) in now.items() if x != held[seen].get(name)}
            return {seen: texts if changed else gr.skip(), **changed}

        def opened(name: str, kind: str) -> Held:
            tabs = gr.Tabs(selected=kind) if kind in kinds else gr.skip()
            return {page.shown: f"{name} {time.monotonic_ns()}", screens: tabs}

        def act(event: gr.EventData, tab: str) -> Held:
            name, said = str(event.job), ""
            try:
                match event.act:
                    case "show":
                        job = page.find(name)
                        return opened(name, job.kind if job else "")
                    case "open":
                        return opened(name, name)
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

        parts = [self.gallery, self.status, table, trouble]
        page.at_pulse(look, {seen}, [*parts, seen])
        clicks = [one.click for one in page.clicked]
        gr.on(clicks, act, [page.tab], [table, trouble, page.shown, screens], **QUIETLY)


def _gallery(page: Page) -> str:
    over = (job for job in reversed(page.queue.jobs()) if not job.is_live)
    made = ((job, address) for job in over if (address := _small_picture(page, job)))
    return html("gallery", [*islice(made, CLIPS)])


def _small_picture(page: Page, job: QueuedJob) -> str:
    """Address of the small picture of a job, of a running one of what there is; "" for none."""
    small = thumbnail(page.queue, job)
    return page.preview(job) if small is None else page.url(job, small)


def _status(page: Page) -> str:
    live = [job for job in page.queue.jobs() if job.is_live]
    if not live:
        return ""
    ahead = page.queue.outlook().get(live[0].id, Outlook())
    return progress_box(live[0], ahead, "status", waiting=len(live) - 1)


def _table(page: Page) -> str:
    jobs = page.queue.jobs()
    live = [job for job in jobs if job.is_live]
    over = [job for job in reversed(jobs) if not job.is_live]
    ahead = page.queue.outlook()
    rows = [
        {**_row(job, ahead.get(job.id, Outlook())), "picture": _small_picture(page, job)}
        for job in [*live, *over][:SHOWN]
    ]
    return html("queue", rows, len([job for job in live if job.state == WAITING]))


def _row(job: QueuedJob, ahead: Outlook) -> Values:
    if not job.is_live:
        took = "" if job.seconds is None else duration(job.seconds)
        acts = [("again", "Again"), ("remove", "Remove")]
        return {"job": job, "state": job.state, "time": took, "acts": acts}
    share, (before, left) = job.share, ahead
    how = f", {share:.0%}" if share is not None else f", {before} before" if before else ""
    rest = "" if left is None else f"{duration(left)} left"
    acts = [("cancel", "Cancel" if job.state == WAITING else "Stop")]
    return {"job": job, "state": job.state + how, "time": rest, "acts": acts}
