"""Stable Diffusion 3 and 3.5.

Image and text attend jointly, text last. In some layers of 3.5 Medium the image also attends to
itself, in an attention of its own.
"""

from typing import Any

from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    SelfAttention,
    in_patches,
    in_stacks,
    without_text,
)
from gen_accel.video import VideoShape

MODELS = "Stable Diffusion 3, 3.5"
CLASSES = ("SD3Transformer2DModel",)
ATTENTION_CALL = "F.scaled_dot_product_attention"
ORDER = "image, text"
KIND = "image"

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    "feed_forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
}


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    sites = []
    for site in in_stacks(transformer, ("transformer_blocks",), heads, dim):
        sites.append(site)
        second = transformer.get_submodule(site.name).attn2
        if second is not None:
            name = f"{site.name}.attn2"
            sites.append(site._replace(name=name, module=second, tokens=without_text))
    return sites


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of (B, C, height, width) latents; ValueError where patches leave a rest."""
    side = transformer.config.patch_size
    grid = in_patches((1, *hidden_states.shape[2:]), (1, side, side))
    return VideoShape(*grid, text=encoder_hidden_states.shape[1])


def timestep(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,)"""
    return timestep
