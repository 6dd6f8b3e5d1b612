"""Two denoisings in turn, their animation, and what the demo's page says of them."""

import json

import numpy as np
import pytest
import torch

from gen_accel import demo
from gen_accel.demo import job, page, race
from gen_accel.demo.job import lora_path
from gen_accel.demo.race import Denoising, Entrant
from gen_accel.measure import read_video

PROMPT = "a red circle moves up slowly"
SMALL = {"prompt": PROMPT, "frames": 5, "steps": 2, "with_lora": False}


def denoising(*seconds: float) -> Denoising:
    return Denoising(
        torch.zeros(1), [torch.full((1,), i) for i in range(len(seconds))], [*seconds]
    )


def test_the_animation_keeps_one_clock(monkeypatch):
    """Stills are grey by their step; a clip that is played is white."""
    monkeypatch.setattr(
        race, "decode_stream", lambda _, x: iter([np.full((1, 96, 96, 3), 10 + int(x), np.uint8)])
    )
    entrants = [Entrant(name, None, None) for name in ("dense", "radial")]
    made = [denoising(*[1.0] * 4), denoising(*[0.5] * 4)]
    clip = np.full((3, 96, 96, 3), 255, np.uint8)
    film = race.animation(entrants, made, [clip, clip], fps=4.0, scale=1)
    assert len(film) == 4 * (race.LASTS + race.STAYS)
    middle = film[:, -48, [48, -48], 0]
    both, middle = np.split(middle, [int(4 * race.STAYS)])
    assert (both == 255).all()  # a reader's first picture is of the clips
    slow, fast = middle[:, 0], middle[:, 1]
    for shown, seconds in ((slow, 1.0), (fast, 0.5)):
        for i, grey in enumerate(shown):
            done = int(4.0 * (i + 1) / (4 * race.LASTS) / seconds + 1e-9)
            assert grey == (255 if done >= 4 else 9 + done if done else 0), (i, done)


def test_what_is_said_of_times_and_of_the_lora():
    seen = {"shows": PROMPT}
    report = {
        **{"prompt": PROMPT, "tokens": 9, "steps": 2, "method": "Radial()", "density": 0.2},
        **{"dense_seconds": 4.0, "sparse_seconds": 2.0, "speedup": 2.0, "total_speedup": 0.9},
        **{"dense_decode_seconds": 1.5, "sparse_decode_seconds": 2.5, "attention_seconds": None},
        **{"attention_flops_share": 0.4, "detector": {"dense": seen, "sparse": seen}},
        **{"busy": None, "speedup_of_steps": {"least": 1.5, "median": 2.0, "most": 2.5}},
    }
    text = " ".join(page.notes(report))
    assert f"Both clips show what was asked for: {PROMPT}." in text
    assert "2.00 times as fast; single steps from 1.50 to 2.50 times" in text
    assert "another 1.5 and 2.5 s, so that the whole was 0.90 times as fast, and so slower" in text

    text = " ".join(page.notes(report | {"busy": "the machine was busy, with 4 processes"}))
    assert "The machine was busy, with 4 processes, so that no speed-up is shown." in text
    assert "times as fast" not in text

    about = job.about_lora(lora_path(guided=True), is_own=False, was_chosen=False)
    text = " ".join(page.notes(report | {"frames": 129, "lora": about}))
    assert "was trained on 33 frames, and made 129 with a LoRA" in text
    assert "chosen" not in text
    assert "the same sparse" not in text
    about |= job.about_lora(lora_path(guided=True), is_own=True, was_chosen=True)
    text = " ".join(page.notes(report | {"frames": 129, "lora": about}))
    assert "The LoRA was trained through the same sparse attention." in text
    assert "This prompt was chosen among the ones that dense attention gets right." in text
    assert f"Of {about['score']['clips']} clips of prompts" in text
    assert "24.4 dB there, from 14.8 to 40.6" in text

    wrong = {"dense": seen, "sparse": {"shows": "a red blob wanders"}}
    text = page.verdict(report | {"detector": wrong})
    assert text.endswith("Sparse: a red blob wanders. Only dense attention got it right.")
    assert page.verdict(report | {"detector": {name: {"shows": "x"} for name in wrong}}) == (
        f"Asked for was {PROMPT!r}. Dense: x. Sparse: x."
    )


@pytest.mark.parametrize(
    ("asked", "right"),
    [
        ("A red circle moves up, slowly.", True),
        ("something moves up slowly", True),
        ("a red square moves up slowly", False),
    ],
)
def test_the_verdict_is_of_the_words_that_were_asked_for(asked, right):
    seen = {"shows": "a red circle moves up slowly"}
    report = {"prompt": asked, "detector": {"dense": seen, "sparse": seen}}
    assert page.verdict(report).startswith("Both clips show what was asked for") is right


@pytest.mark.parametrize(
    ("busy", "speedup", "tile"),
    [(None, 2.0, "Speed-up"), (None, 0.5, "Slower"), ("the machine was busy", 2.0, "not shown")],
)
def test_the_page_tells_no_gain_that_there_was_not(tmp_path, busy, speedup, tile):
    report = {"busy": busy, "speedup": speedup, "total_speedup": 1.5}
    page.RunPage(tmp_path, "title", 16.0).write(report)
    assert json.loads((tmp_path / "report.json").read_text())["speedup"] == speedup
    text = (tmp_path / "report.html").read_text().split("Everything that was measured")[0]
    assert tile in text
    assert (f"{speedup:.3g}\N{MULTIPLICATION SIGN}" in text) is (busy is None)


@pytest.mark.slow
def test_a_demo_that_is_cut_off_leaves_what_it_finished(monkeypatch, tmp_path, one_thread):
    def killed(*args, **options):
        raise KeyboardInterrupt

    (tmp_path / "race.mp4").write_bytes(b"of an earlier run")
    monkeypatch.setattr(race, "race", killed)
    with pytest.raises(KeyboardInterrupt):
        job.run(tmp_path, **SMALL)
    text = (tmp_path / "report.html").read_text()
    assert "the denoising was still to come" in text
    assert "<video" not in text
    assert json.loads((tmp_path / "report.json").read_text())["finished"] is False

    monkeypatch.undo()
    monkeypatch.setattr(race, "animation", killed)
    monkeypatch.setattr(job, "ALIKE", 2)  # steps, fewer than the clip has
    with pytest.raises(KeyboardInterrupt):
        job.run(tmp_path, **SMALL | {"steps": 3})
    text = (tmp_path / "report.html").read_text()
    assert "the animation was still to come" in text
    assert text.count("<video") == 3
    assert read_video(tmp_path / "dense.mp4").shape == (5, 96, 96, 3)
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["steps_seconds"]["dense"]) == 3
    assert report["beside"] == "the model's own attention"
    assert "keys of padded text, equal ones once: 512 as" in report["alike"]
    assert report["speedup_alike"] > 0


def test_a_model_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "path", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="make remake-demo STAGES=model"):
        job.run(tmp_path / "out")
