"""Clips as the Train screen shows them, and their captions on disk."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from support.clips import footage

pytest.importorskip("gradio", reason='needs gradio: pip install "gen_accel[ui]"')

from gen_accel.lora.config import TrainConfig
from gen_accel.lora.data.finding import find_videos
from gen_accel.measure.video_io import write_video
from gen_accel.ui.files import Places
from gen_accel.ui.screens.clips import (
    caption_files,
    find_clips,
    save_captions,
    size_of,
    thumbnail,
    videos_of,
    why_fixed,
)

SIDE = 96


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Five films, three of them awkward, and a picture."""
    folder = tmp_path_factory.mktemp("films")
    for name, frames, size in (
        ("long.mp4", 20, (96, 96)),
        ("sub/wide.mp4", 9, (96, 160)),
        ("short.mp4", 4, (96, 96)),
    ):
        write_video(footage(frames, *size), folder / name, fps=16)
        (folder / name).with_suffix(".txt").write_text(f"the film {name}\n")
    (folder / "long.1.txt").write_text("another caption")
    (folder / "broken.mp4").write_bytes(b"no film")
    (folder / "broken.txt").write_text("broken")
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(folder / "still.png")
    (folder / "still.txt").write_text("a picture")
    return folder


@pytest.fixture
def data(films, tmp_path):
    return shutil.copytree(films, tmp_path / "data")


def config_for(data, **fields):
    given = {"height": SIDE, "width": SIDE, "stages": ("5:1", "9:1"), "device": "cpu"}
    places = {"data": str(data), "out": str(data.parent / "out"), "workers": 0}
    return TrainConfig(**(given | places | fields))


def test_a_row_for_each_caption(data):
    found = find_clips(config_for(data))
    rows = {row.name: row for row in found.rows}
    assert [*rows] == [
        *("broken.mp4", "long.mp4", "long.mp4, long.1.txt", "short.mp4", "still.png"),
        "sub/wide.mp4",
    ]
    assert rows["long.mp4, long.1.txt"].caption == "another caption"
    assert rows["long.mp4, long.1.txt"].file == data / "long.1.txt"
    sizes = {name: size_of(video) for name, video in found.videos.items()}
    assert sizes["long.mp4"] == "20 frames, 1.2 s, 96 x 96"
    assert sizes["still.png"] == "a picture, 96 x 96"
    assert sizes["broken.mp4"].startswith("broken: ")


def test_prompts_without_clips(data):
    path = data / "prompts.txt"
    path.write_text("a red square\na blue circle\n")
    fields = {"objective": "distill", "student_steps": 4}
    found = find_clips(config_for(path, **fields))
    assert [row.caption for row in found.rows] == ["a blue circle", "a red square"]
    assert found.fixed == f"these captions lie in {path}: edit them there"
    video = found.videos["a red square"]
    assert (size_of(video), thumbnail(video)) == ("a prompt alone", "")
    with pytest.raises(ValueError, match="clips are needed unless student_steps is given"):
        find_clips(config_for(path))


def test_thumbnails(data):
    videos = find_clips(config_for(data)).videos
    assert thumbnail(videos["long.mp4"]).startswith("data:image/jpeg;base64,")
    assert thumbnail(videos["broken.mp4"]) == ""


def test_missing_captions_are_said(data):
    (data / "short.txt").write_text(" \n")
    found = find_clips(config_for(data))
    assert found.silent == ["short.mp4"]
    assert {row.name: row.caption for row in found.rows}["short.mp4"] == ""


def captions(data):
    return {video.name: (video.caption, *video.more_captions) for video in find_videos(data)}


def test_edited_captions_are_what_find_videos_reads(data):
    config = config_for(data)
    (data / "short.txt").unlink()
    edits = {
        data / "long.txt": ("the film long.mp4", "a film,\nof two lines ü "),
        data / "long.1.txt": ("another caption", "another caption"),
        data / "short.txt": ("", "no longer silent"),
    }
    assert save_captions(config, edits) == (data / "long.txt", data / "short.txt")
    assert captions(data)["long.mp4"] == ("a film,\nof two lines ü", "another caption")
    assert captions(data)["short.mp4"] == ("no longer silent",)
    assert not [*data.glob(".partial*")]


def test_a_caption_that_changed_meanwhile_is_not_overwritten(data):
    edits = {
        data / "short.txt": ("the film short.mp4", "mine"),
        data / "long.txt": ("as it was an hour ago", "mine"),
    }
    with pytest.raises(ValueError, match=r"changed meanwhile, to 'the film long\.mp4'"):
        save_captions(config_for(data), edits)
    assert captions(data)["short.mp4"] == ("the film short.mp4",)


def test_only_captions_are_written(data):
    elsewhere = data.parent / "elsewhere.txt"
    with pytest.raises(ValueError, match="no caption of a clip"):
        save_captions(config_for(data), {elsewhere: ("", "mine")})
    assert not elsewhere.exists()


def test_a_folder_that_is_gone(data):
    config = config_for(data)
    shutil.rmtree(data)
    with pytest.raises(FileNotFoundError, match="nothing is at"):
        find_clips(config)
    with pytest.raises(FileNotFoundError, match="nothing is at"):
        save_captions(config, {data / "long.txt": ("the film long.mp4", "mine")})
    assert not data.exists()


def manifest(data):
    path = data / "list.jsonl"
    path.write_text(json.dumps({"video": "long.mp4", "caption": ["one", "two"]}))
    return path


def video_folder(data):
    path = data / "sub" / "metadata.csv"
    path.write_text("file_name,caption\nwide.mp4,one\n")
    return data


def dataset(data):
    (data / "dataset_info.json").write_text("{}")
    return data


@pytest.mark.parametrize(
    ("make", "named"),
    [(manifest, "list.jsonl"), (video_folder, "sub/metadata.csv"), (dataset, "dataset_info.json")],
    ids=["manifest", "VideoFolder", "datasets"],
)
def test_captions_in_other_places_are_not_edited(data, make, named):
    given = make(data)
    assert named in why_fixed(str(given))
    before = (data / "long.txt").read_text()
    with pytest.raises(ValueError, match=named):
        save_captions(config_for(given), {data / "long.txt": (before, "mine")})
    assert (data / "long.txt").read_text() == before


def test_files_elsewhere_are_refused(data, tmp_path):
    places = Places(data)
    (tmp_path / "secret.txt").write_text("a secret")
    (data / "short.txt").unlink()
    (data / "short.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match=r"short\.txt is not a file of this page"):
        find_clips(config_for(data), places.readable)
    text = (data / "long.txt").read_text()
    with pytest.raises(ValueError, match="start it with --allow"):
        save_captions(
            config_for(data), {data / "long.txt": (text, "mine")}, Places(tmp_path / "o").editable
        )
    assert (data / "long.txt").read_text() == text


def test_captions_of_a_manifest_are_shown(data):
    found = find_clips(config_for(manifest(data)))
    assert [(row.name, row.file, row.caption) for row in found.rows] == [
        ("long.mp4", None, "one"),
        ("long.mp4, caption 2", None, "two"),
    ]


def test_files_of_captions_agree_with_find_videos(data):
    (data / "short.1.mp4").write_bytes((data / "short.mp4").read_bytes())
    (data / "short.1.txt").write_text("the caption of short.1.mp4")
    (data / "short.10.txt").write_text("ten")
    (data / "short.9.txt").write_text("nine")
    videos = videos_of(config_for(data))
    held = {name: tuple(text for _, text in each) for name, each in caption_files(videos).items()}
    assert held == {video.name: (video.caption, *video.more_captions) for video in videos}
    assert held["short.mp4"] == ("the film short.mp4", "nine", "ten")
