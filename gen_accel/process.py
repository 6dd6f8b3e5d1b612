"""A run as a process: its locks on folders, so that two runs in one folder are told apart, and
the signals that end it, which unwind it before."""

import errno
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
# A closed terminal sends SIGHUP, which Windows does not have.
SIGNALS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder`, which is made if it is missing.

    The system frees the lock when the process ends in any way. The file `.lock` stays, as its
    removal would let a waiting run hold a file of no name.

    Raises:
        BlockingIOError: another run holds the lock; names that run as far as it is known.
        OSError: the folder cannot be made or written to.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"{folder} is in use by {_holder(path)}: wait for it or end it, or take another folder"
        ) from None
    about = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")}
    try:
        with suppress(OSError):  # a full disk: the lock holds without a name
            path.write_text(json.dumps(about), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            os.truncate(path, 0)
        lock.release()
        if made and not any(one != path for one in folder.iterdir()):
            with suppress(OSError):
                path.unlink()
                folder.rmdir()


def check_free(folder: Path) -> None:
    """Raise BlockingIOError for a folder that another run holds, before work is spent."""
    with locked(folder):
        pass


def taken(path: Path) -> IO[str] | None:
    """Lock the file at `path` until it and its copies in processes that inherit it are closed.

    None if the system has no such locks. Raises BlockingIOError if another process holds it.
    """
    if fcntl is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def removed(path: Path) -> bool:
    """Remove the file of a lock, unless a process holds it. Returns whether it is gone.

    Whoever acquires such a lock must look whether its file is still there, and try again if not.
    """
    lock = FileLock(path, blocking=False)
    try:
        with lock:
            path.unlink()
    except Timeout:
        return False
    except FileNotFoundError:
        pass
    return True


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
    taken = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    if not taken or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
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


def _holder(path: Path) -> str:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
