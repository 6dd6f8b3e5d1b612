"""VMAF and ColorVideoVDP of a video against a reference, which model what a viewer sees.

VMAF, Li et al., 2016, https://github.com/Netflix/vmaf, is computed by the libvmaf in the ffmpeg of
imageio_ffmpeg, with the model that is built into it, vmaf_v0.6.1. It was trained on films of
1920 x 1080 pixels, seen from three heights of the screen; on other sizes and on drawn toys it
ranks, and its scale is not calibrated. It looks at brightness alone.

ColorVideoVDP, Mantiuk et al., 2024, https://doi.org/10.1145/3658144, package cvvdp, whose
parameters are in its wheel: nothing is downloaded. It models an eye before a display, in colour
and over time.
"""

import json
import logging
import math
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from gen_accel.measure.video_io import frames_of
from gen_accel.registry import needed_for

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VIEWED_SIDE = 288  # pixels: the height of CIF, the smallest format that films are shown in
LEAST_SIDE = 16  # pixels: libvmaf 3 crashes on smaller frames, and cvvdp's pyramid has no level
MODEL = "vmaf_v0.6.1"
_LOG = "vmaf.json"
# Video above, reference below, in one stream, so that frames cannot get out of step. libvmaf takes
# YUV, of which its model reads Y: as in MP4 files of `write_video`, BT.709 in the limited range.
_GRAPH = (
    "split[a][b];[a]crop={width}:{height}:0:0,{shown}[video];"
    "[b]crop={width}:{height}:0:{height},{shown}[reference];"
    "[video][reference]libvmaf=log_fmt=json:log_path={log}:n_threads={threads}"
)
_SHOWN = "scale={width}:{height}:flags=neighbor:out_color_matrix=bt709:out_range=tv,format=yuv444p"
DISPLAY = "standard_4k"  # of cvvdp
FREE_SHARE = 0.5  # of a GPU's free memory that cvvdp may take


def vmaf(video: np.ndarray, reference: np.ndarray) -> float:
    """Mean of `vmaf_per_frame`, 0 to 100."""
    scores = vmaf_per_frame(video, reference)
    return math.fsum(scores) / len(scores)


def vmaf_per_frame(video: np.ndarray, reference: np.ndarray) -> list[float]:
    """VMAF of each frame, 0 to 100; identical videos score near 100, not always 100.

    Small frames are enlarged by `enlargement`, pixel by pixel.

    Args:
        video, reference: (F, H, W, 3) uint8.

    Raises:
        ValueError: shapes differ, or a refusal of `VMAF`.
        OSError: ffmpeg failed.
    """
    with VMAF() as metric:
        metric.update(video, reference)
        return metric.compute()


class VMAF:
    """VMAF of two videos, chunk by chunk; see `vmaf_per_frame`. Use it in a `with`, which ends the
    process of ffmpeg.

    Args:
        threads: threads of libvmaf; the scores do not depend on them.

    Raises:
        ValueError: ffmpeg is not there, or has no libvmaf; see `vmaf_missing`.
    """

    def __init__(self, *, threads: int = 1) -> None:
        if missing := vmaf_missing():
            raise ValueError(missing)
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._size = (0, 0)
        self._frames = 0
        # Both live as long as the metric, and `close` ends them.
        self._folder = tempfile.TemporaryDirectory(prefix="gen-accel-vmaf-")
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> "VMAF":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, video: np.ndarray, reference: np.ndarray) -> None:
        """Add a chunk, (f, H, W, 3) uint8; ValueError for shapes that differ, or frames under 16
        pixels."""
        check_shapes(video, reference)
        if reason := too_small("vmaf", *video.shape[1:3]):
            raise ValueError(reason)
        if len(video) == 0:
            return
        if self._process is None:
            self._size = (video.shape[1], video.shape[2])
            self._process = self._start()
        elif video.shape[1:3] != self._size:
            raise ValueError(f"chunks must have one size, got {self._size} and {video.shape[1:3]}")
        assert self._process.stdin is not None
        for frames in zip(video, reference, strict=True):
            try:
                self._process.stdin.write(np.concatenate(frames).tobytes())
            except OSError:  # ffmpeg ended
                raise self._failed() from None
            self._frames += 1

    def compute(self) -> list[float]:
        """VMAF of each frame so far. No chunk can be added after it.

        Raises:
            ValueError: no frames.
            OSError: ffmpeg failed.
        """
        if self._process is None:
            raise ValueError("video and reference must hold a frame, got none")
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:  # what is left in the pipe of a process that ended
            raise self._failed() from None
        if self._process.wait():
            raise self._failed()
        log = json.loads((Path(self._folder.name) / _LOG).read_text(encoding="utf-8"))
        scores = [float(frame["metrics"]["vmaf"]) for frame in log["frames"]]
        if len(scores) != self._frames:
            raise OSError(f"ffmpeg scored {len(scores)} of {self._frames} frames")
        return scores

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._words.close()
        self._folder.cleanup()

    def _start(self) -> "subprocess.Popen[bytes]":
        height, width = self._size
        factor = enlargement(height, width)
        shown = _SHOWN.format(width=factor * width, height=factor * height)
        graph = _GRAPH.format(
            log=_LOG, threads=self._threads, width=width, height=height, shown=shown
        )
        command = [
            *(ffmpeg_binary(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"),
            *("-s", f"{width}x{2 * height}", "-i", "-", "-lavfi", graph, "-f", "null", "-"),
        ]
        # Out of the terminal's reach: Ctrl-C is answered here.
        return subprocess.Popen(
            command,
            cwd=self._folder.name,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._words,
            start_new_session=True,
        )

    def _failed(self) -> OSError:
        assert self._process is not None
        status = self._process.wait()
        self._words.seek(0)
        said = self._words.read().decode(errors="replace").strip()
        reason = said.split("\n")[-1] if said else f"it ended with status {status}"
        return OSError(f"ffmpeg computed no VMAF: {reason}")


def vmaf_missing() -> str | None:
    """Return why VMAF cannot be computed here, and how to get it; None if it can."""
    if find_spec("imageio_ffmpeg") is None:
        return 'vmaf needs imageio_ffmpeg: pip install "gen_accel[quality]"'
    try:
        executable = ffmpeg_binary()
    except OSError:  # there is no wheel with a binary for this machine
        return "vmaf needs an ffmpeg with libvmaf: name one by IMAGEIO_FFMPEG_EXE"
    if not _has_libvmaf(executable):
        return (
            f"vmaf needs an ffmpeg with libvmaf and its model {MODEL}, which {executable} has "
            "not: name another by IMAGEIO_FFMPEG_EXE"
        )
    return None


def cvvdp_jod(
    video: np.ndarray,
    reference: np.ndarray,
    *,
    fps: float,
    display: str = DISPLAY,
    device: str | None = None,
) -> float:
    """`cvvdp_of_streams` of two videos in memory, (F, H, W, 3) uint8."""
    check_shapes(video, reference)
    return cvvdp_of_streams(
        [video], [reference], frames=len(video), fps=fps, display=display, device=device
    )


def cvvdp_of_streams(
    video: Iterable[np.ndarray],
    reference: Iterable[np.ndarray],
    *,
    frames: int,
    fps: float,
    display: str = DISPLAY,
    device: str | None = None,
) -> float:
    """Quality of a video beside a reference in JOD, just objectionable differences: 10 if no
    difference can be seen, and one less where three in four viewers prefer the reference.

    Small frames are enlarged by `enlargement`, pixel by pixel. Both videos are read once, in step.

    Args:
        video, reference: chunks of (f, H, W, 3) uint8, in order.
        frames: how many either holds; one is a picture.
        fps: frames a second, which decides what the eye can follow.
        display: one of cvvdp's displays, viewed pixel by pixel. "standard_4k" is its own default:
            30 inches of 3840 x 2160 pixels and 200 cd/m2, at twice the height of the screen, in an
            office.
        device: of torch; without, a GPU if there is one.

    Raises:
        ValueError: cvvdp is not installed, frames under 16 pixels, fps that is not positive, or a
            stream that ends early.
    """
    if missing := cvvdp_missing():
        raise ValueError(missing)
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive and finite, got {fps}")
    import torch

    with needed_for("cvvdp", extra="quality"), _no_new_handlers():
        import pycvvdp
    where = None if device is None else torch.device(device)
    with _no_new_handlers(), torch.no_grad():
        metric = pycvvdp.cvvdp(
            display_name=display, quiet=True, device=where, gpu_mem=_gigabytes()
        )
        source = _Source((video, reference), frames, fps, metric.display_photometry)
        score, _ = metric.predict_video_source(source)
    return float(score)


def cvvdp_missing() -> str | None:
    """Return why cvvdp cannot run here, and how to get it; None if it can."""
    if find_spec("pycvvdp") is None:
        return 'cvvdp needs pycvvdp: pip install "gen_accel[quality]"'
    return None


class _Source:
    """Frames of both videos in order, as pycvvdp asks for them: one of each in turn."""

    def __init__(
        self, videos: Sequence[Iterable[np.ndarray]], frames: int, fps: float, photometry: Any
    ) -> None:
        self._left = [frames_of(video) for video in videos]
        self._ahead = [next(left, None) for left in self._left]
        self._frames, self._fps, self._photometry = frames, fps, photometry
        shapes = [None if frame is None else frame.shape for frame in self._ahead]
        if shapes[0] is None or shapes[0] != shapes[1]:
            raise ValueError(f"video and reference must have one shape, got {shapes} of a frame")
        height, width = shapes[0][:2]
        if reason := too_small("cvvdp", height, width):
            raise ValueError(reason)
        self._factor = enlargement(height, width)
        self._size = (self._factor * height, self._factor * width, frames)

    def get_video_size(self) -> tuple[int, int, int]:
        return self._size

    def get_batch_size(self) -> int:
        return 1

    def get_frames_per_second(self) -> float:
        return self._fps if self._frames > 1 else 0

    def get_test_frame(self, frame: int, device: "torch.device", colorspace: str) -> "Tensor":
        return self._next(0, device, colorspace)

    def get_reference_frame(self, frame: int, device: "torch.device", colorspace: str) -> "Tensor":
        return self._next(1, device, colorspace)

    def _next(self, which: int, device: "torch.device", colorspace: str) -> "Tensor":
        pixels = self._ahead[which]
        if pixels is None:
            raise ValueError(f"video and reference must hold {self._frames} frames, got fewer")
        self._ahead[which] = next(self._left[which], None)
        import torch

        seen = torch.from_numpy(enlarged(pixels, self._factor)).to(device)
        shaped = seen.movedim(-1, 0)[None, :, None].float() / 255
        return self._photometry.source_2_target_colorspace(shaped, colorspace)


def enlargement(height: int, width: int) -> int:
    """Whole factor that brings the smaller side up to 288 pixels at most; 1 from 145 on.

    Frames of a toy model are seen enlarged, pixel by pixel, and metrics that model an eye before a
    screen would call blocks of 96 pixels invisible.
    """
    return max(1, VIEWED_SIDE // min(height, width))


def enlarged(frame: np.ndarray, factor: int) -> np.ndarray:
    """Repeat each pixel of (H, W, 3) `factor` times down and across."""
    return frame if factor == 1 else frame.repeat(factor, 0).repeat(factor, 1)


def too_small(metric: str, height: int, width: int) -> str | None:
    """Reason why frames of this size have no figure of "vmaf" or "cvvdp"; None if they have."""
    if min(height, width) >= LEAST_SIDE:
        return None
    return (
        f"{metric} needs frames of at least {LEAST_SIDE} x {LEAST_SIDE} pixels, got "
        f"{height} x {width}"
    )


def check_shapes(video: np.ndarray, reference: np.ndarray) -> None:
    """Raise ValueError if two videos have different shapes."""
    if video.shape != reference.shape:
        raise ValueError(
            f"video and reference must have one shape, got {video.shape} and {reference.shape}"
        )


def ffmpeg_binary() -> str:
    """Path of the ffmpeg of imageio-ffmpeg, or of the one that IMAGEIO_FFMPEG_EXE names.

    Raises:
        ModuleNotFoundError: imageio_ffmpeg is not installed; with the command that installs it.
        OSError: it has no ffmpeg for this machine.
    """
    with needed_for("the program ffmpeg", extra="quality"):
        import imageio_ffmpeg
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise OSError(f"imageio_ffmpeg has no ffmpeg for this machine: {error}") from error


@cache
def _has_libvmaf(executable: str) -> bool:
    try:
        asked = [executable, "-hide_banner", "-h", "filter=libvmaf"]
        told = subprocess.run(asked, capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return f"version={MODEL}" in told.stdout.decode(errors="replace")


def _gigabytes() -> float | None:
    """GB of a GPU that cvvdp may take, as a model may hold most of it; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return FREE_SHARE * torch.cuda.mem_get_info()[0] / 1e9


@contextmanager
def _no_new_handlers() -> Iterator[None]:
    """Take off what pycvvdp's logging adds to the root logger, for all libraries."""
    root = logging.getLogger()
    before = [*root.handlers]
    try:
        yield
    finally:
        for handler in [*root.handlers]:
            if handler not in before:
                root.removeHandler(handler)
