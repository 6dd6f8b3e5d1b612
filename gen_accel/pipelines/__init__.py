"""Use on a pipeline: attach a method, calibrate it, read a summary of the run, detach."""

from typing import TYPE_CHECKING

from gen_accel.lazy import exported

if TYPE_CHECKING:
    from gen_accel.attention_processors.attached.attachment import Attachment as Attachment
    from gen_accel.attention_processors.attached.attachment import Displaced as Displaced
    from gen_accel.attention_processors.attached.attachment import NothingSaved as NothingSaved
    from gen_accel.attention_processors.attached.attachment import SilentBranch as SilentBranch
    from gen_accel.attention_processors.attached.calibrate import Calibration as Calibration
    from gen_accel.attention_processors.attached.calibrate import calibrate as calibrate
    from gen_accel.attention_processors.attached.calibrate import (
        measure_calibration as measure_calibration,
    )
    from gen_accel.attention_processors.attached.profiling import (
        MeasuredProfile as MeasuredProfile,
    )
    from gen_accel.attention_processors.attached.profiling import (
        measure_profile as measure_profile,
    )
    from gen_accel.attention_processors.attached.records import Summary as Summary
    from gen_accel.attention_processors.attached.schedule import Schedule as Schedule
    from gen_accel.attention_processors.attached.storage import load_processors as load_processors
    from gen_accel.attention_processors.attached.storage import save_processors as save_processors
    from gen_accel.attention_processors.attached.trained import load_trained as load_trained
    from gen_accel.pipelines.image_prompt import ImagePrompt as ImagePrompt
    from gen_accel.pipelines.image_prompt import ScaleRange as ScaleRange
    from gen_accel.pipelines.image_prompt import load_image_prompt as load_image_prompt
    from gen_accel.pipelines.tuning import OtherThanTuned as OtherThanTuned
    from gen_accel.pipelines.tuning import Tuned as Tuned
    from gen_accel.pipelines.tuning import load_tuned as load_tuned
    from gen_accel.pipelines.tuning import tune as tune
else:
    _attached = "gen_accel.attention_processors.attached"
    __all__, __getattr__, __dir__ = exported(
        __name__,
        {
            f"{_attached}.attachment": "Attachment Displaced NothingSaved SilentBranch",
            f"{_attached}.calibrate": "Calibration calibrate measure_calibration",
            f"{_attached}.trained": "load_trained",
            f"{_attached}.profiling": "MeasuredProfile measure_profile",
            f"{_attached}.schedule": "Schedule",
            f"{_attached}.storage": "load_processors save_processors",
            f"{_attached}.records": "Summary",
            ".image_prompt": "ImagePrompt ScaleRange load_image_prompt",
            ".tuning": "OtherThanTuned Tuned load_tuned tune",
        },
    )
