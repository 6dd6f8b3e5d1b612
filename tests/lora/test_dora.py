"""LoRAs whose weights' lengths train apart, and LoRAs that are scaled by the root of the rank."""

from shutil import copytree, rmtree

import pytest
import torch
from safetensors.torch import load_file
from support import finetuning as ft
from support import wan
from support.runs import WEIGHTS, assert_apart, assert_same_run, state

import gen_accel
from gen_accel import Radial
from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.lora import trainer
from gen_accel.lora.publish import CARD

pytestmark = pytest.mark.usefixtures("one_thread")

FIELDS = {"method": "radial", "settings": (), "alpha": 3.0, "stages": ("9:4",)}
BOTH = FIELDS | {"dora": True, "rank_stabilised": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A DoRA with a rank-stabilised scale, and its model."""
    out = tmp_path_factory.mktemp("dora") / "run"
    model = ft.model()
    done = ft.train(ft.config(out, **BOTH, checkpoint_every=2), model=model)
    gen_accel.attach(model.transformer, Radial()).detach()
    return done.folder, model.transformer.eval()


@pytest.mark.slow
def test_lengths_train(made):
    folder, _ = made
    lengths = {n: x for n, x in load_file(folder / WEIGHTS).items() if "magnitude" in n}
    stock = wan.transformer().state_dict()
    assert lengths
    for name, length in lengths.items():
        layer = name.removeprefix("transformer.").removesuffix(".lora_magnitude_vector")
        own = torch.linalg.vector_norm(stock[f"{layer}.weight"], dim=1)
        assert_apart(length, own)


def test_it_begins_as_the_model():
    """Its first loss is the loss of a LoRA of the same draws, which begins at zero."""
    losses = []
    for fields in (FIELDS, BOTH):
        given = ft.config("unused", **fields)
        losses.append(first_loss(given))
    torch.testing.assert_close(*losses)


def first_loss(given):
    run = trainer.Trainer(given, trainer.accelerator_for(given), ft.model(), ft.Clips())
    return run.objective(*run.batches(0, run.plans[0][0], 3, 0)).detach()


def test_diffusers_loads_it(made):
    folder, transformer = made
    pipe = wan.pipeline()
    before = wan.forward(pipe.transformer)
    pipe.load_lora_weights(folder, adapter_name="long")
    loaded = pipe.transformer.peft_config["long"]
    assert (loaded.use_dora, loaded.use_rslora, loaded.lora_alpha) == (True, True, 3.0)
    with torch.no_grad():
        after = wan.forward(pipe.transformer)
        assert torch.equal(after, wan.forward(transformer))
    assert_apart(after, before)
    pipe.unload_lora_weights()
    assert torch.equal(wan.forward(pipe.transformer), before)


def test_the_recipe_and_the_card_say_so(made):
    recipe = read_recipe(made[0])
    assert (recipe.dora, recipe.rank_stabilised) == (True, True)
    assert "2, 3, DoRA, rank-stabilised" in (made[0] / CARD).read_text()


def test_in_two_parts(made, tmp_path):
    """A run that goes on from its second step ends as one that was not interrupted."""
    out = copytree(made[0].parent, tmp_path / "run")
    rmtree(out / "lora")
    rmtree(out / "checkpoints" / "step-000004")
    ft.train(ft.config(out, **BOTH, checkpoint_every=2), resume=True)
    assert_same_run(out, made[0].parent)
    assert any("magnitude" in name for name in state(out).tensors)


def test_going_on_from_one(made, tmp_path):
    start = {"init_lora": str(made[0])}
    given = ft.config(tmp_path / "b", **BOTH, **start)
    ft.train(given)
    with pytest.raises(ValueError, match="trained with dora True, asked for is False"):
        ft.train(ft.config(tmp_path / "c", **FIELDS, rank_stabilised=True, **start))
    # 3 / sqrt(2) as alpha / rank is alpha 4.24.
    with pytest.raises(ValueError, match=r"the same weight is alpha 4.24264"):
        ft.train(ft.config(tmp_path / "d", **FIELDS, dora=True, **start))


@pytest.mark.parametrize("name", ["dora", "rank_stabilised"])
def test_without_a_lora(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} .*is of a LoRA, and rank is 0"):
        ft.config(tmp_path, rank=0, **{name: True})
