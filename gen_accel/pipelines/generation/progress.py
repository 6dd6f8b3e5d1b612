"""Progress on stderr: bars with the remaining time, or occasional lines without a terminal, as in
the log of a job. A program that shows it otherwise is told of each step by `heard_by`."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from operator import length_hint
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gen_accel.registry import needed_for

if TYPE_CHECKING:
    from rich.progress import Progress

EVERY = 10.0  # seconds between two lines of a task

Tick = Callable[[int, int], None]  # takes the number of steps or frames done, and their total


class Update(NamedTuple):
    """State of a task.

    Args:
        task: its number in its bar.
        words: what it is.
        done, total: steps, frames or whatever `unit` says; a total of None is not known.
        left: seconds that remain, where the task itself knows.
    """

    task: int
    words: str
    done: float = 0
    total: float | None = None
    unit: str = ""
    left: float | None = None


Listener = Callable[[Update], None]

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Tell `listener` of the progress that is made inside, in the place of stderr."""
    before = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(before)


def progress_bar(*, units: bool = False) -> "Progress":
    """Make a bar with the remaining time.

    A task may know its own remaining seconds, and give them as a field `left`. Without a terminal
    it prints a line at the first step, every ten seconds, and at the end of each task.

    Args:
        units: each task names its unit, as in `bar.add_task("clip", unit="steps")`.
    """
    with needed_for("a progress bar", extra="video"):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

    class Remaining(TimeRemainingColumn):
        def render(self, task: Any) -> Text:
            known = task.fields.get("left")
            if known is None:
                return super().render(task)
            left = timedelta(seconds=round(known))
            return Text(str(left), style="progress.remaining")

    console = Console(stderr=True)
    if (listener := _LISTENER.get()) is not None:
        return _told(console, listener)
    if not (console.is_terminal or console.is_jupyter):
        return _lines(console)
    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        *([TextColumn("{task.fields[unit]}")] if units else []),
        TimeElapsedColumn(),
        TextColumn("left"),
        Remaining(),
        console=console,
    )


def _silent(console: Any) -> type["Progress"]:
    """Make the base class of a `Progress` without a display, which calls `tell` at each step."""
    from rich.progress import Progress, TaskID

    class Silent(Progress, ABC):
        def __init__(self) -> None:
            super().__init__(console=console, disable=True)

        @abstractmethod
        def tell(self, task_id: TaskID, at_once: bool = False) -> None:
            """Report the state of a task; `at_once` even if it was reported lately."""

        def track(
            self,
            sequence: Iterable[Any],
            total: float | None = None,
            completed: int = 0,
            task_id: TaskID | None = None,
            description: str = "Working...",
            update_period: float = 0.1,
        ) -> Iterator[Any]:
            """Report every item; without a display, `Progress.track` reports the last one only."""
            if task_id is None:
                known = total if total is not None else length_hint(sequence) or None
                task_id = self.add_task(description, total=known)
            for item in sequence:
                yield item
                self.advance(task_id)

        def update(self, task_id: TaskID, *, at_once: bool = False, **fields: Any) -> None:
            super().update(task_id, **fields)
            self.tell(task_id, at_once)

        def advance(self, task_id: TaskID, advance: float = 1) -> None:
            super().advance(task_id, advance)
            self.tell(task_id)

    return Silent


def _told(console: Any, listener: Listener) -> "Progress":
    """Make a `Progress` that tells a listener."""
    silent: Any = _silent(console)

    class Told(silent):
        def add_task(self, description: str, *args: Any, **options: Any) -> Any:
            task_id = super().add_task(description, *args, **options)
            self.tell(task_id)
            return task_id

        def tell(self, task_id: Any, at_once: bool = False) -> None:
            task = self._tasks[task_id]
            unit, left = task.fields.get("unit", ""), task.fields.get("left")
            listener(
                Update(int(task_id), task.description, task.completed, task.total, unit, left)
            )

    return Told()


def _lines(console: Any) -> "Progress":
    """Make a `Progress` that prints lines."""
    from rich.progress import TaskID

    silent: Any = _silent(console)

    class Lines(silent):
        def __init__(self) -> None:
            super().__init__()
            # When, how much was done, and what was said of it.
            self._said: dict[TaskID, tuple[float, float, str]] = {}
            self._begun: dict[TaskID, float] = {}  # how much was done before this run

        def update(self, task_id: TaskID, *, at_once: bool = False, **fields: Any) -> None:
            self._begun.setdefault(task_id, self._tasks[task_id].completed)
            super().update(task_id, at_once=at_once, **fields)

        def tell(self, task_id: TaskID, at_once: bool = False) -> None:
            task, now = self._tasks[task_id], time.monotonic()
            when, done, words = self._said.get(task_id, (-EVERY, -1.0, ""))
            is_new = task.completed != done
            ends = is_new and task.total is not None and task.completed >= task.total
            # A task that says how much time is left may work beside what it counts.
            if not is_new and (task.description == words or "left" not in task.fields):
                return
            if not (ends or at_once or now - when >= EVERY):
                return
            self._said[task_id] = now, task.completed, task.description
            line = _line(task, min(self._begun.get(task_id, 0.0), task.completed))
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    return Lines()


def _line(task: Any, begun: float) -> str:
    """Format a task, as "cat.mp4 3/50 steps, 0:00:12, left 0:03:08".

    Args:
        begun: amount that was done before the clock started.
    """
    total = "?" if task.total is None else f"{task.total:g}"
    unit = task.fields.get("unit", "")
    line = f"{task.description} {task.completed:g}/{total} {unit}".rstrip()
    elapsed = task.elapsed or 0.0
    line += f", {timedelta(seconds=round(elapsed))}"
    if (known := task.fields.get("left")) is not None:
        return f"{line}, left {timedelta(seconds=round(known))}" if known else line
    if task.total is None or task.completed <= begun or task.completed >= task.total:
        return line
    left = elapsed / (task.completed - begun) * (task.total - task.completed)
    return f"{line}, left {timedelta(seconds=round(left))}"


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on stderr what the next seconds are spent on, with a clock where there is a terminal."""
    if (listener := _LISTENER.get()) is not None:
        listener(Update(-1, what))
        yield
        return
    with needed_for("a progress bar", extra="video"):
        from rich.console import Console
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        console.print(what, highlight=False, markup=False, soft_wrap=True)
        yield
        return
    with console.status(what):
        yield


def steps_bar() -> "Progress":
    """Make a bar for `ticker`."""
    return progress_bar(units=True)


def ticker(bar: "Progress", label: str, unit: str = "steps") -> Tick:
    """Add a line to a `steps_bar`, which restarts for each part of a video denoised in parts."""
    task = bar.add_task(label, total=None, unit=unit)
    before = 0

    def tick(done: int, total: int) -> None:
        nonlocal before
        if done <= before:
            bar.reset(task)
        bar.update(task, completed=done, total=total)
        before = done

    return tick


def counted(chunks: Iterable[np.ndarray], tick: Tick, total: int) -> Iterator[np.ndarray]:
    """Yield `chunks`, and report the frames passed so far to `tick`."""
    done = 0
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        tick(done, total)


def stage_ticker(bar: "Progress") -> Callable[[str, int, int], None]:
    """Add a line to a `progress_bar` for each stage that is reported, of what is done and its
    total."""
    tasks: dict[str, Any] = {}

    def tick(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done, total=total)

    return tick
