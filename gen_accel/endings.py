"""A run that a signal ends puts away what it holds before the process is gone."""

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# A closed terminal sends SIGHUP, which Windows does not have.
SIGNALS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n))


class Ended(BaseException):
    """A signal that ends the process, raised where it found the program."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def unwinding() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP unwind the program first and end the process then, by the same
    signal. A second one ends it at once.

    What another handler answers, or what is ignored, as under `nohup`, stays so; threads other
    than the main one have no handlers.
    """
    taken = [] if threading.current_thread() is not threading.main_thread() else _at_default()
    if not taken:
        yield
        return

    def end(number: int, frame: Any) -> None:
        leave_closed_terminal()
        for one in taken:
            signal.signal(one, signal.SIG_DFL)
        raise Ended(number)

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    except Ended as ended:
        os.kill(os.getpid(), ended.number)
        raise
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def answered() -> list[int]:
    """SIGTERM and SIGHUP, without those that whoever started the process had ignored."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def leave_closed_terminal() -> None:
    """Write to a closed terminal no more: each line there would raise OSError."""
    try:
        import termios
    except ImportError:
        return
    for stream in (1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


def _at_default() -> list[int]:
    return [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
