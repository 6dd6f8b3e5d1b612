"""Stable Diffusion 3, and 3.5 Medium with its second attention over the image."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from support.tiny import Case, images
from support.tiny.images import GRIDS, noise, poke_patch
from torch import Tensor
from transformers import CLIPTextModelWithProjection


def transformer(**config: Any) -> Any:
    torch.manual_seed(0)
    tiny: dict[str, Any] = {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 24,
    }
    return SD3Transformer2DModel(**(tiny | config)).eval()


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: None = None,
    time: float = 700.0,
) -> dict[str, Tensor]:
    return {
        "hidden_states": noise(batch, 4, 2 * height, 2 * width),
        "encoder_hidden_states": noise(batch, 5, 12, seed=2),
        "pooled_projections": noise(batch, 8, seed=3),
        "timestep": torch.full((batch,), time),
    }


second = partial(transformer, dual_attention_layers=(0,), qk_norm="rms_norm")


def pipeline(build: Callable[[], Any]) -> Any:
    clip = images.clip(CLIPTextModelWithProjection, 4)
    return images.pipeline(
        StableDiffusion3Pipeline,
        transformer=build(),
        vae=images.autoencoder(4),
        text_encoder=clip,
        tokenizer=images.tokenizer(),
        text_encoder_2=clip,
        tokenizer_2=images.tokenizer(),
        text_encoder_3=images.t5(12),
        tokenizer_3=images.tokenizer(),
    )


generate = partial(images.generate, negative_prompt=images.NEGATIVE, guidance_scale=4.0)

CASES = [
    Case(
        name,
        build,
        inputs,
        poke_patch,
        GRIDS,
        pipeline=partial(pipeline, build),
        generate=generate,
    )
    for name, build in (("sd3", transformer), ("sd3, second attention", second))
]
