"""Measurement of a choice that was made from a profile alone."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gen_accel.attention_processors.attached.attachment import attach_method
from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.methods.dense import Dense
from gen_accel.pipelines.tuning.measuring import relative_error
from gen_accel.pipelines.tuning.preset import Preset, check_model
from gen_accel.pipelines.tuning.runs import Call, check_decodes, decoded, generate
from gen_accel.pipelines.tuning.scoring import score_of_videos

Tick = Callable[[int, int], None]


def scored(
    preset: Preset,
    pipe: Any,
    held_out: Sequence[str],
    objective: Callable[[np.ndarray, np.ndarray], float] | None,
    tick: Tick,
) -> dict[str, list[dict[str, Any]]]:
    """Generate the tuning prompts and others densely and by a preset's rules, and score them.

    Args:
        objective: where the preset's bound is on a function of one's own.

    Raises:
        ValueError: a preset of another model, or without its prompts, or an objective that is
            missing.
    """
    transformer: Any = next(iter(served_transformers(pipe).values()))
    check_model(preset, transformer, "the preset")
    tuning = tuple(preset.made_by.get("prompts", ()))
    name = preset.bound.get("objective", "psnr")
    if not tuning:
        raise ValueError("the preset does not name its tuning prompts: tune again")
    if name not in ("psnr", "latent_error") and objective is None:
        raise ValueError(f"the bound is on {name!r}: give objective=, the function itself")
    if name != "latent_error":
        check_decodes(pipe)
    call = Call(preset.method.steps, preset.made_by.get("seed", 0), preset.made_for.call)
    prompts = [*tuning, *held_out]
    runs = []
    for i, prompt in enumerate(prompts):
        tick(i, len(prompts))
        latents = []
        for method in (Dense(), preset.method):
            with attach_method(
                pipe, method, kernel=preset.made_by.get("kernel", "auto"), record=False
            ):
                latents.append(generate(pipe, prompt, i, call))
        error = relative_error(latents[1], latents[0])
        score = -error
        if name != "latent_error":
            score = score_of_videos(objective or name, *(decoded(pipe, x) for x in latents))
        run = {"prompt": prompt, "seed": call.seed + i, "score": score}
        runs.append(run | {"latent_error": error})
    tick(len(prompts), len(prompts))
    return {"tuning": runs[: len(tuning)], "held_out": runs[len(tuning) :]}
