"""Worker process that runs verbs one after the other, from both of its ends.

A server starts `python -m gen_accel.ui.worker`, with modules to import first. Orders go to its
standard input, a line of JSON each: the arguments of a command line, or "stop". Its standard
output tells what happens:

    {"progress": [0, "a.mp4", 3, 10, "steps", null]}
    {"line": "warning: ..."}
    {"ended": [0, null, "what the verb printed"]}

A stop is what Ctrl-C is on a command line, and ends a process that is idle by then. The end of
standard input, as of a server that was killed, stops what runs and ends the process. The weights
of the last model stay for `--keep` seconds, unless a verb comes that needs the memory.
"""

import argparse
import io
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TextIO

import typer
from typer.core import TyperGroup, TyperOption

from gen_accel.cli.app import BAD_INPUT, INTERRUPTED, OUR_FAULT, app, warning_line
from gen_accel.cli.verb import VerbCommand
from gen_accel.io import read_json
from gen_accel.memory import kills_of_memory
from gen_accel.parsing import as_text, shown
from gen_accel.pipelines.generation.progress import Update, heard_by
from gen_accel.registry import nearest_to

if TYPE_CHECKING:  # it imports torch
    from gen_accel.pipelines.generation.kept import PipelineCache

Values = dict[str, Any]  # by name, as JSON and files of --config hold them
Options = Mapping[str, Any]  # of a verb, by the names that a file of --config has

# What the worker imports before its first order, so that it waits for none.
READY = ("gen_accel.pipelines.generation.generate",)
COMMAND = (sys.executable, "-m", "gen_accel.ui.worker", *READY)
# Seconds that a verb has to end once it was stopped, if it first does what must not be lost: a
# training ends its step and writes a checkpoint.
LONG = {"train": 1800.0}
ALONE = 60.0  # seconds that what runs has to end after the server did, twice; a training has more
LARGE = ("cache", "demo", "train", "tune")  # verbs that load models by themselves
LIGHT = ("--dry-run", "--help", "--plan", "--print-config")  # with which they do not
MOST_SAID = 1 << 20  # characters of what a verb prints that are kept
ANSWER = 600.0  # seconds that a question may take
REMEMBERED = 64  # answers
COLUMNS = 66  # of the lines that a verb says: as many as the narrowest box of the page has
EMPTY: Options = {}
LINES = ("generate",)  # verbs whose --json has an object on each line


class Refused(ValueError):
    """Refusal in one sentence."""


class WorkerDied(Exception):
    """The worker ended without an answer; its text is a sentence for people."""


class NotStarted(WorkerDied):
    """The worker could not be started, so that nothing ran."""


class Ended(NamedTuple):
    """End of a verb: its exit status, its error in a sentence, and what it printed."""

    code: int
    error: str | None
    said: str


Listener = Callable[[Update | str], None]  # takes progress, and lines that a verb says beside


def line_of(error: Exception) -> str:
    """Write an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


@cache
def commands() -> TyperGroup:
    """Return the command `gen-accel` with all of its verbs."""
    found = typer.main.get_command(app)
    assert isinstance(found, TyperGroup)
    return found


def command_of(verb: str) -> VerbCommand:
    """Return the command of a verb.

    Raises ValueError for an unknown one; the error names the nearest.
    """
    known = commands().commands
    if verb not in known:
        raise ValueError(f"gen-accel has no verb {shown(verb)}{nearest_to(verb, [*known])}")
    found = known[verb]
    assert isinstance(found, VerbCommand)
    return found


def arguments(verb: str, options: Options) -> list[str]:
    """Write options as arguments of a command line, without those that have their defaults.

    Args:
        options: None is not given.

    Raises:
        ValueError: an option that the verb does not have; the error names the nearest.
    """
    command = command_of(verb)
    parameters = {str(one.name): one for one in command.params}
    if unknown := [name for name in options if name not in parameters]:
        hint = nearest_to(unknown[0], [*parameters])
        raise ValueError(f"gen-accel {verb} has no option {shown(unknown[0])}{hint}")
    written, last = [], []
    for name, one in parameters.items():
        value = options.get(name)
        if value in (None, command.known[name].default if name in command.known else one.default):
            continue
        if isinstance(value, bool) and isinstance(one, TyperOption) and one.is_flag:
            written += one.opts[:1] if value else one.secondary_opts[:1]
            continue
        for text in map(as_text, value if isinstance(value, list | tuple) else [value]):
            if not isinstance(one, TyperOption):
                last.append(text)
            else:
                flag = one.opts[0]
                written += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    if any(argument.startswith("-") for argument in last):
        last = ["--", *last]
    return [verb, *written, *last]


def command_line(verb: str, options: Options) -> str:
    """Write the command that does the same, as a shell takes it."""
    return shlex.join(["gen-accel", *arguments(verb, options)])


def command_keeping(minutes: float) -> tuple[str, ...]:
    """Command of a worker in which a model stays for some minutes."""
    return (*COMMAND, f"--keep={60 * minutes:g}")


def time_to_end(verb: str, usual: float) -> float:
    """Seconds that a verb has to end once it was stopped; `usual` for most."""
    return max(usual, LONG.get(verb, usual))


class WorkerProcess:
    """A worker that is started when it is needed, and again after it died.

    Args:
        log: file that takes what the worker prints; each worker begins it again.
        command: starts the process.
    """

    def __init__(self, log: Path, command: Sequence[str] = COMMAND) -> None:
        self._log, self._command = log, [*command]
        self._process: subprocess.Popen[str] | None = None
        self._lock, self._ended = threading.Lock(), False
        self.lock: IO[str] | None = None  # a locked file, which the process then holds as well

    def start(self) -> None:
        """Start the process, if none runs. Raises OSError if that fails."""
        with self._lock:
            self._started()

    @property
    def pid(self) -> int | None:
        """Number of the process; None before one was started."""
        return None if self._process is None else self._process.pid

    def run(
        self,
        arguments: Sequence[str],
        listen: Listener = lambda told: None,
        *,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Ended:
        """Run a command line; one at a time.

        Args:
            stopped: whether it was stopped before it began.

        Raises:
            NotStarted: the process could not be started.
            WorkerDied: it was killed.
        """
        try:
            with self._lock:
                if stopped():
                    return Ended(INTERRUPTED, None, "")
                process, kills = self._started(), kills_of_memory()
                _write(process, [*arguments])
        except OSError as error:
            raise NotStarted(f"the process that runs jobs cannot be started: {error}") from error
        assert process.stdout is not None
        for line in process.stdout:
            try:
                event = json.loads(line)
            except ValueError:  # the half of a line that a killed process leaves
                continue
            if "ended" in event:
                return Ended(*event["ended"])
            listen(event["line"] if "line" in event else Update(*event["progress"]))
        raise WorkerDied(_ending(process.wait(), kills))

    def stop(self) -> None:
        """Ask what runs to end, as Ctrl-C does. The process must be retired then."""
        with self._lock, suppress(OSError, ValueError):  # it has ended, or its input is closed
            if self._process is not None:
                _write(self._process, "stop")

    def kill(self) -> None:
        """End the process at once, with all that it started."""
        if self._process is not None:
            _kill(self._process)

    def retire(self) -> None:
        """End an idle process. The next order starts a fresh one."""
        self._end(0.0)

    def close(self, seconds: float = 10.0) -> None:
        """End the process, and start no other.

        What runs is stopped, and killed after some seconds or at an interrupt.
        """
        with self._lock:
            self._ended = True
        self._end(seconds)

    def _end(self, seconds: float) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        with suppress(OSError):  # it has ended by itself
            assert process.stdin is not None
            process.stdin.close()
        try:
            if seconds > 0:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
        finally:  # also at a second Ctrl-C
            _kill(process)
            process.wait()

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        if self._ended:
            raise OSError("the server ends")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        try:
            log = self._log.open("w", encoding="utf-8")
        except OSError:  # a full disk: it runs without a log
            log = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        with log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env={**os.environ, "COLUMNS": str(COLUMNS)},
                pass_fds=() if self.lock is None else (self.lock.fileno(),),
                start_new_session=True,  # Ctrl-C on the server is not for the worker
            )
        return self._process


def _write(process: "subprocess.Popen[str]", order: list[str] | str) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()


def _kill(process: "subprocess.Popen[str]") -> None:
    """Kill a process with all that it started, unless it has ended and was waited for."""
    if process.returncode is not None:
        return
    if sys.platform == "win32":
        process.kill()
    else:
        with suppress(ProcessLookupError, PermissionError):  # macOS: of one that has just ended
            os.killpg(process.pid, signal.SIGKILL)


def _ending(status: int, kills: int | None) -> str:
    """Say how a worker ended that should not have.

    Args:
        kills: `kills_of_memory` before.
    """
    with suppress(ValueError):  # a signal without a name
        name = signal.Signals(-status).name if status < 0 else ""
        fewer, now = "ask for fewer frames, fewer pixels or a smaller model", kills_of_memory()
        if name == "SIGKILL" and (kills is None or now is None):
            return f"the process was killed, perhaps as memory ran out: {fewer}"
        if name == "SIGKILL" and now != kills:
            return f"the process was killed, most likely as memory ran out: {fewer}"
        if name in ("SIGKILL", "SIGTERM"):
            return (
                f"the process was ended from outside, by {name}, and the system has counted none "
                "that it killed for want of memory: queue it again"
            )
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return f"the process ended {how} in the middle of the work; worker.log has what it printed"


class Questions:
    """Verbs that a page asks at once, beside the queue, in a process of their own.

    Args:
        log: file that takes what the process prints.
        command: starts the process.
        check: refuses, by a ValueError, a verb with options that this server does not run.
    """

    def __init__(
        self,
        log: Path,
        command: Sequence[str] = COMMAND,
        check: Callable[[str, Options], None] = lambda verb, options: None,
    ) -> None:
        self._worker, self._check = WorkerProcess(log, command), check
        self._folder = log.parent
        self._lock = threading.Lock()
        self._known = lru_cache(REMEMBERED)(lambda asked: self.ask(*json.loads(asked)))

    def ask(self, verb: str, options: Options = EMPTY) -> Any:
        """Run a verb that answers in JSON.

        Args:
            options: `json` is added.

        Returns:
            What `--json -` prints, parsed. Of `generate`, a list with an object for each video.

        Raises:
            Refused: the sentence of the verb.
        """
        text = self.said(verb, options, {"json": "-"})
        try:
            if verb in LINES:
                return [json.loads(one) for one in text.splitlines() if one.strip()]
            return json.loads(text)
        except ValueError:
            raise Refused(f"gen-accel {verb} gave no answer") from None

    def both(self, verb: str, options: Options = EMPTY) -> tuple[str, Any]:
        """Run a verb once, for its text without the line that names its file, and its JSON."""
        with TemporaryDirectory(dir=self._folder) as folder:
            file = Path(folder) / "answer.json"
            text = self.said(verb, options, {"json": str(file)})
            told = [line for line in text.splitlines() if folder not in line]
            return "\n".join(told), read_json(file)

    def known(self, verb: str, options: Options = EMPTY) -> Any:
        """Answer as `ask`, from memory if the same was asked before.

        For what does not change while the server runs, such as the list of methods.
        """
        return self._known(json.dumps([verb, options], sort_keys=True, default=str))

    def said(self, verb: str, options: Options = EMPTY, own: Options = EMPTY) -> str:
        """Run a verb and return what it prints; raises Refused.

        Args:
            own: options of the server itself, which are not checked.
        """
        try:
            self._check(verb, options)
            line = arguments(verb, {**options, **own})
        except ValueError as error:
            raise Refused(str(error)) from error
        with self._lock:
            late = threading.Event()
            timer = threading.Timer(ANSWER, lambda: (late.set(), self._worker.kill()))
            timer.daemon = True
            timer.start()
            try:
                ended = self._worker.run(line)
            except WorkerDied as died:
                slow = f"{verb} took longer than {ANSWER:g} s and was ended"
                raise Refused(slow if late.is_set() else str(died)) from died
            finally:
                timer.cancel()
        if ended.code != 0:
            raise Refused(ended.error or f"ended with status {ended.code}")
        return ended.said

    def close(self) -> None:
        self._worker.close(seconds=0.0)


class Worker:
    """The process.

    Args:
        events: where lines of JSON go.
        pipelines: keeps the weights of the last model.
    """

    def __init__(self, events: TextIO, pipelines: "PipelineCache") -> None:
        self._events, self._pipelines, self._lock = events, pipelines, threading.Lock()
        self._orders: queue.Queue[list[str] | None] = queue.Queue()
        self._verb = ""  # of what runs

    def serve(self) -> None:
        """Run orders until standard input ends."""
        threading.Thread(target=self._read, daemon=True).start()
        while (order := self._order()) is not None:
            self._verb = order[0]
            if self._verb in LARGE and not {*LIGHT} & {*order}:
                self._pipelines.clear()
            ended = self._run(order)
            self._verb = ""
            self._tell(ended=ended)
            self._pipelines.put_back()

    def _order(self) -> list[str] | None:
        """Wait for the next order. A pipeline that stays too long goes meanwhile."""
        while True:
            try:
                left = self._pipelines.left
                most = threading.TIMEOUT_MAX
                return self._orders.get(timeout=None if left is None else min(left, most))
            except queue.Empty:
                self._pipelines.clear()

    def _read(self) -> None:
        for line in sys.stdin:
            order = json.loads(line)
            if order == "stop":
                _interrupt_main()
            else:
                self._orders.put(order)
        self._orders.put(None)
        for seconds in (time_to_end(self._verb, ALONE), ALONE):  # an interrupt may be lost
            if self._verb:
                _interrupt_main()
            time.sleep(seconds)
        os._exit(1)

    def _run(self, arguments: list[str]) -> Ended:
        said, error, code = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n"), None, 0
        heard = _Lines(lambda line: self._tell(line=line))
        warnings.formatwarning = warning_line
        try:
            with (
                redirect_stdout(said),
                redirect_stderr(heard),
                heard_by(lambda update: self._tell(progress=update)),
                commands().make_context("gen-accel", [*arguments]) as context,
            ):
                commands().invoke(context)
        except typer.Exit as ended:
            code, error = ended.exit_code, getattr(ended, "message", None)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else BAD_INPUT
        except Exception as fault:  # of the parser, before the group of verbs could word it
            code, error = OUR_FAULT, f"a fault of gen-accel: {type(fault).__name__}: {fault}"
        said.flush()
        text = said.buffer.getvalue().decode("utf-8", "replace")  # pyright: ignore
        return Ended(code, error, text[-MOST_SAID:])

    def _tell(self, **event: object) -> None:
        line = json.dumps(event)
        with self._lock, suppress(OSError):  # nobody listens any more
            self._events.write(f"{line}\n")
            self._events.flush()


class _Lines(io.TextIOBase):
    """Stream of text that hands on each whole line, and keeps all of it in the log."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take, self._held = take, ""
        self._log = sys.stderr

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        with suppress(OSError):  # a full disk: the job goes on
            self._log.write(text)
            self._log.flush()
        *lines, self._held = (self._held + text).split("\n")
        for line in filter(None, map(str.strip, lines)):
            self._take(line)
        return len(text)


def _interrupt_main() -> None:
    """Interrupt the main thread, also while it waits for the system."""
    main = threading.main_thread().ident
    if sys.platform == "win32" or main is None:
        import _thread

        _thread.interrupt_main()
    else:
        signal.pthread_kill(main, signal.SIGINT)


def main() -> None:
    from gen_accel.measure.machine import remembering
    from gen_accel.pipelines.generation.kept import keeping

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have ignored
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what prints past Python goes to the log
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=float, default=0.0)
    parser.add_argument("modules", nargs="*")
    asked = parser.parse_args()
    for name in asked.modules:
        with suppress(ImportError):  # the verb says it better
            __import__(name)
    with suppress(KeyboardInterrupt), remembering(), keeping(asked.keep) as pipelines:
        Worker(events, pipelines).serve()


if __name__ == "__main__":
    main()
