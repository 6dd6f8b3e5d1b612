"""Questions that a page asks at once, beside the queue: what a run costs, what there is."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gen_accel.cli.app import INTERRUPTED
from gen_accel.ui.process import COMMAND, WorkerDied, WorkerProcess
from gen_accel.ui.verbs import arguments

SECONDS = 600.0  # that a question may take
REMEMBERED = 64  # answers
LINES = ("generate",)  # verbs whose --json has an object on each line


class Refused(ValueError):
    """An answer that is one sentence: what was wrong with the question."""


def line_of(error: Exception) -> str:
    """Write an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


class Questions:
    """Verbs that are run at once, one at a time: by the worker of the queue while it is idle, else
    in a process of their own.

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
        check: Callable[[str, Mapping[str, Any]], None] = lambda verb, options: None,
    ) -> None:
        self._idle, self._own = idle, WorkerProcess(log, command)
        self._check, self._lock = check, threading.Lock()
        self._known: OrderedDict[str, Any] = OrderedDict()

    def ask(self, verb: str, options: Mapping[str, Any] | None = None) -> Any:
        """Run a verb that answers in JSON.

        Args:
            options: as a file of --config holds them; `json` is added.

        Returns:
            What `--json -` prints, parsed. Of `generate`, a list with an object for each video.

        Raises:
            Refused: the sentence of the verb.
        """
        text = self._run(verb, options or {}, {"json": "-"})
        try:
            if verb in LINES:
                return [json.loads(one) for one in text.splitlines() if one.strip()]
            return json.loads(text)
        except ValueError:
            raise Refused(f"gen-accel {verb} gave no answer") from None

    def known(self, verb: str, options: Mapping[str, Any] | None = None) -> Any:
        """Answer as `ask`, from memory where the same was asked before: for what does not change
        while the server runs, such as the list of methods."""
        key = json.dumps([verb, options], sort_keys=True, default=str)
        if key not in self._known:
            self._known[key] = self.ask(verb, options)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return self._known[key]

    def said(self, verb: str, options: Mapping[str, Any] | None = None) -> str:
        """Run a verb that answers in text, and return what it prints."""
        return self._run(verb, options or {}, {})

    def close(self) -> None:
        self._own.close(seconds=0.0)

    def _run(self, verb: str, options: Mapping[str, Any], added: Mapping[str, Any]) -> str:
        try:
            self._check(verb, options)
            line = arguments(verb, {**options, **added})
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


def _answer(worker: WorkerProcess, line: Sequence[str]) -> dict[str, Any]:
    timer = threading.Timer(SECONDS, worker.stop)
    timer.daemon = True
    timer.start()
    try:
        return worker.run(line, lambda event: None)
    except WorkerDied as died:
        raise Refused(str(died)) from died
    finally:
        timer.cancel()
