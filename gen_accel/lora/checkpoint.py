"""Checkpoints of a training: whole or not there.

    step-000200/
      lora/                  the LoRA as it was then, which diffusers loads; or image_prompt/
      training.safetensors   parameters, average and optimizer
      state.json             step, config, schedule, and the hash of the file before

A checkpoint is written under another name and renamed when all of it is on the disk. The newest
whose hash is right is taken.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from gen_accel.files import file_sha256, replacing, write_json

TENSORS, STATE = "training.safetensors", "state.json"


class Checkpoint(NamedTuple):
    """path: its folder."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(
    folder: Path,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    *,
    keep: int,
    adapter: tuple[str, Callable[[Path], Any]],
) -> Path:
    """Write `folder/step-N` and delete the oldest but `keep`.

    Args:
        state: fit for JSON, with `step`.
        adapter: what its folder is called, and what writes it into the folder it is given.

    Raises:
        OSError: the disk is full, or cannot be written; what was there before is still there.
    """
    target = folder / f"step-{state['step']:06d}"
    with replacing(target) as partial:
        partial.mkdir()
        name, write = adapter
        write(partial / name)
        save_file({name: x.contiguous() for name, x in tensors.items()}, partial / TENSORS)
        write_json(partial / STATE, state | {"sha256": file_sha256(partial / TENSORS)})
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
    whole = found(folder)
    last = whole.index(target)
    # Later ones are of a run that went on from here because they are broken.
    for old in whole[: max(last + 1 - keep, 0)] + whole[last + 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def found(folder: Path) -> list[Path]:
    """Checkpoints by their step, the newest last, whole or not."""
    numbered = {int(p.name[5:]): p for p in folder.glob("step-*") if p.name[5:].isdigit()}
    return [path for _, path in sorted(numbered.items()) if path.is_dir()]


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest that is whole; a warning names each that is not. None where there is none."""
    for path in reversed(found(folder)):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            if file_sha256(path / TENSORS) != state["sha256"]:
                raise ValueError(f"{TENSORS} is not the file that was written")
            return Checkpoint(path, load_file(path / TENSORS), state)
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path} is broken and left out: {error}", stacklevel=2)
    return None


def clear_partial(folder: Path) -> None:
    """Remove what a killed run left half written."""
    for path in folder.glob(".partial-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """To the disk itself, so that a rename does not outlive what it names."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
