"""What is said before the first step, and progress within a step."""

import pytest
from support.wan import pipeline

from gen_accel import Radial
from gen_accel.measure.cost import rates
from gen_accel.measure.cost.rates import KINDS
from gen_accel.measure.video_io import read_stream
from gen_accel.pipelines.generation import steps
from gen_accel.pipelines.generation.compare import compare_with_dense
from gen_accel.pipelines.generation.config import Clip, Loading
from gen_accel.pipelines.generation.progress import heard_by
from gen_accel.pipelines.generation.sampling import filled
from gen_accel.pipelines.generation.steps import expected

CLIP = Clip(frames=5, height=48, width=48, steps=2)


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def hooks(pipe):
    return [module for module in pipe.transformer.modules() if module._forward_hooks]


def test_a_comparison_is_one_bar_that_moves_within_a_step(pipe, monkeypatch):
    monkeypatch.setattr(steps, "OFTEN", 0.0)
    heard, before = [], hooks(pipe)
    with heard_by(heard.append):
        compare_with_dense(pipe, "a cat", filled(pipe, CLIP), method=Radial())
    done = [one.done for one in heard]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 100)
    assert {(one.task, one.total, one.unit) for one in heard} == {(0, 100, "%")}
    words = list(dict.fromkeys(one.words for one in heard))
    assert words == [
        "",
        *(
            f"warm-up {i} of 2, {what}"
            for i in (1, 2)
            for what in ("prompt", "step 1 of 1", "decoding")
        ),
        *(
            f"clip {i} of 2, {what}"
            for i in (1, 2)
            for what in ("prompt", "step 1 of 2", "step 2 of 2", "decoding")
        ),
    ]
    of_a_step = {one.done for one in heard if one.words == "clip 1 of 2, step 1 of 2"}
    assert len(of_a_step) >= 4  # two layers, twice with guidance
    assert all(one.left is None or one.left >= 1 for one in heard if one.done < 100)
    assert hooks(pipe) == before


def test_an_estimate_is_told_before_a_run_of_more_than_seconds(pipe, monkeypatch):
    known = {"rates": dict.fromkeys(KINDS, 1e6), "efficiency": 0.5}
    monkeypatch.setattr(rates, "kept", lambda file, *_, **__: (known[file.stem], None))
    clip, asked = filled(pipe, CLIP), (Radial(), None, Loading())
    short = expected(pipe, clip, *asked)
    assert short.words(short.seconds) == "denoising 0/2, 18 tokens"
    assert sum(short.of_both) == 4 * 1.0 + 2 * steps.DECODING
    monkeypatch.setattr(steps, "BRIEF", {"cpu": 0})
    long = expected(pipe, clip, *asked)
    both = long.words(long.seconds_of_both, 3)
    assert both.startswith("denoising 0/2, 18 tokens, about ")
    assert "each, on this machine" in both
    assert long.seconds
    assert long.seconds_of_both
    assert long.seconds.high < long.seconds_of_both.high
    monkeypatch.setattr(steps, "LONG", 0)
    told = long.words(long.seconds)
    assert told.endswith("make it shorter, and --plan says what takes how long")


def test_a_model_without_sizes_is_made_at_its_own(run, tmp_path):
    given = ("--model", "demo", "--prompt", "a red square", "--frames", "5", "--steps", "1")
    run("generate", *given, "--out", tmp_path / "a.mp4")
    assert next(read_stream(tmp_path / "a.mp4")).shape == (5, 96, 96, 3)
