"""HiDream: an image that is filled up where it is not square, and text of three kinds after it."""

from functools import cache, partial
from typing import Any

import torch
from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel
from support.tiny import Case, images
from support.tiny.images import noise, poke_patch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM


def transformer() -> Any:
    torch.manual_seed(0)
    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[8, 12],
        text_emb_dim=6,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),  # pyright: ignore[reportArgumentType]
        max_resolution=(24, 24),
        llama_layers=[0, 1],
    ).eval()


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
        "timesteps": torch.full((batch,), time),
        "encoder_hidden_states_t5": noise(batch, 3, 8, seed=2),
        "encoder_hidden_states_llama3": noise(2, batch, 4, 12, seed=3),
        "pooled_embeds": noise(batch, 6, seed=4),
    }


def row(given: dict[str, Any], number: int) -> dict[str, Any]:
    """The texts of Llama have their layers first."""
    own = slice(number, number + 1)
    return {
        name: value[:, own] if name.endswith("llama3") else value[own]
        for name, value in given.items()
    }


@cache
def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**images.causal(12, layers=2))).eval()


def pipeline() -> Any:
    clip = images.clip(CLIPTextModelWithProjection, 4, projected=3)
    pipe = images.pipeline(
        HiDreamImagePipeline,
        vae=images.autoencoder(4),
        text_encoder=clip,
        tokenizer=images.tokenizer(),
        text_encoder_2=clip,
        tokenizer_2=images.tokenizer(),
        text_encoder_3=images.t5(8),
        tokenizer_3=images.tokenizer(),
        text_encoder_4=llama(),
        tokenizer_4=images.tokenizer(),
        transformer=transformer(),
    )
    pipe.default_sample_size = 24  # of latents; all pictures are as large as such a square
    return pipe


# 9 x 15 tokens, which are filled up to 144.
generate = partial(
    images.generate, height=36, width=60, negative_prompt=images.NEGATIVE, guidance_scale=4.0
)

CASES = [
    Case(
        "hidream",
        transformer,
        inputs,
        poke_patch,
        ((1, 9, 11), (1, 7, 7)),
        row=row,
        pipeline=pipeline,
        generate=generate,
    )
]
