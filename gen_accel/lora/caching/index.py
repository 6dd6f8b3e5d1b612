"""Indexes of a cache of many clips, which take tens of bytes a clip and not the clips themselves.

A text is known by sixteen bytes of its hash, so that millions of them lie in two arrays.
"""

import hashlib
import json
import marshal
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from gen_accel.files import replacing, room_told

FEWEST_FOLDED = 1024  # entries that are held apart before they are sorted in
ROWS_TOGETHER = 256  # rows of `Packed` in one compressed part
BYTES_TOGETHER, SECONDS_TOGETHER = 1 << 16, 5.0  # of new lines that a killed run loses
MISSING = -1

Row = TypeVar("Row")
Item = TypeVar("Item")


class Again(Generic[Item]):
    """What `make` makes, made anew each time that it is gone through."""

    def __init__(self, make: Callable[[], Iterable[Item]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Item]:
        return iter(self._make())


class Table:
    """Whole numbers by text, 24 bytes each; a set of texts where the numbers do not matter."""

    def __init__(self) -> None:
        self._names, self._numbers = np.empty(0, "S16"), np.empty(0, np.int64)
        self._recent: dict[bytes, int] = {}

    def __setitem__(self, text: str, number: int) -> None:
        self._recent[_name(text)] = number
        if len(self._recent) >= max(FEWEST_FOLDED, len(self._names) // 8):
            self._fold()

    def add(self, text: str) -> bool:
        """Add a text as to a set. Returns whether it is new."""
        if text in self:
            return False
        self[text] = 0
        return True

    def __contains__(self, text: str) -> bool:
        return self.get(text) != MISSING

    def __len__(self) -> int:
        self._fold()
        return len(self._names)

    def get(self, text: str) -> int:
        """Return the text's number, `MISSING` without one."""
        name = _name(text)
        found = self._recent.get(name)
        if found is not None:
            return found
        place = int(self._names.searchsorted(name))
        # numpy leaves out zeros at the end.
        if place == len(self._names) or self._names[place] != name.rstrip(b"\0"):
            return MISSING
        return int(self._numbers[place])

    def find(self, texts: Sequence[str]) -> np.ndarray:
        """Return `get` of each text, int64."""
        self._fold()
        wanted = np.array([_name(text) for text in texts], "S16")
        if not len(self._names):
            return np.full(len(wanted), MISSING, np.int64)
        places = np.searchsorted(self._names, wanted).clip(max=len(self._names) - 1)
        return np.where(self._names[places] == wanted, self._numbers[places], MISSING)

    def _fold(self) -> None:
        """Sort the recent entries into the arrays; of several for one text the last stays."""
        if not self._recent:
            return
        names = np.concatenate([self._names, np.array([*self._recent], "S16")])
        numbers = np.concatenate([self._numbers, np.array([*self._recent.values()], np.int64)])
        order = np.argsort(names, kind="stable")
        names, numbers = names[order], numbers[order]
        last = np.append(names[1:] != names[:-1], True)
        self._names, self._numbers, self._recent = names[last], numbers[last], {}


class Homes:
    """Shards that hold the tensors of each key; a tensor is called `key.name`."""

    def __init__(self) -> None:
        self._table = Table()
        self._places: list[dict[str, str]] = []
        self._numbers: dict[tuple[tuple[str, str], ...], int] = {}

    def add(self, shard: str, tensors: Iterable[str]) -> None:
        found: dict[str, dict[str, str]] = {}
        for tensor in tensors:
            key, name = tensor.split(".", 1)
            found.setdefault(key, {})[name] = shard
        for key, known in zip(found, self._table.find([*found]), strict=True):
            place = found[key] if known == MISSING else self._places[known] | found[key]
            self._table[key] = self._number(place)

    def __contains__(self, key: str) -> bool:
        return key in self._table

    def __getitem__(self, key: str) -> dict[str, str]:
        """Return the shard of each of the key's tensors, by the tensor's name."""
        number = self._table.get(key)
        if number == MISSING:
            raise KeyError(key)
        return self._places[number]

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Return the places in `keys` of those that no shard holds."""
        return np.flatnonzero(self._table.find(keys) == MISSING).tolist()

    def shards(self, keys: Iterable[str]) -> set[str]:
        """Return the shards that hold a tensor of `keys`."""
        numbers = {self._table.get(key) for key in keys} - {MISSING}
        return {shard for number in numbers for shard in self._places[number].values()}

    def _number(self, place: dict[str, str]) -> int:
        form = tuple(sorted(place.items()))
        if form not in self._numbers:
            self._numbers[form] = len(self._places)
            self._places.append(place)
        return self._numbers[form]


class Packed(Sequence[Row], Generic[Row]):
    """Rows that are gone through in order, held compressed.

    Args:
        make: makes a row of a tuple of texts, numbers, containers of them and None.
    """

    def __init__(self, make: Callable[[tuple[Any, ...]], Row]) -> None:
        self._make, self._count = make, 0
        self._parts: list[bytes] = []
        self._open: list[tuple[Any, ...]] = []
        self._last: tuple[int, list[tuple[Any, ...]]] = MISSING, []

    def append(self, row: tuple[Any, ...]) -> None:
        self._count += 1
        self._open.append(row)
        if len(self._open) == ROWS_TOGETHER:
            self._parts.append(zlib.compress(marshal.dumps(self._open), 1))
            self._open = []

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, index: int | slice) -> Row | tuple[Row, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(self._count)))
        if not -self._count <= index < self._count:
            raise IndexError(f"rows are {self._count}, asked for is number {index}")
        part, place = divmod(index % self._count, ROWS_TOGETHER)
        return self._make(self._rows(part)[place])

    def __iter__(self) -> Iterator[Row]:
        for part in range(len(self._parts) + 1):
            yield from map(self._make, self._rows(part))

    def _rows(self, part: int) -> list[tuple[Any, ...]]:
        if part == len(self._parts):
            return self._open
        last, rows = self._last
        if last != part:
            rows = marshal.loads(zlib.decompress(self._parts[part]))
            self._last = part, rows
        return rows


class Memo:
    """Facts that take time to find, by key, in a file of JSON lines.

    Lines are appended, and the last of several for one key counts. A line that a killed run left
    half written is passed over. In memory is only where each line begins. Threads may share it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock, self._used = threading.Lock(), Table()
        self._read()

    def get(self, key: str) -> Any:
        """Return the fact of `key`, None without one."""
        with self._lock:
            return self._known(key)

    def _known(self, key: str) -> Any:
        self._used.add(key)
        if key in self._new:
            return self._new[key]
        place = self._places.get(key)
        if place == MISSING or self._file is None:
            return None
        self._file.seek(place)
        found = _fact(self._file.readline())
        return found[1] if found is not None and found[0] == key else None

    def put(self, key: str, fact: Any) -> None:
        """Keep a fact, as JSON gives it back; it is written with others, or by `flush`."""
        with self._lock:
            if self._known(key) == fact:
                return
            self._new[key] = fact
            self._size += len(key)
            waited = time.monotonic() - self._since
        if self._size >= BYTES_TOGETHER or waited >= SECONDS_TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Write what is new. Raises NoRoom on a full disk."""
        with self._lock:
            self._since = time.monotonic()
            if not self._new:
                return
            lines = [_line([key, fact]) for key, fact in self._new.items()]
            place = append(self.path, lines)
            if self._file is None:
                self._file = self.path.open("rb")
            for key, line in zip(self._new, lines, strict=True):
                self._places[key] = place
                place += len(line)
            self._count += len(lines)
            self._new, self._size = {}, 0

    def shrink(self) -> None:
        """Write the file anew without what nobody asked for, where that is most of it."""
        self.flush()
        if self._count <= 2 * len(self._used) + FEWEST_FOLDED:
            return
        with self._lock:
            self.close()  # some systems replace no open file
            with replacing(self.path) as partial, partial.open("wb") as file:
                for place, line in _lines(self.path):
                    found = _fact(line)
                    if found and found[0] in self._used and self._places.get(found[0]) == place:
                        file.write(line)
            self._read()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> None:
        self._places, self._count = Table(), 0
        self._new: dict[str, Any] = {}
        self._size, self._since = 0, time.monotonic()
        self._file = self.path.open("rb") if self.path.is_file() else None
        if self._file is None:
            return
        for place, line in _lines(self.path):
            found = _fact(line)
            if found is not None:
                self._places[found[0]] = place
                self._count += 1


def append(path: Path, lines: Sequence[bytes]) -> int:
    """Add whole lines to a file. Returns where they begin; raises NoRoom on a full disk."""
    with room_told(path), path.open("ab+") as file:
        place = file.seek(0, 2)
        if place:
            file.seek(place - 1)
            if file.read(1) != b"\n":  # half a line, of a run that was killed
                file.write(b"\n")
                place += 1
        file.write(b"".join(lines))
        file.flush()
    return place


def _name(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _line(data: Any) -> bytes:
    return json.dumps(data).encode() + b"\n"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    place = 0
    with path.open("rb") as file:
        for line in file:
            yield place, line
            place += len(line)


def _fact(line: bytes) -> tuple[str, Any] | None:
    """Read a line; None where it is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, list) and len(found) == 2 and isinstance(found[0], str):
        return found[0], found[1]
    return None
