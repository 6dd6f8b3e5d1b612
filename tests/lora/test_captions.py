"""Captions: where they are found, and what is made of them."""

import json
from itertools import permutations

import pytest
from support.clips import footage

from gen_accel.lora.data.clips import CaptionedVideo, Captions, parse_repeats, repeated
from gen_accel.lora.data.finding import find_videos
from gen_accel.measure.video_io import read_picture, write_video


def clip(*captions, name="clip.mp4", **fields):
    return CaptionedVideo(name, captions[0], footage(1), more_captions=captions[1:], **fields)


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_video(footage(1), path, fps=8)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "b.mp4", "b.1.mp4"):
        write_video(footage(1), tmp_path / name, fps=8)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "caption", "expected"),
    [
        ({}, "a cat, runs", "a cat, runs"),
        ({"trigger": "sks"}, "a cat", "sks, a cat"),
        ({"trigger": "sks"}, "a sks cat", "a sks cat"),
        ({"trigger": "sks"}, "a sksy cat", "sks, a sksy cat"),
        ({"trigger": "s+k"}, "as+kb", "s+k, as+kb"),
        ({"prefix": "A film of "}, "a cat", "A film of a cat"),
        ({"trigger": "sks", "prefix": "A film of "}, "a cat", "sks, A film of a cat"),
        ({"trigger": "sks"}, "", "sks"),
    ],
    ids=str,
)
def test_words_before_a_caption(given, caption, expected):
    assert Captions(**given).of(clip(caption)) == (expected,)


def test_tags_change_their_order_behind_the_first():
    made = Captions(shuffle=2, orders=6, trigger="sks").of(clip("1, 2, 3,4, 5"))
    assert made[0] == "sks, 1, 2, 3,4, 5"  # as it is written
    assert len(made) == len(set(made)) == 6
    orders = {tuple(text.split(", ")[3:]) for text in made[1:]}
    assert orders < {*permutations(("3", "4", "5"))}
    assert all(text.startswith("sks, 1, 2, ") for text in made)
    assert made == Captions(shuffle=2, orders=6, trigger="sks").of(clip("1, 2, 3,4, 5"))
    assert made[:3] == Captions(shuffle=2, orders=3, trigger="sks").of(clip("1, 2, 3,4, 5"))


def test_each_caption_keeps_its_share():
    """Where one has fewer orders than the other."""
    made = Captions(shuffle=0, orders=4).of(clip("x, y", "one caption", "1, 2, 3, 4"))
    assert [made.count(text) for text in ("x, y", "y, x", "one caption")] == [2, 2, 4]
    assert len(set(made)) == 7
    assert len(made) == 12


def test_what_needs_no_draw_is_one_text():
    assert Captions(shuffle=1).of(clip("a cat runs")) == ("a cat runs",)
    assert Captions(shuffle=3).of(clip("a, b, c, d")) == ("a, b, c, d",)
    assert Captions().of(clip("same", "same")) == ("same",)
    assert Captions().of(clip("one", "two")) == ("one", "two")


@pytest.mark.parametrize("options", [{"shuffle": -1}, {"orders": 0}], ids=str)
def test_numbers_out_of_range(options):
    with pytest.raises(ValueError, match="must"):
        Captions(**options)


def test_several_captions_beside_a_clip(folder):
    for name, text in {
        "a.txt": "first",
        "a.2.txt": "third",
        "a.1.txt": "second\nin two lines",
        "a.10.txt": "last",
        "a.3.txt": " \n",
        "b.1.txt": "of the other clip",
        "b.2.txt": "of b",
    }.items():
        (folder / name).write_text(text)
    found = {video.name: (video.caption, video.more_captions) for video in find_videos(folder)}
    assert found == {
        "a.mp4": ("first", ("second\nin two lines", "third", "last")),
        "b.mp4": ("of b", ()),
        "b.1.mp4": ("of the other clip", ()),
    }


def test_a_list_of_captions_and_repeats_in_a_manifest(folder):
    rows = [
        {"video": "a.mp4", "caption": ["one", "", "two "], "repeats": 3},
        {"video": "b.mp4", "caption": "alone"},
    ]
    (folder / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    a, b = find_videos(folder / "clips.jsonl")
    assert (a.caption, a.more_captions, a.repeats) == ("one", ("two",), 3)
    assert (b.caption, b.more_captions, b.repeats) == ("alone", (), 1)
    (folder / "clips.csv").write_text("video,caption,repeats\na.mp4,x,4\nb.mp4,y,\n")
    assert [video.repeats for video in find_videos(folder / "clips.csv")] == [4, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"repeats": 0}, "repeats must be at least 1, line 1 of .* has 0"),
        ({"repeats": 1.5}, "repeats must be a whole number, line 1 of .* has 1.5"),
        ({"repeats": "many"}, "repeats must be a whole number, .* has 'many'"),
        ({"repeats": True}, "repeats must be a whole number, .* has True"),
        ({"caption": ["one", 2]}, "caption must be text, line 1 of .* has 2"),
        ({"caption": []}, "1 of 1 videos .* have no caption"),
    ],
    ids=str,
)
def test_rows_that_will_not_do(folder, row, message):
    given = {"video": "a.mp4", "caption": "x"} | row
    (folder / "clips.jsonl").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=message):
        find_videos(folder / "clips.jsonl")


def test_a_caption_for_clips_without_one(folder):
    (folder / "a.txt").write_text("its own")
    with pytest.raises(ValueError, match=r"2 of 3 videos .* have no caption: b.1.mp4, b.mp4"):
        find_videos(folder)
    found = find_videos(folder, default_caption="a film")
    assert [video.caption for video in found] == ["its own", "a film", "a film"]


def test_repeats_by_name(folder):
    videos = [clip("x", name=name) for name in ("people/a.mp4", "people/b.mp4", "c.mp4")]
    found = repeated(videos, ["*=2", "people/*=5", "people/b.mp4 = 3"])
    assert [video.repeats for video in found] == [5, 3, 2]
    assert [video.repeats for video in repeated([clip("x", repeats=4)], [])] == [4]
    with pytest.raises(ValueError, match=r"'peple/\*=3' matches none of the 3 clips, as people/a"):
        repeated(videos, ["peple/*=3"])


@pytest.mark.parametrize("text", ["3", "a", "=3", "a=", "a=0", "a=-1", "a=1.5", "a=b"])
def test_repeats_that_cannot_be_read(text):
    with pytest.raises(ValueError, match=r"as people/\*=3, PATTERN=NUMBER each, got"):
        parse_repeats(text)


def test_pictures_in_a_folder(folder):
    for name in ("p.png", "sub/q.webp", "a.png", "silent.jpg"):
        picture(folder / name) if name[-3:] == "png" else None
    read_picture(folder / "p.png", "p").save(folder / "r.webp")
    read_picture(folder / "p.png", "p").save(folder / "silent.jpg")
    for name in ("a", "b", "b.1", "p", "r"):
        (folder / f"{name}.txt").write_text(f"caption of {name}")
    assert [v.name for v in find_videos(folder)] == ["a.mp4", "b.1.mp4", "b.mp4"]
    found = find_videos(folder, images=True, pictures="captioned")
    # The picture beside a.mp4 stays its image prompt.
    assert [v.name for v in found] == ["a.mp4", "b.1.mp4", "b.mp4", "p.png", "r.webp"]
    assert [v.is_picture for v in found] == [False] * 3 + [True] * 2
    assert found[0].image == folder / "a.png"
    with pytest.raises(ValueError, match=r"1 of 6 videos .* have no caption: silent.jpg"):
        find_videos(folder, pictures="all")
    (folder / "silent.txt").write_text("no longer")
    assert len(find_videos(folder, pictures="all")) == 6
    picture(folder / "silent.png")
    with pytest.raises(ValueError, match=r"would share one caption, got silent.jpg, silent.png"):
        find_videos(folder, pictures="all")
    (folder / "m.jsonl").write_text('{"file_name": "p.png", "text": "x"}')
    (only,) = find_videos(folder / "m.jsonl")
    assert only.is_picture
