"""Cost of a run and its effect on the result: quality figures, videos, pictures and reports."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gen_accel.io import write_json

if TYPE_CHECKING:
    from gen_accel.measure.motion import Motion, measure_motion
    from gen_accel.measure.pictures import contact_sheet, side_by_side
    from gen_accel.measure.quality import (
        Fidelity,
        cvvdp_jod,
        lpips,
        measure_fidelity,
        psnr,
        psnr_per_frame,
        ssim,
        ssim_per_frame,
        vmaf,
        vmaf_per_frame,
    )
    from gen_accel.measure.report import write_report
    from gen_accel.measure.video_io import (
        check_writable,
        read_about,
        read_stream,
        read_video,
        write_stream,
        write_video,
    )

__all__ = [
    "Fidelity",
    "Motion",
    "check_writable",
    "contact_sheet",
    "cvvdp_jod",
    "lpips",
    "measure_fidelity",
    "measure_motion",
    "psnr",
    "psnr_per_frame",
    "read_about",
    "read_stream",
    "read_video",
    "side_by_side",
    "ssim",
    "ssim_per_frame",
    "vmaf",
    "vmaf_per_frame",
    "write_json",
    "write_report",
    "write_stream",
    "write_video",
]

# Imported when first asked for: an estimate reads no pictures.
_HOMES = {
    "Fidelity": "quality",
    "Motion": "motion",
    "check_writable": "video_io",
    "contact_sheet": "pictures",
    "cvvdp_jod": "quality",
    "lpips": "quality",
    "measure_fidelity": "quality",
    "measure_motion": "motion",
    "psnr": "quality",
    "psnr_per_frame": "quality",
    "read_about": "video_io",
    "read_stream": "video_io",
    "read_video": "video_io",
    "side_by_side": "pictures",
    "ssim": "quality",
    "ssim_per_frame": "quality",
    "vmaf": "quality",
    "vmaf_per_frame": "quality",
    "write_report": "report",
    "write_stream": "video_io",
    "write_video": "video_io",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
