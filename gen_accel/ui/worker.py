"""Process that runs verbs one after the other, and tells in lines of JSON how each goes.

It is started as `python -m gen_accel.ui.worker`, with modules to import first. Orders come on
standard input, a line each: `{"run": NUMBER, "arguments": [...]}` and `{"stop": NUMBER}`. Standard
output carries what happens, each with the number of its order:

    {"progress": NUMBER, "task": 0, "words": "a.mp4", "done": 3, "total": 10, ...}
    {"said": NUMBER, "line": "warning: ..."}
    {"ended": NUMBER, "code": 0, "error": null, "said": "what the verb printed"}

The weights of the last model that made a video stay for `--keep` seconds, unless a verb comes that
needs the memory.

A stop is what Ctrl-C is on a command line. The end of standard input, as of a server that was
killed, stops what runs and ends the process.
"""

import argparse
import io
import json
import os
import queue
import signal
import sys
import threading
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

import typer

from gen_accel.cli.app import BAD_INPUT, INTERRUPTED, OUR_FAULT, Ended, _warning_line
from gen_accel.measure.kept import remembering
from gen_accel.pipelines.generation.progress import Update, heard_by
from gen_accel.pipelines.generation.resident import Shelf, keeping
from gen_accel.ui.process import time_to_end
from gen_accel.ui.verbs import group

ALONE = 60.0  # seconds that what runs has to end after the server did, twice; a training has more
LARGE = ("cache", "demo", "train", "tune")  # verbs that load models by themselves
LIGHT = ("--dry-run", "--help", "--plan", "--print-config")  # with which they do not
MOST_SAID = 1 << 20  # characters of what a verb prints that are kept


class Worker:
    """The process.

    Args:
        events: where lines of JSON go.
        shelf: keeps the weights of the last model.
    """

    def __init__(self, events: TextIO, shelf: Shelf) -> None:
        self._events, self._shelf, self._lock = events, shelf, threading.Lock()
        self._orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
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

    def _order(self) -> dict[str, Any] | None:
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

    def _interrupted(self, *_: Any) -> None:
        if self._running is not None:
            raise KeyboardInterrupt

    def _run(self, number: int, arguments: list[str]) -> dict[str, Any]:
        said, error, code = _Said(), None, 0
        heard = _Lines(lambda line: self._tell(said=number, line=line))
        warnings.formatwarning = _warning_line
        try:
            with self._turning:  # a stop comes before this, or is an interrupt
                self._running, self._verb = number, arguments[0]
                if self._over or self._asked == number:
                    raise KeyboardInterrupt
            with redirect_stdout(said), redirect_stderr(heard), heard_by(self._heard(number)):
                code = _call(arguments)
        except Ended as ended:
            code, error = ended.exit_code, ended.message
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as fault:  # of the parser, before the group of verbs could word it
            code, error = OUR_FAULT, f"a fault of gen-accel: {type(fault).__name__}: {fault}"
        finally:
            self._running = None
        return {"code": code, "error": error, "said": said.text()[-MOST_SAID:]}

    def _heard(self, number: int) -> Any:
        def listener(update: Update) -> None:
            self._tell(progress=number, **update._asdict())

        return listener

    def _tell(self, **event: Any) -> None:
        line = json.dumps(event)
        with self._lock, suppress(OSError):  # nobody listens any more
            self._events.write(f"{line}\n")
            self._events.flush()


class _Said(io.TextIOWrapper):
    """Stream that keeps the text of a verb, and the bytes of --json."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", newline="\n", write_through=True)

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode("utf-8", "replace")  # pyright: ignore[reportAttributeAccessIssue]


class _Lines(io.TextIOBase):
    """Stream of text that hands on each whole line, and keeps all of it in the log."""

    def __init__(self, take: Any) -> None:
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
    command = group()
    try:
        with command.make_context("gen-accel", [*arguments]) as context:
            command.invoke(context)
    except Ended:
        raise
    except typer.Exit as ended:
        return ended.exit_code
    except typer.Abort:
        return INTERRUPTED
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else BAD_INPUT
    return 0


def _interrupt_main() -> None:
    """Interrupt the main thread, also where it waits for the system."""
    main = threading.main_thread().ident
    if sys.platform == "win32" or main is None:
        import _thread

        _thread.interrupt_main()
    else:
        signal.pthread_kill(main, signal.SIGINT)


def main() -> None:
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
