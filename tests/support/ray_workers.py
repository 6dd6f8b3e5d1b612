"""Work for workers of Ray, which import it by name."""

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gen_accel.io import replacing


def simple(folder: Path) -> Callable[[str], Any]:
    """Return what does as its item says; files in `folder` tell of earlier calls."""
    (folder / f"load-{os.getpid()}").touch()

    def work(item: str) -> Any:
        if item == "bad":
            raise ValueError("the item is bad")
        if item == "warn":
            warnings.warn("look at this", stacklevel=2)
        if item == "die" or (item == "once" and not (folder / "died").exists()):
            if item == "once":
                (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "halves":
            with replacing(folder / "file.txt") as partial:
                partial.write_text("half")
                (folder / "begun").touch()
                time.sleep(600)
        return item.upper()

    return work


def unloadable() -> Callable[[str], Any]:
    raise OSError("weights are missing")


def missing() -> None:
    raise ImportError("nothing of that name is here")


class Foreign:
    """Work that no worker can read, as if its machine lacked the package."""

    def __reduce__(self) -> Any:
        return missing, ()


def failing(load: Callable[[], Callable[[int], Any]], folder: Path) -> Callable[[int], Any]:
    """Wrap a worker's `load`: number 1 dies at first, 2 fails."""
    make = load()

    def work(number: int) -> Any:
        if number == 1 and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 2:
            raise ValueError("the prompt is bad")
        return make(number)

    return work
