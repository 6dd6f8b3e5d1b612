"""Gates of VSA in ComfyUI: of published files, with the hidden states of each block."""

import pytest
import torch
from safetensors.torch import save_file
from support import wan
from support.comfyui_host import (
    BLOCKS,
    COMFYUI,
    HEADS,
    WIDTH,
    WanModel,
    Weighted,
    computed_by_comfyui,
    latents,
)
from support.single_files import transformer_state
from torch import nn

import gen_accel
from gen_accel import VSA, VideoShape, attach
from gen_accel.attention_processors.attached.trained import keep_trained

GRID = VideoShape(5, 8, 8)


class Network(WanModel):
    """With the layers of Wan's self-attention."""

    def __init__(self, **said):
        super().__init__(**said)
        for block in self.blocks:
            block.self_attn = nn.ModuleDict({one: nn.Linear(WIDTH, WIDTH) for one in "qkvo"})
            block.self_attn["norm_q"] = nn.RMSNorm(WIDTH, eps=1e-6)

    def forward(self, x, timestep, context, control=None, transformer_options=None, attend=None):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            transformer_options["block_index"] = i
            own, hidden = block.self_attn, tokens * 2
            q, k, v = (own[name](hidden) for name in "qkv")
            q = own["norm_q"](q)
            if attend is None:
                out = self.attention(q, k, v, transformer_options=transformer_options)
            else:
                out = attend(q, k, v, hidden, i)
            tokens = tokens + own["o"](out)
        return tokens


Network.__name__ = "WanModel"


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def gates(name="blocks.{}.to_gate_compress.{}"):
    """As FastWan's checkpoint names them."""
    return {
        name.format(i, part): drawn(*shape, seed=10 * i + len(shape))
        for i in range(BLOCKS)
        for part, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))
    }


def adapter():
    """FastVideo's, in diffusers' names."""
    held = {
        "blocks.0.attn1.to_q.lora_A.weight": drawn(2, WIDTH, seed=1),
        "blocks.0.attn1.to_q.lora_B.weight": drawn(WIDTH, 2, seed=2),
        "blocks.0.attn1.to_out.0.diff_b": drawn(WIDTH, seed=3),
        "blocks.1.attn1.norm_q.diff": drawn(WIDTH, seed=4),
    }
    return held | gates("blocks.{}.attn1.to_gate_compress.set_{}")


def by_hand(model, x, critical, strength=1.0):
    """The definition, by the public function."""

    def attend(q, k, v, hidden, layer):
        held = {name: value * strength for name, value in gates().items()}
        weight, bias = (held[f"blocks.{layer}.to_gate_compress.{x}"] for x in ("weight", "bias"))
        gate = nn.functional.linear(hidden, weight, bias)
        heads = [x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (q, k, v, gate)]
        options = {"video": GRID, "method": VSA(critical), "gate": heads[3]}
        return gen_accel.attention(*heads[:3], **options).transpose(1, 2).flatten(2)

    return model(x, None, None, transformer_options={}, attend=attend)


@pytest.mark.parametrize(("inputs", "critical"), [({}, 0.2), ({"keep_percent": 50.0}, 0.5)])
def test_a_model_computes_with_the_gates_of_its_file(load, inputs, critical):
    network = Network()
    model, x = Weighted(network), latents(batch=2)
    patched = load(model, {**gates(), "blocks.0.ffn.0.weight": torch.ones(2)}, **inputs)
    assert patched.patches == {}
    with torch.no_grad():
        expected = by_hand(network, x, critical)
        assert torch.allclose(patched.forward(x), expected, atol=1e-5)
        assert not torch.allclose(model.forward(x), expected, atol=1e-3)
    assert not any(one._forward_pre_hooks for one in network.modules())


def test_an_adapter_is_loaded_whole(load):
    network, held = Network(), adapter()
    patched = load(Weighted(network), held, "FastH3-VSA.safetensors", 0.5)
    found = {key: one for key, [(strength, one)] in patched.patches.items()}
    name = "diffusion_model.blocks.{}.self_attn.{}"
    low = found.pop(name.format(0, "q.weight"))
    up, down, alpha = low.weights[:3]
    assert torch.equal(up, held["blocks.0.attn1.to_q.lora_B.weight"])
    assert torch.equal(down, held["blocks.0.attn1.to_q.lora_A.weight"])
    assert alpha == 2
    differences = {
        name.format(0, "o.bias"): held["blocks.0.attn1.to_out.0.diff_b"],
        name.format(1, "norm_q.weight"): held["blocks.1.attn1.norm_q.diff"],
    }
    assert {key: kind for key, (kind, _) in found.items()} == dict.fromkeys(differences, "diff")
    for key, x in differences.items():
        assert torch.equal(found[key][1][0], x)
    x = latents()
    with torch.no_grad():
        assert torch.allclose(patched.forward(x), by_hand(network, x, 0.1, 0.5), atol=1e-5)


REFUSED = {
    "no gates": ({"blocks.0.attn1.to_q.diff_b": drawn(WIDTH, seed=0)}, {}, "no gates of VSA"),
    "branches of SLA": (
        {"blocks.0.self_attn.attn_op.local_attn.proj_l.weight": drawn(16, 16, seed=0)},
        {},
        "no gates of VSA",
    ),
    "another layer": (
        adapter() | {"blocks.0.attn1.to_z.diff_b": drawn(WIDTH, seed=0)},
        {},
        r"no place for 1 of its 11 tensors.*blocks\.0\.attn1\.to_z\.diff_b",
    ),
    "another size": (
        adapter() | {"blocks.0.attn1.to_out.0.diff_b": drawn(3, seed=0)},
        {},
        r"or in another size: blocks\.0\.attn1\.to_out\.0\.diff_b",
    ),
    "half a LoRA": (
        {k: x for k, x in adapter().items() if "lora_B" not in k},
        {},
        r"self_attn\.q\.weight",
    ),
    "another width": (
        {"blocks.0.to_gate_compress.weight": drawn(8, 8, seed=0)},
        {},
        r"block 0 of fastwan.safetensors is \(8, 8\), this model has \(32, 32\)",
    ),
    "another block": (
        {"blocks.9.to_gate_compress.weight": drawn(WIDTH, WIDTH, seed=0)},
        {},
        "block 9 .* no such block",
    ),
    "a name that tells nothing": (gates(), {"name": "mine.safetensors"}, "set keep_percent"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_used_is_refused(load, case):
    tensors, inputs, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        load(Weighted(Network()), tensors, **inputs)


def test_other_attention_on_gates_is_refused(pack, load):
    patched = load(Weighted(Network()), gates())
    node = pack.nodes.SparseAttentionNode()
    with pytest.raises(ValueError, match=r"gates of Load Gates .* take one of the two nodes off"):
        node.patch(patched, "radial", 30.0, 0.2, 1.0)


def test_a_model_that_does_not_number_its_blocks_is_refused(load):
    class Unnumbered(Network):
        def attention(self, q, k, v, **options):
            options["transformer_options"].pop("block_index")
            return super().attention(q, k, v, **options)

    Unnumbered.__name__ = "WanModel"
    with pytest.raises(ValueError, match="number of the block is not known, which gates need"):
        load(Weighted(Unnumbered()), gates()).forward(latents())


def test_a_model_that_shows_no_hidden_states_is_refused(load):
    class Hidden(Network):
        def forward(self, *args, **options):
            for block in self.blocks:
                block.self_attn["q"]._forward_pre_hooks.clear()
            return super().forward(*args, **options)

    Hidden.__name__ = "WanModel"
    patched = load(Weighted(Hidden()), gates())
    with pytest.raises(ValueError, match="gate of block 0 found no hidden states"):
        patched.forward(latents())


@pytest.mark.slow
@pytest.mark.skipif(not COMFYUI, reason="COMFYUI_DIR names no checkout of ComfyUI")
def test_comfyui_s_own_wan_computes_as_diffusers(tmp_path):
    model, given = wan.transformer(), wan.inputs(batch=1)
    side = wan.HEADS * wan.HEAD_DIM
    held = {
        f"blocks.{i}.to_gate_compress.{part}": drawn(*shape, seed=10 * i + len(shape))
        for i in range(wan.LAYERS)
        for part, shape in (("weight", (side, side)), ("bias", (side,)))
    }
    keep_trained(model, held, "fastwan")
    with torch.no_grad():
        dense = model(**given, return_dict=False)[0]
        with attach(model, VSA(0.3)):
            expected = model(**given, return_dict=False)[0]
    save_file(held, tmp_path / "fastwan.safetensors")
    save_file(transformer_state(wan.transformer()), tmp_path / "model.safetensors")
    call = {
        "latents": given["hidden_states"],
        "context": given["encoder_hidden_states"],
        "timestep": given["timestep"],
        "heads": torch.tensor(wan.HEADS),
    }
    save_file({name: x.contiguous() for name, x in call.items()}, tmp_path / "given.safetensors")
    found = computed_by_comfyui("comfyui_gated.py", tmp_path)
    torch.testing.assert_close(found["dense"], dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["gated"], expected, rtol=1e-4, atol=1e-4)
    assert (found["gated"] - found["dense"]).abs().max() > 1e-2
