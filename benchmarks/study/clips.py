"""Whole clips beside dense ones of the same prompt and seed, setting by setting: their PSNR, and
what they show."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kept import clip_file, keep_clip, kept_clip

from gen_accel import Schedule, attach
from gen_accel.measure import psnr
from gen_accel.measure.quality import psnr_per_frame
from gen_accel.pipelines import calibrate
from study.captured import STEPS, arguments, shown, sizes

SCHEDULE = Schedule(dense_steps=1, dense_start=0.15)  # the first fifth of 20
FIT_STEPS = 4


def keep_dense(
    pipe: Any, folder: Path, prompts: Sequence[int], frames: int
) -> list[dict[str, Any]]:
    """Make the dense clips that `folder` lacks. One row a prompt: what its clip shows."""
    for prompt in prompts:
        if not clip_file(folder, prompt).exists():
            keep_clip(folder, prompt, clip(pipe, prompt, frames))
    return [{"prompt": i} | shown(kept_clip(folder, i), i) for i in prompts]


def measured(
    pipe: Any,
    method: Any,
    prompts: Sequence[int],
    frames: int,
    dense: Path,
    fit: Sequence[str] = (),
    fit_steps: int = FIT_STEPS,
) -> list[dict[str, Any]]:
    """One row a prompt: PSNR in dB of the clip and of its worst frame, the density, and what the
    clip shows.

    Args:
        dense: the folder of `keep_dense`.
        fit: prompts that the method is calibrated to first.
        fit_steps: of these.
    """
    rows = []
    with attach(pipe, method, schedule=SCHEDULE) as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a branch which was not fitted adds nothing
        if fit:
            fit_to(pipe, fit, frames, fit_steps)
        for prompt in prompts:
            made, wanted = clip(pipe, prompt, frames), kept_clip(dense, prompt)
            rows.append(
                {
                    "prompt": prompt,
                    "psnr_db": psnr(made, wanted),
                    "worst_frame_db": min(psnr_per_frame(made, wanted)),
                    "density": handle.summary().density,
                }
                | shown(made, prompt)
            )
    return rows


def fit_to(pipe: Any, prompts: Sequence[str], frames: int, steps: int = FIT_STEPS) -> None:
    """Fit what is attached, from seeds that no clip has."""
    calibrate(pipe, prompts, num_inference_steps=steps, seed=1000, **sizes(frames))


def clip(pipe: Any, prompt: int, frames: int, steps: int = STEPS) -> np.ndarray:
    """(F, H, W, 3) uint8."""
    made = pipe(**arguments(prompt, frames, steps), output_type="np").frames[0]
    return (made * 255).round().astype("uint8")
