"""FLUX.3: blocks of the image alone, then of text, image and references."""

from functools import partial
from typing import Any

import torch
from diffusers import Flux3Transformer2DModel
from support.tiny import Case
from support.tiny.images import GRIDS, noise, positions
from torch import Tensor

TEXT = 5
SCALE = 0.5  # of the positions on both axes of the image, as the model was trained


def transformer() -> Any:
    torch.manual_seed(0)
    return Flux3Transformer2DModel(
        in_channels=4,
        cond_in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
    ).eval()


def places(height: int, width: int, *, last: float = 0.0) -> Tensor:
    ids = positions(height, width, axes=4)
    ids[:, 1:3] *= SCALE
    ids[:, 3] = last
    return ids


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
    given = {
        "hidden_states": noise(batch, height * width, 4),
        "encoder_hidden_states": noise(batch, TEXT, 12, seed=2),
        "timestep": torch.full((batch,), time / 1000),
        "img_ids": places(height, width),
        "txt_ids": torch.zeros(TEXT, 4),
    }
    if references:
        given["image_cond_hidden_states"] = noise(batch, references**2, 4, seed=3)
        given["image_cond_ids"] = places(references, references, last=-1.0)
    return given


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    place = torch.tensor([0.0, row * SCALE, column * SCALE, 0.0])
    given["hidden_states"][0, (given["img_ids"] == place).all(1).nonzero()[0, 0]] += 1


def row(given: dict[str, Any], number: int) -> dict[str, Any]:
    """Positions are those of all samples."""
    return {
        name: value if name.endswith("_ids") else value[number : number + 1]
        for name, value in given.items()
    }


CASES = [
    Case("flux3", transformer, inputs, poke, GRIDS, row=row),
    Case("flux3, references", transformer, partial(inputs, references=4), poke, GRIDS, row=row),
]
