"""A worker process seen from the server: start, order, listen, stop."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from gen_accel.cli.app import INTERRUPTED as EXIT_OF_CTRL_C

Event = dict[str, Any]

# What the worker imports before its first order, so that it waits for none.
READY = ("gen_accel.pipelines.generation.generate",)
PATIENCE = 300.0  # seconds that who has the worker gets to end, on however slow a machine
# Seconds that a verb has to end once it was stopped, where it first does what must not be lost: a
# training ends its step and writes a checkpoint.
LONG = {"train": 1800.0}
COMMAND = (sys.executable, "-m", "gen_accel.ui.worker", *READY)


def command_keeping(minutes: float) -> tuple[str, ...]:
    """Command of a worker in which a model stays for some minutes."""
    return (*COMMAND, f"--keep={60 * minutes:g}")


def time_to_end(verb: str, usual: float) -> float:
    """Seconds that a verb has to end once it was stopped; `usual` for most."""
    return max(usual, LONG.get(verb, usual))


class WorkerDied(Exception):
    """The worker ended without an answer; its text is a sentence for people."""


class WorkerProcess:
    """A worker that is started when it is needed, and anew after it died.

    Args:
        log: file that takes what the worker prints; written anew by each worker.
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
        """Start the process, if none runs. Raises OSError where that fails."""
        with self._lock:
            self._started()

    def lend(self) -> bool:
        """Take the turn of an idle worker, for who gives it back by `give_back`; whether it was
        idle."""
        return self._turn.acquire(blocking=False)

    def take(self) -> None:
        """Take the turn: of whom it was lent to, what runs is stopped, and killed where it does
        not end."""
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
                    return {"ended": 0, "code": EXIT_OF_CTRL_C, "error": None, "said": ""}
                process = self._started()
                self._number += 1
                self._write(process, {"run": self._number, "arguments": [*arguments]})
        except OSError as error:
            raise WorkerDied(f"the process that runs jobs cannot be started: {error}") from error
        assert process.stdout is not None
        for line in process.stdout:
            event = _parsed(line)
            if event.get("ended") == self._number:
                return event
            if self._number in (event.get("progress"), event.get("said")):
                listen(event)
        raise WorkerDied(_ending(process.wait()))

    def stop(self) -> None:
        """Ask what runs to end, as Ctrl-C does."""
        with self._lock, suppress(OSError, ValueError):  # it has ended, or its input is closed
            if self._process is not None:
                self._write(self._process, {"stop": self._number})

    def kill(self) -> None:
        """End the process at once, with all that it started."""
        process = self._process
        if process is not None:
            _kill(process)

    def retire(self) -> None:
        """End an idle process. The next order starts a fresh one."""
        self._end(0.0)

    def close(self, seconds: float = 10.0) -> None:
        """End the process, and start no other: what runs is stopped, and killed after some seconds
        or where this is interrupted."""
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
            log: Any = self._log.open("w", encoding="utf-8")
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

    def _write(self, process: "subprocess.Popen[str]", order: Event) -> None:
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


def _parsed(line: str) -> Event:
    try:
        event = json.loads(line)
    except ValueError:  # the half of a line that a killed process leaves
        return {}
    return event if isinstance(event, dict) else {}


def _ending(status: int) -> str:
    """Say how a worker ended that should not have."""
    if status == -9:
        return (
            "the process was killed, most likely as memory ran out: ask for fewer frames, fewer "
            "pixels or a smaller model"
        )
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return f"the process ended {how} in the middle of the work; worker.log has what it printed"
