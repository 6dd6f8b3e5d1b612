"""Options of `gen-accel generate` from a YAML file, printed as one, and as a JSON schema."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from gen_accel.config import written
from gen_accel.pipelines.generation.config import GenerateConfig

OPTIONS = GenerateConfig.options()


@pytest.fixture
def printed(run):
    """The fields that --print-config prints for these arguments."""
    return lambda *args: yaml.safe_load(run("generate", *args, "--print-config").stdout)


def test_every_field_is_a_flag_a_line_and_a_property(printed, run):
    help_text = run("generate", "--help").stdout
    assert all(re.search(rf"{one.flag}\b", help_text) for one in OPTIONS.values())
    assert printed().keys() == OPTIONS.keys()
    schema = json.loads(run("generate", "--print-schema").stdout)
    assert schema["properties"].keys() == OPTIONS.keys()
    assert not schema["additionalProperties"]
    told = {name: one.help for name, one in OPTIONS.items()}
    assert {name: one["description"] for name, one in schema["properties"].items()} == told


@pytest.mark.parametrize("hyphens", [False, True])
def test_every_field_takes_its_own_default(printed, tmp_path, hyphens):
    whole = {name: written(one.default) for name, one in OPTIONS.items()} | {"model": "demo"}
    given = {name.replace("_", "-") if hyphens else name: x for name, x in whole.items()}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(given))
    assert printed("--config", tmp_path / "a.yaml") == whole


AWKWARD = (
    *("--model", "a b", "--prompt", "a: cat, - 'surfs' #", "--prompt", "größer " * 40),
    *("--negative-prompt", "no", "--frames", "33", "--guidance-scale", "1e-7", "--extend", "none"),
    *("--seed", str(2**63 - 1), "--dense-layers", "0,7", "--compare", "--set", "window=9,12,12"),
    *("--image-prompt", "x y.png", "--out", "1.5", "--fps", "24"),
)


def test_what_is_printed_does_the_same(run, tmp_path):
    text = run("generate", *AWKWARD, "--print-config").stdout
    (tmp_path / "a.yaml").write_text(text)
    assert run("generate", "--config", tmp_path / "a.yaml", "--print-config").stdout == text
    found = yaml.safe_load(text)
    assert found["prompt"] == ["a: cat, - 'surfs' #", "größer " * 40]
    assert (found["extend"], found["seed"], found["fps"]) == ("none", 2**63 - 1, 24.0)
    assert found["set"] == ["window=9,12,12"]
    assert found["dense_layers"] == [0, 7]


def test_what_is_typed_wins(printed, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: demo\nframes: 33\nseed: 3\ncompare: true\nprompt: a\n")
    found = printed("--config", path, "--seed", "4", "--no-compare", "--prompt", "b")
    assert (found["frames"], found["seed"], found["compare"]) == (33, 4, False)
    assert found["prompt"] == ["b"]


@pytest.mark.parametrize(
    ("held", "typed", "gone", "stays"),
    [
        ("preset: fast", ("--method", "radial"), {"preset": None}, {"method": "radial"}),
        ("method: reuse\nset: [every=5]", ("--preset", "fast"), {"set": []}, {"preset": "fast"}),
        ("from_lora: x", ("--set", "a=1"), {"from_lora": None}, {"set": ["a=1"]}),
        ("prompts: x.txt", ("--prompt=b",), {"prompts": None}, {"prompt": ["b"]}),
    ],
)
def test_what_is_typed_takes_the_place_of_its_rivals(printed, tmp_path, held, typed, gone, stays):
    path = tmp_path / "a.yaml"
    path.write_text(f"model: demo\n{held}\n")
    assert printed("--config", path, *typed).items() >= {**gone, **stays}.items()


def test_rivals_in_one_file_are_refused(refused, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: demo\nprompt: a\npreset: fast\nmethod: reuse\n")
    assert "--preset fast takes the place" in refused("generate", "--config", path)
    path.write_text("model: demo\nprompt: a\npreset: nope\n")
    assert "no preset at nope" in refused("generate", "--config", path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hieght: 3", "a.yaml: unknown field 'hieght', did you mean 'height'?"),
        ("height: tall", "a.yaml: height must be int or none, got 'tall'; such as height: 8"),
        ("height: 0", "a.yaml: height must be at least 1, got 0"),
        ("seed:", "a.yaml: seed must be int, got None; such as seed: 0"),
        ("lora: {a: 1}", "a.yaml: lora must be a list of str, got {'a': 1}; such"),
        ("dense-end: x\ndense_end: 1", "a.yaml: dense_end is given twice"),
        ("config: b.yaml", "a.yaml: unknown field 'config'"),
        ("- model", "must hold fields as `name: value`"),
        ("model: [", "is not YAML"),
    ],
)
def test_one_sentence_for_what_is_wrong(refused, tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    assert message in refused("generate", "--config", tmp_path / "a.yaml", "--prompt", "a")


def test_a_file_that_is_not_there_is_named_with_the_way_to_one(refused, tmp_path):
    line = refused("generate", "--config", tmp_path / "a.yaml")
    assert f"no config at {tmp_path}/a.yaml; `gen-accel generate --print-config > a.yaml`" in line


@pytest.mark.slow
def test_the_first_word_comes_before_torch(tmp_path):
    """The help, the config and a refusal: types, limits and what is not there."""
    (tmp_path / "a.yaml").write_text("model: demo\nheight: 96\nprompt: a red square\n")
    code = """
import sys
from gen_accel.cli import app
try:
    app()
finally:
    assert not {"torch", "diffusers"} & sys.modules.keys()
"""
    cases = {("--print-config",): 0, ("--width", "x"): 2, ("--image", "gone.png"): 2, ("-h",): 0}
    for more, status in cases.items():
        done = subprocess.run(
            [sys.executable, "-c", code, "generate", "--config", tmp_path / "a.yaml", *more],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert "AssertionError" not in done.stderr
