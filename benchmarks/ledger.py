"""Lines of a long run: each with a cap of its own, written down as soon as it is there.

Knows nothing of what is measured. A line that fails is recorded and the run goes on; what a run
that was cut off had is kept, and taken up by the next one on the same machine and source.
"""

import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from gen_accel.io import write_json

DONE, FAILED, REFUSED, SKIPPED, RUNNING = "done", "failed", "refused", "skipped", "running"
TRIES = 2  # of a line that failed, or during which the process ended
GRACE = 60.0  # seconds beyond its cap, after which a line is stuck where Python does not run
TRACE = 4000  # characters of a traceback that are kept


class Kind(NamedTuple):
    """What a parity holds and a timing depends on.

    Args:
        dtype: a short name, such as "bf16".
        dim: of a head.
        rule: "none", "windows", "route" or "gain"; or a rest, around each
            "query" or "key", or of the "second" order.
        backward: gradients too.
    """

    kernel: str
    dtype: str
    dim: int
    rule: str
    backward: bool


class Line(NamedTuple):
    """One thing to measure.

    Args:
        name: by which the line is known, within its stage.
        cap: seconds, after which it is ended.
        run: returns what goes into the file; "says" is printed, no more.
        needs: the kinds that have to be right for it to mean anything.
        holds: what it is the parity of, if it is one.
    """

    name: str
    cap: float
    run: Callable[[], dict[str, Any]]
    needs: Callable[[], Sequence[Kind]] = tuple
    holds: Kind | None = None


class Stage(NamedTuple):
    """Lines that share a cap, in seconds. They are made when their turn comes."""

    name: str
    cap: float
    lines: Callable[[], Iterable[Line]]


class Failed(Exception):
    """What a line found wrong.

    Args:
        fails: of a parity, "output", or "gradient" where the output is right.
        result: figures for the file.
    """

    def __init__(self, reason: str, *, fails: str = "", **result: Any) -> None:
        super().__init__(reason)
        self.fails, self.result = fails, result


class Skipped(Exception):
    """Why a line cannot be measured here."""


class _Refused(Exception):
    """A parity that the line needs has failed."""


class OverCap(BaseException):
    """A line took longer than it may. No Exception, so that nobody else's handler takes it."""


class DeviceLost(Exception):
    """Nothing more can run in this process."""


@contextmanager
def capped(seconds: float) -> Iterator[None]:
    """Raise OverCap in the block after so many seconds, as soon as Python runs again.

    If there are no alarms (Windows) it is never raised.
    """
    if sys.platform == "win32":
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise OverCap(f"over its cap of {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Ledger:
    """The lines of one run and the file that they stand in.

    Args:
        path: of the JSON file, written again with every line.
        made_on: what figures depend on: card, versions, revision of the source.
        seconds: the budget of the run.
        recover: called after a failure; says why nothing more can run, or "".
        stuck: called from another thread when a line is; has to end the process.
        say: prints, with `end=`.
    """

    def __init__(
        self,
        path: Path,
        made_on: dict[str, Any],
        seconds: float,
        *,
        recover: Callable[[], str] = lambda: "",
        stuck: Callable[[], None] = lambda: None,
        say: Callable[..., None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.made_on, self.seconds = path, made_on, seconds
        self.records: dict[tuple[str, str], dict[str, Any]] = {}
        self.taken_up = 0
        self._given_up: set[tuple[str, str]] = set()
        self._recover, self._stuck, self._say, self._clock = recover, stuck, say, clock
        self._start = clock()

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.seconds - (self._clock() - self._start)

    def take_up(self, *, again: bool = True) -> str:
        """Keep the lines that an earlier run wrote to the file, and say how many, or why none.

        Args:
            again: try those that failed, or went over their caps, TRIES times in all.
        """
        if not self.path.exists():
            return f"nothing to resume: {self.path} is not there"
        try:
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            made_on, lines = earlier["made_on"], earlier["lines"]
        except (json.JSONDecodeError, KeyError, TypeError):
            return f"nothing to resume: {self.path} holds no such run"
        other = [
            f"{key} {made_on.get(key)}, here {value}"
            for key, value in self.made_on.items()
            if made_on.get(key) != value
        ]
        if other:
            return f"starts afresh, as the file was made with {'; '.join(other)}"
        for record in lines:
            self._keep(record, again)
        self.taken_up = sum(map(self._is_over, self.records))
        return f"resumes after {self.taken_up} lines"

    def _is_over(self, name: tuple[str, str]) -> bool:
        """Whether this run need not do a line."""
        return name in self._given_up or self.records.get(name, {}).get("status") == DONE

    def _keep(self, record: dict[str, Any], again: bool) -> None:
        if record["status"] == RUNNING:
            tries = record["tries"]
            record = {**record, "status": SKIPPED, "reason": "the process ended during it"}
            if tries >= TRIES:
                record |= {
                    "status": FAILED,
                    "reason": f"the process ended during it {tries} times",
                }
        name = record["stage"], record["name"]
        self.records[name] = record
        if record["status"] == FAILED and (not again or record.get("tries", 1) >= TRIES):
            self._given_up.add(name)

    def run(self, stages: Iterable[Stage]) -> None:
        """All lines in turn.

        Raises:
            KeyboardInterrupt: with the line that ran marked as skipped.
            DeviceLost: after a line that left the device useless; the next process goes on.
        """
        for stage in stages:
            end = self._clock() + stage.cap
            for line in _lines(stage):
                if not self._is_over((stage.name, line.name)):
                    self._one(stage, line, end - self._clock())

    def _one(self, stage: Stage, line: Line, of_stage: float) -> None:
        started = f"[{self.seconds - self.left:6.1f} s] {stage.name}: {line.name}: "
        if reason := self._too_little(line, of_stage):
            self._record(stage, line, SKIPPED, 0.0, {"reason": reason})
            self._say(started + reason)
            return
        tries = self.records.get((stage.name, line.name), {}).get("tries", 0)
        self._record(stage, line, RUNNING, 0.0, {"tries": tries + 1})
        self._say(started, end="")
        start = self._clock()
        said = ""
        try:
            with self._watched(stage, line), capped(line.cap):
                self._check_needs(line)
                result = line.run()
            said = result.pop("says", "")
            found = {"status": DONE, "result": result}
        except KeyboardInterrupt:
            self._say("interrupted")
            self._record(stage, line, SKIPPED, self._clock() - start, {"reason": "interrupted"})
            raise
        except Skipped as error:
            found = {"status": SKIPPED, "reason": str(error)}
        except _Refused as error:
            found = {"status": REFUSED, "reason": str(error)}
        except (Exception, OverCap) as error:
            found = _failure(error)
        seconds = self._clock() - start
        said = said or found.get("reason", "")
        self._say(f"{seconds:.1f} s, {found['status']}{', ' if said else ''}{said}")
        self._record(stage, line, found.pop("status"), seconds, found | {"tries": tries + 1})
        lost = self._recover() if "trace" in found else ""
        if lost:
            raise DeviceLost(lost)

    def _too_little(self, line: Line, of_stage: float) -> str:
        """Say that a line may take longer than is left; empty if it may not."""
        for left, whose in ((of_stage, "stage"), (self.left, "run")):
            if left < line.cap:
                return f"may take {line.cap:.3g} s, {max(left, 0):.3g} s of the {whose} are left"
        return ""

    @contextmanager
    def _watched(self, stage: Stage, line: Line) -> Iterator[None]:
        """Give a line up that no alarm ends, as a kernel that never comes back."""

        def give_up() -> None:
            reason = f"stuck {GRACE:.3g} s after its cap"
            self._record(stage, line, FAILED, line.cap + GRACE, {"reason": reason})
            self._stuck()

        watch = threading.Timer(line.cap + GRACE, give_up)
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()

    def _check_needs(self, line: Line) -> None:
        if any("fails" in record for record in self._all()):  # asking for needs costs time
            reason = next(filter(None, map(self.refusal, line.needs())), "")
            if reason:
                raise _Refused(reason)

    def refusal(self, kind: Kind) -> str:
        """Which parity speaks against timing this; empty where none does.

        A kernel whose gradient alone is wrong may be timed forward.
        """
        for record in self._all():
            if record["status"] != FAILED or "fails" not in record:
                continue
            held = Kind(**record["holds"])
            if held[:4] == kind[:4] and (record["fails"] == "output" or kind.backward):
                return f"not timed: {record['reason']}"
        return ""

    def _all(self) -> Iterable[dict[str, Any]]:
        return self.records.values()

    def _record(
        self, stage: Stage, line: Line, status: str, seconds: float, found: dict[str, Any]
    ) -> None:
        record = {"stage": stage.name, "name": line.name, "status": status, "seconds": seconds}
        if line.holds is not None:
            record["holds"] = line.holds._asdict()
        self.records[stage.name, line.name] = record | found
        try:
            self.write()
        except TypeError as error:  # something that JSON does not know
            reason = f"{error}, in {found!r}"[:TRACE]
            self.records[stage.name, line.name] = record | {"status": FAILED, "reason": reason}
            self.write()

    def write(self) -> None:
        write_json(self.path, {"made_on": self.made_on, "lines": [*self._all()]})

    def table(self) -> str:
        """Lines by stage and status, the failed ones with their reasons, and how many."""
        stages = list(dict.fromkeys(record["stage"] for record in self._all()))
        statuses = (DONE, FAILED, REFUSED, SKIPPED)
        rows = [f"{'stage':<34}" + "".join(f"{status:>9}" for status in statuses) + f"{'s':>9}"]
        for stage in stages:
            own = [record for record in self._all() if record["stage"] == stage]
            counts = [sum(record["status"] == status for record in own) for status in statuses]
            taken = sum(record["seconds"] for record in own)
            rows.append(f"{stage:<34}" + "".join(f"{n:>9}" for n in counts) + f"{taken:>9.1f}")
        failed = [record for record in self._all() if record["status"] == FAILED]
        rows += [f"{one['stage']}: {one['name']}: {one['reason']}" for one in failed]
        return "\n".join([*rows, f"{len(failed)} lines failed"])


def _lines(stage: Stage) -> Iterator[Line]:
    """Those of a stage; what goes wrong in making them is a line that fails."""
    made: Iterator[Line] | None = None
    while True:
        try:
            made = iter(stage.lines()) if made is None else made
            line = next(made)
        except StopIteration:
            return
        except Exception as error:
            line, made = Line("making its lines", 1.0, _raising(error)), iter(())
        yield line


def _raising(error: Exception) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        raise error

    return run


def _failure(error: BaseException) -> dict[str, Any]:
    """With the last line of the traceback, and its end."""
    if isinstance(error, Failed):
        fails = {"fails": error.fails} if error.fails else {}
        return {"status": FAILED, "reason": str(error), **fails, "result": error.result}
    trace = "".join(traceback.format_exception(error)).strip()
    last = str(error) if isinstance(error, OverCap) else trace.splitlines()[-1]
    return {"status": FAILED, "reason": last, "trace": trace[-TRACE:]}
