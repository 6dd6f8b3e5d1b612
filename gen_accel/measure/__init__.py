"""What a run costs and what it changes: quality figures, videos, pictures and reports."""

from gen_accel.files import write_json
from gen_accel.measure.motion import Motion, measure_motion
from gen_accel.measure.quality import (
    Fidelity,
    lpips,
    measure_fidelity,
    psnr,
    psnr_per_frame,
    ssim,
    ssim_per_frame,
)
from gen_accel.measure.report import write_report
from gen_accel.measure.video_io import (
    check_writable,
    contact_sheet,
    read_stream,
    read_video,
    side_by_side,
    write_stream,
    write_video,
)

__all__ = [
    "Fidelity",
    "Motion",
    "check_writable",
    "contact_sheet",
    "lpips",
    "measure_fidelity",
    "measure_motion",
    "psnr",
    "psnr_per_frame",
    "read_stream",
    "read_video",
    "side_by_side",
    "ssim",
    "ssim_per_frame",
    "write_json",
    "write_report",
    "write_stream",
    "write_video",
]
