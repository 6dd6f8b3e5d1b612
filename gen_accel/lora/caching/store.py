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
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gen_accel.io import NoRoom, fields_of, file_sha256, flush, parse_json, replacing

if TYPE_CHECKING:
    from typing_extensions import Self

    from gen_accel.pipelines.generation.progress import Progress

DATABASE, VERSION = "cache.db", 4
MOST_MANIFEST = 256 << 20  # characters; with first frames, a key of each clip is among them
EARLIER = "manifest.json"  # of versions 1 and 2
SHARD_BYTES = 256 * 2**20
SHARD_TENSORS = 4096  # most in a shard, for tensors so small that their names weigh more
SHARD_SECONDS = 300.0  # most work that a killed run loses, beside the clip under way
FACT_SECONDS = 5.0  # of facts that a killed run loses
SHARD_NAME = re.compile(r"shard-([0-9a-f]{64})\.safetensors")
SETTLED = 2 * 10**9  # nanoseconds after which another change would show in a file's times
PATIENCE = 60.0  # seconds to wait for another process's transaction

SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS manifest (fields TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS entries (
    number INTEGER PRIMARY KEY, place TEXT NOT NULL, fields TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS shards (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS tensors (
    key TEXT PRIMARY KEY, names TEXT NOT NULL, shard INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, fact TEXT NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {VERSION};
COMMIT;
"""

Fact = Callable[[str], Any]  # key to what an earlier run found out; None for nothing


class Database:
    """Database of a cache, whose errors name its file and what to do.

    Args:
        writes: make the database if it is missing.

    Raises:
        FileNotFoundError: no cache in the folder.
        ValueError: a cache of another version, or a damaged database.
        OSError: the file cannot be read or written, or is in use for longer than a minute.
    """

    def __init__(self, folder: Path, *, writes: bool = False) -> None:
        self.folder, self._path, self._lock = folder, folder / DATABASE, threading.RLock()
        if not self._path.exists() and (folder / EARLIER).exists():
            raise ValueError(
                f"{folder} is a cache of an earlier version, whose files are read no more: remove "
                "it, or take another folder, and cache again"
            )
        if not (writes or self._path.is_file()):
            raise FileNotFoundError(f"{self._path} is missing; cache writes it")
        # A reader needs the right to write too, to undo what a killed run had begun to write.
        paths = [folder, *([self._path] if self._path.exists() else [])]
        mode = "rwc" if writes else "rw" if all(os.access(p, os.W_OK) for p in paths) else "ro"
        with self._used():
            address = f"{self._path.absolute().as_uri()}?mode={mode}"
            self._db = sqlite3.connect(
                address, timeout=PATIENCE, uri=True, check_same_thread=False
            )
            [version] = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0 and writes:
                self._db.executescript(SCHEMA)
                version = VERSION
        if version not in (0, VERSION):
            raise ValueError(
                f"{self._path} has version {version}, not {VERSION}: remove {folder}, or take "
                "another folder, and cache again"
            )
        self._is_empty = version == 0  # of a run that was killed at once

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _used(self) -> Iterator[None]:
        """Let one thread at a time use the database; raise its errors as sentences."""
        try:
            with self._lock:
                yield
        except sqlite3.ProgrammingError:
            raise
        except (sqlite3.DatabaseError, OverflowError) as error:
            if not isinstance(error, sqlite3.OperationalError) or "no such" in str(error):
                raise self.damaged(error) from error
            if "full" in str(error):
                raise NoRoom(self._path, None, errno.ENOSPC) from error
            raise OSError(f"{self._path} cannot be read or written: {error}") from error

    def damaged(self, why: object) -> ValueError:
        """Error for a damaged database, with what to do."""
        return ValueError(
            f"{self._path} is damaged ({why}): remove this file and cache again, which takes up "
            "the shards beside it"
        )

    def rows(self, asked: str, *values: object) -> list[tuple[Any, ...]]:
        """Run one statement of SQL. Returns all rows of its result."""
        with self._used():
            return self._db.execute(asked, values).fetchall()

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Read the state of one moment inside the context, while writers wait."""
        self.rows("BEGIN")
        try:
            yield
        finally:
            self._db.rollback()

    def manifest(self) -> dict[str, Any] | None:
        """Read the manifest of the last finished run; None without one."""
        found = [] if self._is_empty else self.rows("SELECT fields FROM manifest")
        if not found:
            return None
        try:
            held = parse_json(found[0][0], self._path, most=MOST_MANIFEST)
            return fields_of(held, self._path)
        except ValueError as error:
            raise self.damaged(error) from error

    def fact(self, key: str) -> Any:
        """Return what a run remembered under a key; None for nothing."""
        found = self.rows("SELECT fact FROM facts WHERE key = ?", _text(key))
        return json.loads(found[0][0]) if found else None

    def shard_of(self, key: str) -> tuple[list[str], Path]:
        """Return the names of a key's tensors, and the shard that holds them.

        Raises KeyError for a key without tensors.
        """
        asked = "SELECT names, shards.name FROM tensors JOIN shards ON id = shard WHERE key = ?"
        for names, shard in self.rows(asked, key):
            return names.split(" "), self.folder / shard
        raise KeyError(key)


def is_finished(folder: Path) -> bool:
    """Whether a run of `cache` has finished in the folder. Raises as `Database` does."""
    if not (folder / DATABASE).exists() and not (folder / EARLIER).exists():
        return False
    with Database(folder) as db:
        return db.manifest() is not None


class Store(Database):
    """Writer of a cache's folder.

    A context manager: pending tensors are written at its end, also after an exception.

    Args:
        shard_bytes: bytes of pending tensors at which a shard is written.
        bar: shows how far the check of the earlier shards is.

    Attributes:
        lost: names of shards that are missing or have other bytes than were written.

    Raises:
        ValueError, OSError: see `Database`.
    """

    def __init__(
        self, folder: Path, shard_bytes: int = SHARD_BYTES, bar: "Progress | None" = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, writes=True)
        self.shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes, self._pending_keys = 0, set[str]()
        self._written = self._remembered = time.monotonic()
        self.lost, self._lost_ids = (), "()"
        self._take_up(bar)

    def _take_up(self, bar: "Progress | None") -> None:
        """Check all shards, and take up shards that a killed run wrote before their rows."""
        listed = dict(self.rows("SELECT name, id FROM shards"))
        there = {path.name for path in self.folder.iterdir() if SHARD_NAME.fullmatch(path.name)}
        names, lost = sorted({*listed, *there}), []
        for name in names if bar is None else bar.track(names, description="checking"):
            path, digest = self.folder / name, SHARD_NAME.fullmatch(name)
            if digest is None or not path.is_file() or self.sha256(path) != digest[1]:
                lost += [name] if name in listed else []
            elif name not in listed:
                self._add(path, tensors_of(path))
        # Rows of lost shards stay until the run ends, so that readers are told of them.
        self.lost, self._lost_ids = tuple(lost), f"({', '.join(str(listed[n]) for n in lost)})"
        self.commit()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            super().close()

    def __contains__(self, key: str) -> bool:
        asked = f"SELECT 1 FROM tensors WHERE key = ? AND shard NOT IN {self._lost_ids}"
        return key in self._pending_keys or bool(self.rows(asked, key))

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
        names, shard = self.shard_of(key)
        with safe_open(shard, framework="pt") as file:
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
        with self._used():
            added = "INSERT OR REPLACE INTO shards (name, bytes) VALUES (?, ?)"
            shard = self._db.execute(added, (path.name, path.stat().st_size)).lastrowid
            rows = ((key, " ".join(sorted(each)), shard) for key, each in names.items())
            self._db.executemany("INSERT OR REPLACE INTO tensors VALUES (?, ?, ?)", rows)

    def commit(self) -> None:
        self._remembered = time.monotonic()
        with self._used():
            self._db.commit()

    def remember(self, key: str, fact: object) -> None:
        """Keep a fact that is fit for JSON. It is committed within seconds."""
        if self.fact(key) == fact:
            return
        self.rows("INSERT OR REPLACE INTO facts VALUES (?, ?)", _text(key), json.dumps(fact))
        if time.monotonic() - self._remembered >= FACT_SECONDS:
            self.commit()

    def sha256(self, path: Path) -> str:
        """Hash a file, read only if it changed since its hash was remembered."""
        digest, key = remembered_sha256(path, self.fact)
        if key is not None:
            self.remember(key, digest)
        return digest

    def finish(
        self,
        manifest: Mapping[str, object],
        keys: Iterable[str],
        entries: Iterable[Mapping[str, object]],
    ) -> int:
        """Commit entries and manifest, and delete the shards without a tensor of `keys`.

        Returns the number of entries that the cache held before and holds no more.
        """
        self.flush()
        digest = hashlib.sha256()
        with self._used(), self._db as db:  # which commits, or undoes all at an error
            before = {place for [place] in db.execute("SELECT place FROM entries")}

            def rows() -> Iterator[tuple[int, str, str]]:
                for number, entry in enumerate(entries):
                    place = f"{entry['name']} {entry['pixel_frames']} {entry.get('begin')}"
                    place, fields = _text(place), json.dumps(entry, sort_keys=True)
                    before.discard(place)
                    digest.update(entry_line(fields))
                    yield number, place, fields

            db.execute("DELETE FROM entries")
            db.executemany("INSERT INTO entries VALUES (?, ?, ?)", rows())
            about = {"entries": digest.hexdigest(), **manifest}
            db.execute("DELETE FROM manifest")
            db.execute("INSERT INTO manifest VALUES (?)", (json.dumps(about),))
            asked = "SELECT shard FROM tensors WHERE key = ?"
            used = {db.execute(asked, (key,)).fetchone() for key in keys}
            for shard in [*db.execute("SELECT id FROM shards")]:
                if shard not in used:
                    db.execute("DELETE FROM shards WHERE id = ?", shard)
            db.execute("DELETE FROM tensors WHERE shard NOT IN (SELECT id FROM shards)")
        kept = {name for [name] in self.rows("SELECT name FROM shards")}
        for path in self.folder.iterdir():
            if SHARD_NAME.fullmatch(path.name) and path.name not in kept:
                path.unlink(missing_ok=True)
        return len(before)


def entry_line(fields: str) -> bytes:
    """Bytes of an entry in the hash of all entries."""
    return f"{fields}\n".encode()


def _text(text: str) -> str:
    """Text as sqlite takes it; a file name may hold bytes that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def file_key(path: Path) -> tuple[str, bool]:
    """Return the key of a file's hash, of its place, size and times, and whether it may be kept.

    A file that changed within the clock's step may change again without another time.
    """
    about = path.stat()
    changed = about.st_mtime_ns if os.name == "nt" else about.st_ctime_ns
    key = f"file {path.absolute()} {about.st_size} {about.st_mtime_ns} {changed}"
    return key, changed + SETTLED < time.time_ns()


def remembered_sha256(path: Path, fact: Fact) -> tuple[str, str | None]:
    """Hash a file, read only if it changed since its hash was remembered.

    Returns the hash, and the key to keep it by if it is new and may be kept.
    """
    key, lasts = file_key(path)
    known = fact(key)
    if isinstance(known, str):
        return known, None
    return file_sha256(path), key if lasts else None


def opened(shard: Path) -> safe_open:
    """Open a shard. Raises OSError or ValueError for one that is missing or damaged."""
    try:
        return safe_open(shard, framework="pt")
    except FileNotFoundError:
        raise FileNotFoundError(f"{shard} is missing: cache again") from None
    except SafetensorError as error:
        raise ValueError(f"{shard} is damaged: cache again") from error


def tensors_of(path: Path) -> list[str]:
    """Read the names of a shard's tensors. Raises ValueError for a file that is no shard."""
    with opened(path) as file:
        names = list(file.keys())
    if not all("." in name for name in names):
        raise ValueError(f"{path} is no shard of a cache: cache again")
    return names
