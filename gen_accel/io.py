"""Files on disk: text, JSON and safetensors, read with the file's name in each error, and written
whole or not at all.

A file from another program, a hand or a crash may hold anything: fields of JSON are read by
`typed`, so that a wrong one is refused by name and never met further on.
"""

import ctypes
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import platformdirs
from filelock import FileLock

from gen_accel.parsing import fits, shown
from gen_accel.paths import OF_BLOCKS, check_input, check_replaceable, expanded, real
from gen_accel.process import removed, unwinding

if TYPE_CHECKING:
    from torch import Tensor

ENCODING = "utf-8-sig"  # without the byte order mark that some editors write
MOST_TEXT = 4 << 20  # characters of a file; JSON of so many takes at most 200 MB when parsed
DEEPEST = 64  # levels of lists and names with values in JSON and YAML
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PARTIAL, EARLIER, GUARD = ".partial-", "-earlier", ".lock"
LONG_SUFFIX = 20  # characters; no format has a suffix that long
SYSTEM_ERROR = re.compile(r"os error (\d+)")  # as safetensors, written in Rust, words it
REQUIRED = object()
KINDS = {
    dict: "names with values",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def read_text(path: str | Path) -> str:
    """Read the text of the file at `path`, with each line ending as "\\n".

    Raises:
        OSError: the file cannot be read.
        ValueError: `paths.check_input` refuses it, the text is not UTF-8, or is too long.
    """
    check_input(path)
    try:
        with expanded(path).open(encoding=ENCODING) as file:
            text = file.read(MOST_TEXT + 1)
    except UnicodeDecodeError as error:
        raise not_text(path, error) from error
    check_length(text, path)
    return text


def read_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """Read a file of any length by lines, each with its place, "line 3 of PATH", before it.

    Raises:
        OSError: the file cannot be read.
        ValueError: as `read_text`, for a line.
    """
    check_input(path)
    with expanded(path).open("rb") as file:
        lines = iter(lambda: file.readline(MOST_TEXT + 1), b"")
        for number, line in enumerate(lines, 1):
            where = f"line {number} of {path}"
            try:
                text = line.decode(ENCODING)
            except UnicodeDecodeError as error:
                raise not_text(where, error) from error
            check_length(text, where)
            yield where, text


def check_length(text: str, origin: object, most: int = MOST_TEXT) -> None:
    """Raise ValueError, which names the file `origin`, for more text than such a file may hold."""
    if len(text) > most:
        raise ValueError(
            f"{origin} holds more than {most >> 20} MB of text, the most that is read: give "
            "a shorter file"
        )


def not_text(path: str | Path, error: UnicodeDecodeError) -> ValueError:
    """Make the error for a file that is not UTF-8, with the byte that is wrong."""
    byte = error.object[error.start]
    return ValueError(
        f"{path} is not UTF-8 text, from byte {error.start} (0x{byte:02x}) on: save it as UTF-8"
    )


def read_json(path: str | Path) -> Any:
    """Parse the file at `path`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the text is not UTF-8, not JSON, or nested too deeply.
    """
    return parse_json(read_text(path), path)


def parse_json(text: str, origin: object, *, most: int = MOST_TEXT) -> Any:
    """Parse `text`, of at most `most` characters, which came from the file `origin`.

    Raises ValueError, which names `origin`, for text that is not JSON, is too long, is nested too
    deeply, or holds a number of too many digits.
    """
    check_length(text, origin, most)
    try:
        found = json.loads(text)
    except RecursionError:
        raise too_deep(origin) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{origin} is no JSON from {where} on") from error
    except ValueError as error:  # of Python's limit on digits
        raise ValueError(f"{origin} holds a number of too many digits to be read") from error
    inner = [found]
    for _ in range(DEEPEST + 1):
        holders = [one for one in inner if isinstance(one, dict | list)]
        if not holders:
            return found
        inner = [x for one in holders for x in (one.values() if isinstance(one, dict) else one)]
    raise too_deep(origin)


def too_deep(origin: object) -> ValueError:
    """Make the error for JSON or YAML of too many levels."""
    return ValueError(f"{origin} is nested too deep: it may have at most {DEEPEST} levels")


def read_fields(path: str | Path) -> dict[str, Any]:
    """Parse a file that must hold a JSON object."""
    return fields_of(read_json(path), path)


def read_index(file: Path) -> dict[str, Any]:
    """Read an index: the class of a pipeline, the library and class of each of its parts, and
    plain values. Classes of `published.PIPELINES` and `PARTS` are read as those of diffusers."""
    from gen_accel.published import PARTS, PIPELINES  # which attaching a method does not need

    found = read_fields(file)
    own = found.get("_class_name")
    if isinstance(own, str) and own in PIPELINES:
        found["_class_name"] = PIPELINES[own]
    for name, value in found.items():
        if isinstance(value, list) and len(value) == 2 and value[1] in [*PARTS]:
            found[name] = [value[0], PARTS[value[1]]]
    if file.name != OF_BLOCKS:
        return found
    parts = {name: value[:2] for name, value in found.items() if _is_part(value)}
    return {name: one for name, one in found.items() if not isinstance(one, list)} | parts


def places_in(file: Path) -> dict[str, tuple[str, str]]:
    """Map the parts of a pipeline of blocks to where its index says that they lie: a folder or a
    repository, and a folder in it. What lies beside the index is taken from there."""
    found = {}
    for name, value in read_fields(file).items():
        if _is_part(value):
            folder = str(value[2].get("subfolder") or name)
            here = (file.parent / folder).is_dir()
            place = value[2].get("pretrained_model_name_or_path")
            found[name] = str(file.parent if here or not place else place), folder
    return found


def _is_part(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and isinstance(value[2], dict)


def fields_of(data: object, origin: object) -> dict[str, Any]:
    """Return `data` if it is a dict; raise ValueError, which names `origin`, otherwise."""
    if not isinstance(data, dict):
        raise ValueError(f"{origin} must hold {KINDS[dict]}, got {shown(data)}")
    return data


def typed(
    data: Mapping[str, Any], name: str, *kinds: type, origin: object, default: object = REQUIRED
) -> Any:
    """Return `data[name]`, checked to be of one of `kinds`, see `parsing.fits`.

    Args:
        origin: file that `data` came from.
        default: value of a missing field; without it, a missing field is an error.

    Raises ValueError, which names `origin`, the field and what came.
    """
    if name not in data:
        if default is REQUIRED:
            raise ValueError(f"{origin} has no {name}")
        return default
    value = data[name]
    fitting = (fits(value, x) if x in (int, float) else isinstance(value, x) for x in kinds)
    if not any(fitting):
        wanted = " or ".join(KINDS[kind] for kind in kinds)
        raise ValueError(f"{name} in {origin} must be {wanted}, got {shown(value)}")
    return value


class NoRoom(OSError):
    """Error for a full disk, a quota or a limit on the size of files.

    Args:
        path: file that was being written.
        needs: bytes that it needs; None if unknown.
    """

    def __init__(self, path: Path, needs: int | None, number: int | None) -> None:
        super().__init__(number, os.strerror(number or errno.ENOSPC), str(path))
        self.path, self.needs = path, needs

    def __str__(self) -> str:
        size = "" if self.needs is None else f", which needs {megabytes(self.needs)}"
        reason = (self.strerror or "").lower()
        return f"no room for {self.path}{size}: {reason}; what was there before is still there"


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def file_sha256(path: Path) -> str:
    """Hash a file, read a part at a time; hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def write_json(path: str | Path, data: object) -> None:
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


def plain(value: object) -> Any:
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


def save_tensors(
    tensors: Mapping[str, "Tensor"], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors on the CPU or elsewhere, contiguous or not. Equal ones become equal files.

    Raises:
        NoRoom: the disk is full, with the bytes that the file needs.
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    held = {name: x.detach().contiguous() for name, x in tensors.items()}
    try:
        save_file(held, path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        found = SYSTEM_ERROR.search(str(error))
        number = int(found[1]) if found else None
        if number in FULL:
            needs = sum(x.nbytes for x in held.values())
            raise NoRoom(path, needs, number) from error
        if number is not None:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise OSError(f"cannot write {path}: {error}") from error
    if metadata is not None and len(metadata) > 1:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file, whose writer keeps them in a random order, in that
    of their names."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the same names and values"
        file.seek(8)
        file.write(text.ljust(length))  # the tensors stay where they are


def read_tensors(
    path: Path, chosen: Callable[[list[str]], Iterable[str]] = list
) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Read tensors of a file, on the CPU, and its metadata.

    Args:
        chosen: returns the names of the tensors to read, given all. Default: all.

    Raises ValueError, which names the file, if it is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in chosen([*file.keys()])}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def tensors_sha256(tensors: Mapping[str, "Tensor"]) -> str:
    """Hash names, types, shapes and bytes of tensors on the CPU, in any order."""
    import torch

    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def not_finite(tensors: Mapping[str, "Tensor"]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [n for n, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()]


def check_finite(tensors: Mapping[str, "Tensor"], what: str) -> None:
    """Raise ValueError for tensors that hold NaN or infinity, which must not be written.

    Args:
        what: name of the tensors for the message, such as "the LoRA".
    """
    if wrong := not_finite(tensors):
        raise ValueError(
            f"{what} is not finite and is not written: {named(wrong)}; lower learning_rate, or "
            "use mixed_precision bf16 or no"
        )


def named(names: Iterable[str], few: int = 3) -> str:
    """Join the first few names, and say how many more there are."""
    names = list(names)
    more = f" and {len(names) - few} more" if len(names) > few else ""
    return ", ".join(names[:few]) + more


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

    None if only this user and root can. Covers POSIX access lists, whose upper bound shows as
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
    """Text of a file in `cache_folder`; None if it cannot be read, or if `distrust` objects
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
        reason = error.strerror or error  # whose file is one that nobody gave
        raise OSError(f"cannot write to folder {folder}: {reason}") from error


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
        OSError: the disk is read-only, or another fault; names `path` too.
    """
    given = path
    check_replaceable(path)
    path = real(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = f"{_begin(path)}{secrets.token_hex(4)}"
    suffix = path.suffix if len(path.suffix) < LONG_SUFFIX else ""
    partial, earlier = path.with_name(stem + suffix), path.with_name(stem + EARLIER)
    guard = FileLock(path.with_name(stem + GUARD))  # held as long as this process writes
    with unwinding():
        try:
            clear_killed(path)
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
            finally:
                if earlier.exists() and not path.exists():
                    earlier.rename(path)
                _remove(earlier)
                _remove(partial)
                _remove(Path(guard.lock_file))
                guard.release()
        except NoRoom as error:
            if not error.path.is_relative_to(partial):
                raise
            meant = path / error.path.relative_to(partial)
            raise NoRoom(meant, error.needs, error.errno) from None
        except OSError as error:
            if error.errno in FULL:
                raise NoRoom(path, needs, error.errno) from error
            if _begin(path) not in str(error.filename):
                raise
            raise OSError(error.errno, error.strerror, str(given)) from error


@contextmanager
def room_told(path: Path) -> Iterator[None]:
    """Raise NoRoom, which names `path`, if a full disk stops what runs inside. The error of a
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


def contents_sha256(path: Path) -> str:
    """Hash a file, or the names and bytes of the files in a folder."""
    if not path.is_dir():
        return file_sha256(path)
    digest = hashlib.sha256()
    for file in sorted(one for one in path.iterdir() if one.is_file()):
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _begin(path: Path) -> str:
    """Common beginning of the names of half-written files for `path`: 12 hexadecimal digits of its
    name. Eight random ones follow, so that they are short for any name."""
    return f"{PARTIAL}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}-"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):  # a disk that is read-only refuses to look
        path.unlink(missing_ok=True)
