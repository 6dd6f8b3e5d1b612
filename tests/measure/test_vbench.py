"""The example of VBench: its prompts, names and temporal flickering, against published counts."""

import json
from collections import Counter

import numpy as np
import pytest
from support.paths import ROOT

from gen_accel.measure import read_video, write_video

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
def vbench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "vbench")
    import vbench

    return vbench


def noise(frames=3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (frames, 32, 48, 3), dtype=np.uint8)


def test_the_prompts_are_as_many_as_vbench_says(vbench):
    assert {name: len(vbench.prompts([name])) for name in vbench.dimensions()} == COUNTS
    assert len(vbench.prompts()) == 944
    held = json.loads(vbench.FILE.read_text(encoding="utf-8"))
    assert sum(len(part["prompts"]) for part in held["parts"]) == 946
    assert "Apache-2.0" in held["license"]


def test_prompts_of_several_dimensions_are_each_there_once(vbench):
    both = vbench.prompts(["temporal_style", "color"])
    assert len(both) == COUNTS["temporal_style"] + COUNTS["color"]
    assert max(Counter(vbench.prompts()).values()) == 1
    few = vbench.prompts(["color"], count=5)
    assert few == [vbench.prompts(["color"])[i] for i in (0, 17, 34, 51, 68)]


def test_flickering_is_what_vbench_computes(vbench, tmp_path):
    """(255 - the mean over steps of the mean absolute difference) / 255, step by step."""
    path = write_video(noise(), tmp_path / "a", fps=8)
    one, two, three = (frame.astype(int) for frame in read_video(path))
    first, second = abs(two - one).sum() / two.size, abs(three - two).sum() / two.size
    value, _ = vbench.flickering([path])
    assert value == pytest.approx((255 - (first + second) / 2) / 255)


def test_only_the_prompts_of_the_dimension_count(vbench, tmp_path):
    still = write_video(noise(1).repeat(3, 0), tmp_path / f"{STILL}-0.mp4", fps=8)
    plain = write_video(noise(), tmp_path / "clip.mp4", fps=8)
    action = write_video(noise(), tmp_path / "A person is riding a bike-0.mp4", fps=8)
    assert vbench.dimensions_of(still) == ["temporal_flickering"]
    assert vbench.dimensions_of(plain) == []
    assert vbench.flickering([still, plain]) == vbench.flickering([still])
    assert vbench.flickering([plain])[1] == [plain]
    assert vbench.flickering([action])[0] is None


def test_the_score_says_where_the_weights_of_the_others_go(vbench, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    write_video(noise(), tmp_path / "a.mp4", fps=8)
    raft = tmp_path / "raft_model/models/raft-things.pth"
    raft.parent.mkdir(parents=True)
    raft.touch()
    vbench.main(["score", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert {*found} == {*COUNTS}
    assert [one["there"] for one in found["dynamic_degree"]] == [True]
    assert found["scene"][0]["network"] == "Tag2Text"
    assert found["scene"][0]["there"] is False


def test_prompts_are_written_and_their_videos_named(vbench, tmp_path, capsys):
    out, videos = tmp_path / "p.txt", tmp_path / "clips"
    given = ("--dimension", "color", "--count", "2", "--samples", "2")
    vbench.main(["prompts", *given, "--out", str(out)])
    first, second = vbench.prompts(["color"], count=2)
    assert out.read_text() == f"{first}\n{first}\n{second}\n{second}\n"
    videos.mkdir()
    for i in (0, 1, 3):
        (videos / f"clip-{i:03d}.mp4").write_text(f"video {i}")
    folder = tmp_path / "for"
    place = ("place", videos / "clip.mp4", "--prompts", out, "--out", folder)
    for _ in range(2):  # again, over the same files
        vbench.main([*map(str, place)])
        assert "3 of 4 videos" in capsys.readouterr().out
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            f"{first}-0.mp4": "video 0",
            f"{first}-1.mp4": "video 1",
            f"{second}-1.mp4": "video 3",
        }


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("prompts", "--dimension", "colour"), "did you mean 'color'?"),
        (("prompts", "--count", "0"), "count must be 1 to 944, the number of prompts, got 0"),
    ],
)
def test_it_refuses_in_one_line(vbench, args, words):
    with pytest.raises(SystemExit, match=words.replace("?", r"\?")):
        vbench.main(args)


def test_placing_refuses(vbench, tmp_path):
    film = tmp_path / "a.mp4"
    with pytest.raises(FileNotFoundError, match=r"none of the 1 videos is there.*a\.mp4"):
        vbench.place(["a"], [film], tmp_path / "out")
    film.touch()
    with pytest.raises(ValueError, match=r"the name of a file, got '\.\./a'"):
        vbench.place(["../a"], [film], tmp_path / "out")
    with pytest.raises(ValueError, match="must be a file, which VBench reads"):
        vbench.place(["a"], [tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
