"""Owners of folders and half-written files: which process, and whether it still runs."""

import errno
import hashlib
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None

LOCK = ".lock"
HELD = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)  # EACCES where NFS emulates it


def mark() -> str:
    """Text that identifies this process in a file name: machine, number and start, with dashes."""
    return f"{_machine()}-{os.getpid()}-{_started(os.getpid())}"


def is_dead(marked: str) -> bool:
    """Whether the process of a `mark` has ended. False where unknown: on another machine, in
    another container, or before this machine restarted."""
    machine, _, rest = marked.partition("-")
    number, _, started = rest.partition("-")
    if machine != _machine() or not number.isdigit() or sys.platform == "win32":
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    now = _started(int(number))
    return bool(now and started) and now != started  # the number went to another process


def is_elsewhere(marked: str) -> bool:
    """Whether the process of a `mark` ran on another machine, in another container, or before this
    machine restarted, so that nobody here knows whether it still runs."""
    return marked.partition("-")[0] != _machine()


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keep other runs out of `folder`, which is made where missing.

    The kernel holds the lock, on the file `.lock`, and frees it when the process ends in any way.

    Yields:
        Whether the lock is held. Where the system or the disk has no such locks, a warning says so
        and other runs are not kept out.

    Raises:
        BlockingIOError: another run holds the lock; names that run as far as it is known.
        OSError: the folder cannot be made or written to.
    """
    made = not folder.exists()
    path, file = folder / LOCK, None
    try:
        file = taken(path)
        yield file is not None
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # while it is held: see `taken`
            file.close()
        if made:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def check_free(folder: Path) -> None:
    """Raise BlockingIOError for a folder that another run holds, before work is spent."""
    with locked(folder):
        pass


def taken(path: Path) -> IO[str] | None:
    """Lock the file, with this process written in it, until it and its copies in processes that
    inherit it are closed; None where there are no locks.

    Raises:
        BlockingIOError, OSError: as `locked`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        return None
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _opened(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            said = file.read()
            file.close()
            if error.errno in HELD:
                raise BlockingIOError(
                    f"{path.parent} is in use by {_told(said)}: wait for it or end it, or take "
                    "another folder"
                ) from None
            warnings.warn(
                f"{path.parent} cannot be locked ({error.strerror}): start no second run in it",
                stacklevel=4,
            )
            path.unlink(missing_ok=True)
            return None
        if _is_at(path, file):
            break
        file.close()  # its owner removed it in the meantime
    about = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")}
    with suppress(OSError):  # a full disk: the lock holds without a name
        file.truncate(0)
        file.write(json.dumps(about))
        file.flush()
    return file


def _opened(path: Path) -> IO[str]:
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
    except PermissionError:  # left by another user; reading is enough to lock
        return path.open(encoding="utf-8")


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _told(said: str) -> str:
    try:
        about = json.loads(said)
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return "another run"


@cache
def _machine() -> str:
    """Identify this machine since it started, and this container on it, in eight digits."""
    facts = [platform.node()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with suppress(OSError):
        facts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def _started(number: int) -> str:
    """Start time of a process, in ticks since the machine started; "" where unknown."""
    try:
        about = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
        return about.rpartition(")")[2].split()[19]  # after the name, which may hold anything
    except (OSError, IndexError):
        return ""
