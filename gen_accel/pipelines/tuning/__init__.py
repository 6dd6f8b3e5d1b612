"""Tuning: the sparsest attention of a model within a bound on quality, kept as a preset.

`measuring` says how far each candidate errs, layer by layer, head by head and step by step;
`solving` chooses; `stages` runs it all; `preset` is the file.
"""

from typing import TYPE_CHECKING

from gen_accel.lazy import exported

if TYPE_CHECKING:
    from gen_accel.pipelines.tuning.preset import OtherThanTuned as OtherThanTuned
    from gen_accel.pipelines.tuning.preset import Preset as Preset
    from gen_accel.pipelines.tuning.preset import read_preset as read_preset
    from gen_accel.pipelines.tuning.stages import tune as tune
    from gen_accel.pipelines.tuning.tuned import Tuned as Tuned
    from gen_accel.pipelines.tuning.tuned import load_tuned as load_tuned
else:
    # Attaching a preset needs less than tuning one.
    __all__, __getattr__, __dir__ = exported(
        __name__,
        {
            ".preset": "OtherThanTuned Preset read_preset",
            ".stages": "tune",
            ".tuned": "Tuned load_tuned",
        },
    )
