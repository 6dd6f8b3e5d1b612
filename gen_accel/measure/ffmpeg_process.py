"""ffmpeg as a process of its own that writes a video, and its error when it fails."""

import errno
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from gen_accel.extras import needed_for
from gen_accel.files import FULL
from gen_accel.measure.ffmpeg_words import why
from gen_accel.paths import for_ffmpeg


def ffmpeg() -> Any:
    """The module imageio_ffmpeg, which brings an ffmpeg."""
    with needed_for("reading or writing a video file", extra="video"):
        import imageio_ffmpeg
    return imageio_ffmpeg


def pyav() -> Any:
    """The module av, which is ffmpeg's libraries."""
    with needed_for("reading or writing a video file", extra="video"):
        import av
    return av


def encode(
    frames: Iterator[np.ndarray],
    path: Path,
    size: tuple[int, int],
    *,
    fps: float,
    options: Sequence[str],
) -> int:
    """Send frames to ffmpeg, which encodes them to a file.

    Args:
        frames: (height, width, 3) uint8 each.
        size: width and height.
        options: of the output: codec, filters and so on.

    Returns:
        How many frames were sent.

    Raises:
        OSError: ffmpeg failed, with its reason in one line; with the number of the error where the
            disk is full. Its messages go nowhere else.
    """
    command = [
        *(ffmpeg().get_ffmpeg_exe(), "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"),
        *("-s", f"{size[0]}x{size[1]}", "-r", str(Fraction(fps).limit_denominator())),
        *("-i", "-", "-an", *options, for_ffmpeg(path)),
    ]
    with tempfile.TemporaryFile() as words:
        # Out of the terminal's reach: Ctrl-C is answered here.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=words,
            start_new_session=True,
        )
        try:
            sent = _sent(process, frames)
        except BaseException:
            process.kill()
            raise
        finally:
            with suppress(OSError):  # what is left in the pipe of a process that ended
                process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
            status = process.wait()
        if status:
            words.seek(0)
            raise _failed(path, status, words.read().decode(errors="replace"))
    return sent


def _sent(process: subprocess.Popen[bytes], frames: Iterator[np.ndarray]) -> int:
    """Send frames until all are sent or the process ends; return their number."""
    assert process.stdin is not None
    count = 0
    for frame in frames:
        try:
            process.stdin.write(np.ascontiguousarray(frame).data)
        except OSError:  # ffmpeg ended; its exit status tells why
            break
        count += 1
    return count


def _failed(path: Path, status: int, said: str) -> OSError:
    if -status == getattr(signal, "SIGXFSZ", None):
        return OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    for number in FULL:
        if os.strerror(number) in said:
            return OSError(number, os.strerror(number))
    reason = why(said) if said.strip() else f"it ended with status {status}"
    return OSError(f"ffmpeg wrote no {path.suffix} file: {reason}")
