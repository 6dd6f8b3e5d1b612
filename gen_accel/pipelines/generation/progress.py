"""Progress on stderr: bars with the time that remains, and what moves them on."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from gen_accel.extras import needed_for

if TYPE_CHECKING:
    from rich.progress import Progress

Tick = Callable[[int, int], None]  # is told how much is done, steps or frames, and of how many


def progress_bar(*, units: bool = False) -> "Progress":
    """A bar with the time that remains.

    Args:
        units: each task names what it counts, as in `bar.add_task("clip", unit="steps")`.
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
    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        *([TextColumn("{task.fields[unit]}")] if units else []),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def steps_bar() -> "Progress":
    """For `ticker`."""
    return progress_bar(units=True)


def ticker(bar: "Progress", label: str, unit: str = "steps") -> Tick:
    """A new line of a `steps_bar`, which starts again where a video is denoised in parts."""
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
    """`chunks`, and `tick` is told the frames that have passed."""
    done = 0
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        tick(done, total)
