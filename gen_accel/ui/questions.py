"""Questions that a page asks at once, beside the queue: what a run costs, what there is."""

import json
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gen_accel.ui.process import COMMAND, WorkerDied, WorkerProcess
from gen_accel.ui.verbs import arguments, fields

SECONDS = 120.0  # that a question may take


class Refused(ValueError):
    """An answer that is one sentence: what was wrong with the question."""


class Questions:
    """Verbs that are run at once, one at a time, in a process of their own.

    Args:
        log: file that takes what the process prints.
        command: starts the process.
    """

    def __init__(self, log: Path, command: Sequence[str] = COMMAND) -> None:
        self.worker = WorkerProcess(log, command)
        self._lock = threading.Lock()
        self._known: dict[str, Any] = {}

    def ask(self, verb: str, options: Mapping[str, Any] | None = None) -> Any:
        """Run a verb that answers in JSON.

        Args:
            options: as a file of --config holds them; `json` is added.

        Returns:
            What `--json -` prints, parsed. Of `generate`, a list with an object for each video.

        Raises:
            Refused: the verb's own sentence.
        """
        line = arguments(verb, {**(options or {}), "json": "-"})
        text = self._run(line)
        try:
            if "overwrite" in fields(verb):  # `generate`, whose objects have a line each
                return [json.loads(one) for one in text.splitlines() if one.strip()]
            return json.loads(text)
        except ValueError:
            raise Refused(f"gen-accel {verb} gave no answer") from None

    def known(self, verb: str, options: Mapping[str, Any] | None = None) -> Any:
        """Answer as `ask`, from memory where the same was asked before: for what does not change
        while the server runs, such as the list of methods."""
        key = json.dumps([verb, options], sort_keys=True)
        if key not in self._known:
            self._known[key] = self.ask(verb, options)
        return self._known[key]

    def said(self, verb: str, options: Mapping[str, Any] | None = None) -> str:
        """Run a verb that answers in text, and return what it prints."""
        return self._run(arguments(verb, options or {}))

    def close(self) -> None:
        self.worker.close(seconds=0.0)

    def _run(self, line: Sequence[str]) -> str:
        timer = threading.Timer(SECONDS, partial(self.worker.kill))
        timer.daemon = True
        with self._lock:
            timer.start()
            try:
                ended = self.worker.run(line, lambda event: None)
            except WorkerDied as died:
                raise Refused(str(died)) from died
            finally:
                timer.cancel()
        if ended["code"] != 0:
            raise Refused(ended["error"] or f"ended with status {ended['code']}")
        return str(ended["said"])
