"""Linear layers by oneDNN."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from peft import LoraConfig
from support.checks import assert_no_worse
from support.wan import gradients, inputs, transformer
from torch import nn

from gen_accel.pipelines import linear_layers
from gen_accel.pipelines.linear_layers import (
    PACKED,
    Packed,
    PackedGELU,
    PackedLinear,
    pack_linears,
    product,
    words_of,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not linear_layers.onednn_gain(64, 128, "tanh", 1), reason="this PyTorch lacks oneDNN"
    ),
]
LORA = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v", "ffn.net.0.proj"])


@pytest.fixture(autouse=True)
def _rows(monkeypatch):
    monkeypatch.setattr(linear_layers, "FEWEST_ROWS", 16)


def forward(model):
    with torch.no_grad():
        return model(**inputs(), return_dict=False)[0]


def close(found, plain):
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    return not torch.equal(found, plain)  # both ran


@pytest.mark.parametrize("shape", [(3, 50), (128,), (1, 301)], ids=str)
@pytest.mark.parametrize(("inner", "outer"), [(64, 128), (37, 51), (128, 8)])
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_answer(shape, inner, outer, gelu, bias):
    torch.manual_seed(0)
    layer = nn.Linear(inner, outer, bias=bias).requires_grad_(False)
    x = torch.randn(*shape, inner)

    def plain(x, *given):
        out = F.linear(x, *given)
        return out if gelu is None else F.gelu(out, approximate=gelu)

    given = [one for one in (layer.weight, layer.bias) if one is not None]
    exact, low = plain(x.double(), *(one.double() for one in given)), plain(x, *given)
    vars(layer)[PACKED], layer.__class__ = Packed(), PackedLinear
    found = product(layer, x, gelu=gelu)
    assert found.shape == low.shape
    # The polynomial of oneDNN's GELU is good for 1e-6 or so.
    assert_no_worse(found, low, exact, more=0.0 if gelu is None else 2e-6)


def test_a_model_and_nothing_of_it_after():
    model = transformer()
    stock, state = forward(model), {name: x.clone() for name, x in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    inside = [sorted(vars(module)) for module in model.modules()]
    with pack_linears(model, "onednn") as layers:
        assert layers.is_on
        assert close(forward(model), stock)
        count = kinds.count(nn.Linear)
        assert words_of(model) == f"{count} linear layers by oneDNN, 2 with their GELU"
        assert {*model.state_dict()} == {*state}
    assert not layers.is_on
    assert [type(module) for module in model.modules()] == kinds
    assert [sorted(vars(module)) for module in model.modules()] == inside
    assert torch.equal(forward(model), stock)
    assert words_of(model) == ""
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_layers_that_another_packed_stay_packed():
    model = transformer()
    with pack_linears(model, "onednn"):
        with pack_linears(model, "onednn") as second:
            assert not second.is_on
        assert words_of(model)


CHANGES = {
    "in place": lambda layer: layer.weight.add_(0.25),
    "its data, in place": lambda layer: layer.weight.data.mul_(-1),  # which counts no version
    "a row": lambda layer: layer.weight.data[3].mul_(1 + 1e-6),
    "other data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "a state": lambda layer: layer.load_state_dict(
        {name: x + 1 for name, x in layer.state_dict().items()}
    ),
    "another weight": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 3)),
    "its bias": lambda layer: layer.bias.add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_are_never_stale(change):
    torch.manual_seed(0)
    layer, x = PackedLinear(32, 24), torch.randn(64, 32)
    vars(layer)[PACKED] = Packed()
    with torch.no_grad():
        for _ in range(3):
            before = layer(x)
            assert close(before, F.linear(x, layer.weight, layer.bias)) in (True, False)
            CHANGES[change](layer)
            after = layer(x)
            assert not torch.equal(before, after)
            torch.testing.assert_close(
                after, F.linear(x, layer.weight, layer.bias), rtol=1e-6, atol=1e-6
            )


def test_a_lora_beside_the_weights_and_in_them():
    model = transformer()
    model.add_adapter(LORA)
    for name, x in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(x, std=0.3, generator=torch.Generator().manual_seed(3))
    beside = forward(model)
    with pack_linears(model, "onednn"):
        close(forward(model), beside)
        model.fuse_lora()
        close(forward(model), beside)
        model.unfuse_lora()
        close(forward(model), beside)
        model.disable_adapters()
        without = forward(model)
        assert (without - beside).abs().max() > 1e-3
    close(forward(model), without)
    model.fuse_lora()


def test_training_is_as_without():
    model = transformer()
    plain = gradients(model)
    with pack_linears(model, "onednn"):
        found = gradients(model)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_in_a_graph_and_under_autocast_it_is_torch():
    model = transformer()
    stock = forward(model)
    with pack_linears(model, "onednn"), torch.autocast("cpu", torch.bfloat16):
        low = forward(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(forward(model), low)
    with pack_linears(model, "onednn"):
        model.compile(backend="eager", fullgraph=True)
        assert torch.equal(forward(model), stock)


def test_copies_work_by_themselves():
    model = transformer()
    with pack_linears(model, "onednn"):
        packed = forward(model)
        twin = copy.deepcopy(model)
    assert torch.equal(forward(twin), packed)
    with torch.no_grad():
        for x in twin.parameters():
            x.mul_(0.5)
    assert not torch.equal(forward(twin), packed)


def test_what_it_leaves_alone(monkeypatch):
    class Quantised(nn.Linear):
        """Stands for layers of other packages."""

    model = transformer()
    own, hooked = model.blocks[0].attn1.to_q, model.blocks[1].ffn.net[2]
    own.__class__, hooked._hf_hook = Quantised, object()
    tuned = model.blocks[0].ffn.net[0].proj.register_forward_hook(lambda *_: None)
    with pack_linears(model, "onednn"):
        assert type(own) is Quantised
        assert type(hooked) is nn.Linear
        seen = []
        model.blocks[0].ffn.net[0].proj.register_forward_hook(lambda *given: seen.append(1))
        forward(model)
        assert seen == [1]  # GELU is not joined to a layer that is looked at
    tuned.remove()
    for gain, on in ((1.2, False), (2.0, True)):
        monkeypatch.setattr(linear_layers, "onednn_gain", lambda *_, gain=gain: gain)
        with pack_linears(model) as layers:
            assert layers.is_on is on
            assert layers.gain == gain
    assert not pack_linears(model, "torch").is_on
    monkeypatch.setattr(linear_layers, "onednn_gain", lambda *_: 0.0)
    with pytest.raises(ValueError, match=r"onednn.* this PyTorch lacks it"):
        pack_linears(model, "onednn")
    half = model.to(torch.bfloat16)
    assert not pack_linears(half).is_on
    with pytest.raises(ValueError, match=r"onednn.* not in fp32 on the CPU"):
        pack_linears(half, "onednn")
    with pytest.raises(ValueError, match="must be one of auto, torch, onednn, got 'mkl'"):
        pack_linears(model, "mkl")


def test_both_kinds_of_gelu_are_joined():
    torch.manual_seed(0)
    x = torch.randn(2, 40, 16)
    for kind in ("none", "tanh"):
        layer = GELU(16, 48, approximate=kind).requires_grad_(False)
        plain = layer(x)
        vars(layer.proj)[PACKED], layer.proj.__class__ = Packed(), PackedLinear
        layer.__class__ = PackedGELU
        torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=2e-6)
