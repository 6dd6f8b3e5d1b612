"""Progress on stderr: bars with the remaining time, or occasional lines without a terminal, as in
the log of a job. A program that shows it otherwise is told of each step by `heard_by`."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, pairwise
from operator import length_hint
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from gen_accel.registry import needed_for

if TYPE_CHECKING:
    import rich.progress
    from rich.console import Console
    from typing_extensions import Self

Item = TypeVar("Item")
Tick = Callable[[int, int], None]  # takes the number of steps or frames done, and their total

EVERY = 10.0  # seconds between two lines of a task
PERCENT = "%"  # unit of a task that has parts
EARLY = 0.02  # share below which a forecast knows the remaining time better than the speed


class Update(NamedTuple):
    """State of a task.

    Args:
        task: number in its bar; -1 for work without one.
        words: name of the work.
        done, total: steps, frames or whatever `unit` says; a total of None is not known.
        left: remaining seconds, if the task itself knows them.
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


class Progress:
    """Bars on a terminal; elsewhere a line of a task at its first step, every ten seconds and at
    its end, or an update of each step to a listener."""

    def __init__(self) -> None:
        console, self._listener = _console(), _LISTENER.get()
        is_live = console.is_terminal or console.is_jupyter
        self._bars = _bars(console, shown=is_live and self._listener is None)

    def __enter__(self) -> "Self":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def add_task(
        self,
        description: str,
        total: float | None = None,
        *,
        completed: float = 0,
        unit: str = "",
        left: float | None = None,
    ) -> int:
        """Add a task, and return its number.

        Args:
            completed: amount that was done before its clock starts.
            left: see `Update`.
        """
        # Of a task with parts, a line is told by `Parted` as it begins.
        told = (self._bars.get_time() if unit == PERCENT else -EVERY, -1.0, "")
        fields = {"unit": unit, "left": left, "begun": completed, "told": told}
        task = self._bars.add_task(description, total=total, completed=int(completed), **fields)
        self._tell(task)
        return task

    def update(
        self,
        task: int,
        *,
        completed: float,
        total: float | None = None,
        description: str = "",
        left: float | None = None,
        at_once: bool = False,
    ) -> None:
        """Take the state of a task; less done than before begins it again.

        Args:
            total, description: those of before if they are not given.
            at_once: print a line even if the last one is not ten seconds old.
        """
        place, one = self._bars.task_ids[task], self._bars.tasks[task]
        if completed < one.completed:
            self._bars.reset(place)
            one.fields["begun"] = 0
        words = description or None
        self._bars.update(place, completed=completed, total=total, description=words, left=left)
        self._tell(task)
        if self._listener is None and self._bars.disable:
            self._print(one, at_once)

    def parted(self) -> "Part":
        """Add a task that has parts, and return the whole of it."""
        whole = _Parted(self, self.add_task("", 100, unit=PERCENT), time.monotonic())
        return Part(whole, 0.0, 1.0)

    def say(self, line: str) -> None:
        """Print a line above the bars; a listener is told of the tasks alone."""
        if self._listener is None:
            self._bars.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def track(
        self, items: Iterable[Item], *, total: float | None = None, description: str = ""
    ) -> Iterator[Item]:
        """Yield items, each of which is a step of a new task."""
        known = length_hint(items) if total is None else total
        task = self.add_task(description, known or None)
        for done, item in enumerate(items, 1):
            yield item
            self.update(task, completed=done)

    def _tell(self, task: int) -> None:
        if self._listener is not None:
            one = self._bars.tasks[task]
            unit, left = one.fields["unit"], one.fields["left"]
            self._listener(Update(task, one.description, one.completed, one.total, unit, left))

    def _print(self, task: "rich.progress.Task", at_once: bool) -> None:
        """Print a line, as "clips 3/50, 0:00:12, left 0:03:08", if one is due."""
        words, done, total = task.description, task.completed, task.total
        now, (when, before, told) = task.get_time(), task.fields["told"]
        ends = done != before and total is not None and done >= total
        if (done, words) == (before, told) or not (ends or at_once or now - when >= EVERY):
            return
        task.fields["told"] = now, done, words
        spent, left, begun = task.elapsed or 0.0, task.fields["left"], task.fields["begun"]
        parted = task.fields["unit"] == PERCENT or "," in words
        line = f"{words}{',' * parted} {_amount(task)}"
        line += f", {_seconds(spent)}"
        if left is None and total is not None and begun < done < total:
            left = spent / (done - begun) * (total - done)
        if left:
            line += f", left {_seconds(left)}"
        self._bars.console.print(line, highlight=False, markup=False, soft_wrap=True)


@dataclass
class _Parted:
    """A task with parts.

    Args:
        began: seconds of a clock that never goes back.
        expected: seconds that it is forecast to take; None if unknown.
    """

    bar: Progress
    task: int
    began: float
    expected: float | None = None

    def show(self, words: str, share: float, *, at_once: bool) -> None:
        spent, left = time.monotonic() - self.began, None
        if self.expected is not None and share < EARLY:
            left = max(1.0, self.expected * (1 - share))
        elif EARLY / 2 <= share < 1:  # at the end nobody knows how long a file takes to close
            left = max(1.0, spent * (1 - share) / share)
        self.bar.update(
            self.task, completed=100 * share, description=words, left=left, at_once=at_once
        )


@dataclass(frozen=True)
class Part:
    """Part of a task, from one share of the whole to another. The parts of a task have one bar and
    one remaining time.

    Args:
        label: begins the words.
    """

    whole: _Parted
    begin: float
    end: float
    label: str = ""

    def parts(self, *weights: float, labels: Iterable[str] = ()) -> "list[Part]":
        """Divide it.

        Args:
            weights: seconds that each is thought to take, or any other unit.
            labels: of each, behind the label of this one.
        """
        width, total = self.end - self.begin, sum(weights)
        before = accumulate(weights[:-1], initial=0.0)
        ends = [*(self.begin + width * one / total for one in before), self.end]
        words = [", ".join(filter(None, (self.label, label))) for label in labels]
        words = words or [self.label] * len(weights)
        return [
            Part(self.whole, *bounds, label)
            for bounds, label in zip(pairwise(ends), words, strict=True)
        ]

    def expect(self, seconds: float | None) -> None:
        """Take the seconds that this part is forecast to take; None if they are unknown."""
        width = self.end - self.begin
        self.whole.expected = None if seconds is None else seconds / width

    def show(self, words: str, share: float = 0.0, *, at_once: bool = False) -> None:
        """Show what is done, and the share of this part that is done."""
        told = ", ".join(filter(None, (self.label, words)))
        at = self.begin + (self.end - self.begin) * min(share, 1.0)
        self.whole.show(told, at, at_once=at_once)

    def ticker(self, words: str) -> Tick:
        """Show that this part begins, and return what takes its frames."""
        self.show(words)
        return lambda done, total: self.show(words, done / total)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on stderr what the next seconds are spent on, with a moving bar on a terminal."""
    console, clock = _console(), nullcontext()
    if (listener := _LISTENER.get()) is not None:
        listener(Update(-1, what))
    elif console.is_terminal and not console.is_jupyter:  # whose streams cannot be redirected
        clock = _bars(console, shown=True, transient=True)
        clock.add_task(what, total=None, unit="", left=None)
    else:
        console.print(what, highlight=False, markup=False, soft_wrap=True)
    with clock:
        yield


def ticker(bar: Progress, label: str, unit: str = "steps") -> Tick:
    """Add a task, and return what takes its steps."""
    task = bar.add_task(label, unit=unit)
    return lambda done, total: bar.update(task, completed=done, total=total)


def counted(chunks: Iterable[np.ndarray], tick: Tick, total: int) -> Iterator[np.ndarray]:
    """Yield `chunks`, and report the frames passed so far to `tick`."""
    done = 0
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        tick(done, total)


def _seconds(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _amount(task: "rich.progress.Task") -> str:
    """Write how much is done: "3/50 steps", "6 %"; nothing of a task without a total or unit."""
    done, total, unit = task.completed, task.total, task.fields["unit"]
    if unit == PERCENT:
        return f"{int(done)} %"
    whole = "?" if total is None else f"{total:g}"
    return "" if total is None and not (done or unit) else f"{done:g}/{whole} {unit}".rstrip()


def _console() -> "Console":
    with needed_for("a progress bar", extra="video"):
        from rich.console import Console
    return Console(stderr=True)


def _bars(console: "Console", *, shown: bool, transient: bool = False) -> "rich.progress.Progress":
    from rich import progress
    from rich.text import Text

    class Amount(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            return Text(_amount(task), "progress.download")

    class Remaining(progress.TimeRemainingColumn):
        def render(self, task: progress.Task) -> Text:
            left = task.fields["left"]
            if left is None and (task.total is None or task.time_remaining is None):
                return Text()
            told = super().render(task).plain if left is None else _seconds(left)
            return Text(f"left {told}", "progress.remaining")

    return progress.Progress(
        progress.TextColumn("{task.description:<8}"),
        progress.BarColumn(),
        Amount(),
        progress.TimeElapsedColumn(),
        Remaining(),
        console=console,
        transient=transient,
        # A display of Jupyter flushes the streams, and so would begin itself again.
        redirect_stdout=not console.is_jupyter,
        redirect_stderr=not console.is_jupyter,
        disable=not shown,
    )
