"""Cosmos 1, Predict2, Predict2.5 and Transfer2.5.

Tokens are the video's alone, in raster order; text is seen by cross-attention, and so is the image
of models with a second processor for it. The controlnet of Transfer2.5 is a model of its own, and
keeps the attention that it has.
"""

from typing import Any

from torch import Tensor

from gen_accel.attention_processors.families import (
    ImageAttention,
    Preset,
    SelfAttention,
    image_sites,
    in_patches,
    in_stacks,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.video import VideoShape

MODELS = "Cosmos 1, Predict2, Predict2.5 and Transfer2.5"
CLASSES = ("CosmosTransformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video"
KIND = "video"
GUIDANCE = "sequential"
FPS = 16  # of Predict2.5; the pipelines of others take it
SPATIAL_FACTOR = 8
PRESETS = {
    "Cosmos-1.0-Diffusion-7B": Preset(
        "nvidia/Cosmos-1.0-Diffusion-7B-Text2World", 7.24, temporal=8
    ),
}
TEXT_TOKENS = 512

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"time|norm": "one",
            r"[kv]_img|img_context": "image",
            r"crossattn_proj|attn2\.to_[kv]$": "text",
        },
        {
            r"attn2\.to_q$": ("video", "text"),
            r"attn2\.q_img$": ("video", "image"),
        },
        uncounted="the image, controls, and timesteps of single frames",
    )


def self_attentions(transformer: Any) -> list[SelfAttention]:
    config = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    return in_stacks(transformer, ("transformer_blocks",), heads, dim, attention="attn1")


def image_attentions(transformer: Any) -> list[ImageAttention]:
    names = [f"transformer_blocks.{i}.attn2" for i in range(len(transformer.transformer_blocks))]
    return image_sites(transformer, names, norm="norm_k")


def video_shape(transformer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents; ValueError where patches leave a rest."""
    return VideoShape(*in_patches(hidden_states.shape[2:], transformer.config.patch_size))


def no_frames(
    transformer: Any, *args: Any, block_controlnet_hidden_states: Any = None, **kwargs: Any
) -> str | None:
    if block_controlnet_hidden_states is None:
        return None
    return "Cosmos Transfer2.5 makes a video chunk after chunk"


def timestep(hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(B,), or (B, 1, frames, 1, 1) where frames that are given have their own. From Predict2 on
    a function of the scheduler's sigma, in [0, 1]."""
    return timestep
