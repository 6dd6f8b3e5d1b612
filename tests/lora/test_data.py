"""Captioned videos, their frames, and the cache of what the encoders make of them."""

import csv
import errno
import json
import shutil
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image, ImageOps
from support import wan
from support.clips import SIZE, footage, levels, ramp, read_clip, refuse
from transformers import UMT5EncoderModel

from gen_accel import demo
from gen_accel.attention_processors.families import family_named
from gen_accel.io import NoRoom
from gen_accel.lora.caching.chunks import CacheFields, CacheOptions
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.caching.store import DATABASE, Store, is_finished, tensors_of
from gen_accel.lora.config import TrainConfig, read_config
from gen_accel.lora.data.clips import CaptionedVideo, Captions, nearest_size, parse_sizes
from gen_accel.lora.data.finding import find_videos
from gen_accel.lora.data.survey import check_filled
from gen_accel.measure.video_io import read_video, write_video
from gen_accel.process import locked
from gen_accel.registry import MOST_PROMPT

family = family_named("wan")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    made = tmp_path_factory.mktemp("clips")
    for i, (name, frames) in enumerate((("a", 9), ("b", 13), ("sub/c", 5))):
        path = write_video(footage(frames, seed=i), made / f"{name}.mp4", fps=24)
        path.with_suffix(".txt").write_text(f"a red square moves {('left', 'right', 'up')[i]}\n")
    return made


@pytest.fixture
def folder(clips, tmp_path):
    """Three clips of 9, 13 and 5 frames, 24 a second, with their captions."""
    return shutil.copytree(clips, tmp_path / "data")


@pytest.fixture(scope="module")
def pipe():
    return wan.pipeline()


@pytest.fixture
def build(pipe, folder, tmp_path):
    """`cache` of the folder, with everything small."""

    def run(**options):
        model = options.pop("pipe", pipe)
        data = options.pop("data", folder)
        given = {"frames": [5, 9], "sizes": [SIZE], "max_tokens": 8, "device": "cpu"}
        return cache(model, data, options.pop("out", tmp_path / "cache"), **(given | options))

    return run


def test_a_folder_of_videos_with_captions(folder):
    (folder / ".hidden").mkdir()
    write_video(footage(), folder / ".hidden" / "d.mp4", fps=24)
    (folder / "notes.txt").write_text("not a caption")
    found = find_videos(folder)
    assert [video.name for video in found] == ["a.mp4", "b.mp4", "sub/c.mp4"]
    assert [video.caption.split()[-1] for video in found] == ["left", "right", "up"]
    assert found[2].source == folder / "sub" / "c.mp4"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize(
    "columns", [("video", "caption"), ("file_name", "text"), ("path", "prompt")], ids=str
)
def test_a_manifest(folder, suffix, columns):
    rows = [("b.mp4", 'first, with "quotes"'), ("sub/c.mp4", "zweite: größer")]
    manifest = folder / f"clips{suffix}"
    with manifest.open("w", encoding="utf-8", newline="") as file:
        if suffix == ".csv":
            csv.writer(file).writerows([(*columns, "other"), *((*row, 1) for row in rows)])
        else:
            for row in rows:
                file.write(json.dumps(dict(zip(columns, row, strict=True))) + "\n\n")
    found = find_videos(manifest)
    assert [(video.name, video.caption) for video in found] == rows
    assert found[1].source == folder / "sub" / "c.mp4"


def test_the_layout_of_videofolder(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "one"}\n')
    (folder / "sub" / "metadata.csv").write_text("file_name,text\nc.mp4,three\n")
    found = [(video.name, video.caption) for video in find_videos(folder)]
    assert found == [("a.mp4", "one"), ("sub/c.mp4", "three")]


def test_videos_without_a_caption_are_all_counted(folder):
    for i in range(7):
        write_video(footage(1), folder / f"silent{i}.mp4", fps=24)
    (folder / "silent0.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"7 of 10 videos .* have no caption") as caught:
        find_videos(folder)
    assert "silent4.mp4 and 2 more" in str(caught.value)
    assert "silent5" not in str(caught.value)


def test_one_error_names_all_faults_of_captions(folder):
    (folder / "a.txt").write_bytes("größer".encode("utf-16"))
    (folder / "b.txt").write_bytes(b"\n")
    (folder / "sub" / "c.txt").unlink()
    with pytest.raises(ValueError, match="3 faults") as caught:
        find_videos(folder, repeats=["zz/*=3"])
    told = str(caught.value)
    assert f"(1) {folder}/a.txt is not UTF-8 text, from byte 0 (0xff) on" in told
    assert "(2) 2 of 3 videos" in told
    assert "b.mp4 (an empty .txt), sub/c.mp4;" in told
    assert "(3) repeats 'zz/*=3' matches none of the 3 clips" in told
    manifest = folder / "m.jsonl"
    manifest.write_text('{"video": 3}\n{"video": "a.mp4", "text": "x"}\n{"video": ""}\n')
    with pytest.raises(ValueError, match=r"2 faults .*must be text, line 1 of .*line 3 of "):
        find_videos(manifest)


SETS = """
stages: ["5:4", "9:4"]
height: {height}
width: {width}
trigger: sks
datasets:
  - {folder}
  - data: {other}
    repeats: 3
    frames: 5
    sizes: {small}
    take: all
    prefix: "drawn, "
    trigger: abc
    default_caption: a shape
"""


def test_datasets_have_settings_of_their_own(build, folder, tmp_path):
    other = tmp_path / "elsewhere" / "data"
    other.mkdir(parents=True)
    write_video(footage(13), other / "d.mp4", fps=24)
    height, width = SIZE
    small = f"{height // 2}x{width}"
    file = tmp_path / "sets.yaml"
    words = {"height": height, "width": width, "folder": folder, "other": other, "small": small}
    file.write_text(SETS.format(**words))
    config = read_config(file)
    assert config.clip_sizes == (SIZE, (height // 2, width))
    typed = {"datasets": [str(config.datasets[1])], "height": height // 2}
    assert read_config(file, typed).sets == config.sets[1:]
    assert config.inputs()["datasets"] == [folder, other]
    captions = Captions(trigger="sks")
    report = build(data=config.sets, captions=captions, out=tmp_path / "both")
    entries = LatentCache(report.folder).entries
    # Both folders are called data.
    names = ["data/a.mp4", "data/b.mp4", "data/sub/c.mp4", *["data-2/d.mp4"] * 2]
    assert [entry.name for entry in entries] == names
    assert [entry.pixel_frames for entry in entries] == [9, 9, 5, 5, 5]
    assert [entry.begin for entry in entries] == [None, None, None, None, 5]
    assert [entry.repeats for entry in entries] == [None, None, None, 3, 3]
    assert entries[3].height * 2 == entries[0].height
    assert entries[0].caption == "sks, a red square moves left"
    assert entries[4].caption == "abc, drawn, a shape"
    # A single folder is the list of one.
    alone = build(captions=captions, out=tmp_path / "alone")
    listed = build(data=config.sets[:1], captions=captions, out=tmp_path / "listed")
    assert LatentCache(alone.folder).digest == LatentCache(listed.folder).digest
    assert [e.latent_key for e in LatentCache(alone.folder).entries] == [
        e.latent_key for e in entries[:3]
    ]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("{repeats: 3}", "datasets, item 1: data is not given"),
        (
            "{data: x, repeat: 3}",
            "datasets, item 1: unknown field 'repeat', did you mean 'repeats'",
        ),
        ("{data: x, repeats: 0}", "datasets, item 1: repeats must be at least 1, got 0"),
        ("{data: x, frames: 7}", "frames of the data set x must be of the stages, 5, 9, got 7"),
        ("{data: x, sizes: 7}", "datasets, item 1: sizes are written HEIGHTxWIDTH"),
        ("{data: x", "datasets, item 1 is not YAML"),
        ([[3]], "datasets must be a list"),
    ],
)
def test_what_no_data_set_is_is_refused_by_its_number(told, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig.read({"datasets": told, "stages": ["5:4", "9:4"]})


LONG = f"video,caption\na.mp4,{'x' * 200_000}\n"  # a field of more than Python's csv takes


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("m.jsonl", '{"video": "a.mp4", "text": "x"}\n{"video": ', ValueError, "line 2 of .*JSON"),
        ("m.jsonl", '{"file": "a.mp4"}', ValueError, "none of the columns video, file_name, path"),
        ("m.jsonl", '["a.mp4"]', ValueError, "line 1 of .*none of the columns"),
        ("m.jsonl", '{"video": 3, "text": "x"}', ValueError, "video must be text, .* has 3"),
        ("m.jsonl", '{"video": "", "text": ""}', ValueError, "line 1 of .* names no video"),
        ("m.jsonl", '{"video": "", "text": "x"}', ValueError, "1 of 1 captions .* clip, as 'x': "),
        ("m.jsonl", "", ValueError, "no videos"),
        ("m.csv", "video,caption\nz.mp4,x\n", FileNotFoundError, "1 videos .* not there: .*z.mp4"),
        ("m.csv", "video,caption\na.mp4,\n", ValueError, "1 of 1 videos .* no caption: a.mp4"),
        pytest.param("m.csv", LONG, ValueError, r"m\.csv is no table of text: field", id="long"),
        pytest.param("metadata.csv", LONG, ValueError, r"a\.csv is no table of", id="long too"),
        ("m.csv", "video,caption\na.mp4,\udcff\n", ValueError, r"m\.csv is not UTF-8 text, from"),
        ("m.jsonl", '{"text": "\udcff"}', ValueError, r"m\.jsonl is not UTF-8 text, from byte 10"),
        ("m.xml", "<a>", ValueError, "must be .jsonl or .csv"),
        ("metadata.parquet", "", ValueError, "must be .jsonl or .csv"),
    ],
)
def test_manifests_that_will_not_do(folder, name, text, error, message):
    (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(error, match=message):
        find_videos(folder if name.startswith("metadata") else folder / name)


PROMPTS = ["a blue circle", "a red square", "größer"]


@pytest.fixture(params=["p.txt", "p.jsonl", "p.csv"])
def prompts(request, tmp_path):
    """Prompts without clips."""
    lines = [json.dumps({"caption": text}) for text in PROMPTS]
    text = {
        "p.txt": f"  {PROMPTS[1]}\r\n\n \n{PROMPTS[2]}\n{PROMPTS[0]}",
        "p.jsonl": "\n".join(lines),
        "p.csv": "\n".join(["video,prompt", *(f",{text}" for text in PROMPTS)]),
    }
    path = tmp_path / request.param
    path.write_text(text[request.param], encoding="utf-8-sig")
    return path


def test_prompts_without_clips(prompts, folder):
    rule = CacheOptions(frames=[5, 9], sizes=[SIZE, (64, 48)]).rule
    found = find_videos(prompts, needed=None)
    assert [(one.name, one.caption) for one in found] == [*zip(PROMPTS, PROMPTS, strict=True)]
    assert all(one.is_prompt for one in found)
    with pytest.raises(ValueError, match=r"3 of 3 captions .* unless student_steps is given with"):
        find_videos(prompts)
    # A set of them beside one of clips; a prompt is there once for each size.
    steps = {"objective": "distill", "student_steps": 2, "stages": ["5:1", "9:1"]}
    steps |= {"sizes": ["32x48", "64x48"], "data": None}
    sets = [str(folder), {"data": str(prompts), "repeats": 3, "prefix": "drawn, "}]
    config = TrainConfig.read({**steps, "datasets": sets})
    found = config.clips()
    assert [one.is_prompt for one in found] == 3 * [False] + 6 * [True]
    assert [one.repeats for one in found] == 3 * [1] + 6 * [3]
    assert [one.rule.sizes for one in found[3:5]] == [((32, 48),), ((64, 48),)]
    assert found[3].name == f"p/{PROMPTS[0]}"
    check_filled(found[3:], rule, rule.sizes, None)
    for changed, said in (
        ({"starts": "data"}, "needed unless student_steps is given with starts own or teacher"),
        ({"condition": "first_frame"}, "clips are needed for condition first_frame"),
        ({"images": 0.5}, "clips are needed for images 0.5"),
        ({"sound": True, "objective": "flow", "student_steps": None}, "needed unless"),
    ):
        with pytest.raises(ValueError, match=said):
            config.replaced(**changed).clips()


def test_prompts_that_will_not_do(tmp_path):
    path = tmp_path / "p.txt"
    for data, said in (
        (b"\n \n", "p.txt holds no prompts: write one on each line"),
        (b"a\ncaf\xe9\n", r"p.txt is not UTF-8 text, from byte 5 \(0xe9\) on"),
        (b"a\n\n" + b"b" * (MOST_PROMPT + 1), "prompt 2 of .*p.txt"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=said):
            find_videos(path, needed=None)


@pytest.mark.turns(3)
def test_prompts_are_cached_by_their_text_alone(build, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(family, "encode_video", refuse)
    given = {"data": prompts, "needs_clips": False, "sizes": [SIZE, (64, 48)]}
    report = build(**given, captions=Captions(trigger="sks"))
    assert (report.encoded, report.kept, report.unread, report.texts) == (0, 0, 6, 4)
    assert "6 by their captions alone" in report.line
    assert [(b.frames, b.size, b.clips) for b in report.buckets] == [
        *((9, SIZE, 3), (9, (64, 48), 3))
    ]
    found = LatentCache(report.folder)
    assert [e.caption for e in found.entries[::2]] == [f"sks, {text}" for text in PROMPTS]
    assert [(e.frames, e.height, e.width) for e in found.entries[:2]] == [(3, 4, 6), (3, 8, 6)]
    assert found.buckets(2) == {(4, 6): [0, 2, 4], (8, 6): [1, 3, 5]}
    assert torch.equal(
        found.conditions(1)["encoder_hidden_states"], found.conditions(0)["encoder_hidden_states"]
    )
    with pytest.raises(ValueError, match="holds no latents of a blue circle: cache again"):
        found.latents(0)
    assert not (report.folder / "preview.png").exists()
    digests = found.digest, found.digest_at(3)
    monkeypatch.setattr(family, "encode_prompt", refuse)
    again = build(**given, captions=Captions(trigger="sks"))
    assert (again.removed, again.texts) == (0, 0)
    found = LatentCache(report.folder)
    assert (found.digest, found.digest_at(3)) == digests
    for options, said in (
        ({"needs_clips": True}, "unless student_steps"),
        ({"masks": True}, "for masks"),
        ({"condition": "first_frame"}, "for condition first_frame"),
    ):
        with pytest.raises(ValueError, match=f"clips are needed {said}"):
            build(**(given | options))


def test_a_model_from_first_frames_takes_no_prompts(build):
    videos = [CaptionedVideo("a", "a red square", None)]
    given = {"data": videos, "needs_clips": False}
    with pytest.raises(ValueError, match="clips are needed for condition first_frame"):
        build(**given, pipe=wan.PIPELINES["image"]())


def test_clips_that_need_not_train_are_not_encoded(build, folder, tmp_path, monkeypatch):
    first = build()
    monkeypatch.setattr(family, "encode_video", refuse)
    report = build(needs_clips=False)
    assert (report.encoded, report.kept, report.unread) == (0, 0, 3)
    assert not (report.folder / "preview.png").exists()
    entries = LatentCache(report.folder).entries
    assert [(e.pixel_frames, e.latent_key) for e in entries] == [(9, None), (9, None), (5, None)]
    # Their latents wait for another training.
    report = build()
    assert (report.encoded, report.kept, report.unread) == (0, first.encoded, 0)
    write_video(footage(9, seed=9), folder / "a.mp4", fps=24)
    assert build(needs_clips=False).unread == 3
    with pytest.raises(AssertionError):
        build()


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is at"):
        find_videos(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no videos in .*none ends in .mp4"):
        find_videos(tmp_path)


def test_a_saved_dataset_without_the_library(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r".+\[data\]"):
        find_videos(tmp_path)


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_a_saved_dataset(folder, tmp_path, embedded, split):
    datasets = pytest.importorskip("datasets")
    files = [folder / "a.mp4", folder / "b.mp4"]
    made = datasets.Dataset.from_dict(
        {"video": [str(file) for file in files], "caption": ["one", "two"]}
    )
    if embedded:  # saving copies the files into the data set
        made = made.cast_column("video", datasets.Video())
    if split:
        made = datasets.DatasetDict({"train": made})
    made.save_to_disk(str(tmp_path / "saved"))
    found = find_videos(tmp_path / "saved")
    assert [isinstance(video.source, Path) for video in found] == 2 * [not embedded]
    prefix = "train/" if split else ""
    assert [video.name for video in found] == [f"{prefix}000000", f"{prefix}000001"]
    assert [video.caption for video in found] == ["one", "two"]
    for video, file in zip(found, files, strict=True):
        read = video.read(frames=9, size=SIZE, fps=None)
        np.testing.assert_array_equal(read, read_clip(file, frames=9, size=SIZE))
        assert video.sha256() == CaptionedVideo("", "", file).sha256()


@pytest.mark.parametrize("fps", [24.0, 16.0, 12.0, 8.0, 48.0])
def test_resampling_takes_the_frame_of_each_time(tmp_path, fps):
    path = write_video(ramp(), tmp_path / "clip.mp4", fps=24)
    places = np.floor(np.arange(30) * fps / 24 + 0.5)
    count = round(30 / 24 * fps)
    expected = [int(np.flatnonzero(places <= k)[-1]) for k in range(count)]
    assert levels(read_clip(path, frames=100, size=SIZE, fps=fps)) == expected
    assert CaptionedVideo("clip", "", path).survey(frames=100, fps=fps) == (count, (32, 48))


def test_no_more_frames_than_are_needed(tmp_path):
    path = write_video(ramp(), tmp_path / "clip.mp4", fps=24)
    assert levels(read_clip(path, frames=7, size=SIZE)) == list(range(7))
    assert CaptionedVideo("clip", "", path).survey(frames=7, fps=None) == (7, (32, 48))
    assert levels(read_clip(path, frames=100, size=SIZE)) == list(range(30))


@pytest.mark.parametrize("stored", [(32, 48), (64, 96), (64, 64), (40, 160), (16, 24)], ids=str)
def test_frames_are_covered_and_cropped_to_the_middle(tmp_path, stored):
    path = write_video(footage(3, *stored), tmp_path / "clip.mp4", fps=24)
    read = read_clip(path, frames=3, size=SIZE)
    assert read.shape == (3, *SIZE, 3)
    for frame, whole in zip(read, read_video(path), strict=True):
        expected = ImageOps.fit(Image.fromarray(whole), SIZE[::-1], Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(frame, np.asarray(expected))
    if stored == SIZE:
        np.testing.assert_array_equal(read, read_video(path))


def test_the_middle_is_kept(tmp_path):
    video = np.zeros((1, 32, 144, 3), np.uint8)
    video[:, :, 48:96] = 200
    path = write_video(video, tmp_path / "clip.gif", fps=10)
    assert (read_clip(path, frames=1, size=SIZE) == 200).all()


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "missing"])
def test_damaged_files_are_refused(tmp_path, damage):
    path = write_video(footage(30), tmp_path / "clip.mp4", fps=24)
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    match damage:
        case "empty":
            data = b""
        case "text":
            data = b"no video"
        case "cut":
            data = data[:half]
        case "flipped":
            data[half : half + 3000] = bytes(255 - byte for byte in data[half : half + 3000])
    path.write_bytes(data)
    if damage == "missing":
        path.unlink()
    clip = CaptionedVideo("clip", "", path)
    for read in (clip.survey, partial(clip.read, size=SIZE)):
        with pytest.raises(OSError, match=r"clip.mp4 cannot be read: \w"):
            read(frames=100, fps=None)


def test_sizes():
    assert parse_sizes("480x832,832X480") == ((480, 832), (832, 480))
    for text in ("", "480", "480x", "480x832x3", "0x832", "a x b"):
        with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
            parse_sizes(text)
    sizes = ((480, 832), (832, 480), (96, 96), (64, 64))
    assert nearest_size(sizes, (1080, 1920)) == (480, 832)
    assert nearest_size(sizes, (1920, 1080)) == (832, 480)
    assert nearest_size(sizes, (100, 100)) == (96, 96)
    assert nearest_size(sizes, (80, 80)) == (64, 64)
    assert nearest_size(sizes, (10, 10)) == (64, 64)


def test_latents_are_the_normalised_mode(pipe):
    video = torch.rand(2, 3, 9, 32, 48) * 2 - 1
    latents = family.encode_video(pipe, video)
    assert latents.shape == (2, 16, 3, 4, 6)
    assert latents.dtype == torch.float32
    config = pipe.vae.config
    std, mean = (
        torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_std, config.latents_mean)
    )
    with torch.no_grad():
        mode = pipe.vae.encode(video).latent_dist.mode()
    torch.testing.assert_close(latents * std + mean, mode)
    drawn = [
        family.encode_video(pipe, video, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], latents)


def test_the_first_latents_are_those_of_the_beginning(pipe):
    video = torch.rand(1, 3, 13, 32, 48) * 2 - 1
    assert family.training.causal_vae
    whole = family.encode_video(pipe, video)
    torch.testing.assert_close(family.encode_video(pipe, video[:, :, :5]), whole[:, :, :2])
    with pytest.raises(ValueError, match=r"4 n \+ 1 frames, got 12"):
        family.encode_video(pipe, video[:, :, :12])


def test_conditions_and_velocity_are_those_of_the_pipeline(pipe):
    """Compare with the inputs and outputs of the transformer in a generation."""
    calls = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    prompts = ["a red square moves right", "a blue circle"]
    sizes = {"height": 32, "width": 48, "num_frames": 5}
    pipe(prompts, **sizes, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    hook.remove()
    conditions = family.encode_prompt(pipe, prompts)
    assert list(conditions) == ["encoder_hidden_states"]
    assert conditions["encoder_hidden_states"].shape == (2, 512, wan.TEXT_WIDTH)
    assert len(calls) == 2
    for given, velocity in calls:
        assert torch.equal(given["encoder_hidden_states"], conditions["encoder_hidden_states"])
        with torch.no_grad():
            predicted = family.predict(
                pipe.transformer, given["hidden_states"], given["timestep"] / 1000, conditions
            )
        torch.testing.assert_close(predicted, velocity, atol=1e-5, rtol=1e-5)
    assert family.encode_prompt(pipe, prompts, 8)["encoder_hidden_states"].shape[1] == 8


def test_lora_targets_are_linear_layers_of_every_block():
    model = wan.transformer()
    for names in family.lora_targets.values():
        for name in names:
            for block in model.blocks:
                found = [m for n, m in block.named_modules() if n.endswith(name)]
                assert found
                assert all(isinstance(m, torch.nn.Linear) for m in found)


def expected_latents(pipe, path, frames):
    video = read_clip(path, frames=frames, size=SIZE)
    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return family.encode_video(pipe, pixels)[0]


def test_what_is_cached_is_what_the_encoders_make(pipe, build, folder, tmp_path):
    report = build(store="float32")
    assert (report.encoded, report.kept, report.removed, report.texts) == (3, 0, 0, 4)
    assert report.broken == {}
    found = LatentCache(tmp_path / "cache")
    assert len(found) == 3
    assert [entry.name for entry in found.entries] == ["a.mp4", "b.mp4", "sub/c.mp4"]
    assert [entry.pixel_frames for entry in found.entries] == [9, 9, 5]
    for i, entry in enumerate(found.entries):
        latents = expected_latents(pipe, folder / entry.name, entry.pixel_frames)
        assert latents.shape == (16, entry.frames, entry.height, entry.width)
        assert torch.equal(found.latents(i), latents)
        assert torch.equal(found.latents(i, 2), latents[:, :2])
        text = family.encode_prompt(pipe, [entry.caption], 8)["encoder_hidden_states"][0]
        torch.testing.assert_close(found.conditions(i), {"encoder_hidden_states": text})
    empty = family.encode_prompt(pipe, [""], 8)["encoder_hidden_states"][0]
    torch.testing.assert_close(found.empty, {"encoder_hidden_states": empty})
    found.verify()
    assert [path.name for path in (tmp_path / "cache").glob(".*")] == [".lock"]


@pytest.mark.parametrize("store", ["float16", "bfloat16"])
def test_what_is_stored_is_rounded_once(pipe, build, folder, tmp_path, store):
    build(store=store)
    found = LatentCache(tmp_path / "cache")
    exact = expected_latents(pipe, folder / "a.mp4", 9)
    assert found.latents(0).dtype == torch.float32
    assert torch.equal(found.latents(0), exact.to(getattr(torch, store)).float())
    assert found.empty["encoder_hidden_states"].dtype == torch.float32


def test_fitting_entries_by_size(build, folder, tmp_path):
    path = write_video(footage(9, 48, 32), folder / "tall.mp4", fps=24)
    path.with_suffix(".txt").write_text("a red square moves down")
    build(sizes=[(32, 48), (48, 32)])
    found = LatentCache(tmp_path / "cache")
    assert [entry.name for entry in found.entries][3] == "tall.mp4"
    assert found.fitting(3) == [0, 1, 3]
    assert found.fitting(2) == [0, 1, 2, 3]
    assert found.fitting(4) == found.fitting(0) == []
    assert found.buckets(3) == {(4, 6): [0, 1], (6, 4): [3]}
    with pytest.raises(ValueError, match=r"at most 2, as many latents as sub/c.mp4 has, got 3"):
        found.latents(2, 3)


def test_without_a_causal_autoencoder_each_length_is_encoded(pipe, build, tmp_path, monkeypatch):
    monkeypatch.setattr(family, "training", replace(family.training, causal_vae=False))
    assert build().encoded == 5
    found = LatentCache(tmp_path / "cache")
    lengths = [(entry.name[-5], entry.pixel_frames) for entry in found.entries]
    assert lengths == [("a", 5), ("a", 9), ("b", 5), ("b", 9), ("c", 5)]
    assert found.fitting(2) == [0, 2, 4]
    assert found.fitting(3) == [1, 3]
    with pytest.raises(ValueError, match=r"frames must be 3, .* got 2"):
        found.latents(1, 2)


def held(folder):
    """Files of a cache by name; the memo also learns the hashes of files that have settled."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != DATABASE}


def test_a_second_run_encodes_nothing(pipe, build, tmp_path, monkeypatch):
    build()
    before = held(tmp_path / "cache")
    monkeypatch.setattr(family, "encode_video", refuse)
    monkeypatch.setattr(family, "encode_prompt", refuse)
    monkeypatch.setattr(CaptionedVideo, "survey", refuse)
    report = build()
    assert (report.encoded, report.kept, report.removed, report.texts) == (0, 3, 0, 0)
    assert held(tmp_path / "cache") == before


def test_a_changed_caption_makes_its_text_new(build, folder, tmp_path, monkeypatch):
    build()
    before = LatentCache(tmp_path / "cache")
    (folder / "a.txt").write_text("a green circle moves left")
    monkeypatch.setattr(family, "encode_video", refuse)
    report = build()
    assert (report.encoded, report.kept, report.texts) == (0, 3, 1)
    after = LatentCache(tmp_path / "cache")
    assert after.entries[0].caption == "a green circle moves left"
    assert after.digest != before.digest
    assert after.entries[1:] == before.entries[1:]


def test_a_changed_clip_makes_its_latents_new(build, folder, tmp_path, monkeypatch):
    build()
    before = LatentCache(tmp_path / "cache")
    write_video(footage(9, seed=7), folder / "a.mp4", fps=24)
    monkeypatch.setattr(family, "encode_prompt", refuse)
    report = build()
    assert (report.encoded, report.kept, report.texts) == (1, 2, 0)
    after = LatentCache(tmp_path / "cache")
    assert not torch.equal(after.latents(0), before.latents(0))
    assert after.digest != before.digest


def test_a_clip_that_is_gone_is_removed(build, folder, tmp_path):
    build(shard_bytes=1)
    before = {path.name for path in (tmp_path / "cache").glob("shard-*")}
    (folder / "b.mp4").unlink()
    report = build()
    assert (report.encoded, report.kept, report.removed) == (0, 2, 1)
    after = {path.name for path in (tmp_path / "cache").glob("shard-*")}
    assert after < before
    assert len(before - after) == 2  # its latents and its text
    LatentCache(tmp_path / "cache").verify()


@pytest.mark.turns(5)
@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_another_encoder_makes_its_own_new(build, part, monkeypatch):
    pipe = wan.pipeline()
    build(pipe=pipe)
    if part == "tokenizer":
        pipe.tokenizer.add_tokens(["pentagon"])
    else:
        weight = next(getattr(pipe, part).parameters())
        before = weight.detach().clone()
        weight.data.flatten()[0] += 0.5
    monkeypatch.setattr(family, "encode_prompt" if part == "vae" else "encode_video", refuse)
    try:
        report = build(pipe=pipe)
    finally:
        if part != "tokenizer":
            weight.data.copy_(before)  # the models are shared between tests
    expected = (3, 0, 0) if part == "vae" else (0, 3, 4)
    assert (report.encoded, report.kept, report.texts) == expected


@pytest.mark.turns(5)
@pytest.mark.parametrize("options", [{"fps": 12.0}, {"sizes": [(48, 32)]}, {"store": "bfloat16"}])
def test_other_decoding_makes_latents_new(build, options):
    build(frames=[5])
    report = build(frames=[5], **options)
    assert (report.encoded, report.kept) == (2 if "fps" in options else 3, 0)


def test_a_longer_length_encodes_what_fills_it(build, tmp_path):
    build()
    report = build(frames=[5, 9, 13])
    assert (report.encoded, report.kept, report.removed) == (1, 2, 1)
    assert [entry.pixel_frames for entry in LatentCache(tmp_path / "cache").entries] == [9, 13, 5]


@pytest.mark.parametrize("shard_bytes", [1, 2**20])
def test_an_interrupted_run_goes_on(build, folder, tmp_path, monkeypatch, shard_bytes):
    write_video(footage(9, seed=9), folder / "d.mp4", fps=24)
    (folder / "d.txt").write_text("a red square")
    encode, calls = family.encode_video, []

    def stop_at_third(pipe, video):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(pipe, video)

    monkeypatch.setattr(family, "encode_video", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        build(shard_bytes=shard_bytes)
    with pytest.raises(FileNotFoundError, match="holds no finished cache: cache again"):
        LatentCache(tmp_path / "cache")
    monkeypatch.setattr(family, "encode_prompt", refuse)
    report = build(shard_bytes=shard_bytes)
    assert (report.encoded, report.kept, report.texts) == (2, 2, 0)
    assert len(calls) == 5
    resumed = LatentCache(tmp_path / "cache")
    monkeypatch.undo()
    build(out=tmp_path / "other")
    whole = LatentCache(tmp_path / "other")
    assert resumed.digest == whole.digest
    for i in range(4):
        assert torch.equal(resumed.latents(i), whole.latents(i))


def test_the_earlier_cache_stays_whole_until_the_new_one_is(build, folder, tmp_path, monkeypatch):
    build()
    before = LatentCache(tmp_path / "cache").digest
    write_video(footage(9, seed=8), folder / "a.mp4", fps=24)
    write_video(footage(9, seed=9), folder / "b.mp4", fps=24)
    encode, calls = family.encode_video, []

    def stop_at_second(pipe, video):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(pipe, video)

    monkeypatch.setattr(family, "encode_video", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        build(shard_bytes=1)
    found = LatentCache(tmp_path / "cache")
    found.verify()
    assert found.digest == before
    assert (build().encoded, len(calls)) == (1, 3)


def test_a_second_run_in_one_cache_is_refused(build, tmp_path, monkeypatch):
    """Its model is not loaded either."""
    with locked(tmp_path / "cache"), pytest.raises(BlockingIOError, match="cache is in use by"):
        build(pipe="/nowhere")
    assert not (tmp_path / "cache").exists()
    build()
    (tmp_path / "cache" / ".partial-0.safetensors").touch()
    report = build()
    assert (report.encoded, report.kept) == (0, 3)
    assert [path.name for path in (tmp_path / "cache").glob(".*")] == [".lock"]


@pytest.mark.turns(5)
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_shard_is_found_and_encoded_again(build, tmp_path, damage):
    build(shard_bytes=1)
    before = LatentCache(tmp_path / "cache")
    kept = [before.latents(i) for i in range(3)]
    key = f"{before.entries[1].latent_key}.latents"
    shards = (tmp_path / "cache").glob("shard-*")
    name = next(path.name for path in shards if key in tensors_of(path))
    path = tmp_path / "cache" / name
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"damaged in .*: {name}"):
            LatentCache(tmp_path / "cache").verify()
    elif damage == "cut":
        path.write_bytes(data[:-8])
        with pytest.raises(ValueError, match=f"{name} has .* bytes instead of"):
            LatentCache(tmp_path / "cache")
    else:
        path.unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
            LatentCache(tmp_path / "cache")
    report = build()
    assert (report.encoded, report.kept, report.damaged) == (1, 2, (name,))
    after = LatentCache(tmp_path / "cache")
    after.verify()
    assert after.digest == before.digest
    for i in range(3):
        assert torch.equal(after.latents(i), kept[i])


def test_a_cache_of_an_earlier_version_is_refused(build, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "manifest.json").write_text('{"version": 2}')
    for read in (build, lambda: LatentCache(tmp_path / "cache")):
        with pytest.raises(ValueError, match="cache is a cache of an earlier version, whose fil"):
            read()


def test_broken_and_short_clips(build, folder, tmp_path):
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "broken.txt").write_text("a red square")
    write_video(footage(3), folder / "short.mp4", fps=24)
    (folder / "short.txt").write_text("a red square")
    report = build()
    assert report.encoded == 3
    assert report.short == ("short.mp4",)
    assert list(report.broken) == ["broken.mp4"]
    assert "cannot be read" in report.broken["broken.mp4"]
    assert "1 too short, 1 broken" in str(report)
    assert [e.name for e in LatentCache(tmp_path / "cache").entries] == [
        "a.mp4",
        "b.mp4",
        "sub/c.mp4",
    ]
    with pytest.raises(OSError, match=r"broken.mp4 is broken: .* cannot be read"):
        build(on_broken="stop")


def test_clips_that_are_all_broken(build, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_bytes(b"no video")
    (tmp_path / "bad" / "a.txt").write_text("a red square")
    with pytest.raises(ValueError, match=r"no clip could be read: .*a.mp4"):
        build(data=tmp_path / "bad")


@pytest.mark.parametrize("scale", [1e6, float("nan")])
def test_values_that_the_stored_dtype_cannot_hold(build, monkeypatch, scale):
    encode = family.encode_video
    monkeypatch.setattr(family, "encode_video", lambda *args: encode(*args) * scale)
    with pytest.raises(ValueError, match="'float16' cannot hold its latents"):
        build()


def test_a_text_that_the_stored_dtype_cannot_hold(build, monkeypatch):
    encode = family.encode_prompt

    def scaled(*args):
        found = encode(*args)
        return {n: x * 1e6 if x.is_floating_point() else x for n, x in found.items()}

    monkeypatch.setattr(family, "encode_prompt", scaled)
    said = r"cannot hold the text 'a red .*'; float32 can what the text encoder made"
    with pytest.raises(ValueError, match=said):
        build()
    assert build(store="float32").texts == 4


def test_a_full_disk_is_no_fault_of_a_clip(build, monkeypatch):
    def full(*args):
        raise NoRoom(Path("shard"), None, errno.ENOSPC)

    monkeypatch.setattr(Store, "put", full)
    with pytest.raises(NoRoom):
        build()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": []}, "frames must be lengths"),
        ({"frames": [9, 14]}, r"4 n \+ 1 .* got 14; nearest: 13 or 17"),
        ({"frames": [5, 17]}, "no clip has 17 frames: the longest of 3 has 13"),
        ({"frames": [9], "fps": 6.0}, "no clip has 9 frames at 6 frames a second"),
        ({"sizes": [(32, 40)]}, "multiples of 16 and 16"),
        ({"sizes": []}, "sizes must be pairs"),
        ({"fps": 0.0}, "fps must be from 0.01 to 1000"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"on_broken": "ignore"}, "on_broken must be one of skip, stop"),
        ({"store": "int8"}, "store must be one of float32"),
        ({"shard_bytes": 0}, "shard_bytes must be at least 1"),
        ({"dtype": "float16"}, "dtype is for models to load"),
        ({"device": "nowhere"}, "device must be auto"),
        ({"data": []}, "data holds no videos"),
    ],
    ids=str,
)
def test_refusals(build, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(family, "encode_video", refuse)
    monkeypatch.setattr(family, "encode_prompt", refuse)
    with pytest.raises(ValueError, match=message):
        build(**options)
    assert not is_finished(tmp_path / "cache")


def test_pipelines_that_will_not_do(build, pipe):
    narrow = wan.pipeline(transformer=wan.transformer(in_channels=8, out_channels=8))
    with pytest.raises(ValueError, match="8 channels where the latents have 16"):
        build(pipe=narrow)
    silent = wan.pipeline(text_encoder=None)
    with pytest.raises(ValueError, match="WanPipeline was loaded without its text_encoder"):
        build(pipe=silent)
    with pytest.raises(ValueError, match="no transformer"):
        build(pipe=wan.pipeline(transformer=None))
    with torch.device("meta"):
        empty = UMT5EncoderModel(wan.text_encoder().config)
    offloaded = wan.pipeline(text_encoder=empty)
    with pytest.raises(ValueError, match="text_encoder is offloaded"):
        build(pipe=offloaded)


def test_clips_in_memory(pipe, build, tmp_path):
    clips = [footage(9), footage(13, seed=1), footage(9)]
    videos = [CaptionedVideo(f"clip {i}", "a red square", clip) for i, clip in enumerate(clips)]
    encoded = []
    encode = family.encode_video

    def count(*args):
        encoded.append(1)
        return encode(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "encode_video", count)
        report = build(data=videos, store="float32", fps=16.0)
    assert (report.encoded, report.texts, len(encoded)) == (3, 2, 2)
    found = LatentCache(tmp_path / "cache")
    pixels = torch.from_numpy(clips[1][:9]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    assert torch.equal(found.latents(1), family.encode_video(pipe, pixels)[0])
    assert torch.equal(found.latents(0), found.latents(2))
    wrong = CaptionedVideo("grey", "a red square", clips[0][..., 0])
    with pytest.raises(ValueError, match=r"grey must be \(F, H, W, 3\) uint8"):
        build(data=[wrong])


def test_clips_given_as_bytes(pipe, build, folder, tmp_path):
    stored = CaptionedVideo("a", "a red square", (folder / "a.mp4").read_bytes)
    filed = CaptionedVideo("a", "a red square", folder / "a.mp4")
    build(data=[stored], frames=[9])
    report = build(data=[filed], frames=[9])
    assert (report.encoded, report.kept) == (0, 1)


def test_shards_do_not_wait_for_long(build, tmp_path, monkeypatch):
    monkeypatch.setattr("gen_accel.lora.caching.store.SHARD_SECONDS", 0.0)
    build()
    assert len(list((tmp_path / "cache").glob("shard-*"))) == 7


def test_shards_do_not_change_the_digest(build, tmp_path):
    build(shard_bytes=1)
    build(out=tmp_path / "other")
    assert len(list((tmp_path / "cache").glob("shard-*"))) == 7
    assert len(list((tmp_path / "other").glob("shard-*"))) == 1
    assert LatentCache(tmp_path / "cache").digest == LatentCache(tmp_path / "other").digest


def test_a_model_in_a_folder_is_loaded_without_its_transformer(tmp_path, monkeypatch):
    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", refuse)
    videos = [CaptionedVideo("clip", "a red square moves left quickly", footage(9, 96, 96))]
    options = {"frames": [9], "sizes": [(96, 96)], "max_tokens": 16, "device": "cpu"}
    report = cache(str(demo.path()), videos, tmp_path / "cache", **options)
    assert (report.encoded, report.texts) == (1, 2)
    found = LatentCache(tmp_path / "cache")
    assert found.latents(0).shape == (16, 3, 12, 12)
    vae = AutoencoderKLWan.from_pretrained(demo.path(), subfolder="vae", dtype=torch.float32)
    pixels = torch.from_numpy(videos[0].source).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
    std, mean = (
        torch.tensor(x).view(-1, 1, 1, 1)
        for x in (vae.config.latents_std, vae.config.latents_mean)
    )
    expected = ((mode[0] - mean) / std).half().float()
    torch.testing.assert_close(found.latents(0), expected, atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match="dtype must be auto"):
        cache(demo.path(), videos, tmp_path / "cache", **options, dtype="int8")
    with pytest.raises(FileNotFoundError, match="no folder at"):
        cache("models/none/here", videos, Path(tmp_path), **options)


def test_keywords_are_those_of_the_options():
    assert {*CacheFields.__annotations__} == {one.name for one in fields(CacheOptions)}
