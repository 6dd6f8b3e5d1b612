"""Checkpoints of a training, which are complete or absent.

    step-000200/
      lora/                  the LoRA at this step, which diffusers loads; or image_prompt/
      training.safetensors   parameters, average and optimizer
      state.json             step, config, schedule, hash of training.safetensors, and its own hash

A checkpoint is written under another name and renamed when all of it is on the disk. A run
resumes from the newest checkpoint whose hashes match and whose tensors are finite.
"""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from gen_accel.files import file_sha256, flush, plain, replacing, write_json
from gen_accel.json_files import read_fields, typed
from gen_accel.lora.caching.encoders import hash_of
from gen_accel.tensor_files import check_finite, named, not_finite, save_tensors

TENSORS, STATE = "training.safetensors", "state.json"
OWN = "state_sha256"  # field of the state with the hash of its other fields
# Types of a state's fields.
KINDS = {"sha256": str, "step": int, "config": dict, "data": str, "processes": int}
LATER = {
    "stage_data": list,
    "plan": int,
    "shift": float,
}  # the same of fields that earlier versions did not write


class Checkpoint(NamedTuple):
    """A loaded checkpoint.

    Args:
        path: its folder.
    """

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
    """Write `folder/step-N`, and keep the newest `keep` checkpoints.

    Args:
        state: state with `step`, fit for JSON.
        adapter: name of the adapter's folder, and the function that writes into a given folder.

    Raises:
        ValueError: tensors that are not finite.
        OSError: the disk is full or cannot be written; an earlier checkpoint stays as it was.
    """
    target = folder / _name(state["step"])
    check_finite(tensors, f"the state after step {state['step']}")
    with replacing(target) as partial:
        partial.mkdir()
        name, write = adapter
        write(partial / name)
        save_tensors(tensors, partial / TENSORS)
        known = plain(state | {"sha256": file_sha256(partial / TENSORS)})
        write_json(partial / STATE, known | {OWN: hash_of(known)})
        for file in partial.rglob("*"):
            if file.is_file():
                flush(file)
    prune(folder, target, keep=keep)
    return target


def prune(folder: Path, last: Path, *, keep: int) -> None:
    """Keep `last` and the newest before it, `keep` in all, and delete the other checkpoints.

    Checkpoints after `last` are deleted too: a run that resumed from `last` found them broken.
    """
    there = found(folder)
    number = there.index(last)
    for old in there[: max(number + 1 - keep, 0)] + there[number + 1 :]:
        shutil.rmtree(old, ignore_errors=True)


def found(folder: Path) -> list[Path]:
    """List the checkpoints by their step, the newest last, whole or not."""
    numbered = {int(p.name[5:]): p for p in folder.glob("step-*") if p.name[5:].isdigit()}
    return [path for _, path in sorted(numbered.items()) if path.is_dir()]


def load_newest(folder: Path) -> Checkpoint | None:
    """Load the newest checkpoint that is whole and finite; None if there is none.

    A warning names each broken one that is passed over.
    """
    for path in reversed(found(folder)):
        try:
            return _load(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path} is broken and left out: {error}", stacklevel=2)
    return None


def _load(path: Path) -> Checkpoint:
    """Load a checkpoint. Raises ValueError if it was changed or is not finite."""
    state = read_fields(path / STATE)
    for name, kind in KINDS.items():
        typed(state, name, kind, origin=STATE)
    for name, kind in LATER.items():
        if name in state:
            typed(state, name, kind, origin=STATE)
    # Earlier versions wrote no hash of the state: only the step is checked, by the folder's name.
    if OWN in state and state.pop(OWN) != hash_of(state):
        raise ValueError(f"{STATE} is not the file that was written")
    if path.name != _name(state["step"]):
        raise ValueError(f"{STATE} is of step {state['step']}")
    if file_sha256(path / TENSORS) != state["sha256"]:
        raise ValueError(f"{TENSORS} is not the file that was written")
    tensors = load_file(path / TENSORS)
    if wrong := not_finite(tensors):
        raise ValueError(f"it is not finite: {named(wrong)}")
    return Checkpoint(path, tensors, state)


def _name(step: int) -> str:
    return f"step-{step:06d}"
