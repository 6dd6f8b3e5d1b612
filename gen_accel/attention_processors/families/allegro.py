"""Allegro, text to video.

Tokens are the video's alone, in raster order; text is seen by cross-attention.
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

MODELS = "Allegro"
CLASSES = ("AllegroTransformer3DModel",)
ATTENTION_CALL = "F.scaled_dot_product_attention"
ORDER = "video"
KIND = "video"
GUIDANCE = "batched"
GUIDED = "do_classifier_free_guidance"
NAMES_CALLS = False
FIRST_FRAME_ALONE = False  # with the pipelines' even numbers of frames
FPS = 15
TILED_VAE = True
SPATIAL_FACTOR = 8
PRESETS = {"Allegro": Preset("rhymes-ai/Allegro", 2.77, temporal=4)}
TEXT_TOKENS = 512

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"time|adaln": "one",
            r"caption_projection|attn2\.to_[kv]$": "text",
        },
        {
            r"attn2\.to_q$": ("video", "text"),
        },
    )


def self_attentions(transformer: Any) -> list[SelfAttention]:
    config = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    return in_stacks(transformer, ("transformer_blocks",), heads, dim, attention="attn1")


def image_attentions(transformer: Any) -> list[ImageAttention]:
    names = [f"transformer_blocks.{i}.attn2" for i in range(len(transformer.transformer_blocks))]
    return image_sites(transformer, names)


def video_shape(transformer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents; ValueError where patches leave a rest."""
    config = transformer.config
    patch = config.patch_size_t, config.patch_size, config.patch_size
    return VideoShape(*in_patches(hidden_states.shape[2:], patch))


def timestep(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,)"""
    return timestep
