"""PixArt-alpha and PixArt-Sigma.

Tokens are the image's alone, in raster order; text is seen by cross-attention.
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
from gen_accel.video import VideoShape

MODELS = "PixArt-alpha and PixArt-Sigma"
CLASSES = ("PixArtTransformer2DModel",)
ATTENTION_CALL = "F.scaled_dot_product_attention"
ORDER = "image"
KIND = "image"
GUIDANCE = "batched"
GUIDED = "do_classifier_free_guidance"

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
}


def self_attentions(transformer: Any) -> list[SelfAttention]:
    config = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    return in_stacks(transformer, ("transformer_blocks",), heads, dim, attention="attn1")


def image_attentions(transformer: Any) -> list[ImageAttention]:
    names = [f"transformer_blocks.{i}.attn2" for i in range(len(transformer.transformer_blocks))]
    return image_sites(transformer, names)


def video_shape(transformer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> VideoShape:
    """The grid of (B, C, height, width) latents; ValueError where patches leave a rest."""
    patch = 1, transformer.config.patch_size, transformer.config.patch_size
    return VideoShape(*in_patches((1, *hidden_states.shape[2:]), patch))


def timestep(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,)"""
    return timestep
