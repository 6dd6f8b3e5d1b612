"""Tuning: the sparsest attention of a model within a bound on quality, kept as a preset.

`profile` and `measuring` say how far each candidate errs, layer by layer, head by head and step by
step; `knapsack` and `solving` choose; `stages` runs it all; `preset` is the file.
"""

from gen_accel.pipelines.tuning.preset import OtherThanTuned, Preset, read_preset
from gen_accel.pipelines.tuning.stages import tune
from gen_accel.pipelines.tuning.tuned import Tuned, load_tuned

__all__ = ["OtherThanTuned", "Preset", "Tuned", "load_tuned", "read_preset", "tune"]
