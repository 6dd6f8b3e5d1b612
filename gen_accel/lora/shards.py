"""Tensors in a folder of safetensors files, with hashes, which survive a killed run.

A shard is named by the hash of its bytes, written under another name and renamed. A run lists its
shards in `progress.json` and, as its last file, in `manifest.json`. A run that follows a killed
one goes on from `progress.json`. Tensors are called `key.name`; the key is a hash of all inputs
that they depend on.
"""

import hashlib
import re
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
from torch import Tensor

from gen_accel.files import file_sha256, replacing, write_json
from gen_accel.json_files import fields_of, read_fields, typed

MANIFEST, PROGRESS = "manifest.json", "progress.json"
VERSION = 1
SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 300.0  # most work that a killed run loses, beside the clip under way
SHARD_NAME = re.compile(r"shard-[0-9a-f]{64}\.safetensors")


class Shards:
    """The shards of a folder, to be read from and added to.

    A context manager: pending tensors are written at its end, also after an exception.

    Args:
        shard_bytes: bytes of pending tensors at which a shard is written.

    Attributes:
        files: sha256, bytes and tensor names of each shard, by the shard's name.
        clips: data about the clips that the caller keeps with the shards, by key.
        damaged: names of shards that were listed but are missing or have other bytes.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.files: dict[str, dict[str, Any]] = {}
        self.clips: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._found = {path.name for path in folder.iterdir()}
        self.earlier = _read_or_none(folder / MANIFEST) or {}
        listed: dict[str, dict[str, Any]] = {}
        for known in (self.earlier, _read_or_none(folder / PROGRESS) or {}):
            listed |= known.get("shards", {})
            self.clips |= known.get("clips", {})
        for name, about in listed.items():
            if _digest(folder / name) == about["sha256"]:
                self.files[name] = about
        self.damaged = tuple(sorted(set(listed) - set(self.files)))
        self._keys = {_key(name) for about in self.files.values() for name in about["tensors"]}
        self._pending: dict[str, Tensor] = {}
        self._since = time.monotonic()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.flush()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Add `tensors`; write a shard when it is full or has waited for five minutes."""
        self._pending |= {f"{key}.{name}": x.contiguous().clone() for name, x in tensors.items()}
        self._keys.add(key)
        waited = time.monotonic() - self._since
        if sum(x.nbytes for x in self._pending.values()) >= self.shard_bytes or (
            waited >= SHARD_SECONDS
        ):
            self.flush()

    def flush(self) -> None:
        """Write the pending tensors as a shard, and list the shard in `progress.json`."""
        self._since = time.monotonic()
        if not self._pending:
            return
        data = safetensors.torch.save(self._pending)
        digest = hashlib.sha256(data).hexdigest()
        name = f"shard-{digest}.safetensors"
        with replacing(self.folder / name, needs=len(data)) as partial:
            partial.write_bytes(data)
        self._found.add(name)
        self.files[name] = {
            "sha256": digest,
            "bytes": len(data),
            "tensors": sorted(self._pending),
        }
        self._pending = {}
        self.keep()

    def keep(self) -> None:
        """List the shards and `clips` in `progress.json`, for a run that follows a killed one."""
        progress = {"version": VERSION, "shards": self.files, "clips": self.clips}
        write_json(self.folder / PROGRESS, progress)

    def finish(self, manifest: dict[str, Any], keys: set[str]) -> None:
        """Write the manifest, then delete the shards without a tensor of `keys`.

        Files that came into the folder since this run began belong to another run, and stay.
        """
        self.flush()
        self.files = {
            name: about
            for name, about in self.files.items()
            if any(_key(tensor) in keys for tensor in about["tensors"])
        }
        listed = {"version": VERSION, "shards": self.files, "clips": self.clips}
        write_json(self.folder / MANIFEST, listed | manifest)
        (self.folder / PROGRESS).unlink(missing_ok=True)
        for name in self._found - set(self.files):
            if SHARD_NAME.fullmatch(name):
                (self.folder / name).unlink(missing_ok=True)


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
    if version != VERSION:
        raise ValueError(f"{path} has version {version}, not {VERSION}: cache again")
    return manifest


def check_shard(about: Any, origin: Path) -> None:
    """Refuse, by a ValueError, a manifest's entry of a shard that `Shards` did not write.

    Args:
        origin: the manifest, for messages.
    """
    what = f"a shard in {origin}"
    for name, kind in (("bytes", int), ("sha256", str), ("tensors", list)):
        typed(fields_of(about, what), name, kind, origin=what)
    if not all(isinstance(name, str) and "." in name for name in about["tensors"]):
        raise ValueError(f"tensors in {what} must be names, got {about['tensors']!r}")


def check_sizes(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Refuse a missing shard by FileNotFoundError, and one of another size by ValueError."""
    for name, about in files.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: cache again")
        if path.stat().st_size != about["bytes"]:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes instead of {about['bytes']}: cache again"
            )


def check_bytes(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Refuse shards whose bytes changed, by a ValueError that names them."""
    damaged = [name for name, about in files.items() if _digest(folder / name) != about["sha256"]]
    if damaged:
        raise ValueError(f"damaged in {folder}, cache again: {', '.join(damaged)}")


def _read_or_none(path: Path) -> dict[str, Any] | None:
    """Read a manifest; None if it is missing or unreadable.

    A manifest of another version counts as unreadable: all clips are then encoded again.
    """
    try:
        return read_manifest(path)
    except (FileNotFoundError, ValueError):
        return None


def _key(tensor: str) -> str:
    return tensor.split(".", 1)[0]


def _digest(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None
