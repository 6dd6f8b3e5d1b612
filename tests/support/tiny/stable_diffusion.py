"""Stable Diffusion: levels of smaller and smaller grids, the image alone in self-attention."""

from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from support.image_adapters import CROSS, generate, pipeline, sd_unet
from support.image_models import noise
from support.tiny import Case, Grid
from torch import Tensor, nn

CHANNELS = 4
GRIDS: tuple[Grid, ...] = ((1, 9, 11), (1, 5, 7))  # of odd sides, which the levels round up


def unet_xl() -> Any:
    """As the XL, with more transformer blocks and heads on the lower level."""
    torch.manual_seed(0)
    return still(
        UNet2DConditionModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=CROSS,
            attention_head_dim=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + CROSS,
            norm_num_groups=4,
        )
    )


def still(model: nn.Module) -> nn.Module:
    """With convolutions that take most from the middle, so that it shows where a latent went."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            middle = module.weight.data[:, :, 1, 1].clone()
            module.weight.data.mul_(0.1)[:, :, 1, 1] = middle
    return model.eval()


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: None = None,
    time: float = 700.0,
) -> dict[str, Any]:
    return {
        "sample": noise(batch, CHANNELS, height, width),
        "timestep": torch.tensor(time),
        "encoder_hidden_states": noise(batch, 5, CROSS, seed=2),
    }


def inputs_xl(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    given = inputs(frames, height, width, **options)
    batch = len(given["sample"])
    sizes = torch.tensor([[height, width, 0, 0, height, width]]).repeat(batch, 1)
    added = {"text_embeds": noise(batch, CROSS, seed=3), "time_ids": sizes}
    return given | {"added_cond_kwargs": added}


def row(given: dict[str, Any], number: int) -> dict[str, Any]:
    own = slice(number, number + 1)
    added = {name: x[own] for name, x in given.get("added_cond_kwargs", {}).items()}
    return {
        "sample": given["sample"][own],
        "timestep": given["timestep"],
        "encoder_hidden_states": given["encoder_hidden_states"][own],
        "added_cond_kwargs": added,
    }


def poke(given: dict[str, Tensor], frame: int, row: int, column: int) -> None:
    given["sample"][0, :, row, column] += 3


CASES = [
    Case(
        name,
        build,
        make,
        poke,
        grids=GRIDS,
        row=row,
        local=False,
        pipeline=partial(pipeline, kind),
        generate=partial(generate, kind=kind, size=(24, 32)),
    )
    for name, kind, build, make in (
        ("stable_diffusion", "sd", lambda: still(sd_unet()), inputs),
        ("stable_diffusion_xl", "sdxl", unet_xl, inputs_xl),
    )
]
