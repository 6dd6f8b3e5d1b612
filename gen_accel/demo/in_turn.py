"""Jobs that take turns on one machine, so that whatever else runs there slows them alike."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any


class JobCancelled(BaseException):
    """A job is to end, since another one failed. No job catches it: it is no `Exception`."""


class Turn:
    """The turns of one job.

    Attributes:
        seconds: length of each turn that has ended. Waiting for others does not count.
    """

    def __init__(self, table: "_Table") -> None:
        self.seconds: list[float] = []
        self._table = table
        self._since = 0.0

    def end(self) -> None:
        """End this turn, and return when all other jobs have had theirs."""
        self._stop()
        self._table.pass_on(self)
        self._begin()

    def _begin(self) -> None:
        self._table.wait_for(self)
        self._since = time.perf_counter()

    def _stop(self) -> None:
        self.seconds.append(time.perf_counter() - self._since)


def in_turn(jobs: Sequence[Callable[[Turn], Any]]) -> list[Any]:
    """Run jobs in threads of their own, one turn of each after the other.

    A job calls `Turn.end` as often as it likes, and its last turn ends when it returns.

    Returns:
        What the jobs returned, in their order.

    Raises:
        The first error of a job; the other jobs end at the end of their turn.
    """
    table = _Table()
    turns = [table.join() for _ in jobs]
    made: list[Any] = [None] * len(jobs)

    def run(i: int) -> None:
        try:
            with suppress(JobCancelled):
                turns[i]._begin()
                made[i] = jobs[i](turns[i])
                turns[i]._stop()
        except BaseException as error:
            table.fail(error)
        finally:
            table.leave(turns[i])

    started: list[threading.Thread] = []
    try:
        for i in range(len(jobs)):
            thread = threading.Thread(target=run, args=(i,), daemon=True)
            thread.start()
            started.append(thread)
        for thread in started:
            while thread.is_alive():  # a wait without an end may hold signals back
                thread.join(0.5)
    except BaseException as error:  # Ctrl-C reaches this thread only
        table.fail(error)
        for thread in started:  # they use what the caller will take away
            thread.join()
        raise
    if table.failure is not None:
        raise table.failure
    return made


class _Table:
    """Line of jobs; the first has its turn."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self._line: deque[Turn] = deque()
        self._moved = threading.Condition()

    def join(self) -> Turn:
        turn = Turn(self)
        self._line.append(turn)
        return turn

    def wait_for(self, turn: Turn) -> None:
        with self._moved:
            self._moved.wait_for(lambda: self.failure is not None or self._line[0] is turn)
            if self.failure is not None:
                raise JobCancelled

    def pass_on(self, turn: Turn) -> None:
        with self._moved:
            self._line.remove(turn)
            self._line.append(turn)
            self._moved.notify_all()

    def leave(self, turn: Turn) -> None:
        with self._moved:
            self._line.remove(turn)
            self._moved.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._moved:
            if self.failure is None:
                self.failure = error
            self._moved.notify_all()
