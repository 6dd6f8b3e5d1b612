"""Kandinsky 6, video with sound from text or an image.

Tokens of the video's self-attention are the video's, in raster order, and then the tokens of a
start image. That image has the first frame's time, so that it does not continue the grid and is
seen by all. Self-attention of sound and text, and cross-attention between video, sound and text,
are left as they are. Image prompts are added to the cross-attention of the video, and of its
image, to the text.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    ImageAttention,
    SelfAttention,
    in_patches,
    in_stacks,
    kandinsky5,
    outside_graphs,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.video import VideoShape

MODELS = "Kandinsky 6"
CLASSES = ("Kandinsky6Transformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video, image"
KIND = "video"
LATENT_AXES = "fhwc"
GUIDANCE = kandinsky5.GUIDANCE
TEMPORAL_FACTOR = kandinsky5.TEMPORAL_FACTOR
SPATIAL_FACTOR = 8
TEXT_TOKENS = 1024

# Layers by the end of their names, inside the blocks: the video's alone.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": tuple(
        f"video_dec_block.{attention}.{name}"
        for attention in ("self_attention", "cross_attention")
        for name in ("to_query", "to_key", "to_value", "out_layer")
    ),
    "feed_forward": (
        "video_dec_block.feed_forward.net.0.proj",
        "video_dec_block.feed_forward.net.2",
    ),
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"va_|av_": "none",
            r"modulation|time|pooled": "one",
            r"^(video|audio)_text|video_dec_block\.cross_attention\.to_(key|value)": "text",
            r"audio": "none",
        },
        {
            r"^(video|audio)_text.*to_query$": ("text", "text"),
            r"video_dec_block\.cross_attention\.to_query$": ("video + image", "text"),
        },
        beside="image",
        default="video + image",
        uncounted="the sound, and an image to start from",
    )


longest = kandinsky5.longest


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    dim = sum(config.axes_dims)
    heads, stacks = config.model_dim // dim, ("visual_transformer_blocks",)
    attention = "video_dec_block.self_attention"
    return in_stacks(transformer, stacks, heads, dim, attention=attention)


def image_attentions(transformer: Any) -> list[ImageAttention]:
    return kandinsky5._cross_attentions(transformer, "video_dec_block.cross_attention")


@outside_graphs
def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    audio_hidden_states: Tensor | None = None,
    visual_rope_pos: tuple[Tensor, Tensor, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of (B, frames, height, width, C) latents, and the tokens of the image after it, for
    which this waits for the device; ValueError where patches leave a rest."""
    grid = in_patches(hidden_states.shape[1:4], transformer.config.patch_size)
    if visual_rope_pos is None:
        return VideoShape(*grid)
    whole, height, width = grid
    times = visual_rope_pos[0]
    onwards = times[0] + torch.arange(whole, device=times.device)
    frames = int((times == onwards).cumprod(0).sum())
    return VideoShape(frames, height, width, text=(whole - frames) * height * width)


def no_frames(transformer: Any, *args: Any, **kwargs: Any) -> str | None:
    """Reason why frames are not known: cross-attention has the queries of a start image too."""
    if video_shape(transformer, *args, **kwargs).text:
        return "Kandinsky 6 is given an image as one more frame"
    return None


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
