"""Use on a pipeline: attach a method, calibrate it, read a summary of the run, detach."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from gen_accel.attention_processors.attached.profiling import MeasuredProfile, measure_profile
    from gen_accel.attention_processors.attached.schedule import Schedule
    from gen_accel.attention_processors.attached.storage import load_processors, save_processors
    from gen_accel.attention_processors.attached.summary import Summary
    from gen_accel.pipelines.image_prompt import ImagePrompt, ScaleRange, load_image_prompt
    from gen_accel.pipelines.tuning import OtherThanTuned, Tuned, load_tuned, tune

__all__ = [
    "Attachment",
    "Calibration",
    "Displaced",
    "ImagePrompt",
    "MeasuredProfile",
    "NothingSaved",
    "OtherThanTuned",
    "ScaleRange",
    "Schedule",
    "SilentBranch",
    "Summary",
    "Tuned",
    "calibrate",
    "load_image_prompt",
    "load_processors",
    "load_tuned",
    "measure_calibration",
    "measure_profile",
    "save_processors",
    "tune",
]

# Modules that hold the other names, imported when first asked for.
_ATTACHED = "gen_accel.attention_processors.attached"
_HOMES = {
    f"{_ATTACHED}.attachment": ("Attachment", "Displaced", "NothingSaved", "SilentBranch"),
    f"{_ATTACHED}.calibrate": ("Calibration", "calibrate", "measure_calibration"),
    f"{_ATTACHED}.profiling": ("MeasuredProfile", "measure_profile"),
    f"{_ATTACHED}.schedule": ("Schedule",),
    f"{_ATTACHED}.storage": ("load_processors", "save_processors"),
    f"{_ATTACHED}.summary": ("Summary",),
    f"{__name__}.image_prompt": ("ImagePrompt", "ScaleRange", "load_image_prompt"),
    f"{__name__}.tuning": ("OtherThanTuned", "Tuned", "load_tuned", "tune"),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names:
                return getattr(import_module(home), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
