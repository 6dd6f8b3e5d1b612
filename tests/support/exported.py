"""Tiny LoRAs of the families that train, and what they do in ComfyUI."""

from pathlib import Path

import torch
from support import finetuning as ft
from support.tiny import trainings

from gen_accel.attention_processors.attached.recipe import Recipe, sizes
from gen_accel.lora.adapters import fields_of_lora
from gen_accel.lora.artefact import add_lora, lora_state, write_lora


def model_of_family(family: str):
    """The transformer of its first pipeline that trains, with feed-forward layers as wide as all
    published ones have them."""
    made = next(one for name, one in trainings() if name == family).pipeline().transformer
    if made.config.get("mlp_ratio", 4.0) == 4.0:
        return made
    torch.manual_seed(0)
    return type(made).from_config({**made.config, "mlp_ratio": 4.0})


def lora_of(transformer, folder: Path, seed: int = 0, part: str = "transformer", **fields) -> Path:
    """Write a LoRA of random weights on all layers that train, as a training writes it."""
    given = {"method": "radial", "settings": (), "targets": ("attention", "feed_forward")}
    config = ft.config("unused", **(given | fields))
    recipe = Recipe(
        base_model="demo",
        transformer=sizes(transformer),
        part=part,
        method=config.method,
        options={},
        schedule={"dense_layers": config.dense_layers},
        rope="none",
        trained_frames=5,
        frames=9,
        height=32,
        width=64,
        stages=("9:4",),
        steps=4,
        objective=config.objective,
        data="",
        **fields_of_lora(config),
    )
    add_lora(transformer, config, recipe)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in lora_state(transformer).values():
            x.copy_(torch.randn(x.shape, generator=g))
    return write_lora(folder, transformer, lora_state(transformer), None, recipe)


def changes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ComfyUI adds to each weight of its model: alpha / rank B A."""
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            up, alpha = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.alpha"]
            weight = f"{name.removeprefix('diffusion_model.')}.weight"
            found[weight] = alpha / len(down) * (up @ down)
    return found
