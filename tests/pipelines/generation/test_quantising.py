"""Models whose blocks are held in 8 or 4 bits, by the one option of a run."""

import json

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from support import exported, wan
from support import single_files as files
from torch import nn

import gen_accel
from gen_accel import Radial, registry
from gen_accel.attention_processors.families.weights import linear_names
from gen_accel.measure.clip_settings import read_settings
from gen_accel.pipelines.generation.assemble import assemble
from gen_accel.pipelines.generation.config import GenerateConfig, Loading
from gen_accel.pipelines.generation.loading import load
from gen_accel.pipelines.generation.plan import plan_of

pytestmark = pytest.mark.slow

CLIP = ("--prompt", "a", "--frames", 5, "--height", 32, "--width", 32, "--steps", 1)
CPU = torch.device("cpu")
WIDE = {"attention_head_dim": 64, "ffn_dim": 128}
# Types of a weight that is held, and the largest error of an output, of its largest value.
HELD = {"fp8": ("Parameter", 0.05), "int8": ("Int8Tensor", 0.02), "nf4": ("Params4bit", 0.2)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A pipeline with a LoRA, wide enough for blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("quantising")
    pipe = wan.pipeline(transformer=wan.transformer(**WIDE))
    pipe.save_pretrained(folder / "model")
    exported.lora_of(pipe.transformer, folder / "lora")
    return folder


def forward(pipe):
    with torch.no_grad(), gen_accel.attach(pipe, Radial(), kernel="reference"):
        return wan.forward(pipe.transformer, 3, 4, 8)


@pytest.mark.parametrize("how", HELD)
def test_attention_and_a_lora_go_onto_weights_of_fewer_bits(home, how):
    kind, most = HELD[how]
    made = []
    for loras in ((), (f"{home / 'lora'}:0.01",)):
        plain = load(home / "model", Loading(device="cpu", loras=loras))
        held = load(home / "model", Loading(device="cpu", loras=loras, quantize=how))
        layers = [held.transformer.get_submodule(name) for name in linear_names(held.transformer)]
        weights = [getattr(one, "base_layer", one).weight for one in layers]
        assert {type(one).__name__ for one in weights} == {kind}
        assert weights[0].dtype == (torch.float8_e4m3fn if how == "fp8" else weights[0].dtype)
        assert type(held.transformer.proj_out.weight) is nn.Parameter
        exact, got = forward(plain), forward(held)
        assert 0 < (got - exact).abs().max() < most * exact.abs().max()
        made.append(got)
    assert not torch.equal(*made)  # the LoRA acts


GROUPS = {"onload_device": CPU, "offload_device": CPU, "offload_type": "leaf_level"}
WAYS = {
    "model": lambda model: cpu_offload_with_hook(model, execution_device=CPU),
    "group": lambda model: model.enable_group_offload(**GROUPS),
    "sequential": lambda model: cpu_offload(model, execution_device=CPU),
}


@pytest.mark.parametrize(
    ("how", "way"), [*(("fp8", way) for way in WAYS), ("int8", "model"), ("nf4", "model")]
)
def test_weights_of_fewer_bits_may_wait_in_cpu_memory(home, how, way):
    """As `--offload` does it, with the CPU for the device."""
    pipe = load(home / "model", Loading(device="cpu", quantize=how))
    before = forward(pipe)
    WAYS[way](pipe.transformer)
    assert torch.equal(forward(pipe), before)


def test_a_clip_keeps_how_its_model_was_held(run, home, tmp_path):
    out, args = tmp_path / "a.gif", ("generate", "--model", home / "model", *CLIP)
    run(*args, "--quantize", "fp8", "--out", out)
    run(*args, "--out", tmp_path / "plain.gif")
    assert read_settings(out).fields["quantize"] == "fp8"
    assert "quantize" not in read_settings(tmp_path / "plain.gif").fields
    assert out.read_bytes() != (tmp_path / "plain.gif").read_bytes()
    again = run("generate", "--from-settings", out, "--print-config").stdout
    assert "quantize: fp8" in again
    config = GenerateConfig(model=str(home / "model"), prompt=("a",), quantize="int8")
    assert plan_of(config).request["quantize"] == "int8"


def test_what_cannot_be_quantised_is_refused_before_the_weights(
    home, tmp_path, monkeypatch, no_loading
):
    def planned(model=home / "model", **fields):
        config = GenerateConfig(model=str(model), prompt=("a",), **fields)
        config.check()
        return plan_of(config)

    def refused(words, **fields):
        with pytest.raises((ValueError, ModuleNotFoundError), match=words):
            planned(**fields)

    refused("quantize must be one of .*fp8", quantize="int4")
    words = "quantize int8 does not go with offload group, .* take offload model"
    refused(words, quantize="int8", offload="group")
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    refused(r"quantize nf4 needs bitsandbytes: .*quantized", quantize="nf4")
    monkeypatch.undo()
    gguf = files.write_gguf(wan.transformer(**WIDE), tmp_path / "q8.gguf")
    made = assemble(tmp_path / "made", [str(gguf)], base=home / "model").folder
    refused(
        "original.gguf is quantised already: leave quantize fp8 out", model=made, quantize="fp8"
    )
    config = home / "model/transformer/config.json"
    folder = tmp_path / "bits/transformer"
    folder.mkdir(parents=True)
    (folder.parent / "model_index.json").write_text((home / "model/model_index.json").read_text())
    held = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "torchao"}}
    (folder / "config.json").write_text(json.dumps(held))
    refused("transformer is quantised already", model=folder.parent, quantize="int8")


def test_memory_counts_what_is_held(run, home, tmp_path):
    def parts(*args):
        found = json.loads(run("estimate", "--gpu", "4090", *args, "--json", "-").stdout)
        return found, {one["name"]: one["bytes"] for one in found["parts"]}

    args = ("estimate", "--model", "demo", "--quantize", "nf4", "--offload", "sequential")
    assert "nf4 does not go with offload sequential" in run(*args, code=2).stderr
    plain, known = parts("--model", "Wan2.2-T2V-A14B")
    for how, share in {"fp8": 0.5, "int8": 0.5, "nf4": 0.26}.items():
        found, held = parts("--model", "Wan2.2-T2V-A14B", "--quantize", how)
        for name in ("transformer", "transformer_2"):
            assert share < held[name] / known[name] < share + 0.02
        assert held["text_encoder"] == known["text_encoder"]
        assert found["peak_bytes"]["none"][1] < plain["peak_bytes"]["none"][1]
        assert found["fits_with"] == {"fp8": "model", "int8": "model", "nf4": "model"}[how]
    assert plain["fits_with"] == "group"
    gguf = files.write_gguf(wan.transformer(**WIDE), tmp_path / "q8.gguf")
    made = assemble(tmp_path / "made", [str(gguf)], base=home / "model").folder
    _, held = parts("--model", made, "--frames", "5", "--height", "32", "--width", "32")
    assert held["transformer"] == gguf.stat().st_size
