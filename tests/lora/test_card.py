"""The model card that a training writes beside its adapter."""

import ast
import re
import shlex
import shutil
from dataclasses import replace

import pytest
import typer
from demo_model.cards import cards
from huggingface_hub import ModelCard
from support import finetuning as ft
from support import wan

from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.cli import app
from gen_accel.lora.publish import CARD, card_for, is_ours, new_card, public_name

pytestmark = pytest.mark.usefixtures("one_thread")

HUB = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture
def recipe(whole):
    return read_recipe(whole / "lora")


def head(text):
    return ModelCard(text).data.to_dict()


def fenced(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_a_training_writes_it(whole):
    text = (whole / "lora" / CARD).read_text()
    assert is_ours(text.encode())
    assert head(text) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "tags": ["lora", "text-to-video", "gen_accel"],
    }
    for row in (
        "| attention | `sparse_linear` `critical=0.2`, `block_q=4`, `block_k=4` |",
        "| frames, height, width | 17, 32, 64 |",
        "| curriculum, frames:steps | 9:4, 17:4:position_interpolation |",
        "| optimizer steps | 8 |",
        f"| clips | {len(ft.Clips())} |",
        "| clips a step | 2 |",
        "| rank, alpha | 2, 2 |",
    ):
        assert row in text.splitlines()


def test_a_checkpoint_has_one_too(whole):
    assert is_ours((whole / "checkpoints" / "step-000008" / "lora" / CARD).read_bytes())


def test_diffusers_loads_the_folder_with_its_card(trained):
    folder, _ = trained
    assert (folder / CARD).is_file()
    wan.pipeline().load_lora_weights(folder)


def test_the_license_is_left_to_the_user(recipe):
    assert "license" not in head(new_card(recipe))
    assert head(new_card(recipe, license="mit"))["license"] == "mit"


def test_a_base_model_on_the_hub_is_linked(recipe):
    text = new_card(replace(recipe, base_model=HUB))
    assert head(text)["base_model"] == HUB
    assert head(text)["base_model_relation"] == "adapter"
    assert f'from_pretrained("{HUB}"' in text


@pytest.mark.parametrize("place", ["/home/me/secret/wan", "~/secret/wan", "./secret", "demo"])
def test_a_folder_is_not_named(recipe, place):
    text = new_card(replace(recipe, base_model=place))
    assert "secret" not in text
    assert "base_model" not in head(text)


def test_a_folder_that_looks_like_a_repository_is_not_named(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_name("models/wan") == "models/wan"
    (tmp_path / "models" / "wan").mkdir(parents=True)
    assert public_name("models/wan") is None
    assert "models/wan" not in new_card(replace(recipe, base_model="models/wan"))


def test_an_option_that_is_a_path_is_not_named(recipe):
    options = recipe.options | {"feature_map": "/home/me/secret"}
    assert "secret" not in new_card(replace(recipe, options=options))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"base_model": HUB},
        {"base_model": "demo", "teacher_guidance": 3.0, "techniques": ("fresh_noise:shift=22",)},
        {"part": "transformer_2"},
        {"rank": 0},
    ],
    ids=str,
)
def test_its_commands_are_of_this_program(recipe, fields):
    changed = replace(recipe, **fields)
    text = new_card(changed)
    (code,) = fenced(text, "python")
    ast.parse(code)
    assert ("load_lora_weights" in code) == bool(changed.rank)
    assert ("load_into_transformer_2=True" in code) == (changed.part == "transformer_2")
    assert ("guidance_scale=1.0" in code) == changed.holds_guidance
    assert ("gen_accel.extend" in code) == bool(changed.techniques)
    commands = fenced(text, "bash")
    assert len(commands) == (changed.part == "transformer")
    for command in commands:
        program, verb, *arguments = shlex.split(command.replace("\\\n", " "))
        assert program == "gen-accel"
        group = typer.main.get_command(app)
        group.commands[verb].make_context(verb, arguments)


def test_figures_are_a_table(recipe):
    text = new_card(recipe, figures={"PSNR, dB": 24.4})
    assert "## Figures\n\n| | |\n|---|---|\n| PSNR, dB | 24.4 |" in text
    assert "## Figures" not in new_card(recipe)


class TestReplaced:
    def test_an_untouched_card_is_replaced(self, recipe, tmp_path):
        (tmp_path / CARD).write_text(new_card(recipe))
        longer = replace(recipe, steps=99)
        assert card_for(tmp_path, longer).decode() == new_card(longer)

    @pytest.mark.parametrize(
        "edit",
        [
            lambda card: card.replace(b"---\n", b"---\nlicense: mit\n", 1),
            lambda card: card + b"More.\n",
            lambda card: b"# Mine\n",
            lambda card: b"",
            lambda card: b"\xff\xfe not UTF-8",
        ],
        ids=["license", "more", "other", "empty", "bytes"],
    )
    def test_a_card_of_the_users_is_kept(self, recipe, tmp_path, edit):
        held = edit(new_card(recipe).encode())
        (tmp_path / CARD).write_bytes(held)
        assert card_for(tmp_path, replace(recipe, steps=99)) == held

    @pytest.mark.slow
    def test_by_a_training_into_the_same_folder(self, tmp_path):
        given = ft.config(tmp_path / "run", method="radial", settings=(), stages=("9:1",))
        card = ft.train(given).folder / CARD
        card.write_text("# Mine\n")
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        assert ft.train(given).folder == card.parent
        assert card.read_text() == "# Mine\n"


@pytest.mark.slow
def test_an_image_prompt_has_one(tmp_path):
    given = ft.config(tmp_path / "run", **ft.IMAGES, stages=("9:1",))
    text = (ft.train(given).folder / CARD).read_text()
    assert is_ours(text.encode())
    assert head(text)["tags"] == ["image-prompt", "text-to-video", "gen_accel"]
    (code,) = fenced(text, "python")
    assert "gen_accel.load_image_prompt" in code
    ast.parse(code)


def test_the_embedded_adapters_have_theirs():
    """By `python -m demo_model.cards`."""
    assert {file: file.read_text() for file in cards()} == cards()


def test_a_pipeline_that_loads_no_lora_itself(recipe):
    """Its transformer does."""
    changed = recipe.transformer | {"class": "HunyuanVideo15Transformer3DModel"}
    text = new_card(replace(recipe, transformer=changed))
    assert 'pipe.transformer.load_lora_adapter("lora", prefix="transformer")' in text
    assert "load_lora_weights" not in text
    assert "load_lora_weights" in new_card(recipe)
