"""Entries of a cache, read from their file one at a time."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from gen_accel.json_files import fields_of, parse_json, typed
from gen_accel.lora.caching.index import Homes
from gen_accel.lora.caching.shards import ENTRIES_NAME, MANIFEST, check_sizes, entry_lines
from gen_accel.values import check_fields, check_names, shown

SIZES = ("frames", "height", "width", "pixel_frames")
MOST = 2**31 - 1  # of a size
TOGETHER = 1024  # entries that are checked at once

Kind = TypeVar("Kind")


class Entries(Sequence[Kind], Generic[Kind]):
    """Entries in order; in memory are their sizes and places in the file.

    Args:
        manifest: fields of the cache's manifest, checked but for its entries.
        homes: shards of all keys.
        kind: the entries' dataclass.

    Attributes:
        sizes: (N, 4) int32, the columns `SIZES`.
        digest: hash over all entries and the manifest's fields that say how they are read.

    Raises:
        FileNotFoundError: the file of the entries is missing.
        ValueError: it has other bytes than were written, an entry is no `kind`, or names a key
            that no shard has.
    """

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], homes: Homes, kind: type[Kind]
    ) -> None:
        self._kind, self._origin = kind, folder / MANIFEST
        about = manifest["entries"]
        held = isinstance(about, list)  # in a manifest of version 1
        if not held:
            _check_about(folder, about)
        whole, bare = hashlib.sha256(), hashlib.sha256(b"[[")
        sizes, places, place = [np.empty((0, len(SIZES)), np.int32)], [np.zeros(1, np.int64)], 0
        checked = _Checked(kind, homes, self._origin)
        lines, kept = entry_lines(folder, manifest), []
        while some := [*islice(lines, TOGETHER)]:
            sizes.append(checked(some))
            for line in some:
                whole.update(line)
                bare.update((b", " if place else b"") + line.rstrip(b"\n"))
                place += len(line)
            places.append(places[-1][-1] + np.cumsum([len(line) for line in some]))
            if held:
                kept.append(b"".join(some))
        if not held and whole.hexdigest() != about["sha256"]:
            raise ValueError(f"{folder / about['file']} is damaged: cache again")
        rest = json.dumps([manifest[name] for name in ("empty", "causal", "fps")])
        bare.update(f"], {rest[1:]}".encode())
        self.digest = bare.hexdigest()
        self.sizes, self._places = np.concatenate(sizes), np.concatenate(places)
        self._read = _of_bytes(b"".join(kept)) if held else _of_file(folder / about["file"])

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Kind: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Kind, ...]: ...
    def __getitem__(self, index: int | slice) -> Kind | tuple[Kind, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"entries are {len(self)}, asked for is number {index}")
        first, end = self._places[index % len(self) :][:2].tolist()
        data = json.loads(self._read(first, end - first))
        return self._kind(**{k: tuple(x) if isinstance(x, list) else x for k, x in data.items()})

    def __iter__(self) -> Iterator[Kind]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(lambda x, y: x == y, self, other))

    __hash__: Any = None


class _Checked:
    """Sizes of lines that are sound entries."""

    def __init__(self, kind: type, homes: Homes, origin: Path) -> None:
        self._kind, self._homes, self._origin = kind, homes, origin
        self._keys = [one.name for one in fields(kind) if one.name.endswith(("_key", "_keys"))]
        self._forms: set[tuple[tuple[str, Any], ...]] = set()

    def __call__(self, lines: Sequence[bytes]) -> np.ndarray:
        entries = [self._entry(line) for line in lines]
        named = [
            (entry["name"], key)
            for entry in entries
            for name in self._keys
            if entry.get(name) is not None
            for key in _together(entry[name])
        ]
        for place in self._homes.missing([key for _, key in named]):
            name, key = named[place]
            raise ValueError(
                f"{self._origin} names tensors {shown(key)} of {name}, "
                "which no shard has: cache again into an empty folder"
            )
        sizes = [[entry[name] for name in SIZES] for entry in entries]
        for entry, row in zip(entries, sizes, strict=True):
            if not all(0 <= size <= MOST for size in row):
                raise ValueError(f"{entry['name']} in {self._origin} has no size: {shown(row)}")
        return np.array(sizes, np.int32).reshape(-1, len(SIZES))

    def _entry(self, line: bytes) -> dict[str, Any]:
        what = f"an entry of {self._origin}"
        data = fields_of(parse_json(line.decode("utf-8", "replace"), what), what)
        form = tuple(
            (name, tuple(map(type, value)) if isinstance(value, list) else type(value))
            for name, value in data.items()
        )
        if form not in self._forms:
            check_names(data, self._kind, what)
            check_fields(data, self._kind, what)
            self._forms.add(form)
        return data


def _together(keys: str | list[str]) -> list[str]:
    return [keys] if isinstance(keys, str) else keys


def _check_about(folder: Path, about: Any) -> None:
    what = f"entries in {folder / MANIFEST}"
    for name, kind in (("file", str), ("sha256", str), ("bytes", int)):
        typed(fields_of(about, what), name, kind, origin=what)
    if not ENTRIES_NAME.fullmatch(about["file"]):
        raise ValueError(f"file in {what} must be of cache, got {shown(about['file'])}")
    check_sizes(folder, {about["file"]: about})


def _of_bytes(data: bytes) -> Any:
    return lambda place, size: data[place : place + size]


def _of_file(path: Path) -> Any:
    """Return a reader of parts, which threads and forked processes may share."""
    file, lock = path.open("rb"), threading.Lock()

    def read(place: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(file.fileno(), size, place)
        with lock:
            file.seek(place)
            return file.read(size)

    return read
