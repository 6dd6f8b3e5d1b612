"""VMAF of a video against a reference, by the libvmaf in the ffmpeg of imageio_ffmpeg.

Li et al., 2016, https://github.com/Netflix/vmaf, with the model that is built into libvmaf,
vmaf_v0.6.1. It was trained on films of 1920 x 1080 pixels, seen from three heights of the screen;
on other sizes and on drawn toys it ranks, and its scale is not calibrated. It looks at brightness
alone.
"""

import json
import math
import subprocess
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import numpy as np

from gen_accel.measure.enlarging import enlargement
from gen_accel.measure.ffmpeg_process import ffmpeg_binary

MODEL = "vmaf_v0.6.1"
VMAF_SIDE = 16  # pixels: libvmaf 3 crashes on very small frames
_LOG = "vmaf.json"
# Video above, reference below, in one stream, so that frames cannot get out of step. libvmaf takes
# YUV, of which its model reads Y: as in MP4 files of `write_video`, BT.709 in the limited range.
_GRAPH = (
    "split[a][b];[a]crop={width}:{height}:0:0,{shown}[video];"
    "[b]crop={width}:{height}:0:{height},{shown}[reference];"
    "[video][reference]libvmaf=log_fmt=json:log_path={log}:n_threads={threads}"
)
_SHOWN = "scale={width}:{height}:flags=neighbor:out_color_matrix=bt709:out_range=tv,format=yuv444p"


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
        ValueError: shapes differ, or whatever `VMAF` refuses.
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
        if video.shape != reference.shape:
            raise ValueError(
                f"video and reference must have one shape, got {video.shape} and {reference.shape}"
            )
        if reason := too_small(*video.shape[1:3]):
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
        sizes = {"width": width, "height": height, "shown": shown}
        graph = _GRAPH.format(log=_LOG, threads=self._threads, **sizes)
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
    """Return why VMAF cannot be computed here, and how to get it; None where it can."""
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


def too_small(height: int, width: int) -> str | None:
    """Return why frames of this size have no VMAF; None where they have."""
    if min(height, width) >= VMAF_SIDE:
        return None
    return (
        f"vmaf needs frames of at least {VMAF_SIDE} x {VMAF_SIDE} pixels, got {height} x {width}"
    )


@cache
def _has_libvmaf(executable: str) -> bool:
    try:
        asked = [executable, "-hide_banner", "-h", "filter=libvmaf"]
        told = subprocess.run(asked, capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return f"version={MODEL}" in told.stdout.decode(errors="replace")
