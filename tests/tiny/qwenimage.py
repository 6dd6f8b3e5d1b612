"""Qwen-Image: padded text before the image; references after it, or layers of it as frames."""

from functools import partial
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel

from tiny import Case
from tiny.images import GRIDS, noise

TEXT = 7


def transformer(**config: Any) -> Any:
    torch.manual_seed(0)
    tiny = {
        "in_channels": 4,
        "out_channels": 1,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "axes_dims_rope": (4, 6, 6),
    }
    return QwenImageTransformer2DModel(**(tiny | config)).eval()


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: tuple[int, ...] | None = None,
    time: float = 700.0,
    condition: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """
    Args:
        condition: rows and columns of an image that is edited, or taken apart.
    """
    shapes = [(1, height, width)] * frames + ([(1, *condition)] if condition else [])
    tokens = sum(rows * columns for _, rows, columns in shapes)
    lengths = (TEXT,) * batch if lengths is None else lengths
    return {
        "hidden_states": noise(batch, tokens, 4),
        "encoder_hidden_states": noise(batch, TEXT, 12, seed=2),
        "encoder_hidden_states_mask": torch.arange(TEXT) < torch.tensor(lengths)[:, None],
        "timestep": torch.full((batch,), time / 1000),
        "img_shapes": [shapes] * batch,
    }


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    _, height, width = given["img_shapes"][0][0]
    given["hidden_states"][0, (frame * height + row) * width + column] += 1


def padding(given: dict[str, Any], lengths: tuple[int, int]) -> None:
    for sample, length in enumerate(lengths):
        given["encoder_hidden_states"][sample, length:] += 1


layered = partial(transformer, use_layer3d_rope=True)
with_reference = partial(inputs, condition=(5, 4))
padded = {"lengths": (7, 3), "padding": padding}

CASES = [
    Case("qwenimage", transformer, inputs, poke, GRIDS, **padded),
    Case(
        "qwenimage, references",
        transformer,
        partial(inputs, condition=(5, 4)),
        poke,
        GRIDS,
        **padded,
    ),
    Case(
        "qwenimage, layers",
        layered,
        partial(inputs, condition=(6, 7)),
        poke,
        ((3, 6, 7), (4, 5, 6)),
        **padded,
    ),
]
