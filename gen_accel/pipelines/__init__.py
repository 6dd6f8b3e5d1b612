"""Use on a pipeline: attach a method, calibrate it, read a summary of the run, detach."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gen_accel.attention_processors.attached.attachment import (
    Attachment,
    Displaced,
    NothingSaved,
    SilentBranch,
)
from gen_accel.attention_processors.attached.calibrate import (
    Calibration,
    calibrate,
    measure_calibration,
)
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.attached.storage import load_processors, save_processors
from gen_accel.attention_processors.attached.summary import Summary
from gen_accel.pipelines.attach import attach

if TYPE_CHECKING:
    from gen_accel.pipelines.image_prompt import ImagePrompt, ScaleRange, load_image_prompt

__all__ = [
    "Attachment",
    "Calibration",
    "Displaced",
    "ImagePrompt",
    "NothingSaved",
    "ScaleRange",
    "Schedule",
    "SilentBranch",
    "Summary",
    "attach",
    "calibrate",
    "load_image_prompt",
    "load_processors",
    "measure_calibration",
    "save_processors",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import image prompts when first asked for, as only they need diffusers' hooks."""
        if name in ("ImagePrompt", "ScaleRange", "load_image_prompt"):
            return getattr(import_module(f"{__name__}.image_prompt"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
