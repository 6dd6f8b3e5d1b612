"""The page that screens are built into, and the parts that they share."""

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import gradio as gr

from gen_accel.ui.files import Places
from gen_accel.ui.queue import (
    DONE,
    FAILED,
    INTERRUPTED,
    RUNNING,
    STOPPED,
    WAITING,
    Queue,
    QueuedJob,
)
from gen_accel.ui.worker import Questions, Refused, command_line, line_of

WORDS = {
    WAITING: "waiting",
    RUNNING: "running",
    DONE: "done",
    FAILED: "failed",
    STOPPED: "stopped",
    INTERRUPTED: "interrupted",
}
# Options of events that neither show that they run nor appear in gradio's own interface.
QUIETLY: Any = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
# Of events that show that they run.
PRIVATELY: Any = {"api_visibility": "private"}
# Of events that set a State which others listen to: gradio tells its change in the queue alone.
TELLING: Any = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Page:
    """Parts of the page that a screen is given.

    Args:
        queue: where jobs go.
        questions: verbs that are asked at once.
        places: which files may be read and written.
        models: what to choose a model from: "demo", folders and names on the hub.
        tab: holds the name of the browser's tab, which outlives a reload; an input of whatever
            submits.
        pulse: is clicked within a second of each change of a job; a screen that shows jobs
            listens to this, so that a page at rest asks one small thing a second.
        shown: id of the job that was chosen in the queue, whose screen shows it.
    """

    queue: Queue
    questions: Questions
    places: Places
    models: tuple[str, ...]
    tab: gr.Textbox
    pulse: gr.HTML
    shown: gr.Textbox

    def submit(self, verb: str, options: Mapping[str, Any], **about: Any) -> QueuedJob:
        """Queue a job; see `queue.Queue.submit`. Raises Refused with one sentence."""
        try:
            return self.queue.submit(verb, options, **about)
        except (ValueError, OSError) as error:
            raise Refused(line_of(error)) from error

    def url(self, job: QueuedJob, file: str | Path) -> str:
        """Address of a file of a job, from the page; it changes with the file.

        Args:
            file: its path, or its name in the job's folder.
        """
        place = self.queue.store.place(job)
        path = Path(file) if Path(file).is_absolute() else place / file
        stamp = path.stat().st_mtime_ns if path.exists() else 0
        return f"jobs/{job.id}/{path.relative_to(place).as_posix()}?{stamp}"

    def preview(self, job: QueuedJob) -> str:
        """Address of what there is so far of a video; "" where there is nothing."""
        if not job.is_live:
            return ""
        files = self.queue.store.files(job)
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
        error: shows one sentence, see `refusal`.
        stop: the button.
    """

    job: gr.Textbox
    ended: gr.Textbox
    status: gr.HTML
    error: gr.HTML
    preview: gr.HTML
    stop: gr.Button


def follow(page: Page, prefix: str, *, kind: str = "") -> Followed:
    """Build what shows a job: `#PREFIX-progress`, `-error`, `-preview` and `-stop`.

    Args:
        kind: of the jobs that the screen submits. With it, a page that is loaded again shows the
            last one of its tab, and the screen shows one that is chosen in the queue.
    """
    job = gr.Textbox(visible="hidden", elem_id=f"{prefix}-job")
    ended = gr.Textbox(visible="hidden", elem_id=f"{prefix}-ended")
    seen = gr.State("")
    error = gr.HTML(elem_id=f"{prefix}-error")
    with gr.Row(equal_height=True, elem_classes="ga-following"):
        status = gr.HTML(elem_id=f"{prefix}-progress")
        stop = gr.Button(
            "Stop",
            elem_id=f"{prefix}-stop",
            variant="stop",
            visible=False,
            size="sm",
            scale=0,
            min_width=80,
        )
    preview = gr.HTML(elem_id=f"{prefix}-preview")
    followed = Followed(job, ended, status, error, preview, stop)

    def look(name: str, before: str) -> Any:
        try:
            one = page.queue.job(name)
        except KeyError:  # none is shown, or it was removed
            if not before:
                return [gr.skip()] * 6
            return ["", gr.skip(), "", gr.update(visible=False), gr.skip(), ""]
        address = page.preview(one)
        now = f"{one.id} {one.state} {one.progress} {page.queue.position(one.id)} {address}"
        if now == before:
            return [gr.skip()] * 6
        shown = f'<img src="{address}" alt="what there is so far">' if address else ""
        new = gr.skip() if one.is_live else one.id
        said = error_box(one.error) if not one.is_live else gr.skip()
        return [progress_box(page, one), said, shown, gr.update(visible=one.is_live), new, now]

    outputs = [status, error, preview, stop, ended, seen]
    page.pulse.click(look, [job, seen], outputs, **QUIETLY)
    job.change(look, [job, seen], outputs, **QUIETLY)
    stop.click(page.queue.cancel, [job], [], **QUIETLY)
    if kind:

        def last(tab: str, shown: str) -> Any:
            jobs = [one for one in page.queue.jobs() if one.kind == kind and one.tab == tab]
            return jobs[-1].id if tab and jobs and not shown else gr.skip()

        def chosen(name: str) -> Any:
            known = any(one.id == name and one.kind == kind for one in page.queue.jobs())
            return name if known else gr.skip()

        page.tab.change(last, [page.tab, job], [job], **QUIETLY)
        page.shown.change(chosen, [page.shown], [job], **QUIETLY)
    return followed


def refusing(function: Callable[..., Any], outputs: int) -> Callable[..., Any]:
    """Wrap what submits: its values come with an empty error box before them, a refusal with the
    sentence in that box and all else unchanged.

    Args:
        outputs: number of values that `function` returns.
    """

    def call(*values: Any) -> Any:
        try:
            made = function(*values)
        except (ValueError, OSError, KeyError) as error:
            gone = isinstance(error, KeyError)
            box = error_box("it is not there any more" if gone else error)
            return [box, *[gr.skip()] * outputs] if outputs else box
        if not outputs:
            return ""
        return ["", *(made if isinstance(made, list | tuple) else [made])]

    return call


def error_box(said: str | Exception) -> str:
    """Show a sentence, or an error in one line; "" shows nothing."""
    sentence = line_of(said) if isinstance(said, Exception) else " ".join(said.split())
    if not sentence:
        return ""
    return f'<div class="ga-error" role="alert">{html.escape(sentence)}</div>'


def progress_box(page: Page, job: QueuedJob) -> str:
    """Show how far a job is: its words, a bar, and the time that is left."""
    progress, words = job.progress, WORDS[job.state]
    share, left = progress.share, page.queue.left(job.id)
    if job.state == WAITING:
        words = f"waiting, {page.queue.position(job.id)} before it"
    elif job.state == RUNNING:
        words = progress.words or (job.notes[-1] if job.notes else "starting")
        if progress.total:
            words += f" {progress.done:g} of {progress.total:g} {progress.unit}".rstrip()
    elif job.seconds is not None:
        words += f" after {duration(job.seconds)}"
    rest = f"{duration(left)} left" if job.is_live and left is not None else ""
    width = 100 if job.state == DONE else 100 * (share or 0)
    moving = " ga-moving" if job.state == RUNNING and share is None else ""
    return (
        f'<div class="ga-progress ga-{job.state}{moving}" data-job="{job.id}" '
        f'data-state="{job.state}"><div class="ga-words"><span>{html.escape(words)}</span>'
        f'<span>{rest}</span></div><div class="ga-bar"><div style="width:{width:.1f}%"></div>'
        "</div></div>"
    )


def command_box(job: QueuedJob) -> str:
    """The command that does the same on a command line, as text."""
    return command_line(job.verb, job.options)


def duration(seconds: float) -> str:
    """Write seconds as people say them: 8 s, 3 min, 1 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 100:
        return f"{whole} s"
    minutes = round(whole / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
