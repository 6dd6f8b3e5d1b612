"""Quality figures, video files, side-by-side clips and reports, on clips of a few small frames."""

import json
import math
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from PIL import Image

from gen_accel import io
from gen_accel.measure import (
    check_writable,
    contact_sheet,
    psnr,
    psnr_per_frame,
    quality,
    read_video,
    side_by_side,
    ssim,
    ssim_per_frame,
    video_io,
    write_json,
    write_report,
    write_video,
)


def moving_square(frames=5, height=32, width=48):
    """(F, H, W, 3) uint8: a red square drifts over a blue slope."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[..., 2] = np.linspace(20, 200, width)
    for i, frame in enumerate(video):
        frame[4 : 4 + height // 3, 2 * i : 2 * i + height // 3] = (235, 50, 45)
    return video


@pytest.fixture
def video():
    return moving_square()


@pytest.fixture
def noisy(video):
    noise = np.random.default_rng(0).integers(-20, 21, video.shape)
    return np.clip(video + noise, 0, 255).astype(np.uint8)


def test_psnr_is_the_closed_formula(video, noisy):
    squares = (video.astype(np.float64) - noisy) ** 2
    assert psnr(noisy, video) == pytest.approx(10 * np.log10(255**2 / squares.mean()), abs=1e-4)
    expected = 10 * np.log10(255**2 / squares.mean((1, 2, 3)))
    assert psnr_per_frame(noisy, video) == pytest.approx(list(expected), abs=1e-4)


def test_psnr_pools_frames_of_which_some_are_identical(video, noisy):
    mixed = np.concatenate([video[:2], noisy[2:]])
    squares = (video.astype(np.float64) - mixed) ** 2
    assert psnr_per_frame(mixed, video)[:2] == [math.inf, math.inf]
    assert psnr(mixed, video) == pytest.approx(10 * np.log10(255**2 / squares.mean()), abs=1e-4)


def test_identical_videos(video):
    assert psnr(video, video.copy()) == math.inf
    assert ssim(video, video.copy()) == pytest.approx(1, abs=1e-6)


def test_ssim_falls_with_noise(video, noisy):
    louder = np.clip(video + 3 * (noisy.astype(int) - video), 0, 255).astype(np.uint8)
    assert ssim(louder, video) < ssim(noisy, video) < 0.99
    assert np.mean(ssim_per_frame(noisy, video)) == pytest.approx(ssim(noisy, video))


def test_batches_do_not_change_the_figures(video, noisy, monkeypatch):
    whole = psnr_per_frame(noisy, video), ssim_per_frame(noisy, video)
    monkeypatch.setattr(quality, "PIXELS_AT_ONCE", 2 * 32 * 48)
    assert psnr_per_frame(noisy, video) == pytest.approx(whole[0], abs=1e-5)
    assert ssim_per_frame(noisy, video) == pytest.approx(whole[1], abs=1e-5)


def test_figures_take_views_and_leave_the_videos_alone(video, noisy):
    video.setflags(write=False)
    before = noisy.copy()
    mirrored = psnr(noisy[:, :, ::-1], video[:, :, ::-1])
    assert mirrored == pytest.approx(psnr(noisy, video), abs=1e-4)
    np.testing.assert_array_equal(noisy, before)


@pytest.mark.parametrize("figure", [psnr, psnr_per_frame, ssim, ssim_per_frame])
def test_figures_refuse_other_shapes_and_types(figure, video):
    both = r"\(4, 32, 48, 3\) and \(5, 32, 48, 3\)"
    with pytest.raises(ValueError, match=both):
        figure(video[:4], video)
    with pytest.raises(ValueError, match="float32"):
        figure(video.astype(np.float32), video)
    with pytest.raises(ValueError, match="F, H, W, 3"):
        figure(video[0], video[0])


def test_ssim_refuses_frames_smaller_than_its_window(video):
    assert ssim(video[:, :6, :6], video[:, :6, :6]) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="6 x 6"):
        ssim(video[:, :5], video[:, :5])


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 48), (33, 48), (32, 49), (33, 49)], ids=str)
@pytest.mark.parametrize("fps", [8, 23.976])
def test_mp4_round_trip(tmp_path, size, fps):
    video = moving_square(5, *size)
    path = write_video(video, tmp_path / "new" / "clip.mp4", fps=fps)
    back = read_video(path)
    assert path == tmp_path / "new" / "clip.mp4"
    assert back.shape == video.shape
    # Colour is stored at half the size, so only edges of colour are off.
    errors = np.abs(back.astype(int) - video)
    assert np.median(errors) <= 2
    assert errors.mean() < 4
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


def test_mp4_is_plain_h264_of_even_size(tmp_path):
    path = write_video(moving_square(3, 33, 49), tmp_path / "clip.mp4", fps=8)
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height) == (50, 34)
        assert stream.average_rate == 8


def test_gif_round_trip_keeps_still_frames(tmp_path):
    video = moving_square(6, 33, 49)
    video[3] = video[2]
    back = read_video(write_video(video, tmp_path / "clip.gif", fps=15))
    assert back.shape == video.shape
    assert np.abs(back.astype(int) - video).mean() < 4


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_one_frame_is_a_video_too(tmp_path, suffix):
    one = moving_square(1)
    assert read_video(write_video(one, tmp_path / f"clip{suffix}", fps=8)).shape == one.shape


@pytest.mark.parametrize("name", ["clip", "clip.png"])
def test_png_frames_are_exact_and_replace_earlier_ones(tmp_path, name, video):
    write_video(np.concatenate([video, video]), tmp_path / name, fps=8)
    folder = write_video(video, tmp_path / name, fps=8)
    assert folder == tmp_path / "clip"
    assert sorted(p.name for p in folder.iterdir()) == [f"000{i}.png" for i in range(5)]
    assert [p.name for p in tmp_path.iterdir()] == ["clip"]
    np.testing.assert_array_equal(read_video(folder), video)


def test_one_png_is_a_picture(tmp_path, video):
    path = write_video(video[:1], tmp_path / "still.png", fps=8)
    assert path.is_file()
    np.testing.assert_array_equal(read_video(path), video[:1])


def break_the_writer(monkeypatch, error):
    """Make the third frame fail, in the encoder and in Pillow."""

    def encode(frames, path, *args, **kwargs):
        with path.open("wb") as file:
            for _ in range(2):
                file.write(next(frames).tobytes())
            raise error

    save = Image.Image.save

    def save_two(self, path, *args, **kwargs):
        if "0002" in str(path):
            raise error
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(video_io, "encode", encode)
    monkeypatch.setattr(Image.Image, "save", save_two)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip"])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, name, error, video):
    break_the_writer(monkeypatch, error)
    with pytest.raises(type(error)):
        write_video(video, tmp_path / name, fps=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip"])
def test_an_interrupted_write_leaves_the_earlier_video(tmp_path, monkeypatch, name, video):
    path = write_video(video, tmp_path / name, fps=8)
    before = read_video(path)
    break_the_writer(monkeypatch, OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        write_video(video[:, ::-1], path, fps=8)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    np.testing.assert_array_equal(read_video(path), before)


def test_a_folder_that_cannot_be_swapped_comes_back(tmp_path, monkeypatch, video):
    path = write_video(video, tmp_path / "clip", fps=8)

    def refuse(*args):
        raise OSError("no rename")

    monkeypatch.setattr(io.os, "replace", refuse)
    monkeypatch.setattr(io, "_exchange", lambda one, other: False)
    with pytest.raises(OSError, match="no rename"):
        write_video(video[:2], path, fps=8)
    assert [p.name for p in tmp_path.iterdir()] == ["clip"]
    np.testing.assert_array_equal(read_video(path), video)


def test_a_file_cut_short_is_noticed(tmp_path, monkeypatch, video):
    monkeypatch.setattr(video_io, "count_frames", lambda path: 3)
    with pytest.raises(OSError, match="3 of 5 frames"):
        write_video(video, tmp_path / "clip.mp4", fps=8)
    assert list(tmp_path.iterdir()) == []


def test_write_video_refuses_other_frames(tmp_path, video):
    with pytest.raises(ValueError, match="float64"):
        write_video(video / 255, tmp_path / "clip.mp4", fps=8)
    with pytest.raises(ValueError, match=r"\(0, 32, 48, 3\)"):
        write_video(video[:0], tmp_path / "clip.mp4", fps=8)
    with pytest.raises(ValueError, match="fps must be from"):
        write_video(video, tmp_path / "clip.mp4", fps=0)


@pytest.mark.parametrize("name", ["clip.mp4", "CLIP.MP4", "clip.gif", "clip.png", "clip"])
def test_check_writable_accepts_and_leaves_nothing(tmp_path, name):
    check_writable(tmp_path / "a" / "b" / name)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_check_writable_names_the_suffix_and_the_choices(tmp_path):
    with pytest.raises(ValueError, match=r"'\.mpg'; choose \.mp4, \.gif, \.png"):
        check_writable(tmp_path / "clip.mpg")


def test_check_writable_refuses_a_folder_for_a_file_and_the_reverse(tmp_path):
    (tmp_path / "clip.mp4").mkdir()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="is a folder"):
        check_writable(tmp_path / "clip.mp4")
    with pytest.raises(ValueError, match="is a file"):
        check_writable(tmp_path / "file")


@pytest.mark.parametrize("name", ["work", "work.png"])
def test_a_folder_of_other_things_is_never_replaced(tmp_path, name, video):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"it holds thesis\.txt"):
        write_video(video, tmp_path / name, fps=8)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "kept"
    check_writable(tmp_path / "work.png", frames=1)


def test_check_writable_tries_the_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="cannot write to folder"):
        check_writable(tmp_path / "file" / "clip.mp4")

    def refuse(**kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(io.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        check_writable(tmp_path / "clip.mp4")


def test_read_video_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no video at"):
        read_video(tmp_path / "clip.mp4")
    with pytest.raises(FileNotFoundError, match=r"0000\.png"):
        read_video(tmp_path)
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    with pytest.raises(OSError, match=r"bad\.mp4"):
        read_video(tmp_path / "bad.mp4")


@pytest.mark.parametrize("scale", [1, 3])
def test_side_by_side(video, noisy, scale):
    height, width = 32 * scale, 48 * scale
    frames = side_by_side([video, noisy], ["dense", "sparse"], scale=scale)
    top = frames.shape[1] - height
    gap = frames.shape[2] - 2 * width
    assert len(frames) == len(video)
    assert top > 8
    assert 0 < gap < width / 4
    left = frames[:, top:, :width]
    np.testing.assert_array_equal(left[:, ::scale, ::scale], video)
    np.testing.assert_array_equal(left[:, scale - 1 :: scale, scale - 1 :: scale], video)
    np.testing.assert_array_equal(frames[:, top::scale, width + gap :: scale], noisy)
    for label in (frames[0, :top, :width], frames[0, :top, width + gap :]):
        assert label.max() - label.min() > 100


def test_side_by_side_caption_is_below_and_wraps(video):
    plain = side_by_side([video], ["dense"])
    short = side_by_side([video], ["dense"], caption="48 px")
    long = side_by_side([video], ["dense"], caption="half of all the token pairs \u00d7 20 steps")
    assert plain.shape[1] < short.shape[1] < long.shape[1]
    np.testing.assert_array_equal(long[:, : plain.shape[1]], plain)
    below = long[0, plain.shape[1] :]
    assert below.max() - below.min() > 80


def test_labels_of_two_lines_keep_the_videos_level(video):
    frames = side_by_side([video, video], ["a", "a label too long for one line"])
    right = frames.shape[2] - 48
    np.testing.assert_array_equal(frames[:, -32:, :48], video)
    np.testing.assert_array_equal(frames[:, -32:, right:], video)


def test_side_by_side_refuses(video):
    with pytest.raises(ValueError, match=r"\(4, 32, 48, 3\)"):
        side_by_side([video, video[:4]], ["a", "b"])
    with pytest.raises(ValueError, match="2 videos need as many labels, got 1"):
        side_by_side([video, video], ["a"])
    with pytest.raises(ValueError, match="float64"):
        side_by_side([video / 255], ["a"])
    with pytest.raises(ValueError, match="scale"):
        side_by_side([video], ["a"], scale=0)
    with pytest.raises(ValueError, match="one shape"):
        side_by_side([], [])


def test_contact_sheet_shows_first_to_last(video, noisy):
    sheet = contact_sheet([video, noisy], ["dense", "sparse"], count=3)
    assert sheet.dtype == np.uint8
    np.testing.assert_array_equal(sheet[-32:, :48], noisy[0])
    np.testing.assert_array_equal(sheet[-32:, -48:], noisy[4])
    every = contact_sheet([video], ["dense"])
    assert every.shape[1] > 5 * 48
    np.testing.assert_array_equal(every[-32:, -48:], video[4])
    with pytest.raises(ValueError, match="count"):
        contact_sheet([video], ["dense"], count=0)


def test_contact_sheet_shrinks_large_frames():
    sheet = contact_sheet([np.zeros((9, 360, 640, 3), np.uint8)], ["dense"])
    assert sheet.shape[1] < 2600


class Page(HTMLParser):
    """What a page shows and what it refers to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [v for name, v in attrs if name in ("src", "href", "poster", "data")]

    def handle_data(self, data):
        self.texts.append(data.strip())


REPORT = {
    "prompt": "<script>alert('x')</script>",
    "speedup": 2.4137,
    "steps": [{"dense": True}, {"dense": False}],
    "seconds": {"dense": 26.123, "sparse": 10.8224, "mask": 0.0012345},
    "quality": {"psnr": 30.8123, "ssim": np.float32(0.94321), "psnr_per_frame": [30.0] * 33},
    "plan": {"density": 0.2913, "layers": {"0": {"density": 1.0}}},
    "environment": {"torch": "2.13.0", "compile_seconds": None},
}


@pytest.fixture
def page(tmp_path, video):
    clip = write_video(video, tmp_path / "clip.mp4", fps=8)
    second = write_video(video, tmp_path / "second.gif", fps=8)
    picture = write_video(video[:1], tmp_path / "sheet.png", fps=8)
    write_report(
        tmp_path / "report.html",
        REPORT,
        title='<b>"red" & blue</b>',
        videos={"side by side": clip, "again": second},
        pictures={"nine frames": picture},
        notes=["5 < 6 steps are dense", "same seed"],
    )
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_report_shows_the_figures(page):
    texts = Page(page).texts
    for figure in ("2.41\u00d7", "29.1 %", "30.8 dB", "0.943", "26.1 s", "10.8 s", "0.00123 s"):
        assert figure in texts
    assert texts[texts.index("29.1 %") - 1] == "Density, sparse steps"
    for words in ("side by side", "5 < 6 steps are dense", "same seed", "nine frames", "2.13.0"):
        assert words in texts
    assert "33 values from 30 to 30, mean 30" in texts
    assert texts[texts.index("steps \u00b7 2 \u00b7 dense") + 1] == "no"


def test_report_shows_what_is_seen_of_the_difference(tmp_path, video):
    clip = write_video(video, tmp_path / "clip.mp4", fps=8)
    figures = {"psnr": 30.0, "vmaf": 56.3, "vmaf_lowest": 23.3, "cvvdp_jod": 7.974}
    parts = {"videos": {"a": clip}, "pictures": {}, "notes": []}
    write_report(tmp_path / "a.html", {"deep": figures}, title="a", **parts)
    texts = Page((tmp_path / "a.html").read_text(encoding="utf-8")).texts
    assert texts[texts.index("VMAF") + 1] == "56"
    assert "23 in its worst frame" in " ".join(texts)
    assert texts[texts.index("ColorVideoVDP") + 1] == "8.0 JOD"


def test_report_order_puts_the_video_first_and_the_environment_last(page):
    marks = ["<video", 'class="tiles"', "again", "same seed", "nine frames", "10.8 s", "2.13.0"]
    places = [page.index(mark) for mark in marks]
    assert places == sorted(places)


def test_report_holds_all_it_shows(page, tmp_path):
    parsed = Page(page)
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", page)
    assert len(parsed.references) == 3
    assert all(r.startswith(("data:video/mp4;base64,", "data:image/")) for r in parsed.references)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert "url(" not in page
    assert "@import" not in page


def test_report_lets_wide_pictures_scroll(page):
    """Each picture alone is wider than a phone, in a box that the keyboard can reach."""
    assert 'name="viewport" content="width=device-width' in page
    boxes = re.findall(r'<div class="wide" tabindex="0"><img [^>]+></div>', page)
    assert len(boxes) == 2


def test_report_escapes_everything(page):
    assert "<title>&lt;b&gt;&#34;red&#34; &amp; blue&lt;/b&gt;</title>" in page
    assert "<b>" not in page
    assert "<script" not in page
    assert '<b>"red" & blue</b>' in Page(page).texts


def test_report_of_little(tmp_path):
    parts = {"videos": {}, "pictures": {}, "notes": []}
    write_report(tmp_path / "report.html", {"psnr": math.inf}, title="same", **parts)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "\u221e dB" in page
    for absent in ("Speed-up", "Density", "SSIM", "Pictures", "Environment", "<video"):
        assert absent not in page


def test_report_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("earlier")
    (tmp_path / "clip.avi").write_bytes(b"")
    parts = {"title": "t", "pictures": {}, "notes": []}
    with pytest.raises(ValueError, match=r"clip\.avi must be one of \.mp4"):
        write_report(path, {}, videos={"a": tmp_path / "clip.avi"}, **parts)
    with pytest.raises(FileNotFoundError):
        write_report(path, {}, videos={"a": tmp_path / "none.mp4"}, **parts)
    with pytest.raises(UnicodeEncodeError):
        write_report(path, {"prompt": "half a pair \ud800"}, videos={}, **parts)
    assert path.read_text() == "earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.avi", "report.html"]


def test_json_is_strict_and_atomic(tmp_path):
    path = tmp_path / "new" / "report.json"
    data = {"psnr": math.inf, "ssim": np.float32(0.5), "grid": (1, 2), "file": tmp_path / "a"}
    write_json(path, data | {"frames": np.arange(3), "worst": np.float64("nan")})

    def refuse(constant):
        raise AssertionError(constant)

    back = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert float(back["psnr"]) == math.inf
    assert math.isnan(float(back["worst"]))
    assert back["ssim"] == 0.5
    assert back["grid"] == [1, 2]
    assert back["frames"] == [0, 1, 2]
    assert back["file"] == str(tmp_path / "a")
    before = path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"method": object()})
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("name", ["13:30/clip.mp4", "pipe:1/clip.gif"])
def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch, video, name):
    monkeypatch.chdir(tmp_path)
    path = write_video(video, name, fps=8)
    assert path.is_file()
    assert read_video(name).shape == video.shape
    assert video_io.video_fps(name) == pytest.approx(8, rel=0.05)


def test_a_folder_with_a_dot_is_written_again(tmp_path, video):
    for _ in range(2):
        folder = write_video(video, tmp_path / "v1.5.png", fps=8)
        assert folder == tmp_path / "v1.5"
        np.testing.assert_array_equal(read_video(folder), video)


@pytest.mark.parametrize("fps", [1e-300, 1e300, float("nan"), float("inf"), 0, -1])
def test_rates_that_no_file_states_are_refused(tmp_path, video, fps):
    with pytest.raises(ValueError, match=r"^fps must be from 0\.01 to 1000, got"):
        write_video(video, tmp_path / "clip.mp4", fps=fps)
    assert not [*tmp_path.iterdir()]


def test_ffmpeg_is_quoted_in_one_line(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    for read in (read_video, video_io.video_fps):
        with pytest.raises(OSError, match=r"^\S*bad\.mp4 cannot be read: [^\n]{5,100}$"):
            read(tmp_path / "bad.mp4")
