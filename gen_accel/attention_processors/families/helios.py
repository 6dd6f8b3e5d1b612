"""Helios.

Video is made chunk after chunk. Tokens are the history, the oldest first, and then the chunk in
raster order, all in one attention; text is seen by cross-attention. Old frames have coarser
patches, and recent ones stand beside the very first frame. None of these continue the chunk's
grid, so that the history is seen by all.
"""

from math import prod
from typing import Any

from torch import Tensor

from gen_accel.attention_processors.families import Preset, in_patches, wan
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.video import VideoShape

MODELS = "Helios"
CLASSES = ("HeliosTransformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "history, video"
KIND = "video"
FPS = 24
TEMPORAL_FACTOR = 4  # frames in a latent frame, all but the first of a chunk
SPATIAL_FACTOR = wan.SPATIAL_FACTOR
PRESETS = {"Helios-Base": Preset("BestWishYsh/Helios-Base", 14.3)}
TEXT_TOKENS = wan.TEXT_TOKENS
LORA_TARGETS = wan.LORA_TARGETS
GUIDANCE = wan.GUIDANCE


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"text_embedder|attn2\.to_[kv]$": "text",
            r"time": "one",
            r"patch_(short|mid|long)": "none",
            r"attn1\.|ffn\.": "video + history",
        },
        {
            r"attn2\.to_q$": ("video", "text"),
        },
        beside="history",
        uncounted="the history of earlier chunks",
    )


self_attentions = wan.self_attentions
image_attentions = wan.image_attentions
timestep = wan.timestep


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    indices_hidden_states: Tensor | None = None,
    indices_latents_history_short: Tensor | None = None,
    indices_latents_history_mid: Tensor | None = None,
    indices_latents_history_long: Tensor | None = None,
    latents_history_short: Tensor | None = None,
    latents_history_mid: Tensor | None = None,
    latents_history_long: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents, and the tokens of the history; ValueError
    where patches leave a rest in the grid. In the history the rest is padded."""
    patch = transformer.config.patch_size
    history = (
        (1, latents_history_short, indices_latents_history_short),
        (2, latents_history_mid, indices_latents_history_mid),
        (4, latents_history_long, indices_latents_history_long),
    )
    others = sum(
        prod(-(-size // (coarse * side)) for size, side in zip(x.shape[2:], patch, strict=True))
        for coarse, x, indices in history
        if x is not None and indices is not None
    )
    return VideoShape(*in_patches(hidden_states.shape[2:], patch), text=others)


def before(transformer: Any, *args: Any, **kwargs: Any) -> int:
    """Number of tokens of the history."""
    return video_shape(transformer, *args, **kwargs).text


def no_context_parallel(transformer: Any) -> str | None:
    if not transformer.config.is_amplify_history:
        return None
    return "is_amplify_history=True scales keys by their place among all tokens"


def no_frames(transformer: Any, *args: Any, **kwargs: Any) -> str:
    return "Helios makes a video chunk after chunk"
