"""A process beside the tests, as a user starts it, and what it says."""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

HIDDEN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
BAR = re.compile(r"\d+%\||^\s*(\x1b\[A)?\s*$")  # of tqdm, which diffusers and transformers draw


class Said(NamedTuple):
    out: str
    err: list[str]  # lines, without bars


def without_bars(text: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]", text) if not BAR.search(line)]


def away(program: Path, folder: Path, *arguments: str, seconds: float = 300) -> Said:
    """Run a program that knows nothing of the repository; it must succeed."""
    env = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    done = subprocess.run(
        [program, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr
    return Said(done.stdout.strip(), without_bars(done.stderr))
