"""How it is used on a pipeline: attach a method, calibrate, look at what it did, take it off."""

from gen_accel.pipelines.attach import Attachment, SilentBranch, attach
from gen_accel.pipelines.calibrate import Calibration, calibrate, measure_calibration
from gen_accel.pipelines.schedule import Schedule
from gen_accel.pipelines.storage import load_processors, save_processors
from gen_accel.pipelines.summary import Summary

__all__ = [
    "Attachment",
    "Calibration",
    "Schedule",
    "SilentBranch",
    "Summary",
    "attach",
    "calibrate",
    "load_processors",
    "measure_calibration",
    "save_processors",
]
