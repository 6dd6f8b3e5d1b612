"""Latte, text to video.

Blocks over space and over time take turns. In those over space each frame is a sample of its own
that attends to itself, in raster order, with the text seen by cross-attention. Blocks over time
are left alone: they attend over the frames of one place, only 16 in the published model.
"""

from typing import Any

from torch import Tensor

from gen_accel.attention_processors.families import (
    ImageAttention,
    SelfAttention,
    image_sites,
    in_patches,
    in_stacks,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.seam import Call
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

MODELS = "Latte"
CLASSES = ("LatteTransformer3DModel",)
ATTENTION_CALL = "F.scaled_dot_product_attention"
ORDER = "video, each frame by itself"
KIND = "frames"
GUIDANCE = "batched"
NAMES_CALLS = False
FRAMES_ARGUMENT = "video_length"
FPS = 8
TEMPORAL_FACTOR = 1  # frames in a latent frame
SPATIAL_FACTOR = 8
TEXT_TOKENS = 120

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"attn2\.to_[kv]$": "frames * text",
            r"^adaln": "one",
            r"caption_projection": "text",
        },
        {
            r"^transformer_blocks.*attn2\.to_q$": ("video", "text"),
            r"^temporal_.*attn1\.to_q$": ("video", "frames"),
        },
    )


def self_attentions(transformer: Any) -> list[SelfAttention]:
    config = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    blocks = in_stacks(transformer, ("transformer_blocks",), heads, dim, attention="attn1")
    return [block._replace(tokens=_one_frame) for block in blocks]


def image_attentions(transformer: Any) -> list[ImageAttention]:
    names = [f"transformer_blocks.{i}.attn2" for i in range(len(transformer.transformer_blocks))]
    return image_sites(transformer, names)


def _one_frame(tokens: Tokens, call: Call) -> Tokens:
    _, height, width = tokens.video.grid
    return Tokens(VideoShape(1, height, width))


def video_shape(transformer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents; ValueError where patches leave a rest."""
    patch = 1, transformer.config.patch_size, transformer.config.patch_size
    return VideoShape(*in_patches(hidden_states.shape[2:], patch))


def timestep(hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(B,)"""
    return timestep
