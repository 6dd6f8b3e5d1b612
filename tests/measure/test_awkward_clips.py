"""Clips as people have them are read as a player shows them, or refused by their name."""

import re
import struct
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
from support.awkward_clips import (
    BLUE,
    CLIPS,
    GREY,
    HEIGHT,
    NO_CLIPS,
    RATE,
    RED,
    WIDTH,
    can_encode,
    film,
    pictures,
    play,
)
from support.clips import read_clip, survey_clip

from gen_accel.lora.data.clips import CaptionedVideo
from gen_accel.lora.data.finding import find_videos, not_taken
from gen_accel.measure import read_stream, read_video, write_video
from gen_accel.measure.video_io import video_fps
from gen_accel.paths import FILM_SUFFIXES

# Colours of patches, within what 4:2:0 at these rates loses; the palette of the GIF has 3 bits.
NEAR, NEAR_IN_GIF = 12, 55
MADE = [clip for clip in CLIPS if can_encode(clip.encoder)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    root = tmp_path_factory.mktemp("clips of a user")
    for clip in MADE:
        path = root / clip.name
        path.parent.mkdir(parents=True, exist_ok=True)
        clip.make(path)
        path.with_suffix(".txt").write_text(f"a caption of {clip.name}", encoding="utf-8")
    for name in NO_CLIPS:
        (root / name).write_bytes(b"\xd0\xcf\x11\xe0")
    return root


@pytest.fixture(params=CLIPS, ids=lambda clip: clip.name)
def clip(request):
    if not can_encode(request.param.encoder):
        pytest.skip(f"PyAV {av.__version__} has no encoder {request.param.encoder}")
    return request.param


def upright(clip):
    """Return the frames (F, H, W, 3) as a player shows them, the upright film turned clockwise."""
    height, width = clip.size
    if clip.is_upright:
        return np.rot90(pictures(clip.frames, width, height), -1, axes=(1, 2))
    return pictures(clip.frames, height, width)


def assert_shows(video, wanted, near):
    """All frames, the right way up and round, in order, in their colours."""
    assert video.shape == wanted.shape
    assert video.dtype == np.uint8
    for colour in (RED, BLUE, GREY):
        patch = (wanted == colour).all(-1)
        patch[:, 1:-1, 1:-1] &= (  # away from edges, where colour is blurred
            patch[:, :-2, 1:-1] & patch[:, 2:, 1:-1] & patch[:, 1:-1, :-2] & patch[:, 1:-1, 2:]
        )
        assert patch.any(axis=(1, 2)).all()
        for frame, where in zip(video, patch, strict=True):
            np.testing.assert_allclose(frame[where].mean(0), colour, atol=near)


def test_every_clip_is_read_or_refused_by_name(folder, clip):
    path = folder / clip.name
    if clip.frames is None:
        for read in (read_video, lambda p: survey_clip(p, frames=99), lambda p: [*read_stream(p)]):
            with pytest.raises(OSError, match=clip.says) as caught:
                read(path)
            assert str(caught.value).startswith(f"{path} cannot be read: ")
            assert "\n" not in str(caught.value)
        return
    near = NEAR_IN_GIF if path.suffix == ".gif" else NEAR
    assert_shows(read_video(path), upright(clip), near)
    assert_shows(np.concatenate([*read_stream(path, frames=3)]), upright(clip), near)
    assert survey_clip(path, frames=99) == (clip.frames, clip.size)
    assert_shows(read_clip(path, frames=99, size=clip.size), upright(clip), near)
    few = read_clip(path, frames=2, size=clip.size)
    assert_shows(few, upright(clip)[:2], near)
    # Portrait stays portrait where the wanted size is another one.
    assert read_clip(path, frames=1, size=(20, 30)).shape == (1, 20, 30, 3)


def test_the_bytes_of_a_clip_are_read_like_the_file(folder, clip):
    path = folder / clip.name
    video = CaptionedVideo("a clip", "", path.read_bytes)
    if clip.frames is None:
        with pytest.raises(OSError, match=rf"^a clip cannot be read: .*{clip.says}"):
            video.survey(frames=99, fps=None)
        return
    assert video.survey(frames=99, fps=None) == (clip.frames, clip.size)
    want = read_clip(path, frames=99, size=(24, 32), fps=7.0)
    np.testing.assert_array_equal(video.read(frames=99, size=(24, 32), fps=7.0), want)


def test_a_folder_of_them_is_a_data_set(folder):
    found = find_videos(folder)
    assert [video.name for video in found] == sorted(clip.name for clip in MADE)
    assert all(video.caption == f"a caption of {video.name}" for video in found)


@pytest.mark.parametrize("fps", [RATE / 2, RATE, 3 * RATE])
def test_a_variable_rate_goes_to_the_grid_by_its_times(folder, fps):
    """The last frame at or before each time of the grid, the nearest one in between."""
    (clip,) = [clip for clip in CLIPS if clip.name == "vfr.mp4"]
    stored = read_video(folder / clip.name)
    steps = np.array(clip.steps) / RATE * fps
    video = read_clip(folder / clip.name, frames=999, size=clip.size, fps=fps)
    on_grid = np.floor(steps + 0.5).astype(int)
    for time, frame in enumerate(video):
        latest = np.flatnonzero(on_grid <= time)[-1]
        np.testing.assert_array_equal(frame, stored[latest])
    assert len(video) == pytest.approx((clip.steps[-1] + 1) / RATE * fps, abs=1)


def test_the_rate_is_what_the_file_states(folder):
    rates = {clip.name: video_fps(folder / clip.name) for clip in MADE if clip.frames}
    assert 8 / 2 <= rates.pop("vfr.mp4") <= 8 / 1.5  # by the length that its last frame is given
    assert rates == {clip.name: clip.rate for clip in MADE if clip.name in rates}


def test_every_suffix_that_is_taken_is_read_and_written_down():
    assert {Path(clip.name).suffix.lower() for clip in CLIPS if clip.frames} == {*FILM_SUFFIXES}
    page = Path("docs/clips.md").read_text(encoding="utf-8")
    assert all(f"`{suffix}`" in page for suffix in FILM_SUFFIXES)


def test_what_is_converted_is_told_once(folder, clip):
    told = []
    if clip.frames is None:
        pytest.skip("it is refused")
    CaptionedVideo("a clip", "", folder / clip.name).survey(frames=9, fps=None, tell=told.append)
    assert len(told) == bool(clip.tells)
    assert re.search(clip.tells, "".join(told))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert len(read_video(folder / clip.name)) == len(read_video(folder / clip.name))
    assert [str(one.message) for one in caught] == [f"{folder / clip.name}: {x}" for x in told]


def test_what_is_no_film_is_named(folder, tmp_path):
    assert [*not_taken(folder)] == ["Thumbs.db"]
    (tmp_path / "clip.rm").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"none ends in \.mp4.*, and it holds clip\.rm$"):
        find_videos(tmp_path)


@pytest.mark.parametrize("quarter", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_all_ways_to_hold_a_camera(tmp_path, quarter, mirrored):
    """Each matrix of `tkhd`, applied to the corner of the picture by its definition."""
    path = tmp_path / "clip.mp4"
    film()(path)
    lying = read_video(path)
    a, b, c, d = ((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0))[quarter]
    if mirrored:
        a, c = -a, -c
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    for place, value in ((0, a), (4, b), (12, c), (16, d)):
        data[at + place : at + place + 4] = (value << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    across, down = a * columns + c * rows, b * columns + d * rows
    across, down = across - across.min(), down - down.min()
    shown = np.zeros((len(lying), down.max() + 1, across.max() + 1, 3), np.uint8)
    shown[:, down, across] = lying
    np.testing.assert_array_equal(read_video(path), shown)


def test_a_film_that_changes_its_size_is_refused_by_name(tmp_path):
    """Two films in one stream, as a television station sends them."""
    sizes = ((48, 64), (64, 48))
    parts = []
    for i, size in enumerate(sizes):
        film(size=size)(tmp_path / f"{i}.h264")
        parts.append((tmp_path / f"{i}.h264").read_bytes())
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(parts))
    with pytest.raises(OSError, match=r"both\.h264 cannot be read: its frames change their size"):
        read_video(path)
    assert read_clip(path, frames=16, size=(32, 32)).shape[1:] == (32, 32, 3)


def test_a_list_of_addresses_is_no_film(tmp_path):
    """Nothing that a file names is fetched."""
    path = tmp_path / "clip.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://localhost:9/a.ts\n")
    with pytest.raises(OSError, match=r"^\S+clip\.mp4 cannot be read: "):
        read_video(path)


@pytest.mark.skipif(not can_encode("libmp3lame"), reason="PyAV has no encoder libmp3lame")
def test_a_cover_is_no_film(tmp_path):
    """A song with a picture has no video."""
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as song:
        play(song, song.add_stream("libmp3lame", rate=16000, layout="mono"), seconds=0.5)
    cover = write_video(pictures(1), tmp_path / "cover.png", fps=8).read_bytes()
    picture = b"\0image/png\0\3\0" + cover
    frame = b"APIC" + struct.pack(">IH", len(picture), 0) + picture
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\3\0\0" + size + frame + path.read_bytes())
    with av.open(str(path)) as song:
        assert song.streams.video
    with pytest.raises(OSError, match=r"no video stream \(sound only\)"):
        read_video(path)
