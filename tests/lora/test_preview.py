"""`preview.png` of a cache, and the PSNR of what its autoencoder makes of the clips."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from support import hunyuan, wan
from support.clips import SIZE, footage, refuse

from gen_accel import demo
from gen_accel.demo.world import SEEN, render
from gen_accel.lora.caching import preview
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.caching.preview import evenly, known_reconstruction
from gen_accel.lora.data.clips import CaptionedVideo
from gen_accel.lora.data.report import KNOWN, ReconstructionPsnr
from gen_accel.measure import pictures, psnr
from gen_accel.measure.pictures import ROW_GAP, ROW_TEXT, picture_rows
from gen_accel.pipelines.generation.decode import decode_stream

pytestmark = pytest.mark.slow

LONG = "a red square moves " * 20


@pytest.fixture(scope="module")
def pipe():
    return wan.pipeline()


@pytest.fixture
def build(pipe, tmp_path):
    def run(videos, **options):
        given = {"frames": [9], "sizes": [SIZE], "max_tokens": 8, "device": "cpu"}
        return cache(options.pop("pipe", pipe), videos, tmp_path / "cache", **(given | options))

    return run


def clips(count, caption="a red square"):
    return [
        CaptionedVideo(f"{i:02d}.mp4", f"{caption} {i}", footage(9, seed=i)) for i in range(count)
    ]


def shown(folder):
    with Image.open(folder / "cache" / "preview.png") as image:
        return np.asarray(image)


@pytest.mark.parametrize(
    ("count", "most", "places"),
    [(1, 40, [0]), (3, 3, [0, 1, 2]), (10, 3, [0, 4, 9]), (2, 3, [0, 1]), (5, 1, [0])],
)
def test_places_lie_evenly(count, most, places):
    assert evenly(count, most) == places


def test_frames_after_rate_resize_and_crop(build, tmp_path):
    video = footage(9, 64, 96)
    build([CaptionedVideo("a.mp4", LONG, video)])
    picture = shown(tmp_path)
    read = CaptionedVideo("a", "a", video).read(frames=9, size=SIZE, fps=None)
    made = list(decode_stream(wan.pipeline(), LatentCache(tmp_path / "cache").latents(0)[None]))
    top = next(
        y for y in range(len(picture)) if (picture[y : y + 32, ROW_TEXT:][:, :48] == read[0]).all()
    )
    for column, frame in enumerate((*read[[0, 4, 8]], *np.concatenate(made)[[0, 4, 8]])):
        left = ROW_TEXT + column * (48 + ROW_GAP)
        found = picture[top : top + 32, left : left + 48]
        assert np.abs(found.astype(int) - frame).max() <= (0 if column < 3 else 1)


def test_the_psnr_is_of_the_decoded_clip(build, pipe, tmp_path):
    videos = clips(5)
    report = build(videos)
    assert report.reconstruction is not None
    assert list(report.reconstruction.psnr) == ["00.mp4", "02.mp4", "04.mp4"]
    found = LatentCache(tmp_path / "cache")
    for i in (0, 2, 4):
        made = np.concatenate(list(decode_stream(pipe, found.latents(i)[None])))
        expected = psnr(made, videos[i].source)
        assert report.reconstruction.psnr[f"{i:02d}.mp4"] == pytest.approx(expected, abs=1e-2)
    assert not report.reconstruction.is_known
    assert "warning: the autoencoder gives 3 clips back at" in str(report)
    assert "demo" not in str(report)


def test_nothing_is_decoded_or_drawn_again(build, tmp_path, monkeypatch):
    build(clips(5))
    before = (tmp_path / "cache" / "preview.png").stat().st_mtime_ns
    monkeypatch.setattr(preview, "remake", refuse)
    with monkeypatch.context() as patch:
        patch.setattr(preview, "picture_rows", refuse)
        patch.setattr(CaptionedVideo, "read_chunks", refuse)
        assert build(clips(5)).reconstruction is not None
    assert (tmp_path / "cache" / "preview.png").stat().st_mtime_ns == before
    build(clips(5, "a blue circle"))
    assert (tmp_path / "cache" / "preview.png").stat().st_mtime_ns > before
    (tmp_path / "cache" / "preview.png").write_bytes(b"half a file")
    build(clips(5, "a blue circle"))
    shown(tmp_path)


def test_of_many_clips_some_are_shown_and_the_rest_is_counted(build, tmp_path, monkeypatch):
    rows, foots = [], []

    def draw(given, *, head, foot):
        rows.extend(given)
        foots.append(foot)
        return picture_rows(given, head=head, foot=foot)

    monkeypatch.setattr(preview, "picture_rows", draw)
    monkeypatch.setattr(preview, "MOST_ROWS", 4)
    build([*clips(9), CaptionedVideo("99.mp4", LONG, footage(9, seed=99))])
    names = [text.split("\n")[0] for text, _ in rows]
    assert names == ["00.mp4", "03.mp4", "06.mp4", "99.mp4"]
    assert foots == ["and 6 more clips"]
    words = rows[3][0].split("\n")
    assert words[1] == "32 x 48, 9 frames"
    assert words[2].endswith(" moves a ...")
    assert len(words[2]) <= preview.CAPTION
    assert words[3].startswith("autoencoder: ")
    assert [len(pictures) for _, pictures in rows] == [6, 3, 6, 6]


def test_clips_that_are_gone_are_left_out(build, tmp_path, monkeypatch):
    build(clips(5), shard_bytes=1)
    monkeypatch.setattr(preview, "FORM", 2)

    def gone(*args, **kwargs):
        raise OSError("the disk is gone")

    monkeypatch.setattr(CaptionedVideo, "read_chunks", gone)
    assert build(clips(5)).reconstruction is not None
    assert len(shown(tmp_path)) < 100


def test_a_card_that_is_too_small_leaves_the_clips_undecoded(build, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(preview, "remake", full)
    assert build(clips(2)).reconstruction is None


def test_captions_of_one_long_word(build, tmp_path):
    build([CaptionedVideo("a.mp4", "x" * 1000, footage(9))])
    assert shown(tmp_path).shape[0] < 600


def test_signs_that_no_font_has_are_written_by_their_numbers(monkeypatch):
    video = footage(1, 32, 96)
    seen = pictures.side_by_side([video], ["Maß"])
    monkeypatch.setattr(pictures, "FONTS", ())
    labels = ("Maß 猫 é", r"Ma\xdf \u732b e", r"Ma\xdf")
    told, written, number = (pictures.side_by_side([video], [label]) for label in labels)
    assert np.array_equal(told, written)
    try:
        ImageFont.truetype("DejaVuSans.ttf", 12)
    except OSError:
        return  # this system has no font with an ß
    assert not np.array_equal(seen, number)


def test_hunyuan_video_too(tmp_path):
    report = cache(
        hunyuan.pipeline(),
        clips(1),
        tmp_path / "cache",
        frames=[9],
        sizes=[SIZE],
        max_tokens=8,
        device="cpu",
    )
    assert report.reconstruction is not None
    assert list(report.reconstruction.psnr) == ["00.mp4"]


def test_the_demo_model_knows_its_shapes_and_says_what_it_does_not_know(tmp_path):
    drawn = render([SEEN[0]], frames=9, size=96, generator=torch.Generator().manual_seed(0))
    shape = ((drawn[0].permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy()
    smooth = np.asarray(Image.fromarray(footage(1, 4, 4)[0]).resize((96, 96)))
    videos = [
        CaptionedVideo("shape", "a red circle", shape),
        CaptionedVideo("smooth", "a cat", np.stack([smooth] * 9)),
    ]
    given = {"frames": [9], "sizes": [(96, 96)], "max_tokens": 16, "device": "cpu"}
    for video, known in zip(videos, (True, False), strict=True):
        report = cache(demo.path(), [video], tmp_path / video.name, **given)
        assert report.reconstruction is not None
        assert report.reconstruction.is_demo
        assert report.reconstruction.is_known == known
        line = str(report).splitlines()[-1]
        assert ("the demo model knows only coloured shapes" in line) != known


def test_a_cache_tells_what_was_found_out_when_it_was_made(build, tmp_path):
    report = build(clips(5))
    assert known_reconstruction(LatentCache(tmp_path / "cache"), False) == report.reconstruction
    (tmp_path / "cache" / "report.json").unlink()
    assert known_reconstruction(LatentCache(tmp_path / "cache"), False) is None


def test_what_is_said():
    assert (
        str(ReconstructionPsnr({"a": KNOWN}))
        == "the autoencoder gives 1 clip back at 25.0 dB PSNR"
    )
    said = str(ReconstructionPsnr({"a": 10.0, "b": 20.0}, is_demo=True))
    assert said == (
        "warning: the autoencoder gives 2 clips back at 15.0 dB PSNR (10.0 to 20.0), where 25 is "
        "the least: it does not know such pictures, and what is trained cannot show them; the "
        "demo model knows only coloured shapes"
    )
