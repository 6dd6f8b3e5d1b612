"""Captions that change with time, from the file to the batch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import finetuning as ft
from support import wan
from support.clips import footage

from gen_accel.attention_processors.families import family_named
from gen_accel.lora.batches import Batches, Draw, plan_clips
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.data.clips import CaptionedVideo, Captions
from gen_accel.lora.data.finding import find_videos
from gen_accel.lora.data.survey import Take
from gen_accel.lora.prepare import model_of
from gen_accel.measure.video_io import write_video

CHANGING = "0: a circle\n9: a square\n14: a star\n"
CAUSAL: dict[str, Any] = {
    "objective": "causal",
    "method": "dense",
    "settings": (),
    "chunk_frames": 1,
    "stages": ("17:1",),
    "caption_dropout": 0.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A clip of 34 frames whose caption changes, and one of 17 whose caption stays."""
    made = tmp_path_factory.mktemp("clips")
    for name, frames, caption in (("a", 34, CHANGING), ("b", 17, "a square")):
        write_video(footage(frames, 32, 32), made / f"{name}.mp4", fps=16)
        (made / f"{name}.txt").write_text(caption)
    return made


@pytest.fixture(scope="module")
def pipe():
    return wan.pipeline()


@pytest.fixture(scope="module")
def latents(pipe, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache")
    given = {"frames": [17], "sizes": [(32, 32)], "max_tokens": 8, "store": "float32"}
    cache(pipe, folder, out, **given, take=Take("all"), device="cpu")
    return LatentCache(out)


def test_it_is_cut_into_parts_with_the_frames_from_which_they_hold(folder):
    changing, plain = find_videos(folder)
    assert (changing.caption, changing.more_captions) == ("a circle", ("a square", "a star"))
    assert changing.starts == (0, 9, 14)
    assert (plain.caption, plain.starts) == ("a square", None)
    assert Captions(trigger="sks", shuffle=0).of(changing) == (
        "sks, a circle",
        "sks, a square",
        "sks, a star",
    )


@pytest.mark.parametrize(
    ("caption", "starts"),
    [
        ("0: one line", None),
        ("0: a\nand more", None),
        ("0: a\n\n  5 : b", (0, 5)),
    ],
)
def test_only_lines_that_all_begin_with_a_frame_are_parts(tmp_path, caption, starts):
    (tmp_path / "a.mp4").write_bytes(b"film")
    (tmp_path / "a.txt").write_text(caption)
    [found] = find_videos(tmp_path)
    assert found.starts == starts
    assert found.caption == (caption if starts is None else "a")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": "3: a\n5: b"}, r"a\.mp4: a text that changes begins at frame 0, got '3: a'"),
        (
            {"a.txt": "0: a\n5: b\n5: c"},
            r"a\.mp4: prompts of a stream rise in frames, got 5 after 5",
        ),
        ({"a.txt": "0: a\n5: b", "a.1.txt": "c"}, "changes with time, and it has 1 more"),
    ],
)
def test_parts_that_make_no_caption(tmp_path, files, message):
    (tmp_path / "a.mp4").write_bytes(b"film")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        find_videos(tmp_path)


def test_other_objectives_refuse_it_before_anything_is_read(folder, latents):
    message = r"the caption of a\.mp4 changes at frame 9, which objective causal alone trains"
    plain = TrainConfig(data=str(folder), stages=("17:1",))
    with pytest.raises(ValueError, match=message):
        plain.clips()
    model = model_of(ft.config("unused", **CAUSAL), wan.pipeline())
    assert plan_clips(ft.config("unused", **CAUSAL), model, latents, 1)
    with pytest.raises(ValueError, match=message):
        plan_clips(ft.config("unused"), model, latents, 1)


def test_each_chunk_has_the_text_that_holds_in_it(pipe, latents):
    """Chunks of one latent frame begin at frames 0, 1, 5, 9 and 13, and a text that begins within
    a chunk is the chunk's; the second clip of the same film begins 17 frames later."""
    assert [entry.starts for entry in latents.entries] == [(0, 9, 14), None, None]
    given = ft.config("unused", **CAUSAL)
    here: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0)
    adapter: Any = SimpleNamespace(inputs=lambda *_: ())
    batches = Batches(given, model_of(given, pipe), latents, adapter, here)
    clean = [latents.latents(clip, 5) for clip in range(3)]
    drawn = Draw(torch.zeros_like(clean[0]), 0.5, True, chunks=1)
    told = batches.of([0, 1, 2], clean, [drawn] * 3).conditions["encoder_hidden_states"]
    family = family_named("wan")

    def said(text):
        return family.encode_prompt(pipe, [text], 8)["encoder_hidden_states"][0]

    expected = [
        ["a circle"] * 3 + ["a square", "a star"],
        ["a star"] * 5,
        ["a square"] * 5,
    ]
    for clip, texts in enumerate(expected):
        for chunk, text in enumerate(texts):
            torch.testing.assert_close(told[clip, chunk], said(text), atol=1e-6, rtol=1e-6)
    silent = batches.of([0], clean[:1], [drawn._replace(captioned=False)])
    empty = silent.conditions["encoder_hidden_states"]
    torch.testing.assert_close(empty, said("").expand(1, 5, -1, -1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("fps", "last"), [(None, 16), (8.0, 8)])
def test_a_caption_that_changes_after_the_end_leaves_its_clip_out(pipe, tmp_path, fps, last):
    data = tmp_path / "data"
    for name, caption in (("a", "0: a circle\n17: a square"), ("b", "a square")):
        write_video(footage(17, 32, 32), data / f"{name}.mp4", fps=16)
        (data / f"{name}.txt").write_text(caption)
    given = {"frames": [5], "sizes": [(32, 32)], "max_tokens": 8, "device": "cpu"}
    given["fps"] = fps
    report = cache(pipe, data, tmp_path / "cache", **given)
    told = f"its caption changes at frame 17, its last is {last}"
    assert report.left_out == {"a.mp4": told}
    with pytest.raises(OSError, match=f"a.mp4 is broken: {told}"):
        cache(pipe, data, tmp_path / "other", **given, on_broken="stop")


def test_a_prompt_without_a_clip_may_change_too(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"caption": "0: a\\n5: b"}\n')
    [found] = find_videos(rows, needed=None)
    assert isinstance(found, CaptionedVideo)
    assert (found.caption, found.starts) == ("a", (0, 5))
