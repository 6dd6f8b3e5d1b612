"""Cost of a run and its effect on the result: quality figures, videos, pictures and reports."""

from typing import TYPE_CHECKING

from gen_accel.lazy import exported

if TYPE_CHECKING:
    from gen_accel.io import write_json as write_json
    from gen_accel.measure.motion import Motion as Motion
    from gen_accel.measure.motion import measure_motion as measure_motion
    from gen_accel.measure.pictures import contact_sheet as contact_sheet
    from gen_accel.measure.pictures import side_by_side as side_by_side
    from gen_accel.measure.quality import Fidelity as Fidelity
    from gen_accel.measure.quality import cvvdp_jod as cvvdp_jod
    from gen_accel.measure.quality import lpips as lpips
    from gen_accel.measure.quality import measure_fidelity as measure_fidelity
    from gen_accel.measure.quality import psnr as psnr
    from gen_accel.measure.quality import psnr_per_frame as psnr_per_frame
    from gen_accel.measure.quality import ssim as ssim
    from gen_accel.measure.quality import ssim_per_frame as ssim_per_frame
    from gen_accel.measure.quality import vmaf as vmaf
    from gen_accel.measure.quality import vmaf_per_frame as vmaf_per_frame
    from gen_accel.measure.report import write_report as write_report
    from gen_accel.measure.video_io import check_writable as check_writable
    from gen_accel.measure.video_io import read_about as read_about
    from gen_accel.measure.video_io import read_stream as read_stream
    from gen_accel.measure.video_io import read_video as read_video
    from gen_accel.measure.video_io import write_stream as write_stream
    from gen_accel.measure.video_io import write_video as write_video
else:
    # An estimate reads no pictures.
    __all__, __getattr__, __dir__ = exported(
        __name__,
        {
            "gen_accel.io": "write_json",
            ".motion": "Motion measure_motion",
            ".pictures": "contact_sheet side_by_side",
            ".quality": "Fidelity cvvdp_jod lpips measure_fidelity psnr psnr_per_frame ssim "
            "ssim_per_frame vmaf vmaf_per_frame",
            ".report": "write_report",
            ".video_io": "check_writable read_about read_stream read_video write_stream "
            "write_video",
        },
    )
