"""What a training leaves: a LoRA that diffusers loads, with its recipe."""

import json
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from support import checks, wan
from support import finetuning as ft
from support.runs import (
    FULL_STEPS,
    WEIGHTS,
    assert_apart,
    assert_close_lora,
    assert_same_lora,
    metadata,
    state,
    with_recipe,
)

from gen_accel import SparseLinear
from gen_accel.attention_processors.attached.recipe import (
    read_recipe,
)
from gen_accel.lora.artefact import portable

pytestmark = pytest.mark.usefixtures("one_thread")


class TestArtefact:
    def test_diffusers_loads_it_with_its_alpha(self, trained):
        folder, transformer = trained
        pipe = wan.pipeline()
        before = wan.forward(pipe.transformer)
        pipe.load_lora_weights(folder, adapter_name="long")
        loaded = pipe.transformer.peft_config["long"]
        assert (loaded.r, loaded.lora_alpha) == (2, 5.0)
        with torch.no_grad():
            after = wan.forward(pipe.transformer)
            assert torch.equal(after, wan.forward(transformer))
        assert_apart(after, before)
        pipe.unload_lora_weights()
        assert torch.equal(wan.forward(pipe.transformer), before)

    def test_beside_another_lora(self, trained, style):
        folder, _ = trained
        pipe = wan.pipeline()
        pipe.load_lora_weights(folder, adapter_name="long")
        with torch.no_grad():
            alone = wan.forward(pipe.transformer)
            pipe.load_lora_weights(style, adapter_name="style")
            pipe.set_adapters(["long", "style"], [1.0, 0.0])
            assert torch.equal(wan.forward(pipe.transformer), alone)
            pipe.set_adapters(["long", "style"], [1.0, 0.5])
            both = wan.forward(pipe.transformer)
            pipe.set_adapters("style")
            assert_apart(both, wan.forward(pipe.transformer))
        assert_apart(both, alone)

    @pytest.mark.slow
    def test_fused(self, trained):
        folder, _ = trained
        pipe = wan.pipeline()
        pipe.load_lora_weights(folder)
        with torch.no_grad():
            plain = wan.forward(pipe.transformer)
            exact = exact_forward(pipe.transformer)
            pipe.fuse_lora()
            checks.assert_no_worse(wan.forward(pipe.transformer), plain, exact)
            pipe.unfuse_lora()
            checks.assert_no_worse(wan.forward(pipe.transformer), plain, exact)

    def test_dropout_ends_with_the_training(self, whole):
        """What diffusers adds to a model is in training mode."""
        pipe = wan.pipeline()
        pipe.load_lora_weights(whole / "lora")
        with torch.no_grad():
            first = wan.forward(pipe.transformer)
            assert torch.equal(wan.forward(pipe.transformer), first)

    def test_the_recipe_lies_in_the_file_and_beside_it(self, whole):
        folder = whole / "lora"
        about = metadata(folder / WEIGHTS)
        beside = json.loads((folder / "gen_accel.json").read_text())
        assert json.loads(about["gen_accel"]) == beside
        recipe = read_recipe(folder)
        assert json.loads(json.dumps(recipe.to_dict())) == beside
        assert recipe.build_method() == SparseLinear(critical=0.2, block_q=4, block_k=4)
        assert (recipe.rope, recipe.frames) == ("position_interpolation", 17)
        assert recipe.trained_frames == ft.TRAINED
        assert (recipe.height, recipe.width, recipe.steps) == (32, 64, FULL_STEPS)
        assert recipe.stages == ("9:4", "17:4:position_interpolation")
        assert recipe.data == ft.Clips().digest

    @pytest.mark.parametrize(
        "fields",
        [
            *({"options": {"gone": 1}}, {"version": 0}, {"version": "x"}),
            *({"schedule": {"a": 1}}, {"transformer": {"class": []}}, {"alpha": 10**400}),
        ],
        ids=lambda fields: str(fields)[:30],
    )
    def test_a_recipe_of_another_version_is_refused(self, trained, tmp_path, fields):
        folder = with_recipe(trained[0], tmp_path / "old", **fields)
        with pytest.raises(ValueError, match=r"cannot be read: .*; train again$"):
            read_recipe(folder)

    def test_options_at_their_defaults_are_left_out(self, whole):
        """A PEFT that does not know an option refuses its name, whatever the value."""
        said = json.loads(metadata(whole / "lora" / WEIGHTS)["lora_adapter_metadata"])
        options = {name.removeprefix("transformer."): value for name, value in said.items()}
        assert options.pop("auto_mapping")
        assert {*options} <= {
            *("peft_type", "r", "lora_alpha", "target_modules", "lora_dropout"),
            *("base_model_name_or_path", "rank_pattern", "alpha_pattern"),
        }
        assert portable(LoraConfig(r=4, use_rslora=True, target_modules=["b", "a"])) == {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["a", "b"],
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_rslora": True,
        }

    def test_it_holds_the_average(self, whole):
        tensors = state(whole).tensors
        saved = load_file(whole / "lora" / WEIGHTS)
        saved |= {
            f"{'.'.join(name.split('.')[:3])}.attn1.processor.branch.{name.split('.', 3)[3]}": x
            for name, x in load_file(whole / "lora" / "processors.safetensors").items()
        }
        averages = {
            name.removeprefix("ema/").replace(".default", ""): x
            for name, x in tensors.items()
            if name.startswith("ema/")
        }
        assert saved.keys() == averages.keys()
        assert all(torch.equal(x, averages[name]) for name, x in saved.items())

    def test_every_checkpoint_holds_one(self, whole):
        newest = state(whole).path
        assert_same_lora(newest / "lora", whole / "lora")

    @pytest.mark.slow
    def test_to_go_on_from(self, whole, tmp_path):
        """The first loss is that of the LoRA trained before, and not that of the model."""
        given = ft.config(tmp_path / "a", stages=("9:1",), settings=ft.SPARSE)
        fresh = ft.train(given)
        again = ft.train(given.replaced(out=str(tmp_path / "b"), init_lora=str(whole / "lora")))
        assert again.losses[0] < fresh.losses[0]
        began = given.replaced(out=str(tmp_path / "c"), init_lora=str(whole / "lora"))
        other = ft.train(began.replaced(learning_rate=1e-30))
        assert_close_lora(other.folder, whole / "lora")

    @pytest.mark.slow
    def test_a_smaller_one_grows(self, whole, tmp_path):
        """It says at first what it said; what is new gets gradients."""
        before = load_file(whole / "lora" / WEIGHTS)
        larger = {"rank": 3, "alpha": 3.0, "targets": ("attention", "feed_forward")}
        given = ft.config(tmp_path / "a", stages=("9:2",), init_lora=str(whole / "lora"), **larger)
        still = ft.train(given.replaced(out=str(tmp_path / "b"), learning_rate=1e-30))
        after = load_file(still.folder / WEIGHTS)
        assert before.keys() < after.keys()
        for name, x in before.items():
            part = after[name][tuple(map(slice, x.shape))]
            torch.testing.assert_close(part, x, rtol=0, atol=1e-20)
            after[name][tuple(map(slice, x.shape))] = 0
        assert all(x.abs().max() < 1e-20 for name, x in after.items() if "lora_B" in name)
        trained = load_file(ft.train(given).folder / WEIGHTS)
        new = [name for name in trained if "ffn" in name and "lora_B" in name]
        assert new
        assert all(trained[name].any() for name in new)

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"rank": 1}, r"has rank 2 on attention, asked for are 1 on attention; there is no"),
            ({"targets": ("feed_forward",)}, r"asked for are 2 on feed_forward; there is no room"),
            ({"rank": 4, "alpha": 2.0}, r"alpha 2 at rank 2, asked for is 2 at 4: .* is alpha 4"),
        ],
    )
    def test_one_that_does_not_fit_is_refused(self, fields, match, whole, tmp_path):
        given = ft.config(tmp_path / "a", init_lora=str(whole / "lora"), **fields)
        with pytest.raises(ValueError, match=match):
            ft.train(given)


def exact_forward(transformer):
    """In fp64, with the embedding of the timestep too."""
    made = {name: x.double() for name, x in wan.inputs().items()}
    return deepcopy(transformer).double()(**made, return_dict=False)[0]
