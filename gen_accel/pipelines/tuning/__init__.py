"""Tuning: the sparsest attention of a model within a bound on quality, kept as a preset.

`profile` and `measuring` say how far each candidate errs, layer by layer, head by head and step by
step; `knapsack` and `solving` choose; `stages` runs it all; `preset` is the file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gen_accel.pipelines.tuning.preset import OtherThanTuned, Preset, read_preset
    from gen_accel.pipelines.tuning.stages import tune
    from gen_accel.pipelines.tuning.tuned import Tuned, load_tuned

__all__ = ["OtherThanTuned", "Preset", "Tuned", "load_tuned", "read_preset", "tune"]

# Imported when first asked for: attaching a preset needs less than tuning one.
_HOMES = {
    "OtherThanTuned": "preset",
    "Preset": "preset",
    "Tuned": "tuned",
    "load_tuned": "tuned",
    "read_preset": "preset",
    "tune": "stages",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
