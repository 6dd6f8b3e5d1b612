"""Cosmos: video alone in self-attention, with two ways to tell the time and two processors.

Without the mask of padded pixels among the channels, which takes torchvision, and without a
pipeline: those of diffusers run with NVIDIA's safety checker only, a package of its own.
"""

from typing import Any

import torch
import wan
from diffusers import CosmosTransformer3DModel
from image_models import noise
from torch import Tensor

from tiny import Case

CHANNELS, HEADS, HEAD_DIM = 4, 2, 16
IMAGE_TOKENS, IMAGE_WIDTH = 3, 6


def transformer(**config: Any) -> Any:
    torch.manual_seed(0)
    tiny = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": wan.TEXT_WIDTH,
        "adaln_lora_dim": 8,
        "max_size": (8, 32, 32),
        "concat_padding_mask": False,
    }
    return CosmosTransformer3DModel(**(tiny | config)).eval()


def predict() -> Any:
    """Which frames are given is one more channel."""
    return transformer(in_channels=CHANNELS + 1, extra_pos_embed_type=None)


def transfer() -> Any:
    return transformer(
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=2 * wan.TEXT_WIDTH,
        encoder_hidden_states_channels=wan.TEXT_WIDTH,
        controlnet_block_every_n=1,
        img_context_dim_in=IMAGE_WIDTH,
        img_context_num_tokens=IMAGE_TOKENS,
        img_context_dim_out=HEADS * HEAD_DIM,
    )


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
        "hidden_states": noise(batch, CHANNELS, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), time),
        "encoder_hidden_states": noise(batch, 5, wan.TEXT_WIDTH, seed=2),
        "fps": 30,
    }


def predict_inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    """The first frame is given."""
    given = inputs(frames, height, width, **options)
    times = given["timestep"].view(-1, 1, 1, 1, 1).repeat(1, 1, frames, 1, 1)
    times[:, :, 0] = 0.1
    shown = torch.zeros_like(given["hidden_states"][:, :1])
    shown[:, :, 0] = 1
    return given | {"timestep": times, "condition_mask": shown}


def transfer_inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    given = inputs(frames, height, width, **options)
    batch = len(given["timestep"])
    text = noise(batch, 5, 2 * wan.TEXT_WIDTH, seed=2)
    image = noise(batch, IMAGE_TOKENS, IMAGE_WIDTH, seed=3)
    control = noise(batch, frames * height * width, HEADS * HEAD_DIM, seed=4)
    return given | {
        "encoder_hidden_states": (text, image),
        "block_controlnet_hidden_states": [control, 0.1 * control],
    }


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    given["hidden_states"][0, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1


def row(given: Any, number: int) -> Any:
    if isinstance(given, dict):
        return {name: row(value, number) for name, value in given.items()}
    if isinstance(given, list | tuple):
        return type(given)(row(value, number) for value in given)
    return given[number : number + 1] if isinstance(given, Tensor) else given


CASES = [
    Case("cosmos", transformer, inputs, poke),
    Case("cosmos_predict", predict, predict_inputs, poke),
    Case("cosmos_transfer", transfer, transfer_inputs, poke, row=row),
]
