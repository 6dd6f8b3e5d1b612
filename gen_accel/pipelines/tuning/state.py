"""State of a tuning, in a file beside its preset, so that a killed one goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gen_accel.files import plain, replacing
from gen_accel.json_files import parse_json
from gen_accel.tensor_files import read_tensors, save_tensors

ABOUT, NOTES = "tuning", "notes"


class State:
    """Tensors and notes by name; each change is on the disk when it returns.

    Args:
        path: the file; None keeps nothing.
        about: everything that the measurements depend on.

    Raises:
        ValueError: the file is of a tuning that differs in `about`, with what differs.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.path = path
        self.about = json.loads(json.dumps(plain(about)))
        self.tensors: dict[str, Tensor] = {}
        self.notes: dict[str, Any] = {}
        if path is not None and path.is_file():
            self._read(path)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors."""
        self.tensors |= {name: x.cpu() for name, x in tensors.items()}
        self._write()

    def note(self, name: str, value: Any) -> None:
        """Add a note, of what JSON holds."""
        self.notes[name] = json.loads(json.dumps(plain(value)))
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            metadata = {ABOUT: json.dumps(self.about), NOTES: json.dumps(self.notes)}
            with replacing(self.path) as partial:
                save_tensors(self.tensors, partial, metadata)

    def of(self, prefix: str) -> dict[str, Tensor] | None:
        """Return the tensors called prefix.name, by name; None where there are none."""
        start = f"{prefix}."
        return {
            name.removeprefix(start): x
            for name, x in self.tensors.items()
            if name.startswith(start)
        } or None

    def remove(self) -> None:
        """Remove the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        tensors, metadata = read_tensors(path)
        about = parse_json(metadata.get(ABOUT, "null"), path)
        if about != self.about:
            raise ValueError(
                f"{path} is of another tuning, which differs in {differences(about, self.about)}: "
                "give another --out, or remove it"
            )
        self.tensors, self.notes = tensors, parse_json(metadata.get(NOTES, "{}"), path)


def differences(earlier: Any, now: Mapping[str, Any]) -> str:
    """Name what differs between two descriptions."""
    if not isinstance(earlier, dict):
        return "everything"
    names = [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
    return ", ".join(sorted(names))
