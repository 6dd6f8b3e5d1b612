"""Files on disk: written whole or not at all, known by their hash, kept between runs."""

import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


def file_sha256(path: Path) -> str:
    """Hexadecimal; the file is read a part at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as indented JSON.

    numpy numbers and arrays become plain ones, paths become strings. JSON has no infinity, so
    that of identical videos becomes the string "Infinity", which `float()` reads back.

    Raises:
        TypeError: `data` holds something else that JSON does not know.
        OSError: `path` cannot be written.
    """
    text = json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    match value:
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case np.ndarray() | np.generic():
            return _plain(value.tolist())
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case Path():
            return str(value)
    return value


def cache_folder() -> Path:
    """What is kept between runs, for this user: kernels compiled and measured."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gen_accel"


def check_folder(folder: Path) -> None:
    """Make `folder`; raise OSError if that, or writing to it, fails."""
    if folder.exists() and not folder.is_dir():
        raise OSError(f"cannot write to folder {folder}: it is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell of read-only file systems, so try.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to folder {folder}: {error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new name beside `path`, with its suffix, that takes the place of `path` at the end.

    Write a file there, or a folder of frames. After an exception it is gone, and what was at
    `path` is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = f".partial-{secrets.token_hex(8)}"
    partial, earlier = path.with_name(stem + path.suffix), path.with_name(f"{stem}-earlier")
    try:
        yield partial
        if partial.is_dir() and path.is_dir():  # which no rename can replace
            path.rename(earlier)
        os.replace(partial, path)
    finally:
        if earlier.exists() and not path.exists():
            earlier.rename(path)
        shutil.rmtree(earlier, ignore_errors=True)
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
