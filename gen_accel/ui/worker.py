"""Worker process that runs verbs one after the other, from both of its ends.

A server starts `python -m gen_accel.ui.worker`, with modules to import first. Orders go to its
standard input, a line of JSON each: `{"run": NUMBER, "arguments": [...]}` and `{"stop": NUMBER}`.
Its standard output tells what happens, each with the number of its order:

    {"progress": NUMBER, "task": 0, "words": "a.mp4", "done": 3, "total": 10, ...}
    {"said": NUMBER, "line": "warning: ..."}
    {"ended": NUMBER, "code": 0, "error": null, "said": "what the verb printed"}

A stop is what Ctrl-C is on a command line. The end of standard input, as of a server that was
killed, stops what runs and ends the process. The weights of the last model stay for `--keep`
seconds, unless a verb comes that needs the memory.
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
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from gen_accel.cli.app import BAD_INPUT, INTERRUPTED, OUR_FAULT, CliExit, _warning_line, app
from gen_accel.registry import nearest_to

if TYPE_CHECKING:  # it imports torch
    from gen_accel.pipelines.generation.pipeline_cache import PipelineCache
    from gen_accel.pipelines.generation.progress import Update

Values = dict[str, Any]  # by name, as JSON and files of --config hold them
Event = Values
Options = Mapping[str, Any]  # of a verb, by the names that a file of --config has

# What the worker imports before its first order, so that it waits for none.
READY = ("gen_accel.pipelines.generation.generate",)
COMMAND = (sys.executable, "-m", "gen_accel.ui.worker", *READY)
PATIENCE = 300.0  # seconds that who has the worker gets to end, on however slow a machine
# Seconds that a verb has to end once it was stopped, if it first does what must not be lost: a
# training ends its step and writes a checkpoint.
LONG = {"train": 1800.0}
ALONE = 60.0  # seconds that what runs has to end after the server did, twice; a training has more
LARGE = ("cache", "demo", "train", "tune")  # verbs that load models by themselves
LIGHT = ("--dry-run", "--help", "--plan", "--print-config")  # with which they do not
MOST_SAID = 1 << 20  # characters of what a verb prints that are kept
ANSWER = 600.0  # seconds that a question may take
REMEMBERED = 64  # answers
EMPTY: Options = {}
LINES = ("generate",)  # verbs whose --json has an object on each line


class Refused(ValueError):
    """Refusal in one sentence."""


class WorkerDied(Exception):
    """The worker ended without an answer; its text is a sentence for people."""


def line_of(error: Exception) -> str:
    """Write an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


@cache
def commands() -> TyperGroup:
    """Return the command `gen-accel` with all of its verbs."""
    found = typer.main.get_command(app)
    assert isinstance(found, TyperGroup)
    return found


def command_of(verb: str) -> TyperCommand:
    """Return the command of a verb.

    Raises ValueError for an unknown one; the error names the nearest.
    """
    known = commands().commands
    if verb not in known:
        raise ValueError(f"gen-accel has no verb {verb!r}{nearest_to(verb, [*known])}")
    found = known[verb]
    assert isinstance(found, TyperCommand)
    return found


def arguments(verb: str, options: Options) -> list[str]:
    """Write options as arguments of a command line, without those that have their defaults.

    Args:
        options: None is not given.

    Raises:
        ValueError: an option that the verb does not have; the error names the nearest.
    """
    command = command_of(verb)
    parameters = {option_of(one): one for one in command.params}
    defaults = {name: one.default for name, one in getattr(command, "known", {}).items()}
    if unknown := [name for name in options if name not in parameters]:
        hint = nearest_to(unknown[0], [*parameters])
        raise ValueError(f"gen-accel {verb} has no option {unknown[0]!r}{hint}")
    written, last = [], []
    for name, one in parameters.items():
        value = options.get(name)
        if value is None or value == defaults.get(name, one.default):
            continue
        several = [*map(_text, value)] if isinstance(value, list | tuple) else [_text(value)]
        if not isinstance(one, TyperOption):
            last += several
        elif isinstance(value, bool) and one.is_flag:
            written += one.opts[:1] if value else one.secondary_opts[:1]
        else:
            for text in several:
                joined = text.startswith("-")
                written += [f"{one.opts[0]}={text}"] if joined else [one.opts[0], text]
    if any(argument.startswith("-") for argument in last):
        last = ["--", *last]
    return [verb, *written, *last]


def command_line(verb: str, options: Options) -> str:
    """Write the command that does the same, as a shell takes it."""
    return shlex.join(["gen-accel", *arguments(verb, options)])


def option_of(parameter: object) -> str:
    """Name of a parameter as a file of --config has it."""
    if not isinstance(parameter, TyperOption):
        name = str(getattr(parameter, "name", "")).removeprefix("field_")
        return "config" if name == "config_file" else name
    return parameter.opts[0].lstrip("-").replace("-", "_")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
        self._number, self._lock = 0, threading.Lock()
        self._turn = threading.Lock()
        self._ended = False
        self.lock: IO[str] | None = None  # a locked file, which the process then holds as well

    def start(self) -> None:
        """Start the process, if none runs. Raises OSError if that fails."""
        with self._lock:
            self._started()

    @property
    def pid(self) -> int | None:
        """Number of the process; None before one was started."""
        return None if self._process is None else self._process.pid

    def lend(self) -> bool:
        """Take the turn of an idle worker, until `give_back`; whether it was idle."""
        return self._turn.acquire(blocking=False)

    def take(self) -> None:
        """Take the turn. A question that has it is stopped, and killed if it does not end."""
        until = time.monotonic() + PATIENCE
        while not self._turn.acquire(timeout=0.2):
            if time.monotonic() < until:
                self.stop()
            else:
                self.kill()

    def give_back(self) -> None:
        self._turn.release()

    def run(
        self,
        arguments: Sequence[str],
        listen: Callable[[Event], None],
        *,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Event:
        """Run a command line, for who has the turn.

        Args:
            listen: takes each event until the end.
            stopped: whether it was stopped before it began.

        Returns:
            The event of the end: `code`, `error`, `said`.

        Raises:
            WorkerDied: the process was killed, or could not be started.
        """
        try:
            with self._lock:
                if stopped():  # a `stop` so far was for an earlier order
                    return {"ended": 0, "code": INTERRUPTED, "error": None, "said": ""}
                process = self._started()
                self._number += 1
                _write(process, {"run": self._number, "arguments": [*arguments]})
        except OSError as error:
            raise WorkerDied(f"the process that runs jobs cannot be started: {error}") from error
        assert process.stdout is not None
        for line in process.stdout:
            try:
                event = json.loads(line)
            except ValueError:  # the half of a line that a killed process leaves
                continue
            if event.get("ended") == self._number:
                return event
            if self._number in (event.get("progress"), event.get("said")):
                listen(event)
        raise WorkerDied(_ending(process.wait()))

    def stop(self) -> None:
        """Ask what runs to end, as Ctrl-C does."""
        with self._lock, suppress(OSError, ValueError):  # it has ended, or its input is closed
            if self._process is not None:
                _write(self._process, {"stop": self._number})

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
                pass_fds=() if self.lock is None else (self.lock.fileno(),),
                start_new_session=True,  # Ctrl-C on the server is not for the worker
            )
        return self._process


def _write(process: "subprocess.Popen[str]", order: Event) -> None:
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


def _ending(status: int) -> str:
    """Say how a worker ended that should not have."""
    if status == -9:
        return (
            "the process was killed, most likely as memory ran out: ask for fewer frames, fewer "
            "pixels or a smaller model"
        )
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return f"the process ended {how} in the middle of the work; worker.log has what it printed"


class Questions:
    """Verbs that a page asks at once, beside the queue: what a run costs, what there is.

    The worker of the queue answers while it is idle, else a process of their own.

    Args:
        idle: the worker of the queue.
        log: file that takes what a process of their own prints.
        command: starts such a process.
        check: refuses, by a ValueError, a verb with options that this server does not run.
    """

    def __init__(
        self,
        idle: WorkerProcess,
        log: Path,
        command: Sequence[str] = COMMAND,
        check: Callable[[str, Options], None] = lambda verb, options: None,
    ) -> None:
        self._idle, self._own = idle, WorkerProcess(log, command)
        self._check, self._lock = check, threading.Lock()
        self._known: OrderedDict[str, Any] = OrderedDict()

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

    def known(self, verb: str, options: Options = EMPTY) -> Any:
        """Answer as `ask`, from memory if the same was asked before.

        For what does not change while the server runs, such as the list of methods.
        """
        key = json.dumps([verb, options], sort_keys=True, default=str)
        if key not in self._known:
            self._known[key] = self.ask(verb, options)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return self._known[key]

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
        ended = None
        if self._idle.lend():
            try:
                ended = _answer(self._idle, line)
            finally:
                self._idle.give_back()
        if ended is None or ended["code"] == INTERRUPTED:  # a job came
            with self._lock:
                ended = _answer(self._own, line)
        if ended["code"] != 0:
            raise Refused(ended["error"] or f"ended with status {ended['code']}")
        return str(ended["said"])

    def close(self) -> None:
        self._own.close(seconds=0.0)


def _answer(worker: WorkerProcess, line: Sequence[str]) -> Event:
    timer = threading.Timer(ANSWER, worker.stop)
    timer.daemon = True
    timer.start()
    try:
        return worker.run(line, lambda event: None)
    except WorkerDied as died:
        raise Refused(str(died)) from died
    finally:
        timer.cancel()


class Worker:
    """The process.

    Args:
        events: where lines of JSON go.
        shelf: keeps the weights of the last model.
    """

    def __init__(self, events: TextIO, shelf: "PipelineCache") -> None:
        self._events, self._shelf, self._lock = events, shelf, threading.Lock()
        self._orders: queue.Queue[Event | None] = queue.Queue()
        self._running: int | None = None
        self._asked, self._over = 0, False  # the last order to stop, and whether the server ended
        self._turning, self._verb = threading.Lock(), ""

    def serve(self) -> None:
        """Run orders until standard input ends."""
        signal.signal(signal.SIGINT, self._interrupted)
        threading.Thread(target=self._read, daemon=True).start()
        while (order := self._order()) is not None:
            number = order["run"]
            if order["arguments"][0] in LARGE and not {*LIGHT} & {*order["arguments"]}:
                self._shelf.clear()
            self._tell(ended=number, **self._run(number, order["arguments"]))
            self._shelf.put_back()

    def _order(self) -> Event | None:
        """Wait for the next order. What stays too long on the shelf goes meanwhile."""
        while True:
            try:
                left = self._shelf.left
                most = threading.TIMEOUT_MAX
                return self._orders.get(timeout=None if left is None else min(left, most))
            except queue.Empty:
                self._shelf.clear()

    def _read(self) -> None:
        for line in sys.stdin:
            order = json.loads(line)
            if "run" in order:
                self._orders.put(order)
                continue
            with self._turning:
                self._asked = order["stop"]
                if self._asked == self._running:
                    _interrupt_main()
        self._orders.put(None)
        for seconds in (time_to_end(self._verb, ALONE), ALONE):  # an interrupt may be lost
            with self._turning:
                self._over = True
                if self._running is not None:
                    _interrupt_main()
            time.sleep(seconds)
        os._exit(1)

    def _interrupted(self, *_: object) -> None:
        if self._running is not None:
            raise KeyboardInterrupt

    def _run(self, number: int, arguments: list[str]) -> Event:
        from gen_accel.pipelines.generation.progress import heard_by

        said, error, code = _Said(), None, 0
        heard = _Lines(lambda line: self._tell(said=number, line=line))

        def progress(update: "Update") -> None:
            self._tell(progress=number, **update._asdict())

        warnings.formatwarning = _warning_line
        try:
            with self._turning:  # a stop comes before this, or is an interrupt
                self._running, self._verb = number, arguments[0]
                if self._over or self._asked == number:
                    raise KeyboardInterrupt
            with redirect_stdout(said), redirect_stderr(heard), heard_by(progress):
                code = _call(arguments)
        except CliExit as ended:
            code, error = ended.exit_code, ended.message
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as fault:  # of the parser, before the group of verbs could word it
            code, error = OUR_FAULT, f"a fault of gen-accel: {type(fault).__name__}: {fault}"
        finally:
            self._running = None
        return {"code": code, "error": error, "said": said.text()[-MOST_SAID:]}

    def _tell(self, **event: Any) -> None:
        line = json.dumps(event)
        with self._lock, suppress(OSError):  # nobody listens any more
            self._events.write(f"{line}\n")
            self._events.flush()


class _Said(io.TextIOWrapper):
    """Stream that keeps the text of a verb, and the bytes of --json."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
        super().__init__(self._bytes, encoding="utf-8", newline="\n", write_through=True)

    def text(self) -> str:
        self.flush()
        return self._bytes.getvalue().decode("utf-8", "replace")


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
        self._held += text
        *lines, self._held = self._held.split("\n")
        for line in lines:
            if line.strip():
                self._take(line.strip())
        return len(text)


def _call(arguments: list[str]) -> int:
    """Run a command line; its exit status."""
    command = commands()
    try:
        with command.make_context("gen-accel", [*arguments]) as context:
            command.invoke(context)
    except CliExit:
        raise
    except typer.Exit as ended:
        return ended.exit_code
    except typer.Abort:
        return INTERRUPTED
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else BAD_INPUT
    return 0


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
    from gen_accel.pipelines.generation.pipeline_cache import keeping

    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what prints past Python goes to the log
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=float, default=0.0)
    parser.add_argument("modules", nargs="*")
    asked = parser.parse_args()
    for name in asked.modules:
        with suppress(ImportError):  # the verb says it better
            __import__(name)
    with remembering(), keeping(asked.keep) as shelf:
        Worker(events, shelf).serve()


if __name__ == "__main__":
    main()
