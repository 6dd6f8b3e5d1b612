"""Parts of clips: chunks, scenes, and reading several of them in one pass."""

import sys

import numpy as np
import pytest
from support.awkward_clips import cut_short
from support.clips import SIZE, levels, ramp, read_clip
from support.scenes import film_of, scene

from gen_accel.lora.data.clips import CaptionedVideo
from gen_accel.lora.data.survey import CutFinder, Take, check_scenes, scenes_in, scenes_of, survey
from gen_accel.measure.video_io import write_video


def cuts_of(video, rate=16.0):
    finder = CutFinder(rate)
    for picture in video:
        finder.see(picture)
    return finder.cuts()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("start", [(0, 49)]),
        ("middle", [(39, 49)]),
        ("all", [(0, 49), (49, 49), (98, 17)]),
    ],
)
def test_chunks_of_a_clip(how, expected):
    assert Take(how).of([(0, 128)], [17, 49]) == expected


def test_all_takes_each_frame_at_most_once_and_leaves_less_than_the_shortest():
    lengths = [5, 17, 49]
    for frames in range(1, 200):
        chunks = Take("all").of([(3, 3 + frames)], lengths)
        ends = [3, *(begin + length for begin, length in chunks)]
        assert [begin for begin, _ in chunks] == ends[:-1]
        assert 0 <= 3 + frames - ends[-1] < 5
        assert [length for _, length in chunks] == sorted((n for _, n in chunks), reverse=True)


def test_chunks_of_scenes():
    assert scenes_of(100, []) == [(0, 100)]
    assert scenes_of(100, [30, 33]) == [(0, 30), (30, 33), (33, 100)]
    for how in ("start", "middle", "all"):
        chunks = Take(how).of(scenes_of(100, [30, 33]), [5, 9])
        assert {
            any(b <= begin and begin + n <= e for b, e in ((0, 30), (33, 100)))
            for begin, n in chunks
        } == {True}
        assert {begin < 30 for begin, _ in chunks} == {True, False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "end"}, "how must be one of start, middle, all, got 'end'"),
        ({"scenes": "fade"}, "scenes must be one of off, cut, got 'fade'"),
    ],
    ids=str,
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Take(**options)


@pytest.mark.parametrize("fps", [None, 12.0, 16.0])
def test_several_chunks_in_one_pass(tmp_path, monkeypatch, fps):
    path = write_video(ramp(), tmp_path / "clip.mp4", fps=24)
    video = CaptionedVideo("clip", "", path)
    opened = []
    playing = CaptionedVideo.playing
    monkeypatch.setattr(
        CaptionedVideo, "playing", lambda self, fps: opened.append(1) or playing(self, fps)
    )
    chunks = [(4, 5), (0, 9), (6, 5), (0, 5), (13, 2), (13, 9)]
    read = dict(video.read_chunks(chunks, size=SIZE, fps=fps))
    assert len(opened) == 1
    whole = read_clip(path, frames=99, size=SIZE, fps=fps)
    assert read.keys() == set(chunks)
    for (begin, frames), found in read.items():
        np.testing.assert_array_equal(found, whole[begin : begin + frames])
    alone = video.read(frames=5, size=SIZE, fps=fps, begin=6)
    np.testing.assert_array_equal(alone, read[6, 5])
    assert not list(video.read_chunks([], size=SIZE, fps=fps))


def test_chunks_beyond_the_end():
    video = CaptionedVideo("clip", "", ramp(10))
    read = dict(video.read_chunks([(8, 5), (20, 5), (0, 2)], size=SIZE, fps=None))
    assert [levels(read[key]) if len(read[key]) else [] for key in ((0, 2), (8, 5), (20, 5))] == [
        [0, 1],
        [8, 9],
        [],
    ]


@pytest.mark.parametrize("speed", [0, 1, 4])
@pytest.mark.parametrize("noise", [0, 20])
def test_cuts_are_found_to_the_frame(speed, noise):
    video, cuts = film_of([20, 33, 6, 48, 9], speed=speed, noise=noise)
    assert cuts_of(video) == cuts


def test_cuts_next_to_the_ends_and_of_one_frame():
    video, cuts = film_of([1, 30, 1, 20, 1], speed=0)
    assert cuts_of(video) == cuts


def test_a_cut_between_pictures_of_the_same_colours():
    """Which a histogram does not see."""
    shot = scene(20, speed=0)
    assert cuts_of(np.concatenate([shot, shot[:, ::-1, ::-1]])) == [20]


def test_no_cut_where_only_the_camera_moves():
    assert cuts_of(scene(60, speed=6, noise=10)) == []
    assert cuts_of(scene(1)) == []
    grey = np.linspace(0, 255, 60).astype(np.uint8)  # a fade
    assert cuts_of(np.broadcast_to(grey[:, None, None, None], (60, 48, 64, 3))) == []


@pytest.mark.parametrize("fps", [None, 8.0])
def test_scenes_of_a_file_hold_no_cut(tmp_path, fps):
    video, _ = film_of([21, 30, 13], height=96, width=128)
    path = write_video(video, tmp_path / "film.mp4", fps=16)
    clip = CaptionedVideo("film", "", path)
    take = Take("all", scenes="cut")
    about = survey(clip, take, 9, fps)
    scenes = scenes_in(about, take)
    assert len(scenes) == 3
    assert about["frames"] == about["total"] == scenes[-1][1]
    read = read_clip(path, frames=99, size=(96, 128), fps=fps).astype(int)
    change = np.abs(np.diff(read, axis=0)).mean((1, 2, 3))
    for begin, end in scenes:
        assert change[begin : end - 1].max() < change[[cut - 1 for cut in about["cuts"]]].min() / 2


def test_what_is_known_is_not_looked_for_again(tmp_path, monkeypatch):
    path = write_video(film_of([12, 12])[0], tmp_path / "film.mp4", fps=16)
    clip = CaptionedVideo("film", "", path)
    cut, whole, start = Take(scenes="cut"), Take("middle"), Take()
    first = survey(clip, start, 9, None)
    assert (first["frames"], first["asked"], first["total"]) == (9, 9, 24)
    assert first["seconds"] == pytest.approx(1.5)
    monkeypatch.setattr(CutFinder, "see", lambda *args: pytest.fail("looked for"))
    deeper = survey(clip, whole, 9, None, first)
    assert (deeper["frames"], deeper["total"], "cuts" in deeper) == (24, 24, False)
    monkeypatch.undo()
    found = survey(clip, cut, 9, None, deeper)
    assert found["cuts"] == [12]
    monkeypatch.setattr(CaptionedVideo, "playing", lambda *args: pytest.fail("read"))
    for take in (cut, whole, start):
        assert survey(clip, take, 9, None, found) == found


def test_a_file_whose_rest_is_damaged(tmp_path):
    path = tmp_path / "clip.mp4"
    cut_short(path)
    clip = CaptionedVideo("clip", "", path)
    about = survey(clip, Take(), 1, None)
    assert (about["frames"], about["asked"], about["total"]) == (1, 1, None)
    with pytest.raises(OSError, match="cannot be read"):
        survey(clip, Take("all"), 1, None)


def test_scenes_need_their_extra(monkeypatch):
    check_scenes()
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(ModuleNotFoundError, match=r'scenes: cut needs .*.+\[scenes\]"'):
        CutFinder(16.0)
