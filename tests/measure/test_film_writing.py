"""Films as they are written: all frames, or the reason in one line and nothing left behind."""

import errno
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
from support.full_disk import file_limit

from gen_accel.io import NoRoom
from gen_accel.measure import check_writable, read_video, video_io, write_stream, write_video
from gen_accel.measure.quality import ffmpeg_binary
from gen_accel.measure.video_io import Sound, holds_sound, opened_film, read_about

FRAMES = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), np.uint8)


def test_its_reason_is_in_the_error_and_not_on_stderr(tmp_path, monkeypatch, capfd):
    coding = video_io.CODINGS[".mp4"]._replace(filters=(("scale", "out_color_matrix=none_such"),))
    monkeypatch.setitem(video_io.CODINGS, ".mp4", coding)
    with pytest.raises(OSError, match=r"^ffmpeg wrote no \.mp4 file: \w[^\n]*$"):
        write_video(FRAMES, tmp_path / "clip.mp4", fps=8)
    assert capfd.readouterr().err == ""
    assert [*tmp_path.iterdir()] == []


def test_an_encoder_that_is_missing_is_named_before_the_work(tmp_path, monkeypatch, capfd):
    coding = video_io.CODINGS[".mp4"]._replace(codec="nope")
    monkeypatch.setitem(video_io.CODINGS, ".mp4", coding)
    said = r"^PyAV [\d.]+ here has no encoder nope[^\n]*$"
    with pytest.raises(OSError, match=said):
        check_writable(tmp_path / "clip.mp4")
    with pytest.raises(OSError, match=said):
        video_io.encode(iter(FRAMES), tmp_path / "clip.mp4", fps=8)
    assert capfd.readouterr().err == ""
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif"])
def test_a_disk_that_is_full_is_told_as_such(tmp_path, capfd, name):
    noise = np.random.default_rng(0).integers(0, 255, (20, 128, 128, 3), np.uint8)
    said = rf"no room for \S*{name}: file too large"
    with file_limit(50_000), pytest.raises(NoRoom, match=said):
        write_video(noise, tmp_path / name, fps=8)
    assert capfd.readouterr().err == ""
    assert [*tmp_path.iterdir()] == []


def tone(channels: int, rate: int, seconds: float = 0.625) -> Sound:
    times = np.arange(round(rate * seconds)) / rate
    each = [np.sin(2 * np.pi * 220.0 * (i + 1) * times) for i in range(channels)]
    return Sound(0.5 * np.stack(each).astype(np.float32), rate)


@pytest.mark.parametrize(("channels", "rate"), [(2, 32_000), (1, 24_000), (2, 16_001)])
def test_sound_is_heard_at_its_time_beside_the_frames(tmp_path, channels, rate):
    """A rate that AAC does not have is changed."""
    sound, about = tone(channels, rate), {"prompt": "a bell"}
    path = write_video(FRAMES, tmp_path / "clip.mp4", fps=8, about=about, sound=sound)
    assert read_video(path).shape == FRAMES.shape
    assert read_about(path) == about
    with opened_film(path, path) as film:
        assert film.heard() == pytest.approx(0.625, abs=0.05)
        heard = film.sound(0.0, 0.625, rate)
    assert heard is not None
    wanted = np.broadcast_to(sound.samples, heard.shape)
    assert np.abs(heard - wanted)[:, 2000:-2000].mean() < 0.1 * np.abs(wanted).mean()
    silent = write_video(FRAMES, tmp_path / "silent.mp4", fps=8, about=about)
    np.testing.assert_array_equal(read_video(silent), read_video(path))
    with opened_film(silent, silent) as film:
        assert film.heard() == 0


def test_what_holds_no_sound_is_written_without(tmp_path):
    for name in ("clip.gif", "clip"):
        assert not holds_sound(tmp_path / name)
        path = write_video(FRAMES, tmp_path / name, fps=8, sound=tone(2, 32_000))
        assert len(read_video(path)) == len(FRAMES)
    assert holds_sound("clip.MP4")


def test_sound_that_is_cut_off_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(video_io.FilmStream, "heard", lambda film: 0.2)
    with pytest.raises(OSError, match=r"ffmpeg wrote 0\.20 of 0\.62 s of sound to the \.mp4 file"):
        write_video(FRAMES, tmp_path / "clip.mp4", fps=8, sound=tone(2, 32_000))
    assert [*tmp_path.iterdir()] == []


STEADY = """
import hashlib, sys
import numpy as np
from gen_accel.measure import video_io

noise = np.random.default_rng(0).normal(28, 4, (9, 48, 48, 3))
for i, frame in enumerate(noise):
    frame[12:36, 4 + 3 * i : 24 + 3 * i, 0] += 160
frames = noise.clip(0, 255).astype(np.uint8)
video_io.encode(iter(frames), video_io.Path(sys.argv[1]), fps=16)
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_equal_frames_make_equal_films_whatever_memory_held_before(tmp_path):
    def film(byte: str) -> bytes:
        environment = {**os.environ, "MALLOC_PERTURB_": byte}
        command = [sys.executable, "-c", STEADY, str(tmp_path / "a.mp4")]
        return subprocess.run(command, env=environment, check=True, capture_output=True).stdout

    assert film("0") == film("85")


def held_open(folder: Path) -> list[str]:
    descriptors = Path("/proc/self/fd").iterdir()
    held = [os.readlink(one) for one in descriptors if one.is_symlink()]
    return [path for path in held if path.startswith(str(folder))]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif"])
def test_nothing_is_left_of_a_clip_that_breaks(tmp_path, name):
    """No file, no open file and no thread of the encoder."""

    def threads():
        return len([*Path("/proc/self/task").iterdir()])

    def frames():
        for _ in range(20):
            yield FRAMES
        if name == "clip.mp4":  # its first frames are in the file by now
            assert held_open(tmp_path)
            assert threads() > before
        raise ValueError("no more")

    before = threads()
    with pytest.raises(ValueError, match="no more"):
        write_stream(frames(), tmp_path / name, fps=8)
    gc.collect()
    assert held_open(tmp_path) == []
    assert threads() <= before
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG"])
def test_a_full_disk_is_known_by_the_number_of_the_error(tmp_path, monkeypatch, name):
    number = getattr(errno, name)

    def full(*args):
        raise av.error.OSError(number, os.strerror(number), "clip.mp4")

    monkeypatch.setattr(video_io, "_encoded", full)
    with pytest.raises(NoRoom) as caught:
        write_video(FRAMES, tmp_path / "clip.mp4", fps=8)
    assert caught.value.errno == number


@pytest.mark.parametrize(("size", "fps"), [((34, 50), 23.976), ((480, 64), 8)])
def test_a_film_is_h264_in_bt709_with_its_index_in_front(tmp_path, size, fps):
    frames = np.random.default_rng(0).integers(0, 255, (5, *size, 3), np.uint8)
    path = write_video(frames, tmp_path / "clip.mp4", fps=fps)
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        coded = stream.codec_context
        assert (coded.name, coded.pix_fmt) == ("h264", "yuv420p")
        told = (coded.colorspace, coded.color_primaries, coded.color_trc, coded.color_range)
        assert tuple(map(int, told)) == (1, 1, 1, 1)
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-4)
        assert float(stream.duration * stream.time_base) == pytest.approx(5 / fps, rel=0.01)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert b"crf=15.0" in data
    assert b"sliced_threads=0" in data


@pytest.mark.parametrize("fps", [8, 24, 100, 250])
def test_a_gif_states_its_times_in_hundredths(tmp_path, fps):
    path = write_video(FRAMES, tmp_path / "clip.gif", fps=fps)
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        times = [
            float(packet.pts * stream.time_base) for packet in film.demux(stream) if packet.size
        ]
    due = [i / min(fps, 100) for i in range(len(FRAMES))]
    assert times == pytest.approx(due, abs=0.0051)


def test_a_long_film_is_written_a_part_at_a_time(tmp_path):
    """The encoder lets each chunk go before many more are made."""
    made = []

    def chunks():
        for i in range(200):
            chunk = np.full((1, 32, 48, 3), i, np.uint8)
            made.append(weakref.ref(chunk))
            yield chunk
            assert sum(one() is not None for one in made) < 5

    back = read_video(write_stream(chunks(), tmp_path / "clip.mp4", fps=8))
    assert len(back) == 200
    assert np.abs(back.mean((1, 2, 3)) - np.arange(200)).max() < 3


def test_the_program_ffmpeg_is_found_or_its_package_named(monkeypatch):
    assert Path(ffmpeg_binary()).is_file()
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    said = r'^the program ffmpeg needs imageio_ffmpeg: pip install ".+\[quality\]"$'
    with pytest.raises(ModuleNotFoundError, match=said):
        ffmpeg_binary()
