"""The table of the queue, below all screens."""

import html
from typing import Any

import gradio as gr

from gen_accel.ui.jobs import FAILED, INTERRUPTED, STOPPED, Job
from gen_accel.ui.page import WORDS, Page, duration, error_box

SHOWN = 30  # jobs, the newest first
CLICKED = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-act]');
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
                case "cancel":
                    page.queue.cancel(job)
                case "again":
                    page.queue.again(job, tab=tab)
                case "remove":
                    page.queue.remove(job)
        except KeyError:  # another tab removed it
            pass
        except (ValueError, OSError) as error:
            said = error_box(str(error))
        return [_table(page), said]

    quietly: Any = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    page.timer.tick(look, [seen], [table, trouble, seen], **quietly)
    table.click(act, [page.tab], [table, trouble], **quietly)


def _table(page: Page) -> str:
    jobs = page.queue.jobs()
    if not jobs:
        return '<p class="ga-empty">The queue is empty.</p>'
    live = [job for job in jobs if job.is_live]
    over = [job for job in reversed(jobs) if not job.is_live]
    rows = "".join(_row(page, job) for job in [*live, *over][:SHOWN])
    return (
        '<table class="ga-queue"><thead><tr><th></th><th>job</th><th>state</th>'
        f"<th>time</th><th></th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _row(page: Page, job: Job) -> str:
    place = page.queue.position(job.id)
    number = str(place) if job.is_live and place else ""
    state = WORDS[job.state]
    if job.is_live:
        share, left = job.progress.share, page.queue.left(job.id)
        state += f" {share:.0%}" if share is not None else ""
        time = "" if left is None else f"{duration(left)} left"
        buttons = _button("cancel", job, "Stop" if not place else "Cancel")
    else:
        time = "" if job.seconds is None else duration(job.seconds)
        buttons = _button("again", job, "Again") + _button("remove", job, "Remove")
    wrong = job.state in (FAILED, INTERRUPTED, STOPPED) and job.error
    told = f'<div class="ga-why">{html.escape(job.error)}</div>' if wrong else ""
    title = html.escape(job.title or job.verb)
    return (
        f'<tr data-job="{job.id}" data-state="{job.state}"><td>{number}</td>'
        f"<td><b>{html.escape(job.kind or job.verb)}</b> {title}{told}</td>"
        f'<td><span class="ga-state ga-{job.state}">{state}</span></td><td>{time}</td>'
        f"<td>{buttons}</td></tr>"
    )


def _button(act: str, job: Job, words: str) -> str:
    return f'<button data-act="{act}" data-job="{job.id}">{words}</button>'
