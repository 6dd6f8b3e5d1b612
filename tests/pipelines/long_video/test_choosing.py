"""Techniques that a model takes and that go together, without its weights."""

import json
import re

import pytest

from gen_accel import demo
from gen_accel.attention_processors.attached.clock import first_transformer
from gen_accel.pipelines.generation.model_index import skeleton
from gen_accel.pipelines.long_video import (
    excluded,
    extend,
    known_trained_frames,
    refusals,
    summary_of,
)
from gen_accel.registry import TECHNIQUES

LONG = {"num_frames": 129, "trained_frames": 33}


@pytest.fixture(scope="module")
def pipe():
    return skeleton(demo.path())


def test_a_skeleton_is_the_pipeline_without_values(pipe):
    assert type(pipe).__name__ == "WanPipeline"
    for part in (pipe.transformer, pipe.vae):
        assert {one.device.type for one in part.parameters()} == {"meta"}
    assert pipe.tokenizer is None
    held = json.loads((demo.path() / "scheduler" / "scheduler_config.json").read_text())
    assert type(pipe.scheduler).__name__ == held["_class_name"]
    assert known_trained_frames(first_transformer(pipe)) == demo.TRAINED_FRAMES


def test_what_goes_together_is_what_extend_takes(pipe):
    for name in TECHNIQUES:
        found = excluded([name])
        assert name not in found
        for other in {*TECHNIQUES} - {name}:
            if other in found:
                with pytest.raises(ValueError, match=re.escape(found[other])):
                    extend(pipe, [name, other], **LONG)
            else:
                extend(pipe, [name, other], **LONG).remove()
    assert excluded() == {}
    with pytest.raises(ValueError, match="riflex does not go with position_interpolation"):
        excluded(["riflex", "position_interpolation"])


def test_settings_do_not_matter_to_what_goes_together():
    assert excluded(["fresh_noise:shift=22"]) == excluded(["fresh_noise"])


def test_a_model_refuses_what_it_does_not_carry(pipe):
    assert refusals(pipe, **LONG) == {}
    alone = refusals(pipe.transformer, **LONG)  # which generates nothing
    assert {*alone} == {"continuation", "fresh_noise", "window_noise"}
    assert alone["continuation"].startswith("continuation calls the pipeline")


def test_questions_leave_nothing_on_the_model(pipe):
    hooks = len(pipe.transformer._forward_pre_hooks)
    keys = [*vars(pipe)]
    refusals(pipe, ["window_noise"], **LONG)
    assert (len(pipe.transformer._forward_pre_hooks), [*vars(pipe)]) == (hooks, keys)
    kinds = {type(one).__name__ for one in pipe.transformer.attn_processors.values()}
    assert kinds == {"WanAttnProcessor"}


def test_effects_are_what_an_extension_describes(pipe):
    chosen = ["riflex", "fresh_noise:shift=22"]
    extension = extend(pipe, chosen, **LONG)
    extension.remove()
    found = extension.effects
    assert [*found] == ["riflex", "fresh_noise"]
    assert found["riflex"].startswith("33 latent frames, trained at 9")
    assert found["fresh_noise"].endswith("shift 22")


def test_each_technique_says_what_it_does():
    found = [summary_of(name) for name in TECHNIQUES]
    assert all(one.endswith(".") for one in found)
    assert len({*found}) == len(TECHNIQUES)
    with pytest.raises(ValueError, match="technique must be one of"):
        summary_of("nope")


def test_a_length_that_the_model_cannot_make_is_refused(pipe):
    with pytest.raises(ValueError, match="num_frames"):
        refusals(pipe, num_frames=130, trained_frames=33)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no model_index\.json"):
        skeleton(tmp_path)


def test_the_verb_says_the_same(run, pipe):
    chosen = "riflex,fresh_noise:shift=22"
    args = ("show", "--model", "demo", "--frames", "129", "--extend", chosen)
    found = json.loads(run(*args, "--json", "-").stdout)
    assert (found["frames"], found["trained_frames"]) == (129, demo.TRAINED_FRAMES)
    by_name = {one["name"]: one for one in found["techniques"]}
    assert [*by_name] == [*TECHNIQUES]
    assert {n for n, one in by_name.items() if one["chosen"]} == {"riflex", "fresh_noise"}
    refused = {n: one["refused"] for n, one in by_name.items() if one["refused"]}
    assert refused == refusals(pipe, chosen.split(","), **LONG)
    done = {n: one["effect"] for n, one in by_name.items() if one["effect"]}
    extension = extend(pipe, chosen.split(","), **LONG)
    extension.remove()
    assert done == extension.effects
    said = " ".join(run(*args).stdout.split())
    assert f"no: {refused['continuation']}" in said
    assert f"chosen: {done['riflex']}" in said


def test_the_verb_without_a_model_lists_what_there_is(run):
    said = run("show", "--extend", "all").stdout
    assert all(f"{name}: " in said for name in TECHNIQUES)
    found = json.loads(run("show", "--extend", "ultravico", "--json", "-").stdout)
    assert [one["name"] for one in found["techniques"] if one["refused"]] == [
        "window_noise",
        "continuation",
    ]
