"""Krea 2: one sequence of text, padded before its last words, and image."""

from typing import Any

import torch
from diffusers import Krea2Transformer2DModel
from support.tiny import Case, images
from support.tiny.images import GRIDS, noise, positions
from torch import Tensor

TEXT, LAST = 8, 2  # tokens, and how many of them come behind the padding


def transformer() -> Any:
    torch.manual_seed(0)
    model = Krea2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=12,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    for block in model.transformer_blocks:  # which begin as the identity
        torch.nn.init.normal_(block.scale_shift_table)
    return model


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: tuple[int, ...] | None = None,
    time: float = 700.0,
) -> dict[str, Tensor]:
    lengths = (TEXT,) * batch if lengths is None else lengths
    places = torch.arange(TEXT)
    mask = (places < torch.tensor(lengths)[:, None] - LAST) | (places >= TEXT - LAST)
    return {
        "hidden_states": noise(batch, height * width, 4),
        "encoder_hidden_states": noise(batch, TEXT, 3, 12, seed=2),
        "timestep": torch.full((batch,), time / 1000),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), positions(height, width)]),
        "encoder_attention_mask": mask,
    }


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    width = int(given["position_ids"][-1, 2]) + 1
    images.poke_token(given, width, row, column)


def padding(given: dict[str, Any], lengths: tuple[int, int]) -> None:
    for sample, length in enumerate(lengths):
        given["encoder_hidden_states"][sample, length - LAST : TEXT - LAST] += 1


def row(given: dict[str, Any], number: int) -> dict[str, Any]:
    """Positions are those of all samples."""
    own = slice(number, number + 1)
    return {name: x if name == "position_ids" else x[own] for name, x in given.items()}


CASES = [
    Case(
        "krea2",
        transformer,
        inputs,
        poke,
        GRIDS,
        lengths=(TEXT, 5),
        padding=padding,
        row=row,
    )
]
