"""What stands around the screens: above, what was made last and what runs; below, the queue.

A click on a clip or a job opens the screen that it came from, and shows it there.
"""

import time
from contextlib import suppress
from itertools import islice

import gradio as gr

from gen_accel.ui.page import QUIETLY, Held, Page, duration, html, progress_box
from gen_accel.ui.queue import WAITING, Outlook, QueuedJob
from gen_accel.ui.thumbnails import thumbnail
from gen_accel.ui.worker import Values, line_of

CLIPS, SHOWN = 12, 30  # in the gallery, and jobs in the queue; the newest first


class Overview:
    """`#gallery` and `#status` where this is called, `#queue` where `build_queue` is."""

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
    made = ((job, address) for job in over if (address := _picture(page, job)))
    return html("gallery", [*islice(made, CLIPS)])


def _picture(page: Page, job: QueuedJob) -> str:
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
        {**_row(job, ahead.get(job.id, Outlook())), "picture": _picture(page, job)}
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
