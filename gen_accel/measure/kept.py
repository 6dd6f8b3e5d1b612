"""Measured figures, kept in files of the cache folder, and never from a busy machine."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from gen_accel.files import make_cache_folder, trusted_text, write_json
from gen_accel.json_files import fields_of, parse_json

T = TypeVar("T")

_BUSY: ContextVar[dict[tuple[Path, str], tuple[Any, str]] | None] = ContextVar(
    "busy", default=None
)


@contextmanager
def remembering() -> Iterator[None]:
    """Remember inside what was measured on a busy machine too, for who asks again and again."""
    before = _BUSY.set({})
    try:
        yield
    finally:
        _BUSY.reset(before)


def kept(
    path: Path,
    key: str,
    measure: Callable[[], T],
    *,
    what: str,
    valid: Callable[[Any], bool],
    again: bool = False,
) -> tuple[T, str]:
    """Return what the file holds under `key`, or measure it now and keep it.

    What is measured while others use the processor is returned and not kept.

    Args:
        what: is measured, for a warning.
        valid: whether a value of the file can be one of ours.
        again: measure even so.

    Returns:
        The value, and in words what was wrong with the measurement; "" for nothing.
    """
    known = _read(path)
    if not again and key in known and valid(known[key]):
        return known[key], ""
    memory = _BUSY.get()
    if memory is not None and not again and (path, key) in memory:
        return memory[path, key]
    busy = watched()
    value = measure()
    found = busy()
    if found is None:
        try:
            make_cache_folder()
            write_json(path, _read(path) | {key: value})
        except OSError as error:
            warnings.warn(f"cannot keep {what}: {error}", stacklevel=5)
    elif memory is not None:
        memory[path, key] = value, found
    return value, found or ""


def watched() -> Callable[[], str | None]:
    """Begin to watch the machine. The function returned says that others were busy since; None
    where they were not."""
    try:
        from gen_accel.measure.bystanders import Bystanders
    except ImportError:
        return _load
    return Bystanders().busy


def _load() -> str | None:
    """Tell from the load of the last minute, where psutil is missing."""
    cores = os.cpu_count() or 1
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # not on Windows
        return None
    return f"the machine was busy: a load of {load:.1f} on {cores} cores" if load > cores else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return fields_of(parse_json(trusted_text(path) or "{}", path), path)
    except ValueError:
        return {}  # not ours any more: it is only a cache
