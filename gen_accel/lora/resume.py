"""Agreement of a run with the checkpoint that it goes on from."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gen_accel.lora.batches import PLAN
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.config import Stage, TrainConfig, differences
from gen_accel.lora.experts import halves
from gen_accel.lora.model import Model
from gen_accel.lora.state import learning_rates

DATA = "data (clips and captions)"


def about_data(config: TrainConfig, model: Model, cache: LatentCache) -> dict[str, Any]:
    """Return what a checkpoint records of the clips and their draws: a hash of all clips, a hash
    for each stage, the version of their order, and the shift of the noise levels."""
    return {
        "data": cache.digest,
        "stage_data": [cache.digest_at(model.frames(stage.frames)) for stage in config.curriculum],
        "plan": PLAN,
        "shift": model.shift,  # which some schedulers make of the longest stage
    }


def plan_of(state: Mapping[str, Any]) -> int:
    """Return the version of the clips' order that a checkpoint's run has."""
    return state.get("plan", 1)


def check_agreement(
    path: Path,
    state: Mapping[str, Any],
    now: Mapping[str, Any],
    config: TrainConfig,
    *,
    start: str,
) -> None:
    """Raise ValueError, with all differences, for a run that does not go on from a checkpoint.

    Steps and stages may be added, or left out, where the steps that are done stay the same.

    Args:
        path: the checkpoint's folder.
        state: what the checkpoint says.
        now: the same of this run: `about_data`, `teacher`, `processes`.
        start: words on how to start from the checkpoint's weights instead.
    """
    changed = differences(config, state["config"])
    if "stages" in changed:
        earlier = replace(config, stages=tuple(changed["stages"][0]))
        objection = _objection(state, earlier, config)
        values = changed.pop("stages")
        if objection is not None:
            changed[f"stages ({objection})"] = values
    if not _same_data(state, now, config):
        changed[DATA] = (state["data"][:12], now["data"][:12])
    shift = state.get("shift", now["shift"])
    if "shift" not in changed and shift != now["shift"]:
        changed["shift (by the longest stage)"] = (shift, now["shift"])
    then, teacher = state.get("teacher"), now["teacher"]
    if then != teacher:
        changed["teacher_lora (its weights)"] = (then and then[:12], teacher and teacher[:12])
    if "batch_size" not in changed and state["processes"] != now["processes"]:
        changed["processes"] = (state["processes"], now["processes"])
    if changed:
        listed = "; ".join(f"{k}: {a!r}, now {b!r}" for k, (a, b) in changed.items())
        raise ValueError(
            f"{path} is of another run, which differs in {listed}; a new run with another --out "
            f"and {start} goes on from its weights, with a new optimizer"
        )


def _objection(state: Mapping[str, Any], earlier: TrainConfig, config: TrainConfig) -> str | None:
    """Say why the done steps would not be the same as under the earlier stages; None if they
    are."""
    done = state["step"]
    if config.total_steps < done:
        return f"{done} steps are done"
    was, now = _prefix(earlier.curriculum, done), _prefix(config.curriculum, done)
    if was != now:
        return f"the {done} done steps differ"
    if plan_of(state) < PLAN:
        touched = len(was)
        if earlier.curriculum[:touched] != config.curriculum[:touched]:
            return "an earlier version chose the clips for all steps of a stage: only add stages"
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
    rates = []
    for half, own in halves(config, steps):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=half.learning_rate)
        [factor] = learning_rates(optimizer, half).lr_lambdas
        rates += [factor(step) for step in range(own)]
    return rates


def _same_data(state: Mapping[str, Any], now: Mapping[str, Any], config: TrainConfig) -> bool:
    """Whether the clips are the same; with other stages, the clips of the stages begun."""
    if state["data"] == now["data"]:
        return True
    if list(config.stages) == state["config"].get("stages") or "stage_data" not in state:
        return False
    begun = len(_prefix(config.curriculum, state["step"]))
    return state["stage_data"][:begun] == now["stage_data"][:begun]
