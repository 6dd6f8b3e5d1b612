"""A training's folder as its page shows it: curves, samples, where it stands, what uses it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gen_accel.json_files import read_fields
from gen_accel.lora.caching.preview import evenly
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.progress import STEADY, running_mean
from gen_accel.lora.report import METRICS, REPORT, read_metrics, use_of
from gen_accel.ui.train_points import Point

MOST_POINTS = 400  # of a curve on the page; the report has more


class Sample(NamedTuple):
    """A video that was sampled during the training.

    Args:
        caption: the step and the prompt.
    """

    video: Path
    caption: str


class State(NamedTuple):
    """A training's folder.

    Args:
        done: number of steps in the metrics.
        saved: step of the newest checkpoint; None without one.
        result: folder of the adapter that is complete; None before.
        report: the page of the run; None before there is one.
        loss, fixed, rate: the curves. Fixed is the loss at fixed noise.
        is_held_out: whether `fixed` is of clips that never train.
    """

    done: int
    saved: int | None
    result: Path | None
    report: Path | None
    loss: list[Point]
    fixed: list[Point]
    rate: list[Point]
    is_held_out: bool
    samples: list[Sample]


def state_of(config: TrainConfig) -> State:
    """Read the folder of a training, which may be under way, or not there."""
    from gen_accel.lora import checkpoint
    from gen_accel.lora.trainer import CHECKPOINTS

    out = Path(config.out)
    steps, fixed = read_metrics(out / METRICS)
    steps = [one for one in steps if _is_step(one)]
    saved = checkpoint.found(out / CHECKPOINTS)
    result = out / ("lora" if config.adapter == "lora" else "image_prompt")
    report = out / REPORT
    return State(
        done=steps[-1]["step"] + 1 if steps else 0,
        saved=int(saved[-1].name.removeprefix("step-")) if saved else None,
        result=result if result.is_dir() else None,
        report=report if report.is_file() else None,
        loss=_losses(steps),
        fixed=_fixed(fixed),
        rate=_curve(steps, "learning_rate", "learning rate"),
        is_held_out=bool(fixed and fixed[-1].get("held_out")),
        samples=samples_of(config),
    )


def samples_of(config: TrainConfig) -> list[Sample]:
    """List the validation videos, the newest step first."""
    from gen_accel.lora.evaluate import BESIDE, FOLDER

    found = []
    for folder in (Path(config.out) / FOLDER).glob("step-*"):
        number = folder.name.removeprefix("step-")
        if not number.isdigit():
            continue
        for i, prompt in enumerate(config.validation_prompts):
            videos = [folder / f"{i:02d}{end}" for end in (BESIDE, ".mp4")]
            shown = next((path for path in videos if path.is_file()), None)
            if shown is not None:
                beside = ", beside step 0" if shown.name.endswith(BESIDE) else ""
                found.append(
                    (-int(number), i, Sample(shown, f"step {int(number)}{beside}: {prompt}"))
                )
    return [sample for _, _, sample in sorted(found)]


def config_of_run(out: Path) -> dict[str, Any]:
    """Return the fields that the newest checkpoint of a run records.

    Raises FileNotFoundError for a folder without a checkpoint, ValueError for one that cannot be
    read.
    """
    from gen_accel.lora import checkpoint
    from gen_accel.lora.trainer import CHECKPOINTS

    saved = checkpoint.found(out / CHECKPOINTS)
    if not saved:
        raise FileNotFoundError(f"{out / CHECKPOINTS} holds no checkpoint")
    state = read_fields(saved[-1] / checkpoint.STATE)
    if not isinstance(state.get("config"), dict):
        raise ValueError(f"{saved[-1] / checkpoint.STATE} holds no config")
    return {**state["config"], "out": str(out)}


def command_of(config: TrainConfig, result: Path) -> str:
    """Return the command that generates with a result. Raises ValueError or OSError for a folder
    that holds no adapter of ours."""
    from gen_accel.attention_processors.attached.recipe import read_recipe

    return use_of(config, read_recipe(result), result)


def stands(state: State, config: TrainConfig) -> str:
    """Say where a training stands, in a line."""
    if not state.done and state.saved is None:
        return f"Nothing was trained in {config.out} yet."
    said = f"{state.done} of {config.total_steps} steps are done in {config.out}"
    if state.result is not None:
        return f"{said}; the result is {state.result}."
    if state.saved is not None:
        return f"{said}; Resume goes on after step {state.saved}."
    return f"{said}; no checkpoint is there yet."


def _losses(steps: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Loss of each step, and its running mean, which is computed before points are left out."""
    points: list[Point] = []
    for part in sorted({one.get("part") or "" for one in steps}):
        own = [one for one in steps if (one.get("part") or "") == part]
        of = f" of {part}" if part else ""
        raw = [float(one.get("loss", math.nan)) for one in own]
        means = running_mean(raw, STEADY)
        for values, name in ((raw, f"each step{of}"), (means, f"running mean{of}")):
            rows = zip(own, values, strict=True)
            points += _thinned([(one["step"] + 1, value, name) for one, value in rows])
    return points


def _fixed(records: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Losses at fixed noise: their mean, and each noise level."""
    points: list[Point] = []
    for one in records:
        levels = one.get("levels")
        if not isinstance(one.get("after"), int) or not isinstance(levels, dict):
            continue
        of = f" of {one['part']}" if one.get("part") else ""
        named = {"mean": one.get("fixed_loss"), **{f"at noise {x}": y for x, y in levels.items()}}
        points += [
            (one["after"], float(value), f"{name}{of}")
            for name, value in named.items()
            if isinstance(value, int | float) and math.isfinite(value)
        ]
    return points


def _curve(steps: Sequence[Mapping[str, Any]], name: str, line: str) -> list[Point]:
    """A figure of each step; a line for each expert where two train."""
    points: list[Point] = []
    for part in sorted({one.get("part") or "" for one in steps}):
        of = f"{line} of {part}" if part else line
        own = [one for one in steps if (one.get("part") or "") == part]
        points += _thinned([(one["step"] + 1, float(one.get(name, math.nan)), of) for one in own])
    return points


def _thinned(points: Sequence[Point]) -> list[Point]:
    kept = [point for point in points if math.isfinite(point[1])]
    return [kept[place] for place in evenly(len(kept), MOST_POINTS)]


def _is_step(told: Mapping[str, Any]) -> bool:
    return isinstance(told.get("step"), int) and isinstance(told.get("loss"), int | float)
