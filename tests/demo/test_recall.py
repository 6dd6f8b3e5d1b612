"""Clips in which an object is hidden and returns."""

import sys
from pathlib import Path

import pytest
import torch

from gen_accel.demo.detector import detect
from gen_accel.lora.data.finding import find_videos
from gen_accel.measure.video_io import read_video

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from demo_model.recall import HIDDEN, LENGTHS, drawn, write_recalls


@pytest.mark.parametrize("seed", range(4))
def test_each_chunk_shows_what_its_caption_says_and_the_return_what_was_shown(seed):
    recall = drawn(seed)
    video = recall.draw(frames=93, size=96, generator=torch.Generator().manual_seed(seed))
    pixels = ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
    captions = recall.captions()
    for chunk in range(LENGTHS.chunks):
        seen = detect(pixels[LENGTHS.first(chunk) : LENGTHS.first(chunk + 1)])
        said = LENGTHS.prompt(captions, chunk)
        if chunk >= recall.returns:
            scene = recall.scene
            assert (seen.color, seen.shape) == (scene.color, scene.shape)
            assert said == f"something moves {scene.direction} {scene.speed}"
        else:
            assert seen.caption == ("nothing" if said == HIDDEN else said)


def test_two_objects_are_told_apart_by_their_motion():
    two = [recall for recall in map(drawn, range(60)) if len(recall.scenes) == 2]
    assert {recall.back for recall in two} == {0, 1}
    for recall in two:
        a, b = recall.scenes
        assert (a.direction, a.speed) != (b.direction, b.speed)
    assert all(recall.returns < LENGTHS.chunks for recall in map(drawn, range(60)))


def test_a_folder_is_one_to_train_on(tmp_path):
    write_recalls(tmp_path, count=1, size=48)
    [found] = find_videos(tmp_path, masks=True)
    recall = drawn(0)
    assert found.starts == (*recall.captions(),)
    mask = read_video(tmp_path / "0000.mask.mp4")[..., 0] > 127
    begin, end = LENGTHS.first(recall.returns), LENGTHS.first(recall.returns + 1)
    assert mask.all((1, 2)).nonzero()[0].tolist() == [*range(begin, end)]
