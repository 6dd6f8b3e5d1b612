"""The queue: jobs one at a time, in a worker process, in the order that they came."""

import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from gen_accel.cli.app import INTERRUPTED as EXIT_OF_CTRL_C
from gen_accel.files import clear_partial
from gen_accel.locks import locked, taken
from gen_accel.ui.jobs import (
    DONE,
    ENDED,
    FAILED,
    GIVEN,
    HERE,
    INTERRUPTED,
    RUNNING,
    STOPPED,
    WAITING,
    Job,
    Progress,
    Store,
)
from gen_accel.ui.places import WRITTEN
from gen_accel.ui.process import COMMAND, Event, WorkerDied, WorkerProcess, time_to_end
from gen_accel.ui.verbs import arguments

Given = str | Path | Sequence[str | Path] | None

# Seconds that a job has to end, before it is killed, after it was stopped and after the server
# was; a training has more.
GRACE, CLOSING = 60.0, 10.0
MOST_NOTES = 20  # lines that a job says beside, of which the last are kept
LOCK = "worker.lock"  # in the output folder; held by the worker too
STILL = "a job of an earlier server still ends: the queue goes on after it"


class Queue:
    """Jobs of one output folder.

    A job that ends well, fails or is stopped leaves the next to begin. State that changes is held
    under a lock, and jobs are handed out as frozen snapshots.

    Args:
        folder: holds a folder for each job; see `jobs.Store`.
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
        check: Callable[[str, Mapping[str, Any]], None] = lambda verb, options: None,
        grace: float = GRACE,
    ) -> None:
        self.store = Store(folder)
        self._check, self._grace = check, grace
        self._lock = locked(self.store.folder)
        self._lock.__enter__()
        self._changed = threading.Condition()
        self._jobs = {job.id: job for job in self.store.read()}
        self._stopped: set[str] = set()
        self._closed = False
        self.trouble = ""  # why the queue is not on disk as it is here; one sentence
        self.worker = WorkerProcess(self.store.folder / "worker.log", command)
        self.store.sweep()
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
        """Stop what runs, and end the worker. A running job is interrupted. Ctrl-C in here ends it
        at once."""
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
        """Verb of the job that runs; "" where none does."""
        return next((job.verb for job in self.jobs() if job.state == RUNNING), "")

    def submit(
        self,
        verb: str,
        options: Mapping[str, Any],
        *,
        title: str = "",
        tab: str = "",
        kind: str = "",
        about: Mapping[str, Any] | None = None,
        given: Mapping[str, Given] | None = None,
    ) -> Job:
        """Add a job to the end of the queue.

        Args:
            options: as a file of --config holds them. "{job}" in one that names what is written,
                such as `out`, is the job's own folder.
            given: files by option, one or several, which are copied into the job's folder.

        Raises:
            ValueError: a verb or options that are unknown, or that this server does not run.
            OSError: a file that is not there, or no room for the job.
        """
        job = self.store.new(verb, {}, title=title, tab=tab, kind=kind, about=dict(about or {}))

        def own(place: Path) -> dict[str, Any]:
            told = {
                name: _placed(value, place) if name in WRITTEN else value
                for name, value in options.items()
            }
            told |= _copied(given or {}, place / GIVEN)
            arguments(verb, told)
            self._check(verb, told)
            return told

        return self._added(job, own)

    def again(self, name: str, *, tab: str = "") -> Job:
        """Queue a job anew, with the same options in a folder of its own. A training goes on at
        its newest checkpoint where it has one."""
        job = self.job(name)
        old = self.store.place(job)
        new = self.store.new(
            job.verb, {}, title=job.title, tab=tab or job.tab, kind=job.kind, about=job.about
        )

        def moved(place: Path) -> dict[str, Any]:
            if (old / GIVEN).is_dir():
                shutil.copytree(old / GIVEN, place / GIVEN)
            options = _moved(job.options, str(old), str(place))
            if job.verb == "train":
                options["resume"] = _has_checkpoint(job)
            return options

        return self._added(new, moved)

    def _added(self, job: Job, options_in: Callable[[Path], dict[str, Any]]) -> Job:
        """Queue a new job; its folder goes where that fails.

        Args:
            options_in: fills the job's folder, and returns the options that name it.
        """
        try:
            job = replace(job, options=options_in(self.store.place(job)))
            self.store.write(job)
        except BaseException:
            self.store.remove(job)
            raise
        with self._changed:
            self._jobs[job.id] = job
            self._changed.notify_all()
        return job

    def cancel(self, name: str) -> None:
        """Remove a waiting job; stop a running one. Of one that has ended or was stopped already,
        nothing changes: a training takes a second stop as one to end at once."""
        with self._changed:
            job = self._jobs.get(name)
            if job is None or not job.is_live or name in self._stopped:
                return
            if job.state == WAITING:
                del self._jobs[name]
                self.store.remove(job)
                self._changed.notify_all()
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
                del self._jobs[name]
                self.store.remove(job)
                self._changed.notify_all()
                return
        self.cancel(name)

    def job(self, name: str) -> Job:
        """Return a job as it is now. Raises KeyError where there is none of that name."""
        with self._changed:
            return self._jobs[name]

    def jobs(self) -> list[Job]:
        """Return all jobs as they are now, by age."""
        with self._changed:
            return [*self._jobs.values()]

    def wait(self, name: str, seconds: float) -> Job:
        """Wait until a job has ended, or some seconds are over; the job as it is then.

        Raises:
            KeyError: there is none of that name, or it was removed meanwhile.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: name not in self._jobs or not self._jobs[name].is_live, seconds
            )
            return self._jobs[name]

    def position(self, name: str) -> int:
        """Count the jobs before a waiting one, the running one among them."""
        live = [job.id for job in self.jobs() if job.is_live]
        return live.index(name) if name in live else 0

    def left(self, name: str) -> float | None:
        """Seconds until a live job ends, as far as they are known: what the running one says of
        itself, and for waiting ones how long such jobs took before."""
        live = [job for job in self.jobs() if job.is_live]
        total = 0.0
        for job in live:
            seconds = job.progress.left if job.state == RUNNING else self._usual(job)
            if seconds is None:
                return None
            total += seconds
            if job.id == name:
                return total
        return None

    def _usual(self, job: Job) -> float | None:
        took = [
            one.seconds
            for one in self.jobs()
            if one.state == DONE and one.verb == job.verb and _size(one) == _size(job)
        ]
        known = [seconds for seconds in took if seconds is not None]
        return median(known) if known else None

    def _is_alone(self) -> bool:
        """Whether no worker of an earlier server is left; if so, remove what it left half made.
        Where a server was killed, its worker lives on for a while."""
        try:
            self.worker.lock = taken(self.store.folder / LOCK)
        except BlockingIOError:
            return False
        except OSError as error:
            warnings.warn(f"{LOCK} cannot be written: {error}", stacklevel=2)
        for job in self._broken:
            self._clear(job)
        return True

    def _wait_for_earlier(self) -> None:
        self.worker.take()  # questions go to a process of their own meanwhile
        try:
            with self._changed:
                while not self._closed and not self._is_alone():
                    self._changed.wait(0.5)
                self.trouble = ""
            self.worker.retire()  # one that a question had started does not hold the lock
        finally:
            self.worker.give_back()

    def _serve(self) -> None:
        if self.trouble == STILL:
            self._wait_for_earlier()
        with suppress(OSError):  # the first job says it
            self.worker.start()
        while (job := self._next()) is not None:
            self._run(job)

    def _next(self) -> Job | None:
        def waiting() -> Job | None:
            return next((job for job in self._jobs.values() if job.state == WAITING), None)

        with self._changed:
            self._changed.wait_for(lambda: self._closed or waiting() is not None)
            job = waiting()
            if self._closed or job is None:
                return None
            return self._change(job.id, state=RUNNING, started=time.time())

    def _run(self, job: Job) -> None:
        self.worker.take()
        try:
            with self._changed:
                if self._closed and job.id not in self._stopped:  # while another had the worker
                    self._change(job.id, state=WAITING, started=None)
                    return
            code, error, said = self._ran(job)
            with self._changed:
                stopped, closed = job.id in self._stopped, self._closed
                self._stopped.discard(job.id)
            if stopped and not closed:
                self.worker.retire()  # an interrupt may have left something half imported
                with suppress(OSError):  # the next job says it
                    self.worker.start()
        finally:
            self.worker.give_back()
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
        if state != DONE:
            self._clear(job)
        with self._changed:
            self._change(
                job.id, state=state, ended=time.time(), error=error, said=said, progress=Progress()
            )
            self._changed.notify_all()

    def _ran(self, job: Job) -> tuple[int, str, str]:
        """Exit status of a job, its error, and what it printed."""
        try:
            self._check(job.verb, job.options)  # of a record, which any hand may have written
            ended = self.worker.run(
                arguments(job.verb, job.options),
                _Heard(self, job.id),
                stopped=lambda: job.id in self._stopped,
            )
        except (WorkerDied, ValueError) as error:
            return -1, str(error), ""
        return ended["code"], ended["error"] or "", ended["said"]

    def _change(self, name: str, **changed: Any) -> Job:
        """Change a job, and its record where more than the progress did; under the lock."""
        job = self._jobs[name] = replace(self._jobs[name], **changed)
        if {*changed} - {"progress"}:
            self._save(job)
        return job

    def _save(self, job: Job) -> None:
        try:
            self.store.write(job)
            self.trouble = ""
        except OSError as error:
            self.trouble = f"the queue is not saved: {error}"

    def _clear(self, job: Job) -> None:
        with suppress(OSError):  # files that stay harm no other job
            clear_partial(self.store.place(job))
            self.store.clear(job)

    def _kill(self, name: str) -> None:
        with self._changed:
            job = self._jobs.get(name)
            late = job is not None and job.state == RUNNING
        if late:
            self.worker.kill()


class _Heard:
    """Listener that keeps in the queue how a running job goes."""

    def __init__(self, queue: Queue, name: str) -> None:
        self._queue, self._name = queue, name
        self._began: dict[int, tuple[float, float]] = {}  # when, and how much was done then

    def __call__(self, event: Event) -> None:
        queue = self._queue
        with queue._changed:
            if "said" in event:
                notes = (*queue._jobs[self._name].notes, event["line"])[-MOST_NOTES:]
                queue._jobs[self._name] = replace(queue._jobs[self._name], notes=notes)
                return
            queue._change(self._name, progress=self._progress(event))
            queue._changed.notify_all()

    def _progress(self, event: Event) -> Progress:
        now, done, total = time.monotonic(), event["done"], event["total"]
        when, before = self._began.setdefault(event["task"], (now, done))
        if done < before:  # a video that is denoised in parts
            self._began[event["task"]] = when, before = now, done
        left = event["left"]
        if left is None and total is not None and done > before:
            left = (now - when) / (done - before) * (total - done)
        return Progress(event["words"], done, total, event["unit"], left)


def _size(job: Job) -> tuple[Any, ...]:
    """Return the options that the seconds of a job depend on most."""
    names = ("model", "frames", "height", "width", "steps", "method", "compare")
    return tuple(str(job.options.get(name)) for name in names)


def _has_checkpoint(job: Job) -> bool:
    """Whether the folder of a training has a checkpoint to go on from."""
    from gen_accel.lora import checkpoint
    from gen_accel.lora.training_run import CHECKPOINTS

    out = job.about.get("out") or job.options.get("out")
    return bool(isinstance(out, str) and checkpoint.found(Path(out) / CHECKPOINTS))


def _placed(value: Any, place: Path) -> Any:
    return value.replace(HERE, str(place)) if isinstance(value, str) else value


def _moved(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {name: _moved(one, old, new) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_moved(one, old, new) for one in value]
    if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
        return new + value[len(old) :]
    return value


def _copied(given: Mapping[str, Given], folder: Path) -> dict[str, Any]:
    """Copy files into a folder, each under the name of its option; their new places."""
    found: dict[str, Any] = {}
    for name, files in given.items():
        several = isinstance(files, list | tuple)
        some: Any = files if several else [files]
        for i, file in enumerate(some):
            if file is None:
                continue
            folder.mkdir(exist_ok=True)
            number = f"-{i}" if several else ""
            target = folder / f"{name}{number}{Path(file).suffix.lower()}"
            shutil.copyfile(file, target)
            if several:
                found.setdefault(name, []).append(str(target))
            else:
                found[name] = str(target)
    return found
