"""Motif-Video, text to video and image to video.

Video and text attend jointly, video first in raster order; features of a given image come before
the text. Texts are padded to one length; a mask hides the padding from all. Blocks of two streams
come first, then those of one, and layers are counted through both. The last of them decode: there
the output of the earlier blocks for the video replaces the text, as many tokens again, without
positions, seen by all. Sparse attention leaves the cross-attention to the text as it is, which
some blocks have besides; image prompts are added there.
"""

import re
from typing import Any

from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    ImageAttention,
    SelfAttention,
    image_sites,
    in_patches,
    in_stacks,
    prefix_lengths,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.seam import Call
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

MODELS = "Motif-Video"
CLASSES = ("MotifVideoTransformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video, image features, text"
KIND = "video"
GUIDANCE = "sequential"
FPS = 24
TEMPORAL_FACTOR = 4  # frames in a latent frame, all but the first
SPATIAL_FACTOR = 8
TEXT_TOKENS = 512

# Layers by the end of their names, inside the blocks; cross-attention has `to_q` and the like too.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    "feed_forward": (
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("proj_mlp", "proj_out"),
    ),
}


def layers(transformer: Any) -> Layers:
    """Layers; in the last blocks, which decode, the video replaces the text."""
    config = transformer.config
    first = config.num_single_layers - config.num_decoder_layers
    last = [f"single_transformer_blocks.{i}" for i in range(first, config.num_single_layers)]
    decoding = "|".join(rf"^{re.escape(name)}\." for name in last) or "(?!)"
    return Layers(
        {
            r"time|norm": "one",
            r"^context_embedder|cross_attn\.to_[kv]$": "text",
            r"image_embedder": "image",
            r"add_[qkv]_proj|to_add_out|ff_context": "text + image",
            r"cross_attn": "video",
            decoding: "video + video",
            r"^single_": "video + text + image",
        },
        {r"cross_attn\.to_q$": ("video", "text")},
        beside="text + image",
        pairs=dict.fromkeys(last, ("video + video", "video + video")),
    )


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    sites = in_stacks(transformer, ("transformer_blocks", "single_transformer_blocks"), heads, dim)
    first = len(sites) - config.num_decoder_layers
    return [*sites[:first], *(site._replace(tokens=_decoded) for site in sites[first:])]


def image_attentions(transformer: Any) -> list[ImageAttention]:
    """Cross-attentions; ValueError for a model whose blocks have none."""
    sites = self_attentions(transformer)
    blocks = {site.name: transformer.get_submodule(site.name) for site in sites}
    names = [
        f"{name}.cross_attn" for name, block in blocks.items() if block.cross_attn is not None
    ]
    if not names:
        raise ValueError(
            f"this {type(transformer).__name__} has no cross-attention to its text, to which an "
            "image prompt could be added"
        )
    return image_sites(transformer, names, norm="norm_k")


def _decoded(tokens: Tokens, call: Call) -> Tokens:
    """Tokens of the last blocks, which decode."""
    video = tokens.video
    return Tokens(VideoShape(*video.grid, text=video.video_tokens))


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor | None = None,
    image_embeds: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents, and image and text with its padding;
    ValueError where patches leave a rest."""
    config = transformer.config
    patch = config.patch_size_t, config.patch_size, config.patch_size
    grid = in_patches(hidden_states.shape[2:], patch)
    image = 0 if image_embeds is None else image_embeds.shape[1]
    return VideoShape(*grid, text=image + encoder_hidden_states.shape[1])


def text_lengths(
    transformer: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor | None = None,
    image_embeds: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[int, ...] | None:
    """Number of text and image tokens in each sample, without padding; None where padding comes
    before the text. Waits for the device."""
    if encoder_attention_mask is None:
        return None
    image = 0 if image_embeds is None else image_embeds.shape[1]
    return prefix_lengths(encoder_attention_mask, image)


def timestep(hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(B,)"""
    return timestep
