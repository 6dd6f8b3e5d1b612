"""Texts that a video carries about itself: what goes in comes out, also of a copy."""

import subprocess

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from gen_accel.measure import read_about, read_video, write_stream, write_video
from gen_accel.measure.video_io import video_fps

FRAMES = np.random.default_rng(0).integers(0, 255, (3, 33, 49, 3), np.uint8)
TEXTS = {
    "prompt": 'eine Katze "größer" als 猫,\n\tand a NUL \0 and {"gen_accel": {"prompt": "no"}}',
    "settings": '{"steps": 20, "size": "gen_accel size 9x9"}',
    "empty": "",
    "long": "x" * 3000,
}
NAMES = ["clip.mp4", "CLIP.MP4", "clip.gif", "clip.png", "clip"]


@pytest.mark.parametrize("name", NAMES)
def test_texts_come_back_and_change_no_frame(tmp_path, name):
    path = write_video(FRAMES, tmp_path / "a" / name, fps=8, about=TEXTS)
    plain = write_video(FRAMES, tmp_path / "b" / name, fps=8)
    assert read_about(path) == TEXTS
    assert read_about(plain) == {}
    np.testing.assert_array_equal(read_video(path), read_video(plain))
    assert read_video(path).shape == FRAMES.shape
    assert video_fps(path) == video_fps(plain)


def test_one_picture_has_them(tmp_path):
    path = write_video(FRAMES[:1], tmp_path / "one.png", fps=8, about=TEXTS)
    assert read_about(path) == TEXTS
    assert Image.open(path).text["prompt"] == TEXTS["prompt"]


def test_a_stream_has_them(tmp_path):
    path = write_stream(iter([FRAMES]), tmp_path / "clip.mp4", fps=8, about={"prompt": "猫"})
    assert read_about(path) == {"prompt": "猫"}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_a_copied_film_keeps_them(tmp_path, suffix):
    path = write_video(FRAMES, tmp_path / "clip.mp4", fps=8, about=TEXTS)
    copy = tmp_path / f"copy{suffix}"
    tool = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-c", "copy"]
    subprocess.run([*tool, str(copy)], check=True)
    assert read_about(copy) == TEXTS


def test_foreign_files_have_none_or_their_own(tmp_path):
    for suffix, comment in ((".mp4", '{"gen_accel": 3}'), (".mkv", '{"prompt": "x"}')):
        with av.open(tmp_path / f"a{suffix}", "w") as film:
            film.metadata["comment"] = comment
            stream = film.add_stream("libx264", rate=8)
            stream.width, stream.height = 48, 32
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(FRAMES[0][:32, :48]))
            film.mux(stream.encode(frame))
            film.mux(stream.encode())
        assert read_about(tmp_path / f"a{suffix}") == {}
    Image.fromarray(FRAMES[0]).save(tmp_path / "a.gif", comment=b"\xff\xfe made by hand")
    assert read_about(tmp_path / "a.gif") == {}
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "steps: 20")
    Image.fromarray(FRAMES[0]).save(tmp_path / "a.png", pnginfo=chunks)
    assert read_about(tmp_path / "a.png") == {"parameters": "steps: 20"}


def test_read_about_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no video at"):
        read_about(tmp_path / "clip.mp4")
    with pytest.raises(FileNotFoundError, match=r"0000\.png"):
        read_about(tmp_path)
    for name in ("bad.mp4", "bad.gif", "bad.png"):
        (tmp_path / name).write_bytes(b"not a video")
        with pytest.raises(OSError, match=rf"^\S*{name} [^\n]+$"):
            read_about(tmp_path / name)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"": "x"}, "1 to 79 characters of ASCII, got ''"),
        ({"größe": "x"}, "1 to 79 characters of ASCII, got 'größe'"),
        ({"n" * 80: "x"}, "1 to 79 characters"),
        ({"steps": 20}, r"about\['steps'\] must be text, got 20"),
    ],
)
def test_what_no_file_holds_is_refused_before_the_work(tmp_path, about, said):
    with pytest.raises(ValueError, match=said):
        write_video(FRAMES, tmp_path / "clip.mp4", fps=8, about=about)

    def never():
        raise AssertionError
        yield

    with pytest.raises(ValueError, match=said):
        write_stream(never(), tmp_path / "clip.mp4", fps=8, about=about)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip"])
def test_a_name_that_is_not_utf8_is_escaped(tmp_path, name):
    path = write_video(FRAMES, tmp_path / name, fps=8, about={"model": "m\udcff"})
    assert read_about(path) == {"model": "m\\udcff"}
