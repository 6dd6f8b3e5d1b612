"""Caches of diffusers by the one option of a run: they skip steps, say so, and come off."""

import json
from pathlib import Path
from statistics import fmean

import pytest
from support import wan

import gen_accel
from gen_accel import Radial
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.measure.clip_settings import read_settings
from gen_accel.pipelines.generation.config import GenerateConfig
from gen_accel.pipelines.generation.plan import plan_of
from gen_accel.pipelines.generation.step_cache import caching, check_cache, skipped_steps
from gen_accel.registry import IN_FOUR_STEPS, LEAST_STEPS

MEASURED = Path(__file__).parents[3] / "benchmarks" / "results" / "few_steps.json"
STEPS = 6
CLIP = ("--prompt", "a", "--frames", 5, "--height", 32, "--width", 32, "--steps", STEPS)
LOUD = ("first_block:10", "taylorseer:2", "sea:10")  # they skip whatever they may


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached") / "model"
    wan.pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("schedule", [Schedule(dense_steps=3), Schedule(dense_start=0.3)], ids=str)
@pytest.mark.parametrize("cache", LOUD)
def test_a_cache_skips_steps_after_the_dense_ones_and_comes_off(cache, schedule):
    """Those of `dense_start` are the second and the third."""
    pipe = wan.pipeline()
    before = wan.forward(pipe.transformer, 3, 4, 8)
    with gen_accel.attach(pipe, Radial(block=8), kernel="reference", schedule=schedule) as handle:
        with caching(pipe, cache, schedule, STEPS):
            wan.generate(pipe, STEPS, height=32, width=32, num_frames=5)
        skipped = skipped_steps(handle.summary())
    assert 0 < len(skipped) < STEPS
    assert min(skipped) >= (1 if cache.startswith("first") else 3)
    assert not pipe.transformer.is_cache_enabled
    assert wan.forward(pipe.transformer, 3, 4, 8).equal(before)


def test_a_clip_says_how_many_steps_were_skipped(run, home, tmp_path):
    out, told = tmp_path / "a.gif", tmp_path / "a.json"
    args = ("generate", "--model", home, *CLIP, "--cache", "first_block:10")
    said = run(*args, "--out", out, "--json", told).stdout
    assert "cache first_block:10: 5 of 6 steps skipped" in said
    assert json.loads(told.read_text())["cache"] == "cache first_block:10: 5 of 6 steps skipped"
    settings = read_settings(out)
    assert settings.fields["cache"] == "first_block:10"
    assert settings.ran["skipped_steps"] == [1, 2, 3, 4, 5]
    run(*args, "--out", tmp_path / "b.gif", "--compare", "--method", "radial")
    report = json.loads((tmp_path / "b.json").read_text())
    assert (report["cache"], report["skipped_steps"]) == ("first_block:10", [1, 2, 3, 4, 5])
    assert "cache" not in read_settings(tmp_path / "b.dense.gif").fields


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        ("frist_block", "cache must be one of first_block, .*did you mean 'first_block'"),
        ("sea:0", "the number of cache sea must be above 0, got '0'"),
        ("taylorseer:1.5", "the number of cache taylorseer must be a whole number from 2 to 1000"),
    ],
)
def test_a_cache_that_is_none_is_refused_at_once(cache, words):
    with pytest.raises(ValueError, match=words):
        GenerateConfig(model="demo", prompt=("a",), cache=cache).check()


def test_a_model_that_a_cache_does_not_know_is_refused_before_the_first_step():
    pipe = wan.pipeline()
    pipe.transformer.blocks = type(pipe.transformer.blocks)([pipe.transformer.blocks[0]])
    with pytest.raises(ValueError, match="cache first_block does not go with WanTransformer3D"):
        check_cache(pipe, "first_block")
    assert not pipe.transformer.is_cache_enabled


def test_what_it_costs_in_few_steps_is_what_was_measured():
    held = json.loads(MEASURED.read_text(encoding="utf-8"))["runs"]["33:4"]
    for name, one in IN_FOUR_STEPS.items():
        rows = held[f"dense, --cache {name}"]
        assert one.psnr == round(fmean(row["psnr_db"] for row in rows), 1)
        assert one.skipped == fmean(len(row["skipped_steps"]) for row in rows)


def test_it_is_told_of_before_a_run_of_few_steps():
    asked = {"model": "demo", "prompt": ("a red circle",), "method": "dense"}

    def told(cache, steps):
        return plan_of(GenerateConfig(cache=cache, steps=steps, **asked)).told

    [line] = told("taylorseer:3", LEAST_STEPS - 1)
    assert f"{LEAST_STEPS - 1} here" in line
    assert f"{IN_FOUR_STEPS['taylorseer'].psnr} dB" in line
    assert told("taylorseer:3", LEAST_STEPS) == told("sea", 4) == told(None, 4) == ()
