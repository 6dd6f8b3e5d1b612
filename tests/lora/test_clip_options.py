"""The cache's treatment of sizes, chunks, scenes, pictures and captions, and what it reports."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support import finetuning as ft
from support import hunyuan, wan
from support.awkward_clips import HLG, PAL, film, sound_only
from support.clips import SIZE, footage, read_clip, refuse
from support.scenes import film_of

from gen_accel.attention_processors.families import family_named
from gen_accel.lora import prepare
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.encoders import hash_of
from gen_accel.lora.caching.inputs import ImageCoder
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.caching.store import Database
from gen_accel.lora.data.clips import CaptionedVideo, Captions
from gen_accel.lora.data.report import (
    CropLoss,
    Report,
    buckets_of,
    lost_picture,
    too_short,
    unused_frames,
)
from gen_accel.lora.data.survey import CutFinder, Take
from gen_accel.measure.video_io import write_video

family = family_named("wan")

pytestmark = pytest.mark.slow

WIDE, TALL = (32, 48), (48, 32)


@pytest.fixture(scope="module")
def pipe():
    return wan.pipeline()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    made = tmp_path_factory.mktemp("clips")
    film, _ = film_of([7, 3, 14], height=32, width=48)
    write_video(film, made / "film.mp4", fps=16)
    write_video(footage(9, 64, 36, seed=1), made / "tall.mp4", fps=16)
    write_video(footage(3, seed=2), made / "short.mp4", fps=16)
    (made / "broken.mp4").write_bytes(b"no video")
    sound_only(made / "sound.mp4")
    for i, size in enumerate(((60, 40), (40, 60))):
        noise = np.random.default_rng(i).integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(noise).save(made / f"p{i}.png")
    for name in ("film", "tall", "short", "broken", "sound", "p0", "p1"):
        (made / f"{name}.txt").write_text(f"{name}, red, blue, green")
    return made


@pytest.fixture
def folder(clips, tmp_path):
    return shutil.copytree(clips, tmp_path / "data")


@pytest.fixture
def build(pipe, folder, tmp_path):
    def run(**options):
        given = {"frames": [5, 9], "sizes": [WIDE], "max_tokens": 8, "device": "cpu"}
        model, data = options.pop("pipe", pipe), options.pop("data", folder)
        return cache(model, data, options.pop("out", tmp_path / "cache"), **(given | options))

    return run


@pytest.fixture
def cached(tmp_path):
    return lambda: LatentCache(tmp_path / "cache")


def encoded(pipe, frames):
    pixels = torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return family.encode_video(pipe, pixels)[0]


def test_keys_of_the_defaults(pipe, build, folder, cached):
    build(fps=16.0)
    rows = Database(cached().folder).rows("SELECT fields FROM entries ORDER BY number")
    entries = [json.loads(fields) for [fields] in rows]
    states = [[name, digest] for name, digest in _states(pipe, "vae")]
    vae = hash_of([1, "float16", *states])
    for entry in entries:
        sha = CaptionedVideo("", "", folder / entry["name"]).sha256()
        key = hash_of([vae, sha, 16.0, entry["pixel_frames"], list(SIZE)])
        assert entry["latent_key"] == key
        assert [*entry] == [
            *("caption", "frames", "height", "latent_key", "name", "pixel_frames"),
            *("text_key", "width"),
        ]
    assert [entry["name"] for entry in entries] == ["film.mp4", "tall.mp4"]


def _states(pipe, part):
    from gen_accel.lora.caching.encoders import Encoders

    return Encoders(pipe, pipe.transformer, torch.device("cpu")).states(part)


def test_each_clip_takes_the_nearest_size(build, cached):
    report = build(sizes=[WIDE, TALL], pictures=True)
    found = {entry.name: (entry.height * 8, entry.width * 8) for entry in cached().entries}
    assert found == {"film.mp4": WIDE, "p0.png": TALL, "p1.png": WIDE, "tall.mp4": TALL}
    assert [(b.frames, b.size, b.clips) for b in report.buckets] == [
        (1, WIDE, 1),
        (9, WIDE, 1),
        (1, TALL, 1),
        (9, TALL, 1),
    ]


def test_a_size_that_no_clip_fills(build, monkeypatch):
    monkeypatch.setattr(family, "encode_video", refuse)
    monkeypatch.setattr(family, "encode_prompt", refuse)
    with pytest.raises(ValueError, match=r"no clip goes to size 32x128: each has the shape of an"):
        build(sizes=[WIDE, TALL, (32, 128)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ("32x48", "32x128")}, "no clip goes to size 32x128"),
        (
            {"stages": ("9:1", "33:1")},
            "no clip has 33 frames at 16 frames a second: the longest of",
        ),
    ],
)
def test_what_no_clip_fills_is_refused_before_a_model_is_loaded(
    folder, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(prepare, "load_pipe", refuse)
    given = {"data": str(folder), "model": "demo", "height": 32, "width": 48, **options}
    with pytest.raises(ValueError, match=message):
        prepare.cache_clips(ft.config(tmp_path, **given))


def test_a_chunk_that_fails_leaves_the_others(build, cached, monkeypatch):
    encode, calls = family.encode_video, []

    def second_is_not_finite(*args):
        calls.append(args)
        return encode(*args) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(family, "encode_video", second_is_not_finite)
    report = build(take=Take("all"))
    name = "film.mp4, frames 9 to 17"
    assert report.left_out[name] == "broken: store 'float16' cannot hold its latents"
    assert "film.mp4" not in report.broken
    assert [e.begin for e in cached().entries if e.name == "film.mp4"] == [None, 18]


@pytest.mark.parametrize("fps", [None, 16.0])
def test_chunks_are_what_the_encoder_makes_of_them(pipe, build, folder, cached, fps):
    report = build(take=Take("all"), fps=fps, store="float32")
    entries = cached().entries
    assert [(e.name, e.begin, e.pixel_frames) for e in entries] == [
        ("film.mp4", None, 9),
        ("film.mp4", 9, 9),
        ("film.mp4", 18, 5),
        ("tall.mp4", None, 9),
    ]
    whole = read_clip(folder / "film.mp4", frames=99, size=WIDE, fps=fps)
    for i, entry in enumerate(entries[:3]):
        begin = entry.begin or 0
        frames = whole[begin : begin + entry.pixel_frames]
        assert torch.equal(cached().latents(i), encoded(pipe, frames))
    assert report.losses[0] == CropLoss("film.mp4", 0.0, 1, 24)
    again = build(take=Take("all"), fps=fps, store="float32")
    assert (again.encoded, again.kept, again.removed) == (0, 4, 0)
    start = build(fps=fps, store="float32")  # its chunk is there already
    assert (start.encoded, start.kept, start.removed) == (0, 2, 2)


def test_chunks_of_an_autoencoder_that_is_not_causal(build, cached):
    build(pipe=hunyuan.pipeline(), take=Take("middle"), max_tokens=None)
    found = [(e.name, e.begin, e.pixel_frames) for e in cached().entries]
    assert found == [
        ("film.mp4", 7, 5),
        ("film.mp4", 7, 9),
        ("tall.mp4", None, 5),
        ("tall.mp4", None, 9),
    ]


def test_no_chunk_crosses_a_cut(build, cached, monkeypatch):
    report = build(take=Take("all", scenes="cut"), fps=16.0)
    assert [(e.begin, e.pixel_frames) for e in cached().entries if e.name == "film.mp4"] == [
        (None, 5),
        (10, 9),
        (19, 5),
    ]
    assert report.left_out["film.mp4, frames 7 to 9"] == (
        "too short: 0.2 s, 3 frames at 16 a second, the shortest stage needs 5"
    )
    monkeypatch.setattr(CutFinder, "see", refuse)
    again = build(take=Take("all", scenes="cut"), fps=16.0)
    assert (again.encoded, again.kept) == (0, 4)
    assert again.left_out == report.left_out


def test_cuts_are_kept_from_a_run_that_was_killed(build, monkeypatch):
    monkeypatch.setattr("gen_accel.lora.caching.store.FACT_SECONDS", 0.0)
    monkeypatch.setattr(family, "encode_prompt", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(take=Take(scenes="cut"))
    monkeypatch.undo()
    monkeypatch.setattr(CutFinder, "see", refuse)
    assert build(take=Take(scenes="cut")).encoded == 3


def test_the_image_of_a_chunk_is_its_middle(build, cached, folder):
    coder = ImageCoder("pixels", size=16)
    build(take=Take("all"), images=coder)
    whole = read_clip(folder / "film.mp4", frames=99, size=WIDE)
    for i, middle in enumerate((4, 13, 20)):
        assert torch.equal(cached().image(i), coder_features(coder, whole[middle]))


def coder_features(coder, frame):
    return coder(Image.fromarray(frame)).float() / 127.5 - 1


def test_pictures_are_clips_of_one_frame(pipe, build, folder, cached):
    report = build(pictures=True, store="float32", fps=16.0)
    found = cached()
    entries = [(e.name, e.frames, e.pixel_frames) for e in found.entries if e.is_picture]
    assert entries == [("p0.png", 1, 1), ("p1.png", 1, 1)]
    assert report.videos == 7
    number = next(i for i, e in enumerate(found.entries) if e.name == "p1.png")
    with Image.open(folder / "p1.png") as image:
        frame = np.asarray(image.resize(WIDE[::-1], Image.Resampling.BICUBIC))
    close = encoded(pipe, frame[None])
    torch.testing.assert_close(found.latents(number), close, atol=0.05, rtol=0.05)
    assert len(found.fitting(1)) == 4  # the first frames of the clips too
    assert len(found.fitting(2)) == 2
    other = build(pictures=True, store="float32", fps=8.0, frames=[5])
    assert other.kept == 2  # a picture has no rate


def test_pictures_that_no_stage_takes_are_named(build):
    report = build()
    reason = "a picture, which images or a stage of 1 frame would take"
    assert {name: report.left_out[name] for name in ("p0.png", "p1.png")} == {
        "p0.png": reason,
        "p1.png": reason,
    }
    assert "p0.png" not in build(frames=[1, 5]).left_out


def test_pictures_that_no_stage_takes_need_nothing_else(build, folder):
    """Neither a caption for a teacher nor a name of their own."""
    (folder / "p0.jpg").write_bytes((folder / "p0.png").read_bytes())
    for name in ("film", "tall", "short", "broken", "sound"):
        (folder / f"{name}.teacher.txt").write_text("a film")
    assert build(teacher=True).encoded == 2
    with pytest.raises(ValueError, match=r"would share one caption, got p0\.jpg, p0\.png"):
        build(teacher=True, pictures=True)
    (folder / "p0.jpg").unlink()
    with pytest.raises(ValueError, match="2 of 7 videos have no caption for the teacher: p0"):
        build(teacher=True, pictures=True)


def test_captions_as_they_are_asked_for(pipe, build, cached, folder):
    (folder / "film.1.txt").write_text("another caption")
    captions = Captions(trigger="sks", shuffle=1, orders=3)
    report = build(captions=captions, repeats=["tall*=4"])
    film, tall = cached().entries
    assert film.caption == "sks, film, red, blue, green"
    assert (len(film.text_keys), len(set(film.text_keys))) == (6, 4)
    assert len(set(tall.text_keys)) == 3
    assert (film.repeats, tall.repeats) == (None, 4)
    assert report.texts == 1 + 4 + 3
    texts = captions.of(CaptionedVideo("", "film, red, blue, green", footage(1)))
    for i, text in enumerate((*texts, "sks, another caption")):
        expected = family.encode_prompt(pipe, [text], 8)["encoder_hidden_states"][0]
        torch.testing.assert_close(
            cached().conditions(0, i)["encoder_hidden_states"], expected, atol=2e-3, rtol=2e-3
        )
    before = cached().digest
    assert build(captions=captions).texts == 0
    assert cached().digest != before  # as the repeats are gone


def test_a_caption_for_clips_without_one(build, folder, cached):
    (folder / "film.txt").unlink()
    with pytest.raises(ValueError, match=r"have no caption: film\.mp4"):
        build()
    build(default_caption="a film")
    assert cached().entries[0].caption == "a film"


def test_what_is_not_read_as_it_is_stored_is_named(build, tmp_path):
    data = tmp_path / "tapes"
    data.mkdir()
    film(shape=PAL, frames=9, size=WIDE)(data / "tape.mkv")
    film(states=HLG, frames=9, size=WIDE)(data / "phone.mov")
    for name in ("tape", "phone"):
        (data / f"{name}.txt").write_text(f"a {name}")
    (data / "old.rm").write_bytes(b"")
    for _ in range(2):  # and of a clip that is in the cache already
        report = build(data=data, fps=None)
        assert report.converted == {"tape.mkv": "its pixels are 16:11, and 48 columns are made 70"}
        assert report.left_out["old.rm"] == "no film, as it ends in '.rm'"
        assert report.left_out["phone.mov"].startswith("it is HDR (HLG)")
        assert "converted, 1:\n  tape.mkv: its pixels" in str(report)
        held = json.loads((tmp_path / "cache" / "report.json").read_text())
        assert (held["converted"], held["left_out"]) == (report.converted, report.left_out)
    assert report.losses[0].picture == pytest.approx(1 - 48 / 70, abs=0.01)


def test_every_clip_that_is_left_out_is_named(build, tmp_path):
    report = build(fps=16.0)
    assert {name: reason for name, reason in report.left_out.items() if ".mp4" in name} == {
        "broken.mp4": "broken: it is no video that ffmpeg knows, or was cut off before its index",
        "short.mp4": "too short: 0.2 s, 3 frames at 16 a second, the shortest stage needs 5",
        "sound.mp4": "no video stream (sound only)",
    }
    said = str(report)
    for name, reason in report.left_out.items():
        assert f"  {name}: {reason}" in said
    assert "2 to train on, 1.1 s, of 7 found:" in said
    assert "32 x 48: 2 of 9 frames, 1.1 s" in said
    assert "tall.mp4: loses 62% of its picture" in said
    assert "film.mp4: 15 of 24 frames unused" in said
    assert "19% of the picture" not in said
    held = json.loads((tmp_path / "cache" / "report.json").read_text())
    assert held["left_out"] == report.left_out
    assert held["clips"] == 2
    assert held["seconds"] == pytest.approx(18 / 16)
    assert (held["unused_frames"], held["frames"]) == (15, 33)
    assert [one["name"] for one in held["lost"]] == ["film.mp4", "tall.mp4"]


def test_a_long_list_is_cut_and_leads_to_the_file(tmp_path):
    left = {f"clip{i:02d}.mp4": "too short" for i in range(27)}
    lost = tuple(CropLoss(f"lost{i:02d}.mp4", 0.0, i, 100) for i in range(25))
    report = Report(tmp_path, 0, 0, 0, 0, left_out=left, losses=lost)
    said = str(report).splitlines()
    assert sum("too short" in line for line in said) == 20 + 1  # with the count of the first line
    assert f"  and 7 more in {tmp_path / 'report.json'}" in said
    assert said[said.index("  lost24.mp4: 24 of 100 frames unused") - 1].startswith("lost of 24 ")
    assert f"  and 4 more in {tmp_path / 'report.json'}" in said


def test_figures_of_the_report():
    assert lost_picture((100, 100), (100, 100)) == 0
    assert lost_picture((284, 160), (480, 832)) == pytest.approx(1 - 160 * 480 / 832 / 284)
    assert unused_frames(128, [(0, 49), (40, 49)]) == 128 - 89
    assert unused_frames(None, []) is None
    assert too_short(1, None, 17) == "too short: 1 frame, the shortest stage needs 17"
    assert too_short(6, 16.0, 17, scenes=3) == (
        "too short: the longest of 3 scenes has 0.4 s, 6 frames at 16 a second, the shortest "
        "stage needs 17"
    )
    made = buckets_of([(9, WIDE, 1.0), (1, WIDE, None), (9, WIDE, 0.5), (9, TALL, None)])
    assert [str(bucket) for bucket in made] == [
        "32 x 48: 1 of 1 frame",
        "32 x 48: 2 of 9 frames, 1.5 s",
        "48 x 32: 1 of 9 frames",
    ]


def test_data_of_nothing_but_pictures_that_no_stage_takes(build, folder):
    for clip in folder.glob("*.mp4"):
        clip.unlink()
    with pytest.raises(ValueError, match="no clip could be read: a picture, which images or"):
        build()
    assert build(frames=[1]).encoded == 2
