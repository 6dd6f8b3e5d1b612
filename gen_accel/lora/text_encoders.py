"""Text encoders of a pipeline, which are loaded when a text is encoded, and freed after that.

Their hashes are in the keys of a cache. `encoders.json` in the cache's folder keeps each hash
beside size and date of the files that it was made from, so that a cache that is complete is found
to be so without loading them.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gen_accel.files import write_json
from gen_accel.json_files import read_fields
from gen_accel.lora.fingerprint import hash_of, model_state
from gen_accel.pipelines.generation.model_index import load_part

RECORD = "encoders.json"
PREFIX = "text_encoder"


class TextEncoders:
    """The text encoders that a pipeline was loaded without.

    Args:
        pipe: pipeline that gets them.
        source: folder or hub repository of the pipeline.
        kinds: library and class of each, by its name in the pipeline.
        folder: folder of the cache.
    """

    def __init__(
        self,
        pipe: Any,
        source: str,
        kinds: Mapping[str, Sequence[str]],
        dtype: torch.dtype,
        folder: Path,
    ) -> None:
        self._pipe, self._source, self._kinds = pipe, source, kinds
        self._dtype, self._file = dtype, folder / RECORD

    @property
    def loaded(self) -> bool:
        return all(getattr(self._pipe, name) is not None for name in self._kinds)

    def load(self) -> None:
        for name, kind in self._kinds.items():
            if getattr(self._pipe, name) is None:
                setattr(self._pipe, name, load_part(self._source, name, kind, self._dtype))

    def free(self) -> None:
        for name in self._kinds:
            setattr(self._pipe, name, None)

    def states(self) -> dict[str, str]:
        """Hash each encoder, as `model_state` does, or read its hash from the record."""
        known = _read(self._file)
        stamps = {name: self._stamp(name) for name in self._kinds}
        for name, stamp in stamps.items():
            if stamp is None or known.get(name, {}).get("files") != stamp:
                self.load()
                break
        else:
            return {name: known[name]["state"] for name in self._kinds}
        states = {name: model_state(name, getattr(self._pipe, name)) for name in self._kinds}
        new = {
            name: {"files": self._stamp(name), "state": state} for name, state in states.items()
        }
        if os.access(self._file.parent, os.W_OK):
            write_json(self._file, known | new)
        return states

    def _stamp(self, name: str) -> str | None:
        """Hash names, sizes and dates of an encoder's files; None where they are not here."""
        folder = _folder(self._source, name)
        if folder is None:
            return None
        files = []
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                about = path.stat()
                files.append([path.name, path.resolve().name, about.st_size, about.st_mtime_ns])
        return hash_of([list(self._kinds[name]), str(self._dtype), files])


def _folder(source: str, name: str) -> Path | None:
    """Folder of one part of a pipeline, on this machine."""
    if Path(source).exists():
        return Path(source) / name
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, f"{name}/config.json")
    return Path(found).parent if isinstance(found, str) else None


def _read(file: Path) -> dict[str, Any]:
    try:
        known = read_fields(file)
    except (OSError, ValueError):
        return {}
    return {
        name: about
        for name, about in known.items()
        if isinstance(about, Mapping) and isinstance(about.get("state"), str)
    }
