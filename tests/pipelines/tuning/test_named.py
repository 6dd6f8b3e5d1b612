"""Presets by name: rules for models that nothing was tuned for."""

import warnings

import pytest
from support.wan import generate, pipeline

from gen_accel import Piecewise, Schedule, attach
from gen_accel.names import PRESETS
from gen_accel.pipelines.tuning.named import RULES, NotMeasured, by_rule

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
    assert dense == [*range(max(RULES[name].steps, round(4 * RULES[name].start)))]


def test_the_rules_go_from_exact_to_fast():
    shares = [RULES[name].critical for name in PRESETS]
    starts = [RULES[name].start for name in PRESETS]
    assert shares == sorted(shares, reverse=True)
    assert starts == sorted(starts, reverse=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quality", "Piecewise(0.3), dense in the first 25% of the steps, 2 at least, and in the"),
        ("balanced", "first 20% of the steps, 2 at least, and in the first layer. For settings"),
        ("fast", "Piecewise(0.1), dense in the first 15% of the steps, 1 at least. For settings"),
    ],
)
def test_the_warning_says_the_whole_rule(name, words):
    with pytest.warns(NotMeasured) as told:
        by_rule(name)
    assert words in str(told[0].message)


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
