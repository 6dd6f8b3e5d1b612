"""Fields of the Train screen: the YAML equals `gen-accel train --print-config`, both ways."""

import re

import pytest
import yaml
from typer.testing import CliRunner

from gen_accel.cli import app
from gen_accel.config_files import checked
from gen_accel.lora.config import TrainConfig, config_fields
from gen_accel.ui.train_fields import (
    MATTER,
    WHERE,
    all_values,
    config_of,
    controls,
    folded,
    from_page,
    in_words,
    purposes,
    read_yaml,
    starting_values,
    to_page,
    with_purpose,
    write_yaml,
)

CONTROLS = controls()


def printed(*args):
    found = CliRunner().invoke(app, ["train", "--print-config", *args])
    assert found.exit_code == 0, found.output
    return found.stdout


def through_page(values):
    """Values as a person finds them on the page, and leaves them."""
    return {
        name: from_page(CONTROLS[name], to_page(CONTROLS[name], value))
        for name, value in values.items()
    }


@pytest.mark.parametrize("preset", ["longer", "style", "motion"])
def test_yaml_equals_print_config(preset):
    given = ["--model", "demo", "--height", "96", "--width", "96", "--preset", preset]
    values = through_page(starting_values("demo", preset))
    assert write_yaml(values).text == printed(*given)


def test_untouched_fields_are_the_defaults():
    values = through_page(all_values({}))
    assert write_yaml(values).text == printed()


FILLED = {
    "data": "clips",
    "stages": ["33:2", "65:4:position_interpolation"],
    "fps": 8,
    "learning_rate": "1e-4",
    "settings": ["tile_side=12", "block=432"],
    "betas": [0.9, 0.95],
    "base": "fp8",
    "gradient_checkpointing": "on",
    "validation_prompts": ["a red square, then a blue one", "two\u00fc"],
    "log_with": "none",
    "weighting": "none",
    "dora": True,
    "trigger": "sks",
}


def test_yaml_round_trips():
    text = write_yaml(FILLED).text
    assert write_yaml(through_page(all_values(read_yaml(text)))).text == text
    config = config_of(text)
    assert config.validation_prompts == ("a red square, then a blue one", "two\u00fc")
    assert config.log_with == "none"
    assert config.base == "fp8"
    assert config.learning_rate == 1e-4


def test_every_field_has_one_place():
    placed = [*WHERE, *MATTER, *(name for names in folded().values() for name in names)]
    assert sorted(placed) == sorted(one.name for one in config_fields())


@pytest.mark.parametrize("name", [one.name for one in config_fields()])
def test_a_default_comes_back_from_the_page(name):
    control = CONTROLS[name]
    default = control.field.default
    back = {name: from_page(control, to_page(control, default))}
    found = checked([control.field], back, extra="ui")[name]
    assert found == (list(default) if isinstance(found, list) else default)
    assert isinstance(found, bool) == isinstance(default, bool)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rank": -1}, "rank must not be negative, got -1"),
        ({"rank": None}, "rank must be int, got None; such as rank: 128"),
        ({"fps": "fast"}, "fps must be float or none, got 'fast'; such as fps: 16.0"),
        ({"stages": ["81"]}, "a stage is written frames:steps or frames:steps:rule"),
        ({"method": "radical"}, "did you mean 'radial'?"),
        ({"blocks_to_swap": 2}, "blocks_to_swap"),
    ],
    ids=["range", "empty", "type", "stage", "name", "together"],
)
def test_what_the_library_refuses(fields, sentence):
    written = write_yaml(all_values(fields))
    assert written.config is None
    assert sentence in written.objection
    with pytest.raises(ValueError, match=r".+"):
        config_of(written.text)
    [(name, value)] = fields.items()
    assert yaml.safe_load(written.text)[name] == value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rank: [", "config.yaml is not YAML: "),
        ("just words", "config.yaml must hold fields as `name: value`, got 'just words'"),
        ("ranks: 3", "there is no field 'ranks'; did you mean 'rank'?"),
    ],
)
def test_yaml_that_is_refused(text, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        read_yaml(text)


def test_a_preset_in_the_yaml():
    assert read_yaml("preset: style\nrank: 4")["rank"] == 4
    assert read_yaml("preset: style")["method"] == "dense"


def test_a_preset_keeps_what_was_entered():
    start = starting_values("demo", None)
    entered = through_page({**start, "rank": 4, "out": "elsewhere"})
    values, before = with_purpose(entered, start, "style")
    assert values["rank"] == 4
    assert values["out"] == "elsewhere"
    assert values["method"] == "dense"
    assert before["rank"] == 16
    values, before = with_purpose(through_page(values), before, "longer")
    assert values["method"] == "radial"
    assert values["rank"] == 4
    assert list(values["stages"]) == ["33:200", "65:1500:position_interpolation"]
    values, _ = with_purpose(through_page(values), before, None)
    assert values == {**start, "rank": 4, "out": "elsewhere"}


def test_the_size_of_the_demo_is_for_the_demo():
    start = starting_values("demo", None)
    assert start["height"] == start["width"] == 96
    entered = through_page({**start, "model": "Wan2.1-T2V-1.3B"})
    values, _ = with_purpose(entered, start, None)
    assert (values["height"], values["width"]) == (480, 832)


def test_purposes_are_the_presets():
    assert [name for _, name in purposes()] == ["none", "longer", "style", "motion"]


def test_a_config_in_words():
    config = TrainConfig(stages=("33:2", "65:1500"), height=96, width=96, rank=4)
    assert in_words(config) == (
        "a LoRA of rank 4 for demo: 2 steps at 33 frames, then 1,500 steps at 65 frames, of "
        "96 x 96 pixels, 1 clip a step"
    )
