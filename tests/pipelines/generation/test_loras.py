"""LoRAs that fit whole, and all that fit in part, which diffusers would load."""

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support import wan

from gen_accel.pipelines.generation.loading import Loading, check_lora, load, lora_source

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


def by_kohya(weights, layers=("blocks_{}_self_attn_q", "blocks_{}_ffn_2"), alpha=1.0):
    """Weights in kohya's names, of the original model's layers or of diffusers', with alphas."""
    found = {}
    for key, x in weights.items():
        module, _, matrix = key.removeprefix("transformer.").partition(".lora_")
        block = module.split(".")[1]
        name = "lora_unet_" + layers["ffn" in module].format(block)
        found[f"{name}.lora_{'down' if matrix[0] == 'A' else 'up'}.weight"] = x
        if alpha is not None:
            found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


BY_DIFFUSERS = ("blocks_{}_attn1_to_q", "blocks_{}_ffn_net_2")
ELSEWHERE = {
    "kohya": lambda w: by_kohya(w, alpha=2.0),
    "kohya without alpha": lambda w: by_kohya(w, alpha=None),
    "kohya by diffusers' layers": lambda w: by_kohya(w, BY_DIFFUSERS, 2.0),
    "ComfyUI by diffusers' layers": lambda w: renamed(w, "transformer.", "diffusion_model."),
}


@pytest.mark.parametrize("names", ELSEWHERE)
def test_names_of_other_programs_are_loaded(pipe, weights, tmp_path, names):
    """Hold each to the same LoRA in diffusers' names, of rank 2 and alpha 2, to the bit."""
    pipe.save_pretrained(tmp_path / "model")
    outputs = []
    for name, tensors in (("own", weights), ("other", ELSEWHERE[names](weights))):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        loading = Loading(device="cpu", loras=(f"{tmp_path / name}.safetensors",))
        outputs.append(wan.forward(load(tmp_path / "model", loading).transformer))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], wan.forward(pipe.transformer))


def test_alpha_over_rank_scales_kohyas(pipe, weights, tmp_path):
    save_file(by_kohya(weights, alpha=1.0), tmp_path / FILE)
    home, _ = check_lora(pipe, str(tmp_path))
    assert home.keys() == weights.keys()
    assert all(torch.equal(home[k], x / 2 if "lora_A" in k else x) for k, x in weights.items())


COMFYUI = "diffusion_model.blocks.{}.self_attn.q.lora_"
FOREIGN = {
    "another layer": (lambda w: by_kohya(w, ("blocks_{}_x", "y")), "names that WanTransformer3D"),
    "mixed": (
        lambda w: by_kohya(w) | {k: x + 1 for k, x in w.items()},
        "names that WanTransformer3DModel has no place for",
    ),
    "alphas": (
        lambda w: by_kohya(w) | {"lora_unet_blocks_0_ffn_2.alpha": torch.ones(2)},
        r"alpha of blocks\.0\.ffn\.net\.2 of .* must be one number",
    ),
    "a block": (
        lambda w: {COMFYUI.format("9" * 8) + "A.weight": torch.ones(2, 32)},
        "a block that",
    ),
    "escapes": (
        lambda w: {COMFYUI.format("\x1b[31m") + "A.weight": torch.ones(2, 32)},
        r"a block that no model has: '.*\\x1b",
    ),
    "no block": (lambda w: {"diffusion_model.x.lora_A.weight": torch.ones(2, 2)}, "whole or in"),
    "rank 0": (
        lambda w: {f"{Q}A.weight": torch.ones(0, 32), f"{Q}B.weight": torch.ones(32, 0)},
        "1 are of another size",
    ),
    "3 axes": (lambda w: w | {f"{Q}A.weight": torch.ones(2, 32, 1)}, "1 are of another size"),
    "NaN": (lambda w: {k: x * float("nan") for k, x in w.items()}, "holds NaN or infinity in"),
    "no layer": (lambda w: renamed(w, ".0.attn1.to_q", ""), "1 are of another size, such as bl"),
    "lengths": (
        lambda w: w | {f"{Q}magnitude_vector": torch.ones(3)},
        "1 have lengths or biases alone",
    ),
}


@pytest.mark.parametrize("how", FOREIGN)
def test_names_that_nothing_reads_are_refused(pipe, weights, tmp_path, how):
    change, message = FOREIGN[how]
    save_file(change(weights), tmp_path / FILE)
    with pytest.raises(ValueError, match=message):
        check_lora(pipe, str(tmp_path))


OPTIONS = {
    "5": "must hold names with values, got 5",
    "{": "is no JSON",
    '{"transformer.r": 2}': "has no target_modules",
    '{"transformer.target_modules": 5}': "lora_adapter_metadata of .*: target_modules of it must",
    '{"transformer.target_modules": [5]}': "target_modules of .* must be a list of str or str",
    '{"transformer.target_modules": "("}': "is no pattern",
    '{"transformer.target_modules": "(.+)+x"}': "may take for ever to match",
    '{"transformer.target_modules": [], "transformer.r": "2"}': ": r of it must be int, got '2'",
    "{}": "has no target_modules",
    '{"transformer.target_modules": [], "transformer.r": 0}': ": r must be at least 1, got 0",
    '{"transformer.target_modules": [], "transformer.r": 3}': "the rank 3, its weights 2",
    '{"transformer.target_modules": [], "transformer.lora_alpha": null}': "lora_alpha of .* must",
    '{"transformer.target_modules": [], "transformer.r": 2, "transformer.lora_alpha": 1e308}': (
        r"lora_alpha in lora_adapter_metadata of .* must be at most 1000000, got 1e\+308"
    ),
    '{"transformer.target_modules": [], "transformer.nope": 1}': "the unknown 'nope': remove it",
    '{"transformer.target_modules": [], "transformer.modules_to_save": ["a"]}': "changes more",
    '{"transformer.target_modules": [], "transformer.r": 2, "transformer.use_dora": true}': (
        "sets use_dora, and there is no lora_magnitude_vector"
    ),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_another_form_are_refused(pipe, weights, tmp_path, options):
    save_file(weights, tmp_path / FILE, metadata={"lora_adapter_metadata": options})
    with pytest.raises(ValueError, match=OPTIONS[options]) as caught:
        check_lora(pipe, str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_file_of_a_repository(weights, tmp_path, monkeypatch):
    file = tmp_path / "few" / "four_steps.safetensors"
    file.parent.mkdir()
    save_file(weights, file)
    asked = []
    monkeypatch.setattr(
        "gen_accel.pipelines.generation.loading.fetched", lambda *of: asked.append(of) or file
    )
    named = "someone/many-loras:few/four_steps.safetensors"
    assert lora_source(f"{named}:0.5") == (str(file), 0.5)
    assert asked == [("someone/many-loras", "few/four_steps.safetensors")]
    Loading(loras=(named,)).check_loras()
    with pytest.raises(FileNotFoundError, match="no LoRA at many-loras:a"):
        lora_source("many-loras:a.safetensors")


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
