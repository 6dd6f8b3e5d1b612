"""VBench's suite and its prompts, against its published definitions and counts."""

import json
from collections import Counter

import numpy as np
import pytest
from typer.testing import CliRunner

from gen_accel.cli import app
from gen_accel.measure import read_video, write_video
from gen_accel.measure.vbench import NEEDS, measure_suite, weights_folder
from gen_accel.measure.vbench_prompts import (
    DIMENSIONS,
    PROMPTS,
    dimensions_of,
    place_videos,
    prompt_of,
    vbench_names,
    vbench_prompts,
)

# Of VBench's table of prompts.
COUNTS = {
    "subject_consistency": 72,
    "background_consistency": 86,
    "temporal_flickering": 75,
    "motion_smoothness": 72,
    "dynamic_degree": 72,
    "aesthetic_quality": 93,
    "imaging_quality": 93,
    "object_class": 79,
    "multiple_objects": 82,
    "human_action": 100,
    "color": 85,
    "spatial_relationship": 84,
    "scene": 86,
    "temporal_style": 100,
    "appearance_style": 90,
    "overall_consistency": 93,
}
STILL = "In a still frame, a stop sign"


@pytest.fixture
def run():
    def call(*args, code=0):
        result = CliRunner().invoke(app, [*map(str, args)], env={"COLUMNS": "80"})
        assert result.exit_code == code, result.output
        return result

    return call


def noise(frames=3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (frames, 32, 48, 3), dtype=np.uint8)


def test_the_prompts_are_as_many_as_vbench_says():
    assert tuple(COUNTS) == DIMENSIONS == tuple(NEEDS)
    assert {name: len(vbench_prompts([name])) for name in DIMENSIONS} == COUNTS
    assert len(vbench_prompts()) == 944
    held = json.loads(PROMPTS.read_text(encoding="utf-8"))
    assert sum(len(part["prompts"]) for part in held["parts"]) == 946
    assert "Apache-2.0" in held["license"]
    assert PROMPTS.stat().st_size < 100_000


def test_prompts_of_several_dimensions_are_each_there_once():
    both = vbench_prompts(["temporal_style", "color"])
    assert len(both) == COUNTS["temporal_style"] + COUNTS["color"]
    assert vbench_prompts(["subject_consistency"]) == vbench_prompts(["dynamic_degree"])
    assert max(Counter(vbench_prompts()).values()) == 1
    assert vbench_prompts(count=944) == vbench_prompts()
    few = vbench_prompts(["color"], count=5)
    assert few == [vbench_prompts(["color"])[i] for i in (0, 17, 34, 51, 68)]


def test_a_video_is_of_the_prompt_in_its_name():
    assert prompt_of(f"x/{STILL}-3.mp4") == prompt_of(f"{STILL}.mp4") == STILL
    assert dimensions_of(STILL) == ("temporal_flickering",)
    style = "The bund Shanghai, oil painting"
    assert dimensions_of(style) == (
        *("aesthetic_quality", "imaging_quality", "appearance_style", "overall_consistency"),
    )
    assert dimensions_of("clip") == ()
    assert vbench_names(["a", "b", "a", "a"]) == ["a-0", "b-0", "a-1", "a-2"]


def test_flickering_is_what_vbench_computes(tmp_path):
    """(255 - the mean over steps of the mean absolute difference) / 255, step by step."""
    path = write_video(noise(), tmp_path / "a", fps=8)
    one, two, three = (frame.astype(int) for frame in read_video(path))
    first, second = abs(two - one).sum() / two.size, abs(three - two).sum() / two.size
    found = measure_suite([path])
    assert found.temporal_flickering == pytest.approx((255 - (first + second) / 2) / 255)


def test_a_known_flicker(tmp_path):
    video = np.full((4, 16, 16, 3), 100, np.uint8)
    video[1, ..., 0] += 30  # 10 over all colours, there and back
    video[3, :8] += 51  # 25.5 over all pixels
    path = write_video(video, tmp_path / "a", fps=8)
    assert measure_suite([path]).temporal_flickering == pytest.approx(1 - (10 + 10 + 25.5) / 765)


def test_only_the_prompts_of_the_dimension_count(tmp_path):
    still = write_video(noise(1).repeat(3, 0), tmp_path / f"{STILL}-0.mp4", fps=8)
    other = write_video(noise(), tmp_path / "a person is sipping coffee-0.mp4", fps=8)
    plain = write_video(noise(), tmp_path / "clip.mp4", fps=8)
    assert dimensions_of("a person is sipping coffee") == ()
    alone = measure_suite([still])
    assert measure_suite([still, plain]).temporal_flickering == alone.temporal_flickering
    assert measure_suite([still, plain]).counted == (str(still),)
    assert measure_suite([other, plain]).counted == (str(other), str(plain))
    action = write_video(noise(), tmp_path / "A person is riding a bike-0.mp4", fps=8)
    assert dimensions_of("A person is riding a bike") == ("human_action",)
    assert measure_suite([action]).temporal_flickering is None


def test_missing_networks_say_where_their_weights_go(tmp_path, monkeypatch):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    assert weights_folder() == tmp_path
    path = write_video(noise(), tmp_path / "a", fps=8)
    raft = tmp_path / "raft_model/models/raft-things.pth"
    missing = measure_suite([path]).missing
    assert {*missing} == {*DIMENSIONS} - {"temporal_flickering"}
    assert missing["dynamic_degree"].files == (str(raft),)
    assert all(url.startswith("https://") for one in missing.values() for url in one.urls)
    assert not any(one.there for one in missing.values())
    raft.parent.mkdir(parents=True)
    raft.touch()
    assert measure_suite([path]).missing["dynamic_degree"].there


def test_the_suite_prints_all_dimensions_in_80_columns(run, tmp_path, monkeypatch):
    monkeypatch.setenv("VBENCH_CACHE_DIR", "w")
    write_video(noise(), tmp_path / "a.mp4", fps=8)
    write_video(noise(seed=1), tmp_path / "b.gif", fps=8)
    said = run("metrics", tmp_path, "--suite", "vbench").stdout
    for name in DIMENSIONS:
        assert f"\n{name}" in said
    lines = [line for line in said.splitlines() if "https://" not in line]
    assert max(map(len, lines)) <= 80
    written = json.loads(run("metrics", tmp_path, "--suite", "vbench", "--json", "-").stdout)
    flickering = written["dimensions"]["temporal_flickering"]
    assert len(flickering["videos"]) == 2
    assert f"{flickering['score']:.4f}" in said
    assert written["dimensions"]["scene"]["network"] == "Tag2Text"


def test_prompts_are_written_and_their_videos_named(run, tmp_path):
    out, videos = tmp_path / "p.txt", tmp_path / "clips"
    run("prompts", "vbench", "--dimension", "color", "--count", 2, "--samples", 2, "--out", out)
    first, second = vbench_prompts(["color"], count=2)
    assert out.read_text() == f"{first}\n{first}\n{second}\n{second}\n"
    videos.mkdir()
    for i in (0, 1, 3):
        (videos / f"clip-{i:03d}.mp4").write_text(f"video {i}")
    place = ("--place", videos / "clip.mp4", "--prompts", out, "--out", tmp_path / "for")
    assert "3 of 4 videos" in run("prompts", "vbench", *place).stdout
    names = {path.name: path.read_text() for path in (tmp_path / "for").iterdir()}
    assert names == {
        f"{first}-0.mp4": "video 0",
        f"{first}-1.mp4": "video 1",
        f"{second}-1.mp4": "video 3",
    }
    run("prompts", "vbench", *place)  # again, over the same files
    assert len([*(tmp_path / "for").iterdir()]) == 3


def test_prompts_are_printed_without_a_file(run):
    lines = run("prompts", "vbench", "--dimension", "temporal_flickering").stdout.splitlines()
    assert lines == vbench_prompts(["temporal_flickering"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nope",), "list of prompts must be one of vbench, got 'nope'"),
        (("vbench", "--dimension", "colour"), "did you mean 'color'?"),
        (("vbench", "--count", "0"), "count must be 1 to 944, the prompts there, got 0"),
        (("vbench", "--samples", "0"), "samples must be 1 to 1000, got 0"),
        (("vbench", "--prompts", "x"), "goes with --place"),
        (("vbench", "--place", "x.mp4"), "--place x.mp4 needs --prompts FILE and --out FOLDER"),
        (("vbench", "--out", "/"), "must be a file, but it is a folder"),
    ],
)
def test_prompts_refuse_in_one_line(run, args, words):
    [line] = run("prompts", *args, code=2).stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_placing_refuses(tmp_path):
    film = tmp_path / "a.mp4"
    with pytest.raises(FileNotFoundError, match=r"none of the 1 videos is there.*a\.mp4"):
        place_videos(["a"], [film], tmp_path / "out")
    film.touch()
    with pytest.raises(ValueError, match=r"the name of a file, got '\.\./a'"):
        place_videos(["../a"], [film], tmp_path / "out")
    with pytest.raises(ValueError, match="must be a file, which VBench reads"):
        place_videos(["a"], [tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
