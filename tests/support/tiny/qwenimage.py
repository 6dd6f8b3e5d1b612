"""Qwen-Image: padded text before the image; references after it, or layers of it as frames."""

from functools import cache, partial
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from support.tiny import Case, images
from support.tiny.images import GRIDS, noise
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

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


@cache
def text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(3)
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": 12,
        "patch_size": 4,
    }
    language = images.causal(12, layers=1) | {
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]},
    }
    config = Qwen2_5_VLConfig(text_config=language, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@cache
def autoencoder() -> AutoencoderKLQwenImage:
    torch.manual_seed(2)
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=1,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0],
        latents_std=[1.0],
    ).eval()


def pipeline() -> Any:
    return images.pipeline(
        QwenImagePipeline,
        vae=autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=images.tokenizer(),
        transformer=transformer(),
    )


# Two samples, the shorter text of which is padded.
generate = partial(
    images.generate,
    prompt=[images.PROMPT, images.NEGATIVE],
    negative_prompt=[images.NEGATIVE, images.PROMPT],
    true_cfg_scale=4.0,
)
layered = partial(transformer, use_layer3d_rope=True)
with_reference = partial(inputs, condition=(5, 4))
padded = {"lengths": (7, 3), "padding": padding}

CASES = [
    Case(
        "qwenimage",
        transformer,
        inputs,
        poke,
        GRIDS,
        **padded,
        pipeline=pipeline,
        generate=generate,
    ),
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
