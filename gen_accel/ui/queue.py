"""Queue of the page: jobs one at a time in a worker process, in the order that they came.

Each job has a folder of its own with its record, `job.json`.
"""

import math
import os
import shutil
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from secrets import token_hex
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from gen_accel.cli.app import INTERRUPTED as EXIT_OF_CTRL_C
from gen_accel.io import clear_partial, write_json
from gen_accel.parsing import fits, is_whole, shown, written_type
from gen_accel.paths import ABOUT, CHUNKS, FILM
from gen_accel.pipelines.generation.progress import Update
from gen_accel.process import locked, taken
from gen_accel.ui.files import WRITTEN
from gen_accel.ui.worker import (
    COMMAND,
    NotStarted,
    Options,
    Values,
    WorkerDied,
    WorkerProcess,
    arguments,
    command_of,
    time_to_end,
)

Given = str | Path | Sequence[str | Path] | None

RECORD, GIVEN = "job.json", "given"  # a file and a folder in the folder of each job
PASSING = ("tmp*", ".asked-*")  # folders of requests, which go with them
HERE = "{job}"  # in options, the folder of the job

State = Literal["waiting", "running", "done", "failed", "stopped", "interrupted"]
WAITING, RUNNING, DONE = "waiting", "running", "done"
FAILED, STOPPED, INTERRUPTED = "failed", "stopped", "interrupted"
ENDED = "the server ended while this ran: queue it again"
# Seconds that a job has to end before it is killed, after a stop and after the server's end; a
# training has more.
GRACE, CLOSING = 60.0, 10.0
MOST_NOTES = 20  # lines that a job says beside, of which the last are kept
LOCK = "worker.lock"  # in the output folder; held by the worker too
STILL = "a job of an earlier server still ends: the queue goes on after it"
# Options that the seconds of a job depend on most.
SIZE = ("model", "frames", "seconds", "height", "width", "steps", "method", "compare")
NOTHING_YET = Update(-1, "")
# Seconds between two marks, by the time of its record, that a job still runs: a server that is
# killed writes no end.
BEAT = 1.0
MOST_RECORD = 8 << 20  # bytes of a record: a verb says at most a million characters
DEEPEST = 20  # levels of the values in a record
MADE = r"^[0-9]{8}-[0-9]{6}-[0-9a-f]{6}$"  # id of a job: when it was made, and 24 random bits


def _plain(value: Values) -> Values:
    """Refuse values that no answer of a server can hold."""
    left: list[tuple[object, int]] = [(value, 0)]
    while left:
        one, depth = left.pop()
        if depth > DEEPEST:
            raise ValueError(f"values must be nested {DEEPEST} levels deep at most")
        if isinstance(one, dict | list):
            inner = one.values() if isinstance(one, dict) else one
            left += [(item, depth + 1) for item in inner]
        elif (isinstance(one, float) and not math.isfinite(one)) or (
            type(one) is int and not is_whole(one)
        ):
            raise ValueError("numbers must be finite, and whole ones below 2**63")
    return value


Held = Annotated[Values, AfterValidator(_plain)]
# Seconds since the epoch, up to the year 9999.
Moment = Annotated[float, Field(ge=0, lt=253402300800)]


@dataclass(frozen=True)
class QueuedJob:
    """A verb with its options, and what became of it.

    Args:
        verb, options: as on the command line, by the names that a file of --config has.
        title: what a person knows it by, such as the prompt.
        tab: the tab of a browser that it came from; "" for none.
        kind: the screen or interface that it came from.
        about: whatever who submitted it wants to find again.
        made, started, ended: in seconds since the epoch; None: not yet.
        error: one sentence; "" for none.
        said: what the verb printed.
        notes: lines that it said beside, such as warnings.
        progress: of a running job; not kept on disk.
    """

    id: Annotated[str, Field(pattern=MADE)]
    verb: str
    options: Held
    title: str = ""
    tab: str = ""
    kind: str = ""
    about: Held = field(default_factory=dict)
    state: State = WAITING
    made: Moment = 0.0
    started: Moment | None = None
    ended: Moment | None = None
    error: str = ""
    said: str = ""
    notes: tuple[str, ...] = ()
    progress: Update = NOTHING_YET

    @property
    def is_live(self) -> bool:
        return self.state in (WAITING, RUNNING)

    @property
    def seconds(self) -> float | None:
        """Seconds that it has run for; None before it began."""
        if self.started is None:
            return None
        return (time.time() if self.ended is None else self.ended) - self.started

    @property
    def share(self) -> float | None:
        """Share of the progress that is done, 0 to 1; None if not known."""
        total = self.progress.total
        return min(self.progress.done / total, 1.0) if total else None

    @cached_property
    def size(self) -> tuple[str, ...]:
        """Verb and options that its seconds depend on most."""
        return (self.verb, *(str(self.options.get(name)) for name in SIZE))


class Outlook(NamedTuple):
    """Number of jobs before a live one, the running one among them, and the seconds until it ends,
    None if not known."""

    before: int = 0
    left: float | None = None


_RECORDS = TypeAdapter(QueuedJob)


class Queue:
    """Jobs of one output folder, each in a folder of its own.

    A job that ends well, fails or is stopped lets the next begin. State that changes is held
    under a lock, and jobs are handed out as frozen snapshots.

    Args:
        folder: made if missing.
        command: starts the worker process.
        check: refuses, by a ValueError, a verb with options that this server does not run.
        grace: see `GRACE`.

    Raises:
        OSError: the folder cannot be made.
        BlockingIOError: another server has the folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        command: Sequence[str] = COMMAND,
        check: Callable[[str, Options], None] = lambda verb, options: None,
        grace: float = GRACE,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        self._check, self._grace = check, grace
        self._lock = locked(self.folder)
        self._lock.__enter__()
        self._changed = threading.Condition()
        self._jobs = {job.id: job for job in self._read()}
        self._stopped: set[str] = set()
        self._closed = False
        self.trouble = ""  # why the queue is not on disk as it is here; one sentence
        self.worker = WorkerProcess(self.folder / "worker.log", command)
        for left in (one for pattern in PASSING for one in self.folder.glob(pattern)):
            if left.is_dir() and not left.is_symlink():  # what requests of a killed server left
                _remove(left)
        self._broken = [job for job in self._jobs.values() if job.state == INTERRUPTED]
        for job in self._broken:
            self._save(job)
        if not self._is_alone():
            self.trouble = STILL
        self._thread = threading.Thread(target=self._serve, name="queue", daemon=True)

    def start(self) -> None:
        """Begin to run jobs, and start the worker."""
        self._thread.start()

    def close(self) -> None:
        """Stop what runs, and end the worker. A running job is interrupted, at Ctrl-C at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        try:
            self.worker.close(time_to_end(self.running, CLOSING))
        finally:
            if self._thread.is_alive():
                self._thread.join()
            if (file := self.worker.lock) is not None:
                file.close()
                self.worker.lock = None
            self._lock.__exit__(None, None, None)

    @property
    def running(self) -> str:
        """Verb of the job that runs; "" for none."""
        return next((job.verb for job in self.jobs() if job.state == RUNNING), "")

    def place(self, job: QueuedJob | str) -> Path:
        """Folder of a job."""
        return self.folder / (job if isinstance(job, str) else job.id)

    def files(self, job: QueuedJob) -> list[Path]:
        """Files that a job made, by name, without its record and half-written ones."""
        place = self.place(job)
        found = (
            Path(folder, name)
            for folder, _, names in os.walk(place)  # which passes over folders that go meanwhile
            if GIVEN not in Path(folder).relative_to(place).parts[:1]
            for name in names
            if name != RECORD and not name.startswith(".")
        )
        return sorted(file for file in found if file.is_file())

    def write(self, job: QueuedJob) -> None:
        """Write the record of a job; raises OSError, as on a full disk."""
        held = _RECORDS.dump_python(job, mode="json", exclude={"progress"})
        write_json(self.place(job) / RECORD, held)

    def submit(
        self,
        verb: str,
        options: Options,
        *,
        title: str = "",
        tab: str = "",
        kind: str = "",
        about: Options | None = None,
        given: Mapping[str, Given] | None = None,
    ) -> QueuedJob:
        """Add a job to the end of the queue.

        Args:
            options: as a file of --config holds them. "{job}" in one that names what is written,
                such as `out`, is the job's own folder.
            given: files by option, one or several, which are copied into the job's folder.

        Raises:
            ValueError: a verb or options that are unknown, or that this server does not run.
            OSError: a file that is not there, or no room for the job.
        """
        with self._new_folder() as place:
            told = dict(options)
            for name in {*WRITTEN} & {*told}:
                if isinstance(told[name], str):
                    told[name] = told[name].replace(HERE, str(place))
            told |= _copied(given or {}, place / GIVEN)
            arguments(verb, told)
            self._check(verb, told)
            job = QueuedJob(place.name, verb, told, title, tab, kind, dict(about or {}))
            return self._add(job)

    def again(self, name: str, *, tab: str = "") -> QueuedJob:
        """Queue a job once more, with the same options in a folder of its own.

        A training goes on at its newest checkpoint if it has one, and a stream after the chunks
        that are there.
        """
        job = self.job(name)
        with self._new_folder() as place:
            old = self.place(job)
            if (old / GIVEN).is_dir():
                shutil.copytree(old / GIVEN, place / GIVEN)
            options = {key: _moved(x, str(old), str(place)) for key, x in job.options.items()}
            if job.verb == "train":
                options["resume"] = _has_checkpoint(job)
            if (film := film_of(old)) is not None:
                chunks = film.parent
                shutil.copytree(
                    chunks, place / chunks.name, ignore=shutil.ignore_patterns(film.name)
                )
                options["resume"] = True
            about = job.title, tab or job.tab, job.kind, job.about
            return self._add(QueuedJob(place.name, job.verb, options, *about))

    def cancel(self, name: str) -> None:
        """Remove a waiting job; stop a running one.

        A job that has ended or was stopped already stays as it is: a training takes a second stop
        as one to end at once.
        """
        with self._changed:
            job = self._jobs.get(name)
            if job is None or not job.is_live or name in self._stopped:
                return
            if job.state == WAITING:
                self._forget(job)
                return
            self._stopped.add(name)
            self.worker.stop()
        timer = threading.Timer(time_to_end(job.verb, self._grace), self._kill, [name])
        timer.daemon = True
        timer.start()

    def remove(self, name: str) -> None:
        """Remove a job that has ended, with its files; cancel one that has not."""
        with self._changed:
            job = self._jobs.get(name)
            if job is not None and not job.is_live:
                self._forget(job)
                return
        self.cancel(name)

    def job(self, name: str) -> QueuedJob:
        """Return a job as it is now. Raises KeyError for an unknown name."""
        with self._changed:
            return self._jobs[name]

    def jobs(self) -> list[QueuedJob]:
        """Return all jobs as they are now, by age."""
        with self._changed:
            return [*self._jobs.values()]

    def note(self, name: str, line: str) -> None:
        """Add a line to the notes of a job. Raises KeyError for an unknown name."""
        with self._changed:
            job = self._jobs[name]
            self._jobs[name] = replace(job, notes=(*job.notes, line)[-MOST_NOTES:])

    def wait(self, name: str, seconds: float) -> QueuedJob:
        """Wait until a job has ended, or some seconds are over; the job as it is then.

        Raises:
            KeyError: there is none of that name, or it was removed meanwhile.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: name not in self._jobs or not self._jobs[name].is_live, seconds
            )
            return self._jobs[name]

    def outlook(self) -> dict[str, Outlook]:
        """Return what each live job waits for, by its id.

        Seconds are what the running job says of itself, and for each waiting one the median of
        the jobs of its verb and size that are done.
        """
        jobs = self.jobs()
        took = defaultdict[tuple[str, ...], list[float]](list)
        for job in jobs:
            if job.state == DONE and job.seconds is not None:
                took[job.size].append(job.seconds)
        usual = {size: median(seconds) for size, seconds in took.items()}
        found, total = dict[str, Outlook](), 0.0
        for job in filter(lambda job: job.is_live, jobs):
            left = job.progress.left if job.state == RUNNING else usual.get(job.size)
            total = None if total is None or left is None else total + left
            found[job.id] = Outlook(len(found), total)
        return found

    def _read(self) -> list[QueuedJob]:
        """Read the jobs by age. One that ran is interrupted; a record that breaks a rule is left
        out, with a warning."""
        found = []
        for record in sorted(self.folder.glob(f"*/{RECORD}")):
            try:
                job = _read(record)
                if job.state == RUNNING:
                    ended = record.stat().st_mtime
                    job = replace(job, state=INTERRUPTED, error=ENDED, ended=ended)
            except (OSError, ValueError) as error:
                warnings.warn(f"{record} is left out: {error}", stacklevel=2)
            else:
                found.append(job)
        return sorted(found, key=lambda job: (job.made, job.id))

    @contextmanager
    def _new_folder(self) -> Iterator[Path]:
        """Make the folder of a new job, which goes if the job cannot be added."""
        place = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{token_hex(3)}"
        place.mkdir(parents=True)
        try:
            yield place
        except BaseException:
            _remove(place)
            raise

    def _add(self, job: QueuedJob) -> QueuedJob:
        job = replace(job, made=time.time())
        self.write(job)
        with self._changed:
            self._jobs[job.id] = job
            self._changed.notify_all()
        return job

    def _is_alone(self) -> bool:
        """Whether no worker of an earlier server is left; if so, clear what it left half made.

        The worker of a killed server lives on for a while.
        """
        try:
            self.worker.lock = self.worker.lock or taken(self.folder / LOCK)
        except BlockingIOError:
            return False
        except OSError as error:
            warnings.warn(f"{LOCK} cannot be written: {error}", stacklevel=2)
        for job in self._broken:
            self._clear(job)
        return True

    def _serve(self) -> None:
        if self.trouble == STILL:
            with self._changed:
                while not self._closed and not self._is_alone():
                    self._changed.wait(0.5)
                self.trouble = ""
        with suppress(OSError):  # the first job says it
            self.worker.start()
        while (job := self._next()) is not None:
            self._run(job)

    def _next(self) -> QueuedJob | None:
        def waiting() -> QueuedJob | None:
            return next((job for job in self._jobs.values() if job.state == WAITING), None)

        with self._changed:
            self._changed.wait_for(lambda: self._closed or waiting() is not None)
            job = waiting()
            if self._closed or job is None:
                return None
            return self._change(job.id, state=RUNNING, started=time.time())

    def _run(self, job: QueuedJob) -> None:
        began: dict[int, tuple[float, float]] = {}  # of each task: when, and how much was done

        def listen(told: Update | str) -> None:
            if isinstance(told, str):
                self.note(job.id, told)
                return
            with self._changed:
                self._jobs[job.id] = replace(self._jobs[job.id], progress=_timed(told, began))
                self._changed.notify_all()

        code, error, said, over = -1, None, "", threading.Event()
        threading.Thread(target=self._mark, args=[job, over], daemon=True).start()
        try:
            self._check(job.verb, job.options)  # of a record, which any hand may have written
            line = arguments(job.verb, job.options)
            stopped = lambda: job.id in self._stopped  # noqa: E731
            code, error, said = self.worker.run(line, listen, stopped=stopped)
        except (WorkerDied, ValueError) as died:
            error = str(died)
            with self._changed:
                if isinstance(died, NotStarted) and self._closed and job.id not in self._stopped:
                    self._change(job.id, state=WAITING, started=None)
                    return
        finally:
            over.set()
        with self._changed:
            stopped, closed = job.id in self._stopped, self._closed
            self._stopped.add(job.id)  # so that a late stop does not reach the next job
        if code == 0:
            state, error = DONE, ""
        elif stopped:
            state, error = STOPPED, ""
        elif closed:
            state, error = INTERRUPTED, ENDED
        else:
            state = FAILED
            by_key = "interrupted" if code == EXIT_OF_CTRL_C else f"ended with status {code}"
            error = error or by_key
        if stopped and not closed:
            self.worker.retire()  # an interrupt may have left something half imported
            with suppress(OSError):  # the next job says it
                self.worker.start()
        if state != DONE:
            self._clear(job)
        with self._changed:
            about = {"state": state, "error": error, "said": said, "progress": NOTHING_YET}
            self._change(job.id, ended=time.time(), **about)
            self._stopped.discard(job.id)
            self._changed.notify_all()

    def _mark(self, job: QueuedJob, over: threading.Event) -> None:
        while not over.wait(BEAT):
            with suppress(OSError):
                os.utime(self.place(job) / RECORD)

    def _change(self, name: str, **changed: Any) -> QueuedJob:
        """Change a job and its record, under the lock."""
        job = self._jobs[name] = replace(self._jobs[name], **changed)
        self._save(job)
        return job

    def _save(self, job: QueuedJob) -> None:
        try:
            self.write(job)
            self.trouble = ""
        except OSError as error:
            self.trouble = f"the queue is not saved: {error}"

    def _forget(self, job: QueuedJob) -> None:
        """Remove a job with its files, under the lock."""
        del self._jobs[job.id]
        _remove(self.place(job))
        self._changed.notify_all()

    def _clear(self, job: QueuedJob) -> None:
        """Remove what a job made: all in its folder but its record, what it was given, and what a
        stream goes on from."""
        with suppress(OSError):  # files that stay harm no other job
            clear_partial(self.place(job))
            film = film_of(self.place(job))
            kept = (RECORD, GIVEN, *(() if film is None else (film.parent.name,)))
            for left in self.place(job).iterdir():
                if left.name not in kept:
                    _remove(left)

    def _kill(self, name: str) -> None:
        with self._changed:
            job = self._jobs.get(name)
            late = job is not None and job.state == RUNNING
        if late:
            self.worker.kill()


def _read(record: Path) -> QueuedJob:
    """Read a record, which any hand may have written.

    Raises:
        OSError: it cannot be read.
        ValueError: it breaks a rule: the sizes above, or the types of a job and of its options.
    """
    if not record.is_file():
        raise ValueError("a record must be a file")
    with record.open("rb") as file:
        data = file.read(MOST_RECORD + 1)
    if len(data) > MOST_RECORD:
        raise ValueError(f"a record must have {MOST_RECORD >> 20} MiB at most")
    try:
        job = _RECORDS.validate_json(data)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = ".".join(map(str, fault["loc"]))
        came = "" if fault["type"] in ("json_invalid", "value_error") else shown(fault["input"])
        said = f"{name}: {fault['msg']}" if name else fault["msg"]
        raise ValueError(f"{said}, got {came}" if came else said) from None
    if job.id != record.parent.name:
        raise ValueError(f"id must be the name of its folder, got {shown(job.id)}")
    known = command_of(job.verb).known
    for name, value in job.options.items():
        if name not in known or value is None or (known[name].joined and isinstance(value, str)):
            continue  # several values may be one text, as a file of --config has them
        if not fits(value, known[name].hint):
            raise ValueError(
                f"{name} must be {written_type(known[name].hint)}, got {shown(value)}"
            )
    return replace(job, progress=NOTHING_YET)


def _timed(update: Update, began: dict[int, tuple[float, float]]) -> Update:
    """Add the seconds that remain of a task, by its speed so far."""
    now, done, total = time.monotonic(), update.done, update.total
    when, before = began.setdefault(update.task, (now, done))
    if done < before:  # a video that is denoised in parts
        began[update.task] = when, before = now, done
    if update.left is not None or total is None or done <= before:
        return update
    return update._replace(left=(now - when) / (done - before) * (total - done))


def _has_checkpoint(job: QueuedJob) -> bool:
    """Whether the folder of a training has a checkpoint to go on from."""
    from gen_accel.lora import checkpoint
    from gen_accel.lora.trainer import CHECKPOINTS

    out = job.about.get("out") or job.options.get("out")
    return bool(isinstance(out, str) and checkpoint.found(Path(out) / CHECKPOINTS))


def film_of(place: Path) -> Path | None:
    """Return the film of the stream in the folder of a job, a file until the stream is whole; None
    if there is no stream to go on with."""
    found = next(place.glob(f"*{CHUNKS}/{ABOUT}"), None)
    return None if found is None else found.with_name(FILM)


def _moved(value: object, old: str, new: str) -> object:
    """Lead paths in a folder to another one."""
    if isinstance(value, list | tuple):
        return [_moved(one, old, new) for one in value]
    if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
        return new + value[len(old) :]
    return value


def _copied(given: Mapping[str, Given], folder: Path) -> dict[str, str | list[str]]:
    """Copy files into a folder, each under the name of its option; their new places."""
    found: dict[str, str | list[str]] = {}
    for name, files in given.items():
        if isinstance(files, str | Path):
            found[name] = _copy(files, folder, name)
        elif files:
            found[name] = [_copy(one, folder, f"{name}-{i}") for i, one in enumerate(files)]
    return found


def _copy(file: str | Path, folder: Path, name: str) -> str:
    folder.mkdir(exist_ok=True)
    target = folder / f"{name}{Path(file).suffix.lower()}"
    shutil.copyfile(file, target)
    return str(target)


def _remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
