"""Latent cache on disk: tensors in safetensors shards, all else in a sqlite database.

The folder holds

- `shard-HASH.safetensors`, named by the hash of its bytes. A tensor is called `key.name`; the key
  is a hash of all inputs that the tensor depends on;
- `cache.db`: the shard of each key, the entries and the manifest of the last finished run, and
  facts that take time to find, such as hashes and lengths of clips.

One process writes, under a lock on the folder; others may read meanwhile. A shard is flushed to
the disk before its rows are committed, and entries and manifest change together in the last
transaction of a run. A process that is killed at any moment therefore leaves the earlier cache
and each whole shard. The next run takes up shards without rows, by the names in their headers.
The journal is a rollback journal: a write-ahead log works neither on network drives nor in
read-only folders.
"""

import errno
import hashlib
import json
import marshal
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from gen_accel.io import PARTIAL, NoRoom, fields_of, file_sha256, flush, parse_json, replacing

if TYPE_CHECKING:
    from gen_accel.pipelines.generation.progress import Progress

DATABASE, VERSION = "cache.db", 3
EARLIER = "manifest.json"  # of versions 1 and 2
SHARD_BYTES = 256 * 2**20
SHARD_TENSORS = 4096  # most in a shard, for tensors so small that their names weigh more
SHARD_SECONDS = 300.0  # most work that a killed run loses, beside the clip under way
FACT_SECONDS = 5.0  # of facts that a killed run loses
SHARD_NAME = re.compile(r"shard-([0-9a-f]{64})\.safetensors")
MOST_HEADER = 100 * 10**6  # bytes, as in safetensors itself
SETTLED = 2 * 10**9  # nanoseconds after which another change would show in a file's times
PATIENCE = 60.0  # seconds to wait for another process's transaction
ROWS_TOGETHER = 256

SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS manifest (fields TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS shards (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS tensors (
    key TEXT PRIMARY KEY, names TEXT NOT NULL, shard INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (
    run INTEGER, number INTEGER, place TEXT NOT NULL, frames INTEGER NOT NULL,
    height INTEGER NOT NULL, width INTEGER NOT NULL, fields TEXT NOT NULL,
    PRIMARY KEY (run, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, fact TEXT NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {VERSION};
COMMIT;
"""

Row = TypeVar("Row")


def connect(folder: Path, *, writes: bool = False) -> sqlite3.Connection:
    """Open the database of a cache.

    Raises:
        FileNotFoundError: no cache in the folder.
        ValueError: a cache of another version, or a damaged database.
    """
    path = folder / DATABASE
    if not path.exists() and (folder / EARLIER).exists():
        raise ValueError(
            f"{folder} is a cache of an earlier version, whose files are read no more: remove it, "
            "or take another folder, and cache again"
        )
    if not (writes or path.is_file()):
        raise FileNotFoundError(f"{path} is missing; cache writes it")
    # A reader needs the right to write too, to undo what a killed run had begun to write.
    may_write = os.access(folder, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
    mode = "rwc" if writes else "rw" if may_write else "ro"
    with sentences(path):
        address = f"{path.absolute().as_uri()}?mode={mode}"
        db = sqlite3.connect(address, PATIENCE, uri=True, check_same_thread=False)
        [version] = db.execute("PRAGMA user_version").fetchone()
        if version == 0 and writes:
            db.executescript(SCHEMA)
    if version not in (0, VERSION):
        raise ValueError(
            f"{path} has version {version}, not {VERSION}: remove {folder}, or take another "
            "folder, and cache again"
        )
    return db


@contextmanager
def sentences(path: Path) -> Iterator[None]:
    """Raise the errors of sqlite with the file and what to do.

    Raises:
        NoRoom: the disk is full.
        OSError: the file cannot be read or written, or is in use for longer than a minute.
        ValueError: it is damaged.
    """
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise NoRoom(path, None, errno.ENOSPC) from error
        if "no such" in str(error):  # table or column
            raise damaged(path, error) from error
        raise OSError(f"{path} cannot be read or written: {error}") from error
    except (sqlite3.DatabaseError, OverflowError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, why: object) -> ValueError:
    """Error for a damaged database, with what to do."""
    return ValueError(
        f"{path} is damaged ({why}): remove this file and cache again, which takes up the shards "
        "beside it"
    )


def is_finished(folder: Path) -> bool:
    """Whether a run of `cache` has finished in the folder.

    Raises ValueError and OSError as `connect` does.
    """
    if not (folder / DATABASE).exists() and not (folder / EARLIER).exists():
        return False
    db = connect(folder)
    try:
        with sentences(folder / DATABASE):
            [version] = db.execute("PRAGMA user_version").fetchone()
            return version == VERSION and _manifest(db) is not None
    finally:
        db.close()


def read_manifest(db: sqlite3.Connection, folder: Path) -> dict[str, Any]:
    """Read the manifest of the last finished run. Raises FileNotFoundError without one."""
    with sentences(folder / DATABASE):
        [version] = db.execute("PRAGMA user_version").fetchone()
        found = _manifest(db) if version else None
    if found is None:
        raise FileNotFoundError(f"{folder} holds no finished cache: cache again")
    try:
        return fields_of(parse_json(found, folder / DATABASE), folder / DATABASE)
    except ValueError as error:
        raise damaged(folder / DATABASE, error) from error


def _manifest(db: sqlite3.Connection) -> str | None:
    found = db.execute("SELECT fields FROM manifest").fetchone()
    return None if found is None else found[0]


class Store:
    """Writer of a cache's folder.

    A context manager: pending tensors are written at its end, also after an exception.

    Args:
        shard_bytes: bytes of pending tensors at which a shard is written.
        bar: shows how far the check of the earlier shards is.

    Attributes:
        damaged: names of shards that are missing or have other bytes than were written.

    Raises:
        ValueError, OSError: see `connect`.
    """

    def __init__(
        self, folder: Path, shard_bytes: int = SHARD_BYTES, bar: "Progress | None" = None
    ) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / DATABASE
        self._db, self._lock = connect(folder, writes=True), threading.RLock()
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes, self._pending_keys = 0, set[str]()
        self._written = self._remembered = time.monotonic()
        self._rows: list[Rows] = []
        self.damaged, self._lost = (), "()"
        self._take_up(bar)

    def _take_up(self, bar: "Progress | None") -> None:
        """Check all shards, and take up those that a killed run wrote before their rows."""
        with self._writing() as db:
            listed = dict(db.execute("SELECT name, id FROM shards"))
        there = {path.name for path in self.folder.iterdir() if SHARD_NAME.fullmatch(path.name)}
        names, lost = sorted({*listed, *there}), []
        for name in names if bar is None else bar.track(names, description="checking"):
            path, digest = self.folder / name, SHARD_NAME.fullmatch(name)
            if digest is None or not path.is_file() or self.sha256(path) != digest[1]:
                lost += [name] if name in listed else []
            elif name not in listed:
                self._add(path, tensors_of(path))
        self.damaged = tuple(lost)
        # Their rows stay until the run ends, so that readers are told of them.
        self._lost = f"({', '.join(str(listed[name]) for name in lost)})"
        self.commit()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.flush()
        finally:
            for rows in self._rows:
                rows.close()
            self._db.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, sentences(self._path):
            yield self._db

    def __contains__(self, key: str) -> bool:
        if key in self._pending_keys:
            return True
        with self._writing() as db:
            asked = f"SELECT 1 FROM tensors WHERE key = ? AND shard NOT IN {self._lost}"
            return db.execute(asked, (key,)).fetchone() is not None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors; write a shard when it is full or has waited for five minutes."""
        added = {f"{key}.{name}": x.contiguous().clone() for name, x in tensors.items()}
        self._pending |= added
        self._pending_keys.add(key)
        self._pending_bytes += sum(x.nbytes for x in added.values())
        waited = time.monotonic() - self._written
        full = self._pending_bytes >= self.shard_bytes or len(self._pending) >= SHARD_TENSORS
        if full or waited >= SHARD_SECONDS:
            self.flush()

    def read(self, key: str) -> dict[str, Tensor]:
        """Read the tensors of a key that is in a shard, by their names."""
        with self._writing() as db:
            names, shard = shard_of(db, key)
        with safe_open(self.folder / shard, framework="pt") as file:
            return {name: file.get_tensor(f"{key}.{name}") for name in names}

    def flush(self) -> None:
        """Write the pending tensors as a shard, and commit its rows and all facts."""
        self._written = time.monotonic()
        if self._pending:
            data = safetensors.torch.save(self._pending)
            path = self.folder / f"shard-{hashlib.sha256(data).hexdigest()}.safetensors"
            with replacing(path, needs=len(data)) as partial:
                partial.write_bytes(data)
                flush(partial)
            self._add(path, self._pending)
        self.commit()
        self._pending, self._pending_bytes, self._pending_keys = {}, 0, set()

    def _add(self, path: Path, tensors: Iterable[str]) -> None:
        names: dict[str, list[str]] = {}
        for tensor in tensors:
            key, name = tensor.split(".", 1)
            names.setdefault(key, []).append(name)
        with self._writing() as db:
            added = "INSERT OR REPLACE INTO shards (name, bytes) VALUES (?, ?)"
            shard = db.execute(added, (path.name, path.stat().st_size)).lastrowid
            rows = ((key, " ".join(sorted(each)), shard) for key, each in names.items())
            db.executemany("INSERT OR REPLACE INTO tensors VALUES (?, ?, ?)", rows)

    def commit(self) -> None:
        self._remembered = time.monotonic()
        with self._writing() as db:
            db.commit()

    def fact(self, key: str) -> Any:
        """Return the fact of a key; None without one."""
        with self._writing() as db:
            return read_fact(db, key)

    def remember(self, key: str, fact: Any) -> None:
        """Keep a fact that is fit for JSON. It is committed within seconds."""
        if self.fact(key) == fact:
            return
        with self._writing() as db:
            row = (_text(key), json.dumps(fact))
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", row)
        if time.monotonic() - self._remembered >= FACT_SECONDS:
            self.commit()

    def sha256(self, path: Path) -> str:
        """Hash a file, read only if it changed since its hash was remembered."""
        digest, key = remembered_sha256(path, self)
        if key is not None:
            self.remember(key, digest)
        return digest

    def rows(self, make: Callable[[tuple[Any, ...]], Row]) -> "Rows[Row]":
        """Make a list of rows on the disk, which goes with this object."""
        found = Rows(self.folder / f"{PARTIAL}{len(self._rows)}.db", make)
        self._rows.append(found)
        return found

    def finish(
        self,
        manifest: Mapping[str, Any],
        keys: Iterable[str],
        entries: Iterable[Mapping[str, Any]],
    ) -> int:
        """Commit entries and manifest, and delete the shards without a tensor of `keys`.

        The entries of the run before stay, for those who are reading them.

        Returns the number of entries that the cache held before and holds no more.
        """
        self.flush()
        with self._writing() as db:
            try:
                removed = self._finish(db, manifest, keys, entries)
            except BaseException:
                db.rollback()
                raise
            db.commit()
            kept = {name for [name] in db.execute("SELECT name FROM shards")}
        for path in self.folder.iterdir():
            if SHARD_NAME.fullmatch(path.name) and path.name not in kept:
                path.unlink(missing_ok=True)
        return removed

    def _finish(
        self,
        db: sqlite3.Connection,
        manifest: Mapping[str, Any],
        keys: Iterable[str],
        entries: Iterable[Mapping[str, Any]],
    ) -> int:
        before = _fields(_manifest(db))
        earlier = before.get("run", 0)
        run, digest = earlier + 1, hashlib.sha256()

        def rows() -> Iterator[tuple[Any, ...]]:
            for number, entry in enumerate(entries):
                fields = json.dumps(entry, sort_keys=True)
                row = entry["frames"], entry["height"], entry["width"], fields
                digest.update(entry_line(*row))
                place = f"{entry['name']} {entry['pixel_frames']} {entry.get('begin')}"
                yield run, number, _text(place), *row

        db.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", rows())
        places = "SELECT place FROM entries WHERE run = ?"
        counted = f"SELECT count(*) FROM ({places} EXCEPT {places})"
        [removed] = db.execute(counted, (earlier, run)).fetchone()
        if before.get("entries") == digest.hexdigest():
            db.execute("DELETE FROM entries WHERE run = ?", (run,))
            run = earlier
        else:
            db.execute("DELETE FROM entries WHERE run < ?", (earlier,))
        about = {"run": run, "entries": digest.hexdigest(), **manifest}
        db.execute("DELETE FROM manifest")
        db.execute("INSERT INTO manifest VALUES (?)", (json.dumps(about),))
        asked = "SELECT shard FROM tensors WHERE key = ?"
        used = {db.execute(asked, (key,)).fetchone() for key in keys}
        for shard in [*db.execute("SELECT id FROM shards")]:
            if shard not in used:
                db.execute("DELETE FROM shards WHERE id = ?", shard)
        db.execute("DELETE FROM tensors WHERE shard NOT IN (SELECT id FROM shards)")
        return removed


def entry_line(frames: int, height: int, width: int, fields: str) -> bytes:
    """Bytes of an entry in the hash of all entries."""
    return f"{frames} {height} {width} {fields}\n".encode()


def _fields(manifest: str | None) -> dict[str, Any]:
    try:
        return fields_of(parse_json(manifest or "{}", DATABASE), DATABASE)
    except ValueError:  # damaged, and about to be replaced
        return {}


def shard_of(db: sqlite3.Connection, key: str) -> tuple[list[str], str]:
    """Return the names of a key's tensors, and the shard that holds them.

    Raises KeyError for a key without tensors.
    """
    asked = "SELECT names, shards.name FROM tensors JOIN shards ON id = shard WHERE key = ?"
    found = db.execute(asked, (key,)).fetchone()
    if found is None:
        raise KeyError(key)
    return found[0].split(" "), found[1]


def read_fact(db: sqlite3.Connection, key: str) -> Any:
    found = db.execute("SELECT fact FROM facts WHERE key = ?", (_text(key),)).fetchone()
    return None if found is None else json.loads(found[0])


def _text(text: str) -> str:
    """Text as sqlite takes it; a file name may hold bytes that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


class Rows(Generic[Row]):
    """Rows in order, in a file of their own that goes at the end.

    Args:
        make: makes a row of a tuple of texts, numbers, containers of them and None.
    """

    def __init__(self, path: Path, make: Callable[[tuple[Any, ...]], Row]) -> None:
        self._path, self._make, self._count = path, make, 0
        path.unlink(missing_ok=True)
        with sentences(path):
            self._db = sqlite3.connect(path, isolation_level=None)
        try:
            with sentences(path):
                for words in ("journal_mode = OFF", "synchronous = OFF"):
                    self._db.execute(f"PRAGMA {words}")
                self._db.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, data BLOB)")
                self._db.execute("BEGIN")
        except OSError:
            self.close()
            raise

    def append(self, row: tuple[Any, ...]) -> None:
        with sentences(self._path):
            data = self._count, marshal.dumps(row)
            self._db.execute("INSERT INTO rows VALUES (?, ?)", data)
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        asked = "SELECT data FROM rows WHERE number BETWEEN ? AND ?"
        for first in range(0, self._count, ROWS_TOGETHER):
            with sentences(self._path):
                found = self._db.execute(asked, (first, first + ROWS_TOGETHER - 1)).fetchall()
            for [data] in found:
                yield self._make(marshal.loads(data))

    def close(self) -> None:
        self._db.close()
        self._path.unlink(missing_ok=True)


class EmptyStore:
    """A cache that knows nothing, for workers that survey a clip."""

    def fact(self, key: str) -> None:
        return None

    def __contains__(self, key: str) -> bool:
        return False


def file_key(path: Path) -> tuple[str, bool]:
    """Return the key of a file's hash, of its place, size and times, and whether it may be kept.

    A file that changed within the clock's step may change again without another time.
    """
    about = path.stat()
    changed = about.st_mtime_ns if os.name == "nt" else about.st_ctime_ns
    key = f"file {path.absolute()} {about.st_size} {about.st_mtime_ns} {changed}"
    return key, changed + SETTLED < time.time_ns()


def remembered_sha256(path: Path, store: Store | EmptyStore) -> tuple[str, str | None]:
    """Hash a file, read only if it changed since the store learnt its hash.

    Returns the hash, and the key to keep it by if it is new and may be kept.
    """
    key, lasts = file_key(path)
    known = store.fact(key)
    if isinstance(known, str):
        return known, None
    return file_sha256(path), key if lasts else None


def tensors_of(path: Path) -> list[str]:
    """Read the names of a shard's tensors. Raises ValueError for a file that is no shard."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size <= MOST_HEADER else b""
    try:
        found = fields_of(parse_json(header.decode(), path), path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: cache again") from error
    names = [name for name in found if name != "__metadata__"]
    if not all("." in name for name in names):
        raise ValueError(f"{path} is no shard of a cache: cache again")
    return names
