"""HunyuanVideo 1.5, text to video and image to video.

Video and text attend jointly, video first in raster order. What counts as text is of three kinds,
each padded to a length of its own: features of an image, glyphs, and the prompt. The model moves
all real tokens to the front of each sample, in this order, and a mask hides the rest, rows and
columns. Image features that are all zero, as in text to video, are padding too. The token refiner,
which attends over the prompt alone, is left as it is.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families import Preset, SelfAttention, in_patches, in_stacks
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.video import VideoShape

MODELS = "HunyuanVideo 1.5"
CLASSES = ("HunyuanVideo15Transformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video, text"
KIND = "video"
FPS = 24
MASK_OF_PAIRS = True
TEMPORAL_FACTOR = 4  # frames in a latent frame, all but the first
SPATIAL_FACTOR = 16
PRESETS = {
    "HunyuanVideo-1.5": Preset("hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v", 8.3),
}
TEXT_TOKENS = 1000

# Layers by the end of their names, inside the blocks: the token refiner has some of them too.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    "feed_forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"time|norm": "one",
            r"context_embedder_2": "glyphs",
            r"image_embedder": "image",
            r"context_embedder": "text",
            r"add_[qkv]_proj|to_add_out|ff_context": "text + glyphs + image",
        },
        {
            r"refiner_blocks.*attn\.to_q$": ("text", "text"),
        },
        beside="text + glyphs + image",
        lengths={"glyphs": 256, "image": 729},  # as its pipelines pad them
    )


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    return in_stacks(transformer, ("transformer_blocks",), heads, dim)


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    timestep_r: Tensor | None = None,
    encoder_hidden_states_2: Any = None,
    encoder_attention_mask_2: Any = None,
    image_embeds: Any = None,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents, and the text of all kinds with its
    padding; ValueError where patches leave a rest."""
    config = transformer.config
    patch = config.patch_size_t, config.patch_size, config.patch_size
    grid = in_patches(hidden_states.shape[2:], patch)
    kinds = encoder_hidden_states, encoder_hidden_states_2, image_embeds
    return VideoShape(*grid, text=sum(x.shape[1] for x in kinds))


def timestep(hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(B,)"""
    return timestep


def text_lengths(
    transformer: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    timestep_r: Tensor | None = None,
    encoder_hidden_states_2: Any = None,
    encoder_attention_mask_2: Any = None,
    image_embeds: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[int, ...]:
    """Text tokens of each sample, the padding left out, as the model counts them. Waits for the
    device."""
    masks = encoder_attention_mask, encoder_attention_mask_2
    prompt, glyphs = (mask.bool().sum(1, dtype=torch.int) for mask in masks)
    image = image_embeds.shape[1] * image_embeds.any()
    return tuple((prompt + glyphs + image).tolist())
