"""Seconds of all candidates on another machine, or with other threads, for a known profile."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from gen_accel.attention_processors.attached.attachment import attach_method
from gen_accel.attention_processors.attached.calibrate import check_bare
from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.attached.layer import Observed
from gen_accel.attention_processors.methods.mixed import Mixed, Rule
from gen_accel.pipelines.tuning.measuring import Heard, seconds_of
from gen_accel.pipelines.tuning.preset import Preset, check_model
from gen_accel.pipelines.tuning.runs import Call, Enough, generate


def priced(preset: Preset, candidates: Sequence[Any], pipe: Any) -> tuple[Tensor, Tensor]:
    """Time candidates and dense attention on q, k and v of the preset's first tuning prompt, half
    way through the steps; nothing is generated beyond them.

    Returns:
        (C,) fp32 shares of dense attention, and the seconds of dense attention of a layer.

    Raises:
        ValueError: a preset of another model or grid, or without its prompts, or a pipeline that
            something is attached to.
    """
    transformer: Any = next(iter(served_transformers(pipe).values()))
    check_model(preset, transformer, "the preset")
    check_bare(pipe, "priced")
    prompts = preset.made_by.get("prompts", ())
    if not prompts:
        raise ValueError("the preset does not name its tuning prompts: tune again")
    kernel, steps = preset.made_by.get("kernel", "auto"), preset.method.steps
    call = Call(steps, preset.made_by.get("seed", 0), preset.made_for.call)
    heard: dict[int, Heard] = {}

    def hear(seen: Observed) -> None:
        step, number = handle.clock.step, seen.layer.number
        if step < steps // 2:
            return
        if step > steps // 2 or number in heard:
            raise Enough
        heard[number] = Heard.of(seen)

    probe = Mixed((Rule(candidates[0]),), steps)  # not run, as an observer is there
    with attach_method(pipe, probe, kernel=kernel, record=False) as handle:
        handle.observe = hear
        with suppress(Enough):
            generate(pipe, prompts[0], 0, call)
    if not heard:
        raise ValueError("no attention over a known grid was seen, so that nothing can be timed")
    grid = next(iter(heard.values())).video.grid
    if tuple(grid) != tuple(preset.made_for.grid):
        raise ValueError(
            f"the preset was tuned on {preset.made_for.grid} tokens, and the model makes {grid}"
        )
    shares, dense = seconds_of(heard, candidates, kernel)
    return shares.float(), torch.tensor(dense)
