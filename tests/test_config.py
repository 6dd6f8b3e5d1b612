"""Configs: one declaration a field, from which checks, flags, YAML, schema and settings come."""

import json
import re
import time
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
import yaml
from typer.testing import CliRunner

from gen_accel.cli.app import OneLineErrors
from gen_accel.cli.verb import verb
from gen_accel.config import Config, Words, option


class Example(Config):
    VERB = "example"
    RIVALS = ((("frames",), ("seed",)),)

    model: str = option(..., "What", "Folder of a pipeline.", metavar="DIR")
    frames: int | None = option(None, "Clip", "Number of frames.", ge=1)
    seed: int = option(0, "Clip", "Seed.", ge=0, le=2**63 - 1)
    strength: float | None = option(None, "Clip", "Share that is changed.", gt=0, le=1)
    offload: Literal["none", "model"] = option("none", "Loading", "Models in CPU memory.")
    extend: Literal["none"] | tuple[str, ...] | None = option(None, "Clip", "x.", commas=True)
    betas: tuple[float, float] = option((0.9, 0.99), "Clip", "Betas.")
    image: Annotated[object, Words(Path | None)] = option(None, "Clip", "Picture.")
    set: tuple[str, ...] = option((), "Clip", "Field of the method.")
    compare: bool = option(False, "Run", "Run densely too.", kept=False)
    report: Path | None = option(None, "Run", "Report.", name="json", kept=False)
    ray: str | None = option(None, "Run", "Address.", bare="auto", kept=False)


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"frames": "33"}, "frames", 33),
        ({"frames": 33.0}, "frames", 33),
        ({"frames": "none"}, "frames", None),
        ({"seed": str(2**63 - 1)}, "seed", 2**63 - 1),
        ({"strength": "1e-1"}, "strength", 0.1),
        ({"offload": "model"}, "offload", "model"),
        ({"extend": "none"}, "extend", "none"),
        ({"extend": "riflex:k=4,freelong"}, "extend", ("riflex:k=4", "freelong")),
        ({"betas": "0.5,1"}, "betas", (0.5, 1.0)),
        ({"set": "a=1,2"}, "set", ("a=1,2",)),
        ({"image": "a.png"}, "image", Path("a.png")),
        ({"image": 3j}, "image", 3j),
        ({"json": "-"}, "report", Path("-")),
        ({"report": "-"}, "report", Path("-")),
    ],
)
def test_values_are_read_leniently(given, name, value):
    found = getattr(Example(model="m", **given), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"seed": -1}, "seed must be from 0 to 2^63 - 1, got -1"),
        ({"strength": 0}, "strength must be above 0 and at most 1, got 0"),
        ({"strength": float("nan")}, "strength must be above 0 and at most 1, got nan"),
        ({"seed": True}, "seed must be int, got True; such as seed: 0"),
        ({"betas": [0.9]}, "betas must be float,float, got [0.9]; such as betas: [0.9, 0.99]"),
        ({"offload": "no"}, "offload must be one of none, model, got 'no'"),
        ({"image": {}}, "image must be a path or none, got {}"),
        ({"set": 3j}, "set must be a list of str, got 3j"),
        ({"ofload": "none"}, "there is no field 'ofload'; did you mean 'offload'?"),
    ],
    ids=str,
)
def test_one_sentence_for_what_is_wrong(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Example(**({"model": "m"} | given))
    with pytest.raises(ValueError, match=r"^a\.yaml: "):
        Example.read({"model": "m"} | given, origin="a.yaml")


def bomb(list_of: str) -> str:
    """Nine lists of nine of the one before."""
    lists = [f"&a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    return list_of.format(",".join(["&a0 [x,x,x,x,x,x,x,x,x]", *lists]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb("[{}]"), "is beyond 20,000 values, the most that are read"),
        (bomb("set: [{}]"), "is beyond 20,000 values"),
        (f"set: [{'a,' * 30_000}]", "is beyond 20,000 values"),
        (f"set: {'[' * 500}{']' * 500}", "is nested too deep: it may have at most 64 levels"),
        (f"frames: {'9' * 400}", "line 1, has a number of 400 digits"),
        (f"seed: 0x{'f' * 10**6}", "line 1, has a number of 1,000,002 digits"),
        (f"seed: 1{':1' * 10**6}", "line 1, has a number of 2,000,001 digits"),
        (f"seed: {10**30}", "2^63 - 1, got a number of about 31 digits, which is too large"),
        ("set: &a [*a]", "line 1, has *a within itself"),
        ("frames: !!int ''", "line 1, has the tag 'tag:yaml.org,2002:int': leave it out"),
        ("model: 2001-99-99", "holds no value of YAML: month must be in 1..12"),
        (f"model: {'x' * 5_000_000}", "holds more than 4 MB of text"),
    ],
    ids=lambda x: x[:20],
)
def test_a_hostile_file_is_one_sentence_in_no_time(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(ValueError, match=r"a\.yaml") as caught:
        Example.from_yaml(path, {"model": "m"})
    assert time.process_time() - started < 1
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_aliases_of_plain_files_stay(tmp_path):
    (tmp_path / "a.yaml").write_text("set: &a [x=1]\nmodel: m\nextend: *a\n<<: {frames: 9}\n")
    found = Example.from_yaml(tmp_path / "a.yaml")
    assert (found.set, found.extend, found.frames) == (("x=1",), ("x=1",), 9)


def test_text_that_is_not_utf8_is_refused():
    with pytest.raises(ValueError, match=r"set must be UTF-8 text, got '\\udce9'"):
        Example(model="m", set=["\udce9"])


def test_a_missing_field_is_named_with_its_flag():
    with pytest.raises(ValueError, match="model is not given: --model DIR, the folder of a pip"):
        Example()


def test_what_is_written_is_read_again(tmp_path):
    whole = Example(model="a: b", frames=9, extend=("a", "b"), set=("x=1", "y=2"), json="j.json")
    (tmp_path / "a.yaml").write_text(whole.as_yaml())
    assert Example.from_yaml(tmp_path / "a.yaml") == whole
    assert Example.read(whole.given()) == whole
    assert whole.kept() == {
        "model": "a: b",
        "frames": 9,
        "seed": 0,
        "offload": "none",
        "extend": ["a", "b"],
        "betas": [0.9, 0.99],
        "set": ["x=1", "y=2"],
    }
    assert all(one.help in whole.as_yaml() for one in Example.options().values())


def test_typed_fields_win_and_leave_their_rivals_out():
    held = {"model": "m", "seed": 3, "set": ["a=1"]}
    assert Example.read(held, {"seed": "4"}).seed == 4
    assert Example.read(held, {"frames": "9"}).seed == 0


@pytest.fixture
def run():
    """Run a verb of this config, with a further option; returns the result, and what it got."""

    class More(Config):
        plan: bool = option(False, "Run", "Plan alone.")

    def call(*args, config=Example):
        app, got = typer.Typer(cls=OneLineErrors, rich_markup_mode=None), []
        app.callback()(lambda: None)

        @verb(app, config, more=More, short_help="", example={"model": "demo"})
        def example(made, more) -> None:
            """Example."""
            got.append((made, more.plan))

        result = CliRunner().invoke(app, ["example", *map(str, args)], catch_exceptions=False)
        return result, got

    return call


def test_fields_are_flags(run):
    line = "--model m --frames 9 --set a=1 --set b=2 --betas 0.5,1 --extend none --compare --plan"
    result, [(made, plan)] = run(*line.split(), "--ray")
    assert result.exit_code == 0
    assert plan
    assert made == Example(
        model="m",
        frames=9,
        set=("a=1", "b=2"),
        betas=(0.5, 1),
        extend="none",
        compare=True,
        ray="auto",
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--frames", "x"), "frames must be int or none, got 'x'; such as --frames 8"),
        (("--betas", "1"), "betas must be float,float, got '1'; such as --betas 0.9,0.99"),
        (("--frames", "0"), "frames must be at least 1, got 0"),
        ((), "model is not given"),
    ],
    ids=str,
)
def test_a_wrong_flag_is_one_line(run, args, message):
    result, got = run(*args)
    assert (result.exit_code, got) == (2, [])
    assert result.stderr.startswith(f"error: {message}")


class Longer(Example):
    """A config with one field more, declared here and nowhere else."""

    sharpness: float = option(1.0, "New", "Strength of sharpening, 0 to 2.", ge=0, le=2)


def test_a_new_field_is_declared_in_one_place(run, tmp_path):
    assert "--sharpness FLOAT Strength of sharpening, 0 to 2. [default: 1.0]" in " ".join(
        run("--help", config=Longer)[0].stdout.split()
    )
    [(made, _)] = run("--model", "m", "--sharpness", "1.5", config=Longer)[1]
    assert made.sharpness == 1.5
    printed = yaml.safe_load(run("--print-config", config=Longer)[0].stdout)
    assert printed["sharpness"] == 1.0
    schema = json.loads(run("--print-schema", config=Longer)[0].stdout)
    assert schema["properties"]["sharpness"]["maximum"] == 2
    assert made.kept()["sharpness"] == 1.5
    one = Longer.options()["sharpness"]
    assert (one.kind, one.default, one.group) == (float, 1.0, "New")
    assert one.limits == {"ge": 0, "le": 2}
    (tmp_path / "a.yaml").write_text("model: m\nsharpness: 3\n")
    result, _ = run("--config", tmp_path / "a.yaml", config=Longer)
    assert "a.yaml: sharpness must be from 0 to 2, got 3" in result.stderr
