"""FastH3's gates in ComfyUI: the same numbers as in diffusers, from the same file."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from support import comfyui_h3 as h3
from support.comfyui_host import (
    COMFYUI,
    Adapter,
    Unpacked,
    WanModel,
    Weighted,
    computed_by_comfyui,
)
from support.tiny import minimax_h3 as tiny
from torch import nn

from gen_accel import VSA, attach
from gen_accel.attention_processors.attached.trained import keep_trained

KEPT = 30.0  # percent


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def gates(model, name="transformer_blocks.{}.attn.to_gate_compress.set_weight"):
    """Name layers as FastVideo's adapter does."""
    shape = model.transformer_blocks[0].attn.to_q.weight.shape
    return {name.format(i): drawn(*shape, seed=i) for i in range(len(model.transformer_blocks))}


class Unknown(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)


@pytest.fixture(scope="module")
def model():
    return tiny.transformer()


OF_A_MODEL = {"text": "blocks.{}.attn.to_gate_compress.weight"}  # names there, of an adapter else


@pytest.mark.parametrize("layout", h3.LAYOUTS)
def test_the_attention_is_that_of_diffusers(layout, model, load):
    network, held = h3.alike(model), gates(model)
    names = OF_A_MODEL.get(layout)
    file = held if names is None else {**gates(model, names), "blocks.0.norm1.weight": drawn(3)}
    given, call = h3.case(layout)
    keep_trained(model, held, "FastH3")
    count = len(given["hidden_states"][0]) - 320
    with torch.no_grad():
        dense = model(**given, return_dict=False)
        with attach(model, VSA(KEPT / 100)):
            exact = model(**given, return_dict=False)
        plain = Weighted(network, Unpacked)
        found = h3.called(load(plain, file, "fasth3.safetensors", keep_percent=KEPT), *call)
        stays = h3.called(plain, *call)
    for i, rest in enumerate((count, len(given["audio_hidden_states"][0]) - 2 * tiny.SOUND)):
        torch.testing.assert_close(stays[i], dense[i][0, rest:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[i], exact[i][0, rest:], rtol=1e-5, atol=1e-5)
        assert (found[i] - stays[i]).abs().max() > 1e-2


def test_a_model_that_comfyui_loads_with_its_gates_computes_with_them(model, load):
    network, held = h3.alike(model), gates(model)
    for block, x in zip(network.blocks, held.values(), strict=True):
        block.attn.to_gate_compress = nn.Linear(*x.T.shape, bias=False)
        block.attn.to_gate_compress.weight.data.copy_(2 * x)
    # In the file they have 8 bits, which ComfyUI alone reads.
    name = "model.diffusion_model.blocks.{}.attn.to_gate_compress.weight"
    file = {key: x.to(torch.int8) for key, x in gates(model, name).items()}
    file |= {f"{key}_scale": torch.ones(32) for key in file}
    patched = load(Weighted(network, Unpacked), file, "fasth3_pruned_int8.safetensors", 0.5)
    assert patched.patches == {}
    keep_trained(model, held, "FastH3")
    given, call = h3.case("key frames")
    with torch.no_grad(), attach(model, VSA(0.1)):
        exact = model(**given, return_dict=False)[0][0, -320:]
        torch.testing.assert_close(h3.called(patched, *call)[0], exact, rtol=1e-5, atol=1e-5)


def adapter(model):
    """Make FastVideo's kind, in diffusers' names: products in the first block and the refiner,
    whole differences in the second block, of all else, and the gates."""
    held = gates(model)
    for seed, (name, layer) in enumerate(model.named_modules()):
        if isinstance(layer, nn.Linear) and re.match(r"(transformer|.*refiner)_blocks\.0", name):
            rows, width = layer.weight.shape
            held[f"{name}.lora_A.weight"] = drawn(2, width, seed=seed)
            held[f"{name}.lora_B.weight"] = drawn(rows, 2, seed=seed + 500)
        elif isinstance(layer, (nn.Linear, nn.RMSNorm)):
            held[f"{name}.diff"] = drawn(*layer.weight.shape, seed=seed)
        if getattr(layer, "bias", None) is not None:
            held[f"{name}.diff_b"] = drawn(*layer.bias.shape, seed=seed)
    return held


def test_an_adapter_changes_the_weights_as_in_diffusers(model, load):
    network, held = h3.alike(model), adapter(model)
    tuned = copy.deepcopy(model)
    weights = dict(tuned.named_parameters())
    with torch.no_grad():
        for name, x in held.items():
            layer, _, part = name.rpartition(".")
            if name.endswith("lora_A.weight"):
                layer = name.removesuffix(".lora_A.weight")
                weights[f"{layer}.weight"] += 0.5 * held[f"{layer}.lora_B.weight"] @ x
            elif part in ("diff", "diff_b"):
                weights[f"{layer}.{'bias' if part == 'diff_b' else 'weight'}"] += 0.5 * x
    patched = load(Weighted(network, Unpacked), held, "fasth3.safetensors", 0.5)
    state = network.state_dict()
    for key, [(strength, one)] in patched.patches.items():
        x = state[key.removeprefix("diffusion_model.")]
        if isinstance(one, Adapter):
            up, down, alpha = one.weights[:3]
            x += strength * alpha / len(down) * (up @ down)
        else:
            x += strength * one[1][0]
    found = h3.convert({name: x.clone() for name, x in state.items()}, None)
    assert found.keys() == weights.keys()
    for name, x in weights.items():
        torch.testing.assert_close(found[name], x.data)
    keep_trained(tuned, gates(model), "FastH3", 0.5)
    given, call = h3.case("key frames")
    with torch.no_grad(), attach(tuned, VSA(0.1)):
        exact = tuned(**given, return_dict=False)[0][0, -320:]
        torch.testing.assert_close(h3.called(patched, *call)[0], exact, rtol=1e-4, atol=1e-4)


REFUSED = {
    "a block without a gate": (
        lambda held: held.pop("transformer_blocks.1.attn.to_gate_compress.set_weight"),
        "lacks the gates of 1 of the 2 blocks of MiniMaxH3Model, of block 1 first",
    ),
    "a gate of another width": (
        lambda held: held.update(
            {"transformer_blocks.0.attn.to_gate_compress.set_weight": drawn(32, 8, seed=0)}
        ),
        r"the gate of block 0 of .* is \(32, 8\), this model has \(32, 32\)",
    ),
    "a LoRA on a gate": (
        lambda held: held.update(
            {"transformer_blocks.0.attn.to_gate_compress.lora_A.weight": drawn(2, 32, seed=0)}
        ),
        "no place for 1 of its",
    ),
    "half of a product": (
        lambda held: held.pop("transformer_blocks.0.attn.to_k.lora_B.weight"),
        r"in another size: diffusion_model\.blocks\.0\.attn\.qkv_proj\.weight",
    ),
    "gates that are quantised": (
        lambda held: [
            held.clear(),
            held.update(
                {
                    "blocks.0.attn.to_gate_compress.weight": torch.ones(32, 32),
                    "blocks.0.attn.to_gate_compress.weight_scale": torch.ones(32),
                }
            ),
        ],
        r"holds its gates quantised \(blocks\.0\.attn\.to_gate_compress\.weight_scale\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_fit_is_refused(case, model, load):
    change, said = REFUSED[case]
    held = adapter(model)
    change(held)
    with pytest.raises(ValueError, match=said):
        load(Weighted(h3.alike(model), Unpacked), held, "fasth3.safetensors")


def test_another_model_is_refused(model, load):
    held = adapter(model)
    with pytest.raises(ValueError, match="does not fit this model, which has no place for"):
        load(Weighted(WanModel()), held, "fasth3.safetensors")
    with pytest.raises(ValueError, match="have no place in Unknown, only in Wan and MiniMax-H3"):
        load(Weighted(Unknown()), held, "fasth3.safetensors")
    network = h3.alike(model)
    network.register_buffer("adaln_t_table", torch.zeros(2, 16))
    network.blocks[0].adaln_proj.linear = nn.Linear(8, 576)
    with pytest.raises(ValueError, match="is pruned: load the whole one"):
        load(Weighted(network, Unpacked), held, "fasth3.safetensors")


def unsaid(network):
    network.blocks[0].register_forward_pre_hook(
        lambda block, args: args[1].pop("minimax_h3_layout") and None
    )


def elsewhere(network):
    network.blocks[1].attn.register_forward_pre_hook(
        lambda layer, args: args[2].pop("optimized_attention_override") and None
    )


def otherwise(network):
    order = SimpleNamespace(segments=[(0, 320, "video"), (320, 467, "text")])
    network.blocks[0].register_forward_pre_hook(
        lambda block, args: args[1].update(minimax_h3_layout=order)
    )


USELESS = {
    unsaid: r"words, pictures and sound, .* update ComfyUI to 0\.35",
    elsewhere: "gate of block 1 was not used: another node computes its attention",
    otherwise: r"gate of block 0 has no use in attention that stays dense \(467 tokens",
}


@pytest.mark.parametrize("change", USELESS)
def test_a_gate_that_would_not_be_used_is_refused(change, model, load):
    network = h3.alike(model)
    patched = load(Weighted(network, Unpacked), gates(model), "fasth3.safetensors")
    change(network)
    with torch.no_grad(), pytest.raises(ValueError, match=USELESS[change]):
        h3.called(patched, *h3.case("key frames")[1])


@pytest.mark.slow
@pytest.mark.skipif(not COMFYUI, reason="COMFYUI_DIR names no checkout of ComfyUI")
def test_comfyui_s_own_minimax_h3_computes_as_diffusers(model, tmp_path):
    network, held = h3.alike(model), gates(model)
    keep_trained(model, held, "FastH3")
    save_file(held, tmp_path / "fasth3.safetensors")
    state = network.state_dict() | {"rope.inv_freq": network.rope.inv_freq}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "sizes.json").write_text(json.dumps(h3.sizes(model.config)))
    exact, calls = {}, {}
    for layout, (_, _, _, payload) in h3.LAYOUTS.items():
        given, (video, sound, text, about) = h3.case(layout)
        with torch.no_grad():
            exact[f"{layout}.dense"] = model(**given, return_dict=False)
            with attach(model, VSA(KEPT / 100)):
                exact[f"{layout}.gated"] = model(**given, return_dict=False)
        tensors = {"x": video, "sound": sound, "text": text, "sigma": torch.tensor(h3.SIGMA)}
        for kind in ("video", "audio"):
            tensors |= {f"{kind}{i}": x for i, x in enumerate(about[f"cond_{kind}_latents"])}
        save_file(
            {k: x.contiguous() for k, x in tensors.items()}, tmp_path / f"{layout}.safetensors"
        )
        calls[layout] = payload
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    found = computed_by_comfyui("comfyui_gated_h3.py", tmp_path)
    for name, (video, sound) in exact.items():
        rows = -tiny.rows(found[f"{name}.0"]), -found[f"{name}.1"][0].flatten(1).T
        for here, there in zip(rows, (video, sound), strict=True):
            torch.testing.assert_close(here, there[0, -len(here) :], rtol=1e-4, atol=1e-4)
