"""Presets by name: tuned ones that come with the package, and rules for all other models."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.attached.recipe import sizes
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.methods.piecewise import Piecewise
from gen_accel.names import PRESETS
from gen_accel.pipelines.tuning.preset import (
    Preset,
    check_model,
    loras_of,
    read_preset,
)

BOX = Path(__file__).parents[2] / "presets"


class NotMeasured(UserWarning):
    """A named preset is a rule: nothing was tuned for this model."""


class Hand(NamedTuple):
    """A preset by rule.

    Args:
        critical: density of `Piecewise`.
        start: share of the first steps that stay dense.
        steps: the least number of them, for models of 4 to 8 steps, each of which is long.
        layers: the first blocks that stay dense.
    """

    critical: float
    start: float
    steps: int
    layers: int


# As the published methods were measured at: a fifth to a quarter of the steps dense and the first
# block (Radial Attention, https://arxiv.org/abs/2506.19852, table 1), densities of 0.1 to 0.3
# (PISA, https://arxiv.org/abs/2602.01077; SLA, https://arxiv.org/abs/2509.24006).
RULES = {
    "quality": Hand(0.3, 0.25, 2, 1),
    "balanced": Hand(0.2, 0.2, 2, 1),
    "fast": Hand(0.1, 0.15, 1, 0),
}


def choose_preset(
    preset: str | Path | Preset,
    pipe_or_transformer: Any,
    schedule: Schedule | None,
    asked: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Any, Schedule | None, Preset | None]:
    """Return the method of a preset, its schedule, and the preset itself where it was tuned.

    Args:
        preset: a file, one of `PRESETS`, or what `read_preset` returned.
        schedule: as given beside it, which wins over the preset's own.
        asked: what is known of the call, by the pipeline's names, with "num_inference_steps". Of a
            name, a preset that was tuned for another call is passed over.

    Raises:
        ValueError: a preset of another model, or a file that is none.
        FileNotFoundError: there is no such file.

    Warns:
        NotMeasured: a name for a model that no preset was tuned for.
    """
    transformer: Any = next(iter(served_transformers(pipe_or_transformer).values()))
    if isinstance(preset, str) and preset in PRESETS:
        found = in_the_box(preset, transformer, asked)
        if found is None:
            return by_rule(preset, schedule)
    elif isinstance(preset, Preset):
        found = preset
    else:
        try:
            found = read_preset(preset)
        except FileNotFoundError as error:
            names = ", ".join(PRESETS)
            raise FileNotFoundError(f"{error}; the names of presets are {names}") from None
    check_model(found, transformer, "the preset" if isinstance(preset, Preset) else preset)
    return found.method, schedule, found


def in_the_box(
    name: str, transformer: Any, asked: Mapping[str, Any] = MappingProxyType({})
) -> Preset | None:
    """Read the preset of that name that was tuned for a model, its LoRAs and a call; None without
    one."""
    loras = loras_of(transformer)
    for one in all_in_the_box(name, transformer):
        call = {**one.made_for.call, "num_inference_steps": one.method.steps}
        known = {key: value for key, value in asked.items() if value is not None}
        if one.made_for.loras == loras and known.items() <= call.items():
            return one
    return None


def all_in_the_box(name: str, transformer: Any) -> list[Preset]:
    """Read all presets of that name that were tuned for a model, by whatever LoRAs."""
    return [*files_in_the_box(name, transformer).values()]


def files_in_the_box(name: str, transformer: Any) -> dict[Path, Preset]:
    """Read what `all_in_the_box` reads, by the files."""
    own = sizes(transformer)["sha256"]
    found = {file: read_preset(file) for file in sorted(BOX.glob(f"*-{name}.json"))}
    return {
        file: one for file, one in found.items() if one.made_for.transformer.get("sha256") == own
    }


def by_rule(name: str, schedule: Schedule | None = None) -> tuple[Piecewise, Schedule, None]:
    """Return a rule for any model: the settings that published methods were measured at."""
    rule = RULES[name]
    own = Schedule(dense_start=rule.start, dense_steps=rule.steps, dense_layers=rule.layers)
    said = _said(rule) if schedule is None else f"Piecewise({rule.critical:g})"
    warnings.warn(
        f"preset {name!r} is a rule for this model, not measured: {said}. For settings that keep "
        "a quality, gen-accel tune --model MODEL --prompts FILE --quality 28 --out PRESET.json",
        NotMeasured,
        stacklevel=4,
    )
    return Piecewise(rule.critical), own if schedule is None else schedule, None


def _said(rule: Hand) -> str:
    """Say a rule in words."""
    layers = "layer" if rule.layers == 1 else f"{rule.layers} layers"
    return (
        f"Piecewise({rule.critical:g}), dense in the first {rule.start:.0%} of the steps, "
        f"{rule.steps} at least{f', and in the first {layers}' if rule.layers else ''}"
    )
