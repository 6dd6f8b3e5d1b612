"""Unwind a run that a signal ends, so that it cleans up before the process is gone."""

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# A closed terminal sends SIGHUP, which Windows does not have.
SIGNALS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n))


class SignalExit(BaseException):
    """Signal that ends the process, raised in the main thread where it was running."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def unwinding() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the program inside, then end the process by the same signal.

    A second signal ends it at once. Signals that another handler answers, or that are ignored (as
    under `nohup`), keep their treatment. Threads other than the main one have no handlers.
    """
    taken = [] if threading.current_thread() is not threading.main_thread() else _at_default()
    if not taken:
        yield
        return

    def end(number: int, frame: Any) -> None:
        leave_closed_terminal()
        for one in taken:
            signal.signal(one, signal.SIG_DFL)
        raise SignalExit(number)

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    except SignalExit as ended:
        os.kill(os.getpid(), ended.number)
        raise
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def answered() -> list[int]:
    """SIGTERM and SIGHUP, unless the parent process had them ignored."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def leave_closed_terminal() -> None:
    """Stop writing to a closed terminal, where each line would raise OSError."""
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
