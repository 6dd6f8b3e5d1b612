"""What a run costs and what it changes: quality figures, videos, pictures and reports."""

from .quality import psnr, psnr_per_frame, ssim, ssim_per_frame
from .report import write_json, write_report
from .video_io import check_writable, contact_sheet, read_video, side_by_side, write_video

__all__ = [
    "check_writable",
    "contact_sheet",
    "psnr",
    "psnr_per_frame",
    "read_video",
    "side_by_side",
    "ssim",
    "ssim_per_frame",
    "write_json",
    "write_report",
    "write_video",
]
