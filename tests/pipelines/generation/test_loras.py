"""LoRAs that fit whole, and all that fit in part, which diffusers would load."""

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support import wan

from gen_accel.pipelines.generation.loading import Loading, check_lora, load

FILE = "pytorch_lora_weights.safetensors"
TARGETS = ["blocks.0.attn1.to_q", "blocks.0.ffn.net.2", "blocks.1.attn1.to_q"]
Q = "transformer.blocks.1.attn1.to_q.lora_"


@pytest.fixture(scope="module")
def pipe():
    return wan.pipeline()


@pytest.fixture(scope="module")
def weights():
    """Of a LoRA of three layers, by diffusers' names."""
    other = wan.transformer()
    other.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    state = get_peft_model_state_dict(other)
    return {f"transformer.{name}": x.contiguous() for name, x in state.items()}


def renamed(weights, old, new):
    return {key.replace(old, new): x for key, x in weights.items()}


def of_another_size(weights):
    return weights | {f"{Q}A.weight": torch.zeros(2, 7)}


PARTIAL = {
    "a name": (lambda w: renamed(w, "attn1", "attn9"), "of its 3 layers 2 are not in the model"),
    "a block": (lambda w: renamed(w, ".1.", ".999."), r"1 are not .*as blocks\.999\.attn1\.to_q$"),
    "half": (
        lambda w: {key: x for key, x in w.items() if key != f"{Q}B.weight"},
        r"of its 3 layers 1 have no weights or half of them, such as blocks\.1\.attn1\.to_q$",
    ),
    "a size": (of_another_size, r"1 are of another size, such as blocks\.1\.attn1\.to_q$"),
    "ranks": (lambda w: w | {f"{Q}B.weight": torch.zeros(32, 3)}, "1 are of another size"),
    "int32": (
        lambda w: {key: x.to(torch.int32) for key, x in w.items()},
        r"holds weights of int32: blocks\.0.* and 3 more$",
    ),
    "a part": (
        lambda w: w | {"text_encoder.q.lora_A.weight": torch.zeros(2, 2)},
        r"which has no place for 1 of its 7 tensors, such as text_encoder\.q\.lora_A\.weight$",
    ),
    "none": (lambda w: renamed(w, "transformer.", "unet."), "holds no LoRA for WanPipeline$"),
}


@pytest.mark.parametrize("how", PARTIAL)
def test_what_fits_in_part_is_refused(pipe, weights, tmp_path, how):
    change, message = PARTIAL[how]
    save_file(change(weights), tmp_path / FILE)
    with pytest.raises(ValueError, match=message) as caught:
        check_lora(pipe, str(tmp_path))
    assert str(caught.value).startswith(str(tmp_path))


def test_layers_that_the_file_names_without_weights(pipe, weights, tmp_path):
    """Its options ask for them, which PEFT then makes without weights."""
    left = {name.removeprefix("transformer."): x for name, x in weights.items() if ".0." in name}
    about = LoraConfig(r=2, target_modules=TARGETS).to_dict()
    type(pipe).save_lora_weights(tmp_path, left, transformer_lora_adapter_metadata=about)
    with pytest.raises(ValueError, match=r"of its 3 layers 1 have no weights.*blocks\.1\.attn1"):
        check_lora(pipe, str(tmp_path))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_what_fits_is_not_refused(pipe, weights, tmp_path):
    """With options or without, by older names, and on a model that has a LoRA."""
    short = {name.removeprefix("transformer."): x for name, x in weights.items()}
    about = LoraConfig(r=2, target_modules=TARGETS).to_dict()
    type(pipe).save_lora_weights(
        tmp_path / "options", short, transformer_lora_adapter_metadata=about
    )
    older = renamed(renamed(weights, "lora_A", "lora.down"), "lora_B", "lora.up")
    for name, tensors in (("plain", weights), ("older", older)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / FILE)
    other = wan.pipeline()
    for name in ("options", "plain", "older"):
        check_lora(other, str(tmp_path / name))
        other.load_lora_weights(str(tmp_path / name), adapter_name=name)


def test_a_pipeline_that_takes_none(weights):
    with pytest.raises(ValueError, match="object takes no LoRA, got x"):
        check_lora(object(), "x")


def test_loading_refuses_both(pipe, weights, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    save_file(renamed(weights, ".1.", ".9."), tmp_path / FILE)
    loading = Loading(device="cpu", loras=(f"{tmp_path}:0.5",))
    with pytest.raises(ValueError, match="does not fit WanTransformer3DModel"):
        load(tmp_path / "model", loading)
    [file] = (tmp_path / "model" / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    name = "blocks.0.attn1.to_q.weight"
    save_file(tensors | {name: tensors[name].int()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{file.name} holds weights of I32: {name}$"):
        load(tmp_path / "model", Loading(device="cpu"))
