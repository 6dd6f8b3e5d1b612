"""The world of several objects, and the judge of its clips."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from gen_accel.measure.video_io import read_video

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from demo_model.faults import KINDS, planted
from demo_model.judge import judge, scored_scenes
from demo_model.scenes import (
    BACKGROUNDS,
    BEHIND,
    COLORS,
    FRONT,
    HIDES,
    LEAVES,
    MOTIONS,
    MOVES,
    SHAPES,
    SIZES,
    STAYS,
    Group,
    Scene,
    draw,
    scene_of,
    write_clips,
)

RED, BLUE = Group(2, "small", "red", "circle"), Group(1, "large", "blue", "square")
DRAWN = [*map(scene_of, range(600))]


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (
            Scene(RED, MOVES, "right", "quickly", BLUE, BEHIND, "striped", "left"),
            "two small red circles move right quickly behind a large blue square on a striped "
            "background, the camera pans left",
        ),
        (
            Scene(RED, HIDES, other=BLUE, depth=BEHIND),
            "two small red circles hide behind a large blue square and come back",
        ),
        (
            Scene(Group(1, "large", "white", "cross"), LEAVES, "up", other=BLUE),
            "a large white cross leaves up and comes back beside a large blue square",
        ),
        (
            Scene(Group(3, "large", "white", "cross"), STAYS, background="dotted"),
            "three large white crosses stay still on a dotted background",
        ),
    ],
)
def test_captions_are_plain_words(scene, caption):
    assert scene.caption == caption


def test_all_that_the_world_has_is_drawn():
    groups = [group for scene in DRAWN for group in scene.groups]
    assert {scene.group.count for scene in DRAWN} == {1, 2, 3, 4}
    for names, found in (
        (COLORS, {group.color for group in groups}),
        (SHAPES, {group.shape for group in groups}),
        (SIZES, {group.size for group in groups}),
        (MOTIONS, {scene.motion for scene in DRAWN}),
        (BACKGROUNDS, {scene.background for scene in DRAWN}),
        ((FRONT, BEHIND, None), {scene.depth for scene in DRAWN}),
        (("left", "right", None), {scene.pan for scene in DRAWN}),
    ):
        assert found == {*names}
    assert all(sum(group.count for group in scene.groups) <= 4 for scene in DRAWN)
    assert 0.08 < sum(scene.is_held_out for scene in DRAWN) / len(DRAWN) < 0.17


@pytest.mark.parametrize("depth", [FRONT, BEHIND])
def test_the_truth_says_who_covers_whom(depth):
    scene = Scene(Group(1, "large", "red", "square"), MOVES, "right", "quickly", BLUE, depth)
    film = draw(scene, frames=33, seed=0)
    mine, its = film.visible.sum((2, 3))
    covered, whole = (its, mine) if depth == FRONT else (mine, its)
    assert whole.min() > 0.9 * whole.max() > 0
    assert covered.min() < 0.5 * covered.max()
    assert not (film.visible[0] & film.visible[1]).any()
    assert film.order == ((1, 0) if depth == FRONT else (0, 1))
    for pixels, group in zip(film.visible, scene.groups, strict=True):
        middle = film.video[pixels].float().median(0).values
        assert middle.tolist() == [*map(float, COLORS[group.color])]


def test_a_clip_is_drawn_from_its_seed():
    one, same, another = (draw(DRAWN[0], frames=9, seed=seed).video for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, another)


@pytest.mark.parametrize("motion", MOTIONS)
def test_drawn_clips_are_right(motion):
    scenes = [(i, scene) for i, scene in enumerate(DRAWN) if scene.motion == motion]
    for seed, scene in scenes[:3]:
        verdict = judge(draw(scene, frames=33, seed=seed).video, scene)
        assert verdict.strict, (scene.caption, verdict)


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_fault_is_found(kind):
    found = 0
    for seed, scene in enumerate(DRAWN):
        video = planted(kind, scene, frames=33, seed=seed)
        if video is not None:
            found += 1
            assert not judge(video, scene).strict, scene.caption
        if found == 2:
            return
    pytest.fail("no scene can have this fault")


def test_the_scored_scenes_are_the_same_at_each_call_and_half_held_out():
    scenes = scored_scenes(20)
    assert scenes == scored_scenes(40)[:20]
    assert sum(scene.is_held_out for scene in scenes) == 10


def test_clips_to_train_on_show_nothing_that_is_held_out(tmp_path):
    write_clips(tmp_path, frames=5, count=3)
    said = [(tmp_path / f"{i:04d}.txt").read_text("utf-8").strip() for i in range(3)]
    shown = (scene for scene in map(scene_of, itertools.count()) if not scene.is_held_out)
    assert said == [next(shown).caption for _ in range(3)]
    assert read_video(tmp_path / "0000.mp4").shape == (5, 96, 96, 3)
    before = (tmp_path / "0001.mp4").stat().st_mtime_ns
    write_clips(tmp_path, frames=5, count=3)
    assert (tmp_path / "0001.mp4").stat().st_mtime_ns == before
