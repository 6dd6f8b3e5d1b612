"""Files on disk: written whole or not at all, known by their hash, kept between runs."""

import ctypes
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from filelock import FileLock

from gen_accel.locks import removed
from gen_accel.paths import check_replaceable, expanded, real
from gen_accel.signals import unwinding

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PARTIAL, EARLIER, GUARD = ".partial-", "-earlier", ".lock"
LONG_SUFFIX = 20  # characters; no format has a suffix that long


class NoRoom(OSError):
    """Error for a full disk, a quota or a limit on the size of files.

    Args:
        path: file that was being written.
        needs: bytes that it needs; None where unknown.
    """

    def __init__(self, path: Path, needs: int | None, number: int | None) -> None:
        super().__init__(number, os.strerror(number or errno.ENOSPC), str(path))
        self.path, self.needs = path, needs

    def __str__(self) -> str:
        size = "" if self.needs is None else f", which needs {megabytes(self.needs)}"
        reason = (self.strerror or "").lower()
        return f"no room for {self.path}{size}: {reason}; what was there before is still there"

    def at(self, path: Path) -> "NoRoom":
        return NoRoom(path, self.needs, self.errno)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def file_sha256(path: Path) -> str:
    """Hash a file, read a part at a time; hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as indented JSON.

    numpy numbers and arrays become plain ones, paths become strings. JSON has no infinity, so
    an infinite number (PSNR of identical videos) becomes "Infinity", which `float()` reads back.

    Raises:
        TypeError: `data` holds something else that JSON does not know.
        OSError: `path` cannot be written.
    """
    text = json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(expanded(path)) as partial:
        # A file name that is not UTF-8 is written with JSON's escape.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def plain(value: Any) -> Any:
    """Convert `value` to what `write_json` writes and `json` reads back."""
    match value:
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case np.ndarray() | np.generic():
            return plain(value.tolist())
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case Path():
            return str(value)
    return value


def cache_folder() -> Path:
    """Folder of this user for compiled kernels and timings, kept between runs.

    A relative XDG_CACHE_HOME is ignored, as the XDG Base Directory Specification demands: the
    folder that a program starts in must not decide what it loads.
    """
    folder = platformdirs.user_cache_path("gen_accel", appauthor=False)
    return folder if folder.is_absolute() else expanded("~/.cache/gen_accel")


def make_cache_folder() -> Path:
    """Make `cache_folder`, writable by this user alone whatever the umask allows."""
    folder = cache_folder()
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    return folder


def distrust(about: os.stat_result, what: str | Path) -> str | None:
    """Say why another user may have written a file or folder, with the fix.

    None where only this user and root can. Covers POSIX access lists, whose upper bound shows as
    the rights of the group.
    """
    own = os.geteuid()
    if about.st_uid not in (0, own):
        return f"{what} belongs to user {about.st_uid}, not to {own} or root: remove it"
    if mode := stat.S_IMODE(about.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        others = "its group" if mode == stat.S_IWGRP else "every user"
        return f"{what} may be written by {others}: chmod go-w {what}"
    return None


def trusted_text(path: Path) -> str | None:
    """Text of a file in `cache_folder`; None where it cannot be read, or where `distrust` objects
    to it or its folder."""
    try:
        with path.open(encoding="utf-8") as file:
            known = os.fstat(file.fileno()), path.parent.stat()
            return None if any(distrust(about, path) for about in known) else file.read()
    except (OSError, ValueError):
        return None


def check_folder(folder: Path) -> None:
    """Make `folder`; raise OSError if that, or writing to it, fails."""
    if folder.exists() and not folder.is_dir():
        raise OSError(f"cannot write to folder {folder}: it is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permission bits do not show a read-only file system, so try.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to folder {folder}: {error}") from error


@contextmanager
def replacing(path: Path, *, needs: int | None = None) -> Iterator[Path]:
    """Yield a new path beside `path`, with its suffix, which replaces `path` at the end.

    Write a file there, or a folder of frames. After an exception, Ctrl-C, SIGTERM or SIGHUP the
    new path is removed and `path` is unchanged. Leftovers of killed processes for `path` are
    removed first. A link at `path` stays, and the file that it leads to is replaced.

    Args:
        needs: bytes that will be written, for the message if there is no room.

    Raises:
        ValueError, OSError: `paths.check_replaceable` refuses `path`.
        NoRoom: the disk is full; replaces the OSError of the write.
    """
    check_replaceable(path)
    path = real(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_killed(path)
    stem = f"{_begin(path)}{secrets.token_hex(4)}"
    suffix = path.suffix if len(path.suffix) < LONG_SUFFIX else ""
    partial, earlier = path.with_name(stem + suffix), path.with_name(stem + EARLIER)
    guard = FileLock(path.with_name(stem + GUARD))  # held as long as this process writes
    with unwinding():
        try:
            while not os.path.exists(guard.lock_file):
                guard.release()  # another process cleared it in between
                guard.acquire()
            yield partial
            if partial.is_dir() and path.is_dir():  # which no rename can replace
                if _exchange(partial, path):
                    return
                path.rename(earlier)
            os.replace(partial, path)
        except NoRoom as error:
            if not error.path.is_relative_to(partial):
                raise
            raise error.at(path / error.path.relative_to(partial)) from None
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise NoRoom(path, needs, error.errno) from error
        finally:
            if earlier.exists() and not path.exists():
                earlier.rename(path)
            _remove(earlier)
            _remove(partial)
            _remove(Path(guard.lock_file))
            guard.release()


@contextmanager
def room_told(path: Path) -> Iterator[None]:
    """Raise NoRoom, which names `path`, where a full disk stops what runs inside. The error of a
    write, unlike the error of an open, names no file."""
    try:
        yield
    except OSError as error:
        if isinstance(error, NoRoom) or error.errno not in FULL:
            raise
        raise NoRoom(path, None, error.errno) from error


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths at once, so that neither is ever missing. False if the system or the file
    system cannot."""
    try:
        exchange = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return exchange(here, os.fsencode(one), here, os.fsencode(other), both) == 0


def clear_killed(path: Path) -> None:
    """Remove half-written files that killed processes left for `path`, and put back the original
    that they had moved aside."""
    _clear(path.parent, _begin(path), path)


def is_begun(path: Path) -> bool:
    """Whether a file or folder for `path` is half written."""
    return any(path.parent.glob(f"{_begin(path)}*"))


def clear_partial(folder: Path) -> None:
    """Remove half-written files that killed processes left in `folder`. An original that was
    moved aside stays for `clear_killed`."""
    _clear(folder, PARTIAL, None)


def _clear(folder: Path, begin: str, path: Path | None) -> None:
    left: dict[str, list[Path]] = {}
    for one in sorted(folder.glob(f"{begin}*")):
        left.setdefault(PARTIAL + one.name[len(PARTIAL) :][:21], []).append(one)
    for stem, files in left.items():
        guard = folder / f"{stem}{GUARD}"
        if guard in files and not removed(guard):
            continue
        for one in files:
            if one.name.endswith(EARLIER):
                if path is None:
                    continue
                if not path.exists():
                    one.rename(path)
            _remove(one)


def flush(path: Path) -> None:
    """Flush a file to the disk itself, so that a rename does not outlive the content."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def folder_sha256(files: Iterable[Path]) -> str:
    """Hash names and bytes of files, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _begin(path: Path) -> str:
    """Common beginning of the names of half-written files for `path`: 12 hexadecimal digits of its
    name. Eight random ones follow, so that they are short for any name."""
    return f"{PARTIAL}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}-"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
