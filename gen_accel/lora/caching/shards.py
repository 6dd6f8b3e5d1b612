"""Tensors in a folder of safetensors files, with hashes, which survive a killed run.

A shard is named by the hash of its bytes, written under another name and renamed. Tensors are
called `key.name`; the key is a hash of all inputs that they depend on. The folder holds beside its
shards

- `manifest.json`, the last file that a run writes: the shards, and the file of the entries;
- `entries-HASH.jsonl`: the entries, a line each;
- `progress.jsonl`, of a run under way or killed: its shards, a line each. The run that follows
  goes on from there;
- `memo.jsonl`: what took time to find, such as the hashes and lengths of clips.

Neither of them is read or written as a whole, so that memory and time for a shard do not grow with
the number of clips. Folders of version 1, whose manifest and `progress.json` hold all of it, are
read too.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from gen_accel.files import file_sha256, replacing, write_json
from gen_accel.json_files import fields_of, parse_json, read_fields, typed
from gen_accel.lora.caching.index import Homes, Memo, append

if TYPE_CHECKING:
    from rich.progress import Progress

MANIFEST, PROGRESS, MEMO = "manifest.json", "progress.jsonl", "memo.jsonl"
OLD_PROGRESS = "progress.json"  # of version 1
VERSION, VERSIONS = 2, (1, 2)
SHARD_BYTES = 256 * 2**20
SHARD_TENSORS = 4096  # most in a shard, for tensors so small that their names weigh more
SHARD_SECONDS = 300.0  # most work that a killed run loses, beside the clip under way
SHARD_NAME = re.compile(r"shard-[0-9a-f]{64}\.safetensors")
ENTRIES_NAME = re.compile(r"entries-[0-9a-f]{64}\.jsonl")
MOST_HEADER = 100 * 10**6  # bytes, as in safetensors itself
SETTLED = 2 * 10**9  # nanoseconds after which another change would show in a file's times


class Shards:
    """The shards of a folder, to be read from and added to.

    A context manager: pending tensors are written at its end, also after an exception.

    Args:
        shard_bytes: bytes of pending tensors at which a shard is written.
        bar: shows how far the check of the earlier shards is.

    Attributes:
        files: sha256 and bytes of each shard, by the shard's name.
        clips: data about the clips that the caller keeps with the shards, by key.
        memo: other facts that the caller keeps there.
        damaged: names of shards that were listed but are missing or have other bytes.
    """

    def __init__(
        self, folder: Path, shard_bytes: int = SHARD_BYTES, bar: "Progress | None" = None
    ) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.files: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._found = {path.name for path in folder.iterdir()}
        self.memo = Memo(folder / MEMO)
        self.clips = Clips(self.memo)
        self._homes = Homes()
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes, self._pending_keys = 0, set[str]()
        self._since = time.monotonic()
        self._take_up(bar)

    def _take_up(self, bar: "Progress | None") -> None:
        """Find the shards that earlier runs left whole."""
        self._earlier = _read_or_none(self.folder / MANIFEST) or {}
        listed: dict[str, dict[str, Any]] = {}
        for known in (self._earlier, _read_or_none(self.folder / OLD_PROGRESS) or {}):
            listed |= _sound_shards(known, self.folder)
            clips = known.get("clips")  # of version 1
            for clip, about in clips.items() if isinstance(clips, dict) else ():
                if self.clips.get(clip) is None:
                    self.clips[clip] = about
        listed |= _progress(self.folder / PROGRESS)
        names = [*listed]
        for name in names if bar is None else bar.track(names, description="checking"):
            tensors = self._whole(name, listed[name])
            if tensors is not None:
                self.files[name] = {key: listed[name][key] for key in ("sha256", "bytes")}
                self._homes.add(name, tensors)
        self.damaged = tuple(sorted(set(listed) - set(self.files)))

    def _whole(self, name: str, about: dict[str, Any]) -> list[str] | None:
        """Return the names of a shard's tensors, None for a shard with other bytes."""
        path = self.folder / name
        if not path.is_file() or self._remembered(path) != about["sha256"]:
            return None
        try:
            return tensors_of(path)
        except ValueError:
            return None

    def _remembered(self, path: Path) -> str:
        digest, key = remembered_sha256(path, self.memo)
        if key is not None:
            self.memo.put(key, digest)
        return digest

    def __enter__(self) -> "Shards":
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
            self.memo.close()

    def __contains__(self, key: str) -> bool:
        return key in self._pending_keys or key in self._homes

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Add `tensors`; write a shard when it is full or has waited for five minutes."""
        added = {f"{key}.{name}": x.contiguous().clone() for name, x in tensors.items()}
        self._pending |= added
        self._pending_keys.add(key)
        self._pending_bytes += sum(x.nbytes for x in added.values())
        waited = time.monotonic() - self._since
        full = self._pending_bytes >= self.shard_bytes or len(self._pending) >= SHARD_TENSORS
        if full or waited >= SHARD_SECONDS:
            self.flush()

    def read(self, key: str) -> dict[str, Tensor]:
        """Read the tensors of a key that is in a shard, by their names after the key."""
        found = {}
        for name, shard in self._homes[key].items():
            with safe_open(self.folder / shard, framework="pt") as file:
                found[name] = file.get_tensor(f"{key}.{name}")
        return found

    def keep(self) -> None:
        """Write what was found out about clips, for a run that follows a killed one."""
        self.memo.flush()

    def flush(self) -> None:
        """Write the pending tensors as a shard, and list the shard in `progress.jsonl`."""
        self._since = time.monotonic()
        if self._pending:
            self._write()
        self.memo.flush()

    def _write(self) -> None:
        data = safetensors.torch.save(self._pending)
        digest = hashlib.sha256(data).hexdigest()
        name = f"shard-{digest}.safetensors"
        with replacing(self.folder / name, needs=len(data)) as partial:
            partial.write_bytes(data)
        self._found.add(name)
        self.files[name] = {"sha256": digest, "bytes": len(data)}
        about = {"version": VERSION, "shard": name, **self.files[name]}
        append(self.folder / PROGRESS, [json.dumps(about).encode() + b"\n"])
        self._homes.add(name, self._pending)
        self._pending, self._pending_bytes, self._pending_keys = {}, 0, set()

    def earlier_entries(self) -> Iterator[dict[str, Any]]:
        """Read the entries of the manifest that was there, up to the first that is damaged."""
        try:
            for line in entry_lines(self.folder, self._earlier):
                yield fields_of(parse_json(line.decode(), MANIFEST), MANIFEST)
        except (OSError, ValueError, KeyError, TypeError):
            return

    def finish(
        self,
        manifest: dict[str, Any],
        keys: Iterable[str],
        entries: Iterable[dict[str, Any]] = (),
    ) -> None:
        """Write the entries and the manifest, then delete the shards without a tensor of `keys`.

        Files that came into the folder since this run began belong to another run, and stay.

        Args:
            entries: gone through twice.
        """
        self.flush()
        used = self._homes.shards(keys)
        self.files = {name: about for name, about in self.files.items() if name in used}
        about = self._write_entries(entries)
        listed = {"version": VERSION, "shards": self.files, "entries": about}
        write_json(self.folder / MANIFEST, listed | manifest)
        for name in (PROGRESS, OLD_PROGRESS):
            (self.folder / name).unlink(missing_ok=True)
        for name in self._found - {*self.files, about["file"]}:
            if SHARD_NAME.fullmatch(name) or ENTRIES_NAME.fullmatch(name):
                (self.folder / name).unlink(missing_ok=True)

    def _write_entries(self, entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
        digest, size, count = hashlib.sha256(), 0, 0
        for entry in entries:
            line = entry_line(entry)
            digest.update(line)
            size, count = size + len(line), count + 1
        name = f"entries-{digest.hexdigest()}.jsonl"
        with replacing(self.folder / name, needs=size) as partial, partial.open("wb") as file:
            file.writelines(entry_line(entry) for entry in entries)
        return {"file": name, "sha256": digest.hexdigest(), "bytes": size, "count": count}


class Known(Protocol):
    """Facts by key, as `Memo` keeps them."""

    def get(self, key: str) -> Any: ...


class Clips:
    """Data about clips by a clip's key, kept in a memo."""

    def __init__(self, memo: Memo) -> None:
        self._memo = memo

    def get(self, clip: str) -> Any:
        return self._memo.get(clip_key(clip))

    def __setitem__(self, clip: str, about: Any) -> None:
        self._memo.put(clip_key(clip), about)


def clip_key(clip: str) -> str:
    return f"clip {clip}"


def file_key(path: Path) -> tuple[str, bool]:
    """Return the key of a file's hash, of its place, size and times, and whether it may be kept.

    A file that changed within the clock's step may change again without another time.
    """
    about = path.stat()
    changed = about.st_mtime_ns if os.name == "nt" else about.st_ctime_ns
    key = f"file {path.absolute()} {about.st_size} {about.st_mtime_ns} {changed}"
    return key, changed + SETTLED < time.time_ns()


def remembered_sha256(path: Path, memo: "Known") -> tuple[str, str | None]:
    """Hash a file, read only where it changed since the memo learnt its hash.

    Returns the hash, and the key by which to keep it if it is new and may be kept.
    """
    key, lasts = file_key(path)
    known = memo.get(key)
    if isinstance(known, str):
        return known, None
    return file_sha256(path), key if lasts else None


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises FileNotFoundError if it is missing, ValueError if `Shards` did not write it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; cache writes it")
    try:
        manifest = read_fields(path)
        version = typed(manifest, "version", int, origin=path)
    except ValueError as error:
        raise ValueError(f"{path} is not what cache writes: {error}") from error
    if version not in VERSIONS:
        raise ValueError(f"{path} has version {version}, not {VERSION}: cache again")
    return manifest


def check_shard(about: Any, origin: Path, version: int) -> None:
    """Refuse, by a ValueError, a manifest's entry of a shard that `Shards` did not write.

    Args:
        origin: the manifest, for messages.
    """
    what = f"a shard in {origin}"
    kinds = {"bytes": int, "sha256": str} | ({"tensors": list} if version == 1 else {})
    for name, kind in kinds.items():
        typed(fields_of(about, what), name, kind, origin=what)
    tensors = about["tensors"] if version == 1 else ()
    if not all(isinstance(name, str) and "." in name for name in tensors):
        raise ValueError(f"tensors in {what} must be names, got {tensors!r}")


def check_sizes(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a missing file by FileNotFoundError, and one of another size by ValueError."""
    for name, about in files.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: cache again")
        if path.stat().st_size != about["bytes"]:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes instead of {about['bytes']}: cache again"
            )


def check_bytes(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse files whose bytes changed, by a ValueError that names them."""
    damaged = [name for name, about in files.items() if _digest(folder / name) != about["sha256"]]
    if damaged:
        raise ValueError(f"damaged in {folder}, cache again: {', '.join(damaged)}")


def entry_line(entry: Mapping[str, Any]) -> bytes:
    """Return an entry's line, which is its part of `LatentCache.digest` too."""
    text = json.dumps(entry, sort_keys=True, ensure_ascii=False)
    # A file name that is not UTF-8 is written with JSON's escape.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def entry_lines(folder: Path, manifest: Mapping[str, Any]) -> Iterator[bytes]:
    """Read the lines of a manifest's entries."""
    about = manifest["entries"]
    if isinstance(about, list):
        yield from map(entry_line, about)
        return
    with (folder / about["file"]).open("rb") as file:
        yield from file


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


def _progress(path: Path) -> dict[str, dict[str, Any]]:
    """Read the shards that a killed run listed, without lines that are not whole."""
    found: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return found
    with path.open("rb") as file:
        for line in file:
            try:
                fields = fields_of(parse_json(line.decode(), path), path)
                check_shard(fields, path, VERSION)
                name = typed(fields, "shard", str, origin=path)
            except ValueError:
                continue
            if fields.get("version") == VERSION and SHARD_NAME.fullmatch(name):
                found[name] = fields
    return found


def _sound_shards(manifest: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Return the shards that a manifest lists as `Shards` does."""
    found: dict[str, dict[str, Any]] = {}
    listed = manifest.get("shards")
    for name, about in listed.items() if isinstance(listed, dict) else ():
        with suppress(ValueError):
            check_shard(about, folder / MANIFEST, manifest["version"])
            found[name] = about
    return found


def _read_or_none(path: Path) -> dict[str, Any] | None:
    """Read a manifest; None if it is missing or unreadable.

    A manifest of another version counts as unreadable: all clips are then encoded again.
    """
    try:
        return read_manifest(path)
    except (FileNotFoundError, ValueError):
        return None


def _digest(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None
