"""Presets of a training for a purpose."""

import json

import pytest
from support import wan

from gen_accel import lora
from gen_accel.attention_processors.families import family_named
from gen_accel.lora import TrainConfig, dry_run, print_config, read_config
from gen_accel.lora.presets import PRESETS, preset

WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", ["demo", WAN])
def test_it_trains(name, model):
    given = TrainConfig(**(lora.preset(name, model) | {"model": model}))
    assert dry_run(given).steps == 2


@pytest.mark.parametrize("name", PRESETS)
def test_each_value_has_a_reason(name):
    assert PRESETS[name].purpose
    assert all(len(one.reason) > 10 for one in PRESETS[name].values.values())


def test_stages_follow_the_model(tmp_path):
    twice = "161:1500:position_interpolation"
    assert preset("longer", WAN)["stages"] == ("81:200", twice)
    assert preset("longer", "Wan-AI/Wan2.2-TI2V-5B-Diffusers")["stages"][0] == "121:200"
    assert preset("longer", "demo")["stages"][0] == "33:200"
    wan.pipeline().save_pretrained(tmp_path / "model")
    assert preset("longer", str(tmp_path / "model"))["stages"] == ("81:200", twice)
    assert preset("longer", "any", trained_frames=49)["stages"][0] == "49:200"
    (tmp_path / "model" / "gen_accel.json").write_text(json.dumps({"trained_frames": 41}))
    assert preset("longer", str(tmp_path / "model"))["stages"][0] == "41:200"
    assert preset("motion", str(tmp_path / "model"))["stages"] == ("41:1500",)
    assert preset("motion", WAN)["stages"] == ("49:1500",)
    assert preset("style", WAN)["stages"] == ("25:1500",)
    # Patches of CogVideoX 1.5 join two latent frames, which 5 or 8 n more frames fill.
    joined = "THUDM/CogVideoX1.5-5B"
    assert preset("style", joined)["stages"] == ("29:1500",)
    assert preset("longer", joined)["stages"][1].startswith("333:")
    # The curriculum is all that the model decides.
    assert preset("style", "nowhere") == preset("style", WAN)


def test_file_and_flags_come_before_it(tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text("rank: 7\nlearning_rate: 1e-3\nstages: ['9:4']\n")
    given = read_config(path, {"rank": "5"}, "style")
    assert (given.rank, given.learning_rate, given.stages) == (5, 1e-3, ("9:4",))
    assert given.targets == ("attention", "feed_forward")
    path.write_text("preset: style\nrank: 7\n")
    assert read_config(path).method == "dense"
    assert read_config(path, preset="motion").method == "radial"
    assert read_config(path, preset="motion").rank == 7


def test_what_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="one of longer, style, motion, got 'lnger'; did you mean"
    ):
        preset("lnger")
    with pytest.raises(ValueError, match="preset style is for a LoRA, got adapter 'image_prompt'"):
        read_config(None, {"adapter": "image_prompt"}, "style")
    with pytest.raises(FileNotFoundError, match="no folder at nowhere/at/all"):
        preset("longer", "nowhere/at/all")
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "Unheard"}))
    with pytest.raises(ValueError, match="preset longer needs the length that"):
        preset("longer", str(tmp_path))


def test_on_the_command_line(run, tmp_path):
    said = run("train", "--preset", "longer", "--model", WAN, "--rank", "3", "--print-config")
    path = tmp_path / "lora.yaml"
    path.write_text(said.stdout)
    assert read_config(path) == read_config(None, {"model": WAN, "rank": "3"}, "longer")
    assert print_config(read_config(path)) == said.stdout
    text = run("train", "--help").stdout
    assert all(name in text for name in PRESETS)
    assert "did you mean 'motion'" in run("train", "--preset", "moton", code=2).stderr


def test_lengths_are_the_families():
    assert family_named("wan").sizes.frames == 81
