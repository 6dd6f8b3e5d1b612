"""LoRAs in ComfyUI's names: the same change of each weight, by diffusers' own reading of the
original checkpoints."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from support.exported import READERS, changes, lora_of, model_of_family
from support.runs import WEIGHTS, metadata, with_recipe

from gen_accel.attention_processors.attached.recipe import KEY, read_recipe
from gen_accel.lora import comfyui, export

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", READERS)
def test_each_weight_changes_by_the_same(family, tmp_path):
    transformer = model_of_family(family)
    folder = lora_of(transformer, tmp_path / "lora", alpha=3.0)
    done = export(folder, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    found = READERS[family](changes(tensors))
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer):
            exact = module.get_delta_weight("default")
            assert exact.abs().max() > 0
            torch.testing.assert_close(found.pop(f"{name}.weight"), exact)
    assert [name for name, x in found.items() if x.any()] == []
    assert done.files == {tmp_path / "a.safetensors": len(tensors) // 3}
    assert metadata(tmp_path / "a.safetensors")[KEY] == metadata(folder / WEIGHTS)[KEY]


def test_a_rank_stabilised_lora_keeps_its_weight(tmp_path):
    transformer = model_of_family("wan")
    folder = lora_of(transformer, tmp_path / "lora", alpha=3.0, rank=4, rank_stabilised=True)
    export(folder, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert {float(x) for key, x in tensors.items() if key.endswith("alpha")} == {6.0}  # 3 / sqrt 4
    layer = transformer.blocks[1].attn1.to_q
    exact = layer.get_delta_weight("default")
    torch.testing.assert_close(changes(tensors)["blocks.1.self_attn.q.weight"], exact)


def test_part_of_a_joined_weight_leaves_the_rest_alone(tmp_path):
    transformer = model_of_family("hunyuan_video")
    folder = lora_of(transformer, tmp_path / "lora", targets=("to_k", "to_out.0"), rank=3)
    export(folder, tmp_path / "a.safetensors")
    found = changes(load_file(tmp_path / "a.safetensors"))
    q, k, v = found["double_blocks.0.img_attn.qkv.weight"].chunk(3)
    layer = transformer.transformer_blocks[0].attn.to_k
    torch.testing.assert_close(k, layer.get_delta_weight("default"))
    assert not q.any()
    assert not v.any()
    width = len(k)
    single = found["single_blocks.0.linear1.weight"]
    assert len(single) == 7 * width
    assert not single[3 * width :].any()


@pytest.mark.slow
def test_a_training_with_parameters_of_its_method_keeps_them(sparse, tmp_path):
    folder, _ = sparse
    export(folder, tmp_path / "a.safetensors", dtype="bfloat16")
    tensors = load_file(tmp_path / "a.safetensors")
    saved = load_file(folder / "processors.safetensors")
    assert saved
    for name, x in saved.items():
        key = name.removeprefix("transformer.blocks.")
        assert torch.equal(tensors[f"gen_accel.branch.{key}"], x)
    ours, again = comfyui.load(folder), comfyui.load(tmp_path / "a.safetensors")
    assert ours.recipe == again.recipe == read_recipe(folder)
    assert ours.branches.keys() == again.branches.keys() == {1}
    assert ours.layers.keys() == again.layers.keys()
    for name, layer in ours.layers.items():
        assert torch.equal(layer.down.bfloat16(), again.layers[name].down)
        assert layer.alpha == again.layers[name].alpha


def test_two_experts_become_two_files(tmp_path):
    parts = ("transformer", "transformer_2")
    for seed, part in enumerate(parts):
        lora_of(model_of_family("wan"), tmp_path / part, seed, part)
    folder = with_recipe(tmp_path / parts[0], tmp_path / "lora", parts=parts)
    with_recipe(tmp_path / parts[1], folder / parts[1], parts=parts)
    done = export(folder, tmp_path / "wan.safetensors")
    assert [path.name for path in done.files] == [
        "wan_high_noise.safetensors",
        "wan_low_noise.safetensors",
    ]
    high, low = (load_file(path) for path in done.files)
    assert high.keys() == low.keys()
    key = "diffusion_model.blocks.0.ffn.0.lora_B.weight"
    assert not torch.equal(high[key], low[key])


def refused(folder, said, out="a.safetensors", **options):
    with pytest.raises(ValueError, match=said):
        export(folder, folder.parent / out, **options)
    assert [*folder.parent.glob("*.safetensors")] == []


@pytest.mark.slow
def test_what_no_file_can_hold_is_refused(tmp_path):
    dora = lora_of(model_of_family("wan"), tmp_path / "lora", dora=True)
    refused(dora, "is a DoRA, which ComfyUI computes otherwise")
    assert comfyui.load(dora).layers["blocks.0.ffn.2"].lengths is not None
    refused(dora, "out must end in .safetensors, got", "a.pt")
    refused(dora, "did you mean 'comfyui'?", format="comfyu")
    refused(dora, "dtype must be one of float32", dtype="int8")
    video = lora_of(model_of_family("cogvideox"), tmp_path / "video")
    refused(video, "is for CogVideoXTransformer3DModel, which ComfyUI does not have")


def test_layers_that_comfyui_does_not_have_are_named(tmp_path):
    folder = lora_of(model_of_family("wan"), tmp_path / "lora")
    recipe, tensors = read_recipe(folder), load_file(folder / WEIGHTS)
    odd = {key.replace("attn1.to_q", "attn1.to_x"): x for key, x in tensors.items()}
    with pytest.raises(ValueError, match=r"a LoRA on blocks\.0\.attn1\.to_x, which no layer"):
        comfyui.converted(odd, recipe, "a file")
    half = {key: x for key, x in tensors.items() if "blocks.1.ffn.net.2.lora_B" not in key}
    with pytest.raises(ValueError, match=r"no whole LoRA .* blocks\.1\.ffn\.net\.2"):
        comfyui.converted(half, recipe, "a file")
    narrow = model_of_family("hunyuan_video")
    joined = lora_of(narrow, tmp_path / "hunyuan", targets=("attention", "feed_forward"))
    tensors = load_file(joined / WEIGHTS)
    key = "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight"
    with pytest.raises(ValueError, match="where ComfyUI's model has"):
        comfyui.converted(tensors | {key: tensors[key][:64]}, read_recipe(joined), "a file")
