"""The tests that need a GPU, in a process of their own."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from ledger import Failed, Line, Skipped

from .machine import ROOT, cleared
from .setting import Setting

TRITON = "tests/kernels/test_triton.py"
SPARE = 5.0  # seconds of a line's cap that are not the tests'
OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.M)


def lines(at: Setting) -> Iterator[Line]:
    if at.dry:
        yield _line(at, "tests of values", ["--noconftest", "tests/test_parsing.py"], 60.0)
        return
    yield _line(at, "tests marked gpu", [*marked(), "-m", "gpu"], 150.0)
    yield _line(at, "Triton tests", [TRITON], 240.0)


def marked() -> list[str]:
    """Files with tests that are marked gpu; the others import packages that no GPU needs."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if "mark.gpu" in path.read_text()]


def _line(at: Setting, name: str, arguments: Sequence[str], cap: float) -> Line:
    return Line(name, cap, partial(_tests, at, arguments, cap - SPARE))


def _tests(at: Setting, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """How many passed and which failed, of the tests that were done in time."""
    if find_spec("pytest") is None or not (ROOT / "tests").is_dir():
        raise Skipped("needs pytest and the tests of a checkout")
    cleared(at.device)  # the memory is theirs now
    command = [
        sys.executable,
        "-m",
        "pytest",
        *arguments,
        "-v",
        "--tb=line",
        "-p",
        "no:cacheprovider",
    ]
    given = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        streams: dict[str, Any] = {"stdout": said, "stderr": subprocess.STDOUT}
        try:
            subprocess.run(command, cwd=ROOT, env=given, timeout=seconds, check=False, **streams)
            cut_off = False
        except subprocess.TimeoutExpired:
            cut_off = True
        said.seek(0)
        text = said.read()
    return summed_up(text, cut_off)


def summed_up(text: str, cut_off: bool) -> dict[str, Any]:
    """Of what `pytest -v` says.

    Raises:
        Failed: a test did, or none ran.
    """
    outcomes = OUTCOME.findall(text)
    count = {
        word.lower(): sum(outcome == word for _, outcome in outcomes)
        for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")
    }
    found = {**count, "cut_off": cut_off}
    wrong = [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    if wrong:
        raise Failed(
            f"{len(wrong)} of {len(outcomes)} tests failed, first {wrong[0]}",
            **found,
            failed_tests=wrong,
            output=text[-8000:],
        )
    if not outcomes:
        last = (text.strip().splitlines() or ["nothing was said"])[-1]
        raise Failed(f"no test ran: {last}", **found, output=text[-8000:])
    said = f"{count['passed']} passed, {count['skipped']} skipped"
    return {**found, "says": said + (", cut off by the cap" if cut_off else "")}
