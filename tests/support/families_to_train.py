"""Tiny trainings of each family that low memory is tried on."""

import torch
from support import finetuning as ft
from support import hunyuan, wan
from support.runs import state


class HunyuanClips(ft.Clips):
    """Clips for the tiny HunyuanVideo."""

    def latents(self, index, frames):
        return super().latents(index, frames)[: hunyuan.CHANNELS]

    def conditions(self, index, text=0):
        given = hunyuan.inputs(1, 4, 8, lengths=(5 + index % 3,))
        names = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"
        return {name: given[name][0] for name in names}

    @property
    def empty(self):
        return self.conditions(99)


# As wide as blocks of 4-bit weights.
FAMILIES = {
    "wan": (lambda: wan.transformer(num_layers=4, attention_head_dim=32, ffn_dim=64), ft.Clips),
    "hunyuan": (
        lambda: hunyuan.transformer(attention_head_dim=32, rope_axes_dim=(8, 12, 12)),
        HunyuanClips,
    ),
}


def trained(out, family="wan", resume=False, transformer=None, **fields):
    """Tensors of the state after a training."""
    made, clips = FAMILIES[family]
    given = ft.config(out, **fields)
    model = ft.model(transformer=transformer or ft.loaded(made(), given))
    ft.train(given, clips(), model=model, resume=resume)
    return state(out).tensors


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert any(x.abs().max() > 0 for name, x in a.items() if "lora_B" in name)


def gradients(family, transformer):
    if family == "hunyuan":
        return hunyuan.gradients(transformer, 3, 4, 8)
    transformer.zero_grad()
    wan.forward(transformer, 3, 4, 8).square().mean().backward()
    return {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}
