"""ffmpeg as it writes: all frames, or its reason in one line and nothing on stderr."""

import errno
import itertools
import signal
import subprocess

import numpy as np
import pytest
from support.full_disk import file_limit

from gen_accel.files import NoRoom
from gen_accel.measure import ffmpeg_process, video_io, write_stream, write_video

FRAMES = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), np.uint8)


def test_its_reason_is_in_the_error_and_not_on_stderr(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(video_io, "MP4_FILTER", "no_such_filter")
    said = r"^ffmpeg wrote no \.mp4 file: .*'no_such_filter'[^\n]*$"
    with pytest.raises(OSError, match=said):
        write_video(FRAMES, tmp_path / "clip.mp4", fps=8)
    assert capfd.readouterr().err == ""
    assert [*tmp_path.iterdir()] == []


def test_it_may_end_before_all_frames_are_sent(tmp_path, capfd):
    frames = itertools.repeat(FRAMES[0], 500)
    with pytest.raises(OSError, match=r"^ffmpeg wrote no \.mp4 file: [^\n]*ncoder[^\n]*$"):
        ffmpeg_process.encode(
            frames, tmp_path / "clip.mp4", (48, 32), fps=8, options=("-c:v", "nope")
        )
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif"])
def test_a_disk_that_is_full_is_told_as_such(tmp_path, capfd, name):
    noise = np.random.default_rng(0).integers(0, 255, (20, 128, 128, 3), np.uint8)
    said = rf"no room for \S*{name}: file too large"
    with file_limit(50_000), pytest.raises(NoRoom, match=said):
        write_video(noise, tmp_path / name, fps=8)
    assert capfd.readouterr().err == ""
    assert [*tmp_path.iterdir()] == []


def test_no_process_is_left_of_a_clip_that_breaks(tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    def frames():
        yield FRAMES
        raise ValueError("no more")

    monkeypatch.setattr(ffmpeg_process.subprocess, "Popen", start)
    with pytest.raises(ValueError, match="no more"):
        write_stream(frames(), tmp_path / "clip.mp4", fps=8)
    [process] = started
    assert process.returncode == -signal.SIGKILL
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_is_known_by_what_ffmpeg_says(tmp_path):
    said = "[out#0/mp4 @ 0x1] Error writing trailer: No space left on device"
    assert ffmpeg_process._failed(tmp_path / "a.mp4", 1, said).errno == errno.ENOSPC
