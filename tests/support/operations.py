"""Operations on files as a process makes them: listed, failed at one of them, or killed there.

Python reports them to audit hooks (PEP 578) before they take place. Those that it does not
report, `os.fsync`, the writer of safetensors and sqlite's commits, report themselves here.
"""

import errno
import functools
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENDED = "ended.json"
WRITES = "commit", "fsync", "mkdir", "open", "rename", "serialize"
REMOVES = "remove", "rmdir", "rmtree"


@dataclass(frozen=True)
class Operation:
    """place: path in the folder that is watched, with `.partial-*` as one name."""

    kind: str
    place: str


@dataclass(frozen=True)
class Fault:
    """What happens, and at which operation.

    Args:
        kind: "killed" before the operation, or "torn", half way in one that writes a file;
            "stopped" until a signal comes; or the name of an error, as EACCES.
        at: the number of the operation.
        goes_on: the error comes at each one from there on, as on a disk that is read-only.
    """

    kind: str
    at: int
    goes_on: bool = False

    def __str__(self) -> str:
        return f"{self.kind}{' from' if self.goes_on else ''} at {self.at}"


class Operations:
    """What a process does to files under `folder`, from when `watch` is called.

    Args:
        fault: None: none.
    """

    def __init__(self, folder: Path, fault: Fault | None = None) -> None:
        self.folder, self.fault = folder.resolve(), fault
        self.listed: list[Operation] = []
        self._busy = False

    def watch(self) -> None:
        """For good: an audit hook cannot be taken off."""
        import safetensors.torch

        fsync, serialize = os.fsync, safetensors.torch.serialize_file
        connect, note = sqlite3.connect, self._note

        class Connection(sqlite3.Connection):
            def commit(self) -> None:
                if self.in_transaction:
                    note("commit", self.execute("PRAGMA database_list").fetchone()[2])
                super().commit()

        def fsynced(number: Any) -> None:
            file = number if isinstance(number, int) else number.fileno()
            self._note("fsync", os.readlink(f"/proc/self/fd/{file}"))
            fsync(number)

        def serialized(tensors: Any, path: Any, *args: Any, **options: Any) -> None:
            self._note("serialize", path)
            serialize(tensors, path, *args, **options)
            if self._is_at("torn"):
                half = os.path.getsize(path) // 2
                os.truncate(path, half)
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fsynced
        sqlite3.connect = functools.partial(connect, factory=Connection)
        safetensors.torch.serialize_file = serialized  # pyright: ignore[reportAttributeAccessIssue]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: Any) -> None:
        if self._busy:
            return
        match event:
            case "open" if _is_write(*args):
                self._note("open", args[0])
            case "os.rename":
                self._note("rename", args[1])
            case "os.mkdir":
                self._note("mkdir", args[0])
            case "os.remove" | "os.rmdir":
                self._note(event[3:], _resolved(args[0], args[1]))
            case "shutil.rmtree":
                self._note("rmtree", args[0])
            case "subprocess.Popen" if ".partial-" in str(args[1]):
                self._note("process", next(a for a in args[1] if ".partial-" in str(a)))

    def _note(self, kind: str, path: Any) -> None:
        self._busy = True
        try:
            place = self._place(path)
            if place is None:
                return
            if kind in REMOVES and not os.path.lexists(path):
                if self.fault is not None and self.fault.kind == "EROFS" and self._has_begun:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fsdecode(path))
                return
            self.listed.append(Operation(kind, place))
            if self.fault is not None:
                self._fail(self.fault, kind, path)
        finally:
            self._busy = False

    def _place(self, path: Any) -> str | None:
        if isinstance(path, int):
            return None
        full = os.path.abspath(os.fsdecode(path))
        if not full.startswith(f"{self.folder}{os.sep}") or full.endswith(ENDED):
            return None
        parts = os.path.relpath(full, self.folder).split(os.sep)
        return os.sep.join(".partial-*" if ".partial-" in part else part for part in parts)

    @property
    def _has_begun(self) -> bool:
        return self.fault is not None and len(self.listed) > self.fault.at

    def _is_at(self, kind: str) -> bool:
        fault = self.fault
        return fault is not None and fault.kind == kind and len(self.listed) == fault.at + 1

    def _fail(self, fault: Fault, kind: str, path: Any) -> None:
        now = len(self.listed) - 1
        if now != fault.at and not (fault.goes_on and now > fault.at):
            return
        if fault.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        elif fault.kind == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.kind.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[fault.kind])
        elif fault.kind != "torn":
            number = getattr(errno, fault.kind)
            if kind == "serialize":
                from safetensors import SafetensorError

                reason = f"{os.strerror(number)} (os error {number})"
                raise SafetensorError(f"Error while serializing: I/O error: {reason}")
            if kind == "commit":
                full = number == errno.ENOSPC
                raise sqlite3.OperationalError(
                    "database or disk is full" if full else "attempt to write a readonly database"
                )
            raise OSError(number, os.strerror(number), os.fsdecode(path))


def _is_write(path: Any, mode: Any, flags: Any) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _resolved(path: Any, folder: int) -> str:
    """Of a path that is relative to an open folder, or of any other (-1)."""
    name = os.fsdecode(path)
    return name if folder < 0 else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)


def faults_at(listed: Sequence[Operation]) -> list[Fault]:
    """Each that can happen at one of these operations."""
    found = []
    for i, operation in enumerate(listed):
        found.append(Fault("killed", i))
        if operation.kind == "serialize":
            found.append(Fault("torn", i))
        if operation.kind == "process":
            continue
        found.append(Fault("EROFS", i, goes_on=True))
        if operation.kind in WRITES:
            found += [Fault("EACCES", i), Fault("ENOSPC", i)]
    return found
