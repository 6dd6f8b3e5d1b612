"""Options of `gen-accel generate` from a YAML file, printed as one, and as a JSON schema."""

import json
import re
import subprocess
import sys

import pytest
import typer
import yaml

from gen_accel.cli import app
from gen_accel.cli.verb_fields import EXTRA, NO_FIELDS, fields_of
from gen_accel.config_files import model_of


@pytest.fixture(scope="module")
def verb():
    group = typer.main.get_command(app)
    return group.commands["generate"]


@pytest.fixture
def fields(verb):
    context = verb.make_context("generate", ["--model", "demo"])
    return [*fields_of(context).values()]


@pytest.fixture
def printed(run):
    """The fields that --print-config prints for these arguments."""
    return lambda *args: yaml.safe_load(run("generate", *args, "--print-config").stdout)


def flags_of(verb) -> set[str]:
    """Options as fields are written, without those that read or print fields."""
    names = {one.opts[0][2:].replace("-", "_") for one in verb.params}
    return names - {"help", *NO_FIELDS}


def test_every_flag_is_a_field_and_every_field_a_flag(verb, fields, printed, run):
    flags = flags_of(verb)
    assert {one.name for one in fields} == flags
    assert {one.alias for one in model_of(fields, extra=EXTRA).model_fields.values()} == flags
    assert printed().keys() == flags
    schema = json.loads(run("generate", "--print-schema").stdout)
    assert schema["properties"].keys() == flags
    assert not schema["additionalProperties"]
    told = {one.name: one.help for one in fields}
    assert {name: one["description"] for name, one in schema["properties"].items()} == told


@pytest.mark.parametrize("hyphens", [False, True])
def test_every_field_takes_its_own_default(fields, printed, tmp_path, hyphens):
    whole = {one.name: one.default for one in fields} | {"model": "demo"}
    for name, value in whole.items():
        given = {name.replace("_", "-") if hyphens else name: value, "model": "demo"}
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(given))
        if value is not None:
            assert printed("--config", tmp_path / "a.yaml")[name] == value, name


AWKWARD = (
    *("--model", "a b", "--prompt", "a: cat, - 'surfs' #", "--prompt", "größer " * 40),
    *("--negative-prompt", "no", "--frames", "33", "--guidance-scale", "1e-7", "--extend", "none"),
    *("--seed", str(2**63 - 1), "--dense-layers", "0,7", "--compare", "--set", "window=9,12,12"),
    *("--image-prompt", "x y.png", "--out", "1.5", "--fps", "24"),
)


def test_what_is_printed_does_the_same(run, printed, tmp_path):
    text = run("generate", *AWKWARD, "--print-config").stdout
    (tmp_path / "a.yaml").write_text(text)
    assert run("generate", "--config", tmp_path / "a.yaml", "--print-config").stdout == text
    found = yaml.safe_load(text)
    assert found["prompt"] == ["a: cat, - 'surfs' #", "größer " * 40]
    assert (found["extend"], found["seed"], found["fps"]) == ("none", 2**63 - 1, 24.0)
    assert found["set"] == ["window=9,12,12"]


def test_each_field_is_told_what_it_means(run, fields):
    lines = run("generate", "--print-config").stdout.splitlines()
    assert [line.partition("  # ")[2] for line in lines] == [one.help for one in fields]


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
        ("method: reuse\nset: [every=5]", ("--preset", "fast"), {"set": None}, {"preset": "fast"}),
        ("from_lora: x", ("--set", "a=1"), {"from_lora": None}, {"set": ["a=1"]}),
        ("prompts: x.txt", ("--prompt=b",), {"prompts": None}, {"prompt": ["b"]}),
    ],
)
def test_what_is_typed_takes_the_place_of_its_rivals(printed, tmp_path, held, typed, gone, stays):
    path = tmp_path / "a.yaml"
    path.write_text(f"model: demo\n{held}\n")
    assert printed("--config", path, *typed).items() >= {**gone, **stays}.items()


def test_rivals_in_one_file_are_refused(refused, tmp_path):
    """A method at its default is none: --print-config prints it beside a preset."""
    path = tmp_path / "a.yaml"
    path.write_text("model: demo\nprompt: a\npreset: fast\nmethod: reuse\n")
    assert "--preset fast takes the place" in refused("generate", "--config", path)
    path.write_text("model: demo\nprompt: a\npreset: nope\nmethod: radial\n")
    assert "no preset at nope" in refused("generate", "--config", path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hieght: 3", "a.yaml: unknown field 'hieght', did you mean 'height'?"),
        ("zzz: 3", "a.yaml: unknown field 'zzz'"),
        ("height: tall", "a.yaml: height must be int or none, got 'tall'; such as height: 8"),
        ("seed: true", "a.yaml: seed must be int, got True; such as seed: 0"),
        ("seed: 1.5", "a.yaml: seed must be int, got 1.5; such as seed: 0"),
        ("seed:", "a.yaml: seed must be int, got None; such as seed: 0"),
        ("compare: 1", "a.yaml: compare must be true/false, got 1; such as compare: false"),
        ("prompt: {a: 1}", "a.yaml: prompt must be a list of str or none, got {'a': 1}; such"),
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


def test_neither_reading_nor_printing_imports_torch(tmp_path):
    (tmp_path / "a.yaml").write_text("model: demo\nheight: 96\n")
    code = """
import sys
from gen_accel.cli import app
try:
    app()
finally:
    assert not {"torch", "diffusers"} & sys.modules.keys()
"""
    for more, status in (["--print-config"], 0), (["--width", "x"], 2):
        done = subprocess.run(
            [sys.executable, "-c", code, "generate", "--config", tmp_path / "a.yaml", *more],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert "AssertionError" not in done.stderr
        assert status or re.search(r"^height: 96 ", done.stdout, re.MULTILINE)


def test_help_of_the_options_does_not_need_pydantic():
    code = (
        "import gen_accel.cli, sys; sys.exit('pydantic' in sys.modules or 'yaml' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
