"""Where the repository keeps what tests read, and how other processes find it."""

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent


def environment(**changed: str) -> dict[str, str]:
    """That of a new process, which can import all that pytest can."""
    places = [str(ROOT), str(TESTS), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))} | changed
