"""Checkpoints of a training, which are complete or absent.

    step-000200/
      lora/                  the LoRA at this step, which diffusers loads; or image_prompt/
      training.safetensors   parameters, average and optimizer
      state.json             step, config, schedule, hash of training.safetensors, and its own hash

A checkpoint is written under another name and renamed when all of it is on the disk. A run
resumes from the newest checkpoint whose hashes match and whose tensors are finite, if the run is
the one that wrote it: steps and stages may be added, or left out, as long as the steps that are
done stay the same.
"""

import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gen_accel.io import (
    check_finite,
    file_sha256,
    flush,
    named,
    not_finite,
    plain,
    read_fields,
    replacing,
    save_tensors,
    write_json,
)
from gen_accel.lora.caching.encoders import hash_of
from gen_accel.lora.config import Stage, TrainConfig, differences
from gen_accel.lora.state import StateFields, learning_rates
from gen_accel.parsing import shown

TENSORS, STATE = "training.safetensors", "state.json"
OWN = "state_sha256"  # field of the state with the hash of its other fields
VERSION = 3  # of a checkpoint's state


class Checkpoint(NamedTuple):
    """A loaded checkpoint.

    Args:
        path: its folder.
    """

    path: Path
    tensors: dict[str, Tensor]
    state: StateFields


class OtherVersion(ValueError):
    """A checkpoint of another version of gen_accel."""


def save(
    folder: Path,
    tensors: dict[str, Tensor],
    state: StateFields,
    *,
    keep: int,
    adapter: tuple[str, Callable[[Path], object]],
) -> Path:
    """Write `folder/step-N`, and keep the newest `keep` checkpoints. If it fails, an earlier one
    stays as it was.

    Args:
        state: state with `step`, fit for JSON.
        adapter: name of the adapter's folder, and the function that writes into a given folder.
    """
    target = folder / _name(state["step"])
    check_finite(tensors, f"the state after step {state['step']}")
    with replacing(target) as partial:
        partial.mkdir()
        name, write = adapter
        write(partial / name)
        save_tensors(tensors, partial / TENSORS)
        hashed = {"version": VERSION, "sha256": file_sha256(partial / TENSORS)}
        known = {name: plain(value) for name, value in (state | hashed).items()}
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
    numbered = (p for p in folder.glob("step-*") if p.name[5:].isdigit() and p.is_dir())
    return sorted(numbered, key=step_of)


def step_of(path: Path) -> int:
    """Number of the steps that were done at a checkpoint."""
    return int(path.name[len("step-") :])


def load_newest(folder: Path) -> Checkpoint | None:
    """Load the newest checkpoint that is whole and finite; None if there is none.

    A warning names each broken one that is passed over.

    Raises OtherVersion for a checkpoint that another version wrote.
    """
    for path in reversed(found(folder)):
        try:
            return _load(path)
        except OtherVersion:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path} is broken and left out: {error}", stacklevel=2)
    return None


def is_end(path: Path, config: TrainConfig) -> bool:
    """Whether a checkpoint is the last one of this config's training."""
    try:
        state = read_fields(path / STATE)
        if list(config.stages) == state["asked"]:  # in epochs, which are counted with the clips
            config = config.replaced(stages=state["config"]["stages"])
        return state["step"] == config.total_steps and not differences(config, state["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_agreement(
    path: Path,
    state: StateFields,
    now: StateFields,
    config: TrainConfig,
    *,
    start: str,
) -> None:
    """Raise ValueError, with all differences, for a run that does not go on from a checkpoint.

    Args:
        path: the checkpoint's folder.
        state: what the checkpoint says.
        now: fields of this run that must agree with it.
        start: words on how to start from the checkpoint's weights instead.
    """
    changed = differences(config, state["config"])
    if "stages" in changed:
        earlier = config.replaced(stages=changed["stages"][0])
        objection = _objection(state["step"], earlier, config)
        values = changed.pop("stages")
        if objection is not None:
            changed[f"stages ({objection})"] = values
    if not _same_data(state, now, config):
        changed["data (clips and captions)"] = (state["data"][:12], now["data"][:12])
    if "shift" not in changed and state["shift"] != now["shift"]:
        changed["shift (by the longest stage)"] = (state["shift"], now["shift"])
    then, teacher = state.get("teacher"), now["teacher"]
    if then != teacher:
        changed["teacher_lora (its weights)"] = (then and then[:12], teacher and teacher[:12])
    if "batch_size" not in changed and state["processes"] != now["processes"]:
        changed["processes"] = (state["processes"], now["processes"])
    if changed:
        listed = "; ".join(f"{k}: {shown(a)}, now {shown(b)}" for k, (a, b) in changed.items())
        raise ValueError(
            f"{path} is of another run, which differs in {listed}; a new run with another --out "
            f"and {start} goes on from its weights, with a new optimizer"
        )


def _objection(done: int, earlier: TrainConfig, config: TrainConfig) -> str | None:
    """Say why the `done` steps would not be the same as under the earlier stages; None if they
    are."""
    if config.total_steps < done:
        return f"{done} steps are done"
    if _prefix(earlier.curriculum, done) != _prefix(config.curriculum, done):
        return f"the {done} done steps differ"
    if _rates(earlier, done) != _rates(config, done):
        return (
            f"the learning rate of schedule {config.schedule} in the {done} done steps depends on "
            "the number of all steps"
        )
    return None


def _prefix(stages: Sequence[Stage], done: int) -> list[Stage]:
    """Return the stages cut to their first `done` steps."""
    cut = []
    for stage in stages:
        if done <= 0:
            break
        cut.append(replace(stage, steps=min(stage.steps, done)))
        done -= stage.steps
    return cut


def _rates(config: TrainConfig, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    [factor] = learning_rates(optimizer, config).lr_lambdas
    return [factor(step) for step in range(steps)]


def _same_data(state: StateFields, now: StateFields, config: TrainConfig) -> bool:
    """Whether the clips are the same; with other stages, the clips of the stages begun."""
    if state["data"] == now["data"]:
        return True
    if list(config.stages) == state["config"].get("stages"):
        return False
    begun = len(_prefix(config.curriculum, state["step"]))
    return state["stage_data"][:begun] == now["stage_data"][:begun]


def _load(path: Path) -> Checkpoint:
    """Load a checkpoint. Raises ValueError if it was changed or is not finite."""
    state = read_fields(path / STATE)
    if state.get("version") != VERSION:
        raise OtherVersion(
            f"{path} was written by another version of gen_accel, which this one does not go on "
            "from: start a new run with another --out from the weights in it, by --init-lora "
            f"{path / 'lora'} or --init-adapter {path / 'image_prompt'}"
        )
    if state.pop(OWN) != hash_of(state):
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
