"""FLUX.2: positions of four axes, one set for each sample."""

from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from support.image_adapters import picture
from support.tiny import Case, images
from support.tiny.images import GRIDS, noise, positions
from torch import Tensor

TEXT = 5


def transformer() -> Any:
    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
    ).eval()


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: None = None,
    time: float = 700.0,
    references: int = 0,
) -> dict[str, Tensor]:
    """
    Args:
        references: rows and columns of a reference image.
    """
    ids = [positions(height, width, axes=4)]
    if references:
        ids.append(positions(references, references, axes=4, image=10))
    img_ids = torch.cat(ids)
    return {
        "hidden_states": noise(batch, len(img_ids), 4),
        "encoder_hidden_states": noise(batch, TEXT, 12, seed=2),
        "timestep": torch.full((batch,), time / 1000),
        "img_ids": img_ids.expand(batch, -1, -1),
        "txt_ids": torch.zeros(batch, TEXT, 4),
        "guidance": torch.full((batch,), 4.0),
    }


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    own = given["img_ids"][0]
    place = (own == torch.tensor([0.0, row, column, 0.0])).all(1).nonzero()[0, 0]
    given["hidden_states"][0, place] += 1


def pipeline() -> Any:
    torch.manual_seed(2)
    return images.pipeline(
        Flux2KleinPipeline,
        vae=AutoencoderKLFlux2(**images.TWO_LEVELS, latent_channels=1).eval(),
        text_encoder=images.qwen3(4),
        tokenizer=images.tokenizer(),
        transformer=transformer(),
    )


# The text is what three layers of the text encoder give, side by side.
guided = partial(images.generate, guidance_scale=4.0, text_encoder_out_layers=(0, 1, 2))

CASES = [
    Case("flux2", transformer, inputs, poke, GRIDS, pipeline=pipeline, generate=guided),
    Case(
        "flux2, references",
        transformer,
        partial(inputs, references=4),
        poke,
        GRIDS,
        pipeline=pipeline,
        generate=partial(guided, image=picture(size=(64, 72))),
    ),
]
