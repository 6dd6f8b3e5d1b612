"""Presets by name: tuned ones in the box, and rules for models that nothing was tuned for."""

import warnings

import pytest
from support.wan import generate, pipeline

from gen_accel import Piecewise, Schedule, attach, demo
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.tuning import load_tuned
from gen_accel.pipelines.tuning.preset import (
    BUNDLED_PRESETS,
    NotMeasured,
    by_rule,
    choose_preset,
    in_the_box,
)
from gen_accel.registry import PRESETS, RULES

pytestmark = [pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("name", PRESETS)
def test_a_name_is_a_rule_where_nothing_was_tuned(name):
    pipe = pipeline()
    with pytest.warns(NotMeasured, match=r"not measured.*gen-accel tune"):
        handle = attach(pipe, preset=name, kernel="gather")
    with handle:
        generate(pipe, 4)
        assert handle.method == Piecewise(RULES[name].critical)
        dense = [step for step, why in handle.passing.steps.items() if why]
    assert dense == [1]  # a quarter or less of four, from the second on


def test_the_rules_go_from_exact_to_fast():
    shares = [RULES[name].critical for name in PRESETS]
    starts = [RULES[name].start for name in PRESETS]
    assert shares == sorted(shares, reverse=True)
    assert starts == sorted(starts, reverse=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quality", "Piecewise(0.3), dense in 25% of the steps, from the second on, and in the"),
        ("balanced", "20% of the steps, from the second on, and in the first layer. For settings"),
        ("fast", "Piecewise(0.1), dense in 15% of the steps, from the second on. For settings"),
    ],
)
def test_the_warning_says_the_whole_rule(name, words):
    with pytest.warns(NotMeasured) as told:
        by_rule(name)
    assert words in str(told[0].message)


@pytest.mark.parametrize(
    ("steps", "dense"), [(1, [0]), (3, [1]), (4, [1]), (8, [1, 2]), (20, [1, 2, 3, 4])]
)
def test_a_fifth_of_the_steps_is_dense_from_the_second_on(steps, dense):
    _, schedule, _ = by_rule("balanced", quiet=True)
    assert [i for i in range(steps) if schedule.why_step(i, steps)] == dense


def test_a_schedule_beside_a_name_wins():
    with pytest.warns(NotMeasured, match=r"measured: Piecewise\(0.1\)\. For"):
        handle = attach(pipeline(), preset="fast", schedule=Schedule(dense_steps=3))
    with handle:
        assert handle.schedule == Schedule(dense_steps=3)


def test_no_file_says_which_names_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="quality, balanced, fast"):
        attach(pipeline(), preset=tmp_path / "none.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FileNotFoundError, match=r"no preset at .*fastest"):
            attach(pipeline(), preset="fastest")


BOXED = sorted(BUNDLED_PRESETS.glob("*.json"))


@pytest.mark.parametrize("path", BOXED, ids=lambda path: path.stem)
def test_a_preset_in_the_box_was_verified_on_the_demo_model(path):
    found = load_tuned(path)  # with its profile
    name = path.stem.split("-")[-1]
    scores = [run["score"] for run in found.measured["tuning"]]
    assert found.verified
    assert sum(scores) / len(scores) >= found.preset.bound["mean"]
    assert len(found.measured["held_out"]) >= 4
    call = {**found.preset.made_for.call, "num_inference_steps": found.method.steps}
    pipe = load(demo.path(), Loading(dtype="float32", device="cpu"))
    chosen = in_the_box(name, pipe.transformer, call)
    assert chosen is not None
    assert chosen.method == found.method


def test_the_box_has_every_name():
    assert {path.stem for path in BOXED} == {f"demo-{name}" for name in PRESETS}


def test_a_preset_of_another_call_is_passed_over():
    pipe = load(demo.path(), Loading(dtype="float32", device="cpu"))
    assert in_the_box("fast", pipe.transformer) is not None
    assert in_the_box("fast", pipe.transformer, {"num_frames": 33}) is None
    assert in_the_box("fast", pipe.transformer, {"num_inference_steps": 50}) is None
    assert in_the_box("fast", pipe.transformer, {"num_inference_steps": None}) is not None
    with pytest.warns(NotMeasured, match="preset 'fast' is a rule"):
        method, _, found = choose_preset("fast", pipe, None, {"num_inference_steps": 50})
    assert found is None
    assert method == Piecewise(RULES["fast"].critical)
