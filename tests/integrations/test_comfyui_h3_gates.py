"""FastH3's gates in ComfyUI: the same numbers as in diffusers, from the same file."""

import pytest
import torch
from support import comfyui_h3 as h3
from support.comfyui_host import WanModel, Weighted
from support.tiny import minimax_h3 as tiny

from gen_accel import VSA, attach
from gen_accel.attention_processors.attached.trained import keep_trained
from gen_accel.pipelines.generation.lora_file import split_whole

KEPT = 30.0  # percent


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def gates(model, name="transformer_blocks.{}.attn.to_gate_compress.set_weight"):
    """As FastVideo's adapter names them."""
    shape = model.transformer_blocks[0].attn.to_q.weight.shape
    return {
        name.format(i): drawn(*shape, seed=i) for i in range(len(model.transformer_blocks))
    }


@pytest.fixture(scope="module")
def model():
    return tiny.transformer()


@pytest.mark.parametrize("layout", h3.LAYOUTS)
def test_the_attention_is_that_of_diffusers(layout, model, load):
    network, held = h3.alike(model), gates(model)
    given, call = h3.case(layout)
    keep_trained(model, held, "FastH3")
    count = len(given["hidden_states"][0]) - 320
    with torch.no_grad():
        dense = model(**given, return_dict=False)
        with attach(model, VSA(KEPT / 100)):
            exact = model(**given, return_dict=False)
        plain = h3.patcher(network)
        found = h3.called(load(plain, held, "fasth3.safetensors", keep_percent=KEPT), *call)
        stays = h3.called(plain, *call)
    for i, rest in enumerate((count, len(given["audio_hidden_states"][0]) - 2 * tiny.SOUND)):
        torch.testing.assert_close(stays[i], dense[i][0, rest:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[i], exact[i][0, rest:], rtol=1e-5, atol=1e-5)
        assert (found[i] - stays[i]).abs().max() > 1e-2
