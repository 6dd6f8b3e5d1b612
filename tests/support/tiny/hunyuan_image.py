"""HunyuanImage 2.1: image and padded text of two encoders in one attention."""

from functools import partial
from typing import Any

import torch
from diffusers import HunyuanImageTransformer2DModel
from support.tiny import Case
from support.tiny.images import GRIDS, noise
from torch import Tensor

TEXT, LETTERS = 9, 4  # tokens of the first and the second encoder


def transformer(**config: Any) -> Any:
    torch.manual_seed(0)
    tiny = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": 12,
        "rope_axes_dim": (8, 8),
    }
    return HunyuanImageTransformer2DModel(**(tiny | config)).eval()


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: tuple[int, ...] | None = None,
    time: float = 700.0,
    letters: int = 0,
) -> dict[str, Tensor]:
    """
    Args:
        letters: width of the second encoder; all of its tokens but the last two are seen.
    """
    lengths = (TEXT,) * batch if lengths is None else lengths
    given = {
        "hidden_states": noise(batch, 4, height, width),
        "timestep": torch.full((batch,), time),
        "encoder_hidden_states": noise(batch, TEXT, 12, seed=2),
        "encoder_attention_mask": torch.arange(TEXT) < torch.tensor(lengths)[:, None],
    }
    if letters:
        given["encoder_hidden_states_2"] = noise(batch, LETTERS, letters, seed=3)
        given["encoder_attention_mask_2"] = (torch.arange(LETTERS) < LETTERS - 2).expand(batch, -1)
    return given


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    given["hidden_states"][0, :, row, column] += 1


def padding(given: dict[str, Any], lengths: tuple[int, int]) -> None:
    for sample, length in enumerate(lengths):
        given["encoder_hidden_states"][sample, length:] += 1


padded: dict[str, Any] = {"lengths": (TEXT, 5), "padding": padding}
CASES = [
    Case("hunyuan_image", transformer, inputs, poke, GRIDS, **padded),
    Case(
        "hunyuan_image, letters",
        partial(transformer, text_embed_2_dim=8),
        partial(inputs, letters=8),
        poke,
        GRIDS,
        **padded,
    ),
]
