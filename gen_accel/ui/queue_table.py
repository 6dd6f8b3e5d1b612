"""The table of the queue, below all screens."""

import html
from contextlib import suppress
from typing import Any

import gradio as gr

from gen_accel.ui.page import QUIETLY, WORDS, Page, duration, error_box
from gen_accel.ui.queue import RUNNING, WAITING, QueuedJob

SHOWN = 30  # jobs, the newest first
CLICKED = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-act]');
  if (button) trigger('click', {act: button.dataset.act, job: button.dataset.job});
});
"""


def build(page: Page) -> None:
    """Build `#queue`: each job with its state, position and time left, to cancel or do again."""
    trouble = gr.HTML(elem_id="queue-error")
    table = gr.HTML(_table(page), elem_id="queue", js_on_load=CLICKED)
    seen = gr.State("")

    def look(before: str) -> Any:
        now = _table(page)
        said = error_box(page.queue.trouble)
        mark = now + said
        return [gr.skip()] * 3 if mark == before else [now, said, mark]

    def act(event: gr.EventData, tab: str) -> Any:
        job, said = str(event.job), ""
        try:
            match event.act:
                case "show":
                    return [gr.skip(), "", job]
                case "cancel":
                    page.queue.cancel(job)
                case "again":
                    with suppress(KeyError):  # another tab removed it
                        page.queue.again(job, tab=tab)
                case "remove":
                    page.queue.remove(job)
        except (ValueError, OSError) as error:
            said = error_box(error)
        return [_table(page), said, gr.skip()]

    page.pulse.click(look, [seen], [table, trouble, seen], **QUIETLY)
    table.click(act, [page.tab], [table, trouble, page.shown], **QUIETLY)


def _table(page: Page) -> str:
    jobs = page.queue.jobs()
    if not jobs:
        return '<p class="ga-empty">The queue is empty.</p>'
    live = [job for job in jobs if job.is_live]
    over = [job for job in reversed(jobs) if not job.is_live]
    rows = "".join(_row(page, job) for job in [*live, *over][:SHOWN])
    waiting = len([job for job in live if job.state != RUNNING])
    count = f" <small>{waiting} waiting</small>" if waiting else ""
    return f'<h3 class="ga-heading">Queue{count}</h3><div class="ga-queue">{rows}</div>'


def _row(page: Page, job: QueuedJob) -> str:
    place = page.queue.position(job.id)
    state = WORDS[job.state]
    if job.is_live:
        share, left = job.progress.share, page.queue.left(job.id)
        state += f", {share:.0%}" if share is not None else f", {place} before" if place else ""
        time = "" if left is None else f"{duration(left)} left"
        buttons = _button("cancel", job, "Cancel" if job.state == WAITING else "Stop")
    else:
        time = "" if job.seconds is None else duration(job.seconds)
        buttons = _button("again", job, "Again") + _button("remove", job, "Remove")
    told = f'<div class="ga-why">{html.escape(job.error)}</div>' if job.error else ""
    title = html.escape(job.title or job.verb)
    if job.kind:
        title = f'<a data-act="show" data-job="{job.id}" tabindex="0">{title}</a>'
    return (
        f'<div class="ga-row" data-job="{job.id}" data-state="{job.state}">'
        f'<span class="ga-kind">{html.escape(job.kind or job.verb)}</span>'
        f'<span class="ga-job">{title}{told}</span>'
        f'<span class="ga-state ga-{job.state}">{state}</span>'
        f'<span class="ga-time">{time}</span><span class="ga-acts">{buttons}</span></div>'
    )


def _button(act: str, job: QueuedJob, words: str) -> str:
    return f'<button data-act="{act}" data-job="{job.id}">{words}</button>'
