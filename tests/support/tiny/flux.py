"""FLUX.1: text before the image, and images that are edited after it."""

from functools import partial
from typing import Any

import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from support import image_models
from support.image_adapters import picture
from support.tiny import Case, images
from support.tiny.images import GRIDS, noise, positions
from torch import Tensor
from transformers import CLIPTextModel

TEXT = 5


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
        references: rows and columns of an image that is edited.
    """
    ids = [positions(height, width)]
    if references:
        ids.append(positions(references, references, image=1))
    img_ids = torch.cat(ids)
    return {
        "hidden_states": noise(batch, len(img_ids), 4),
        "encoder_hidden_states": noise(batch, TEXT, 24, seed=2),
        "pooled_projections": noise(batch, 12, seed=3),
        "timestep": torch.full((batch,), time / 1000),
        "img_ids": img_ids,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    own = given["img_ids"]
    place = (own == torch.tensor([0.0, row, column])).all(1).nonzero()[0, 0]
    given["hidden_states"][0, place] += 1


def row(given: dict[str, Any], number: int) -> dict[str, Any]:
    """Positions are those of all samples."""
    shared = {"img_ids", "txt_ids"}
    return {
        name: value if name in shared else value[number : number + 1]
        for name, value in given.items()
    }


def pipeline(kind: type = FluxPipeline) -> Any:
    return images.pipeline(
        kind,
        vae=images.autoencoder(1),
        text_encoder=images.clip(CLIPTextModel, 12),
        tokenizer=images.tokenizer(),
        text_encoder_2=images.t5(24),
        tokenizer_2=images.tokenizer(),
        transformer=image_models.flux(),
    )


guided = partial(images.generate, negative_prompt=images.NEGATIVE, true_cfg_scale=4.0)
# Without the latter two, both images would be made a megapixel large.
edited = {"image": picture(), "max_area": images.HEIGHT * images.WIDTH, "_auto_resize": False}

CASES = [
    Case(
        "flux",
        image_models.flux,
        inputs,
        poke,
        GRIDS,
        row=row,
        pipeline=pipeline,
        generate=guided,
    ),
    Case(
        "flux, references",
        image_models.flux,
        partial(inputs, references=4),
        poke,
        GRIDS,
        row=row,
        pipeline=partial(pipeline, FluxKontextPipeline),
        generate=partial(guided, **edited),
    ),
]
