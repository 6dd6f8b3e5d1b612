"""Tiny LoRAs of the families that train, what they do in ComfyUI, and how diffusers reads original
checkpoints."""

from pathlib import Path

import torch
from diffusers.loaders import single_file_utils as original
from support import finetuning as ft
from support.tiny import trainings

from gen_accel.attention_processors.attached.recipe import Recipe, sizes
from gen_accel.lora.adapters import fields_of_lora
from gen_accel.lora.artefact import add_lora, lora_state, write_lora


def model_of_family(family: str, **config):
    """The transformer of its first pipeline that trains, with feed-forward layers as wide as all
    published ones have them.

    Args:
        config: overrides what is tiny there.
    """
    made = next(one for name, one in trainings() if name == family).pipeline().transformer
    if made.config.get("mlp_ratio", 4.0) != 4.0:
        config["mlp_ratio"] = 4.0
    if not config:
        return made
    torch.manual_seed(0)
    return type(made).from_config({**made.config, **config})


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
    """Changes that ComfyUI makes to each weight of its model: alpha / rank B A."""
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            up, alpha = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.alpha"]
            weight = f"{name.removeprefix('diffusion_model.')}.weight"
            found[weight] = alpha / len(down) * (up @ down)
    return found


class Rest(dict):
    """A checkpoint with the keys that a reader asks for, and zeros where it has none."""

    def pop(self, key, *default):
        return super().pop(key, torch.zeros(6, 1))


def hunyuan(checkpoint):
    """Read as diffusers does. It cuts the single blocks at the published width, to which rows are
    repeated."""
    times = {}
    for key in [*checkpoint]:
        x = checkpoint.pop(key)
        name = key.replace("_attn.qkv", "_attn_qkv").replace("_attn.proj", "_attn_proj")
        name = (
            name.replace("mlp.0", "mlp.fc1")
            .replace("mlp.2", "mlp.fc2")
            .replace(".lin.", ".linear.")
        )
        if ".linear1." in name:
            times["single"] = 3072 // (len(x) // 7)
            x = x.repeat_interleave(times["single"], 0)
        checkpoint[name] = x
    made = original.convert_hunyuan_video_transformer_to_diffusers(checkpoint)
    narrow = ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight", "proj_mlp.weight")
    return {
        key: x[:: times["single"]] if "single" in key and key.endswith(narrow) else x
        for key, x in made.items()
    }


READERS = {
    "wan": original.convert_wan_transformer_to_diffusers,
    "skyreels": original.convert_wan_transformer_to_diffusers,
    "hunyuan_video": hunyuan,
    "hunyuan_video15": hunyuan,
    "ltx": original.convert_ltx_transformer_checkpoint_to_diffusers,
    "ltx2": original.convert_ltx2_transformer_to_diffusers,
    "cosmos": original.convert_cosmos_transformer_checkpoint_to_diffusers,
    "mochi": lambda found: original.convert_mochi_transformer_checkpoint_to_diffusers(Rest(found)),
    "minimax_h3": lambda found: original.convert_minimax_h3_transformer_checkpoint_to_diffusers(
        found, None
    ),
    "kandinsky5": lambda found: found,  # diffusers has the original names
}
