"""FramePack.

Video is made section after section. Tokens are the history, the section in raster order, features
of the given image, and the text, all in one attention. The history has distant frames first, in
patches of four times the size, then nearer ones in patches of twice the size. Last come the given
image and the nearest frame, which need not be neighbours in time. None of these continue the
section's grid, so that the history is seen by all. The text of a sample that is alone in its batch
comes without its padding; in larger batches a mask hides it. The token refiner, which attends over
the text alone, is left as it is.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from gen_accel.attention_processors.families import Preset, hunyuan_video, in_patches
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.video import VideoShape

MODELS = "FramePack"
CLASSES = ("HunyuanVideoFramepackTransformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "history, video, image features, text"
KIND = "video"
TEMPORAL_FACTOR = hunyuan_video.TEMPORAL_FACTOR
SPATIAL_FACTOR = hunyuan_video.SPATIAL_FACTOR
PRESETS = {"FramePackI2V_HY": Preset("lllyasviel/FramePackI2V_HY", 12.8)}
TEXT_TOKENS = hunyuan_video.TEXT_TOKENS
LORA_TARGETS = hunyuan_video.LORA_TARGETS


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"time|norm|guidance": "one",
            r"context_embedder": "text",
            r"image_projection": "image",
            r"clean_x_embedder": "none",
            r"add_[qkv]_proj|to_add_out|ff_context": "text + image",
            r"^single_": "video + text + image + history",
            r"^transformer_blocks": "video + history",
        },
        {
            r"refiner_blocks.*attn\.to_q$": ("text", "text"),
        },
        beside="text + image + history",
        uncounted="the history of earlier sections and the features of the image",
    )


self_attentions = hunyuan_video.self_attentions
timestep = hunyuan_video.timestep


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    pooled_projections: Tensor,
    image_embeds: Tensor,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of the section's (B, C, frames, height, width) latents; ValueError where patches
    leave a rest in it. For a sample alone in its batch this waits for the device."""
    config = transformer.config
    patch = config.patch_size_t, config.patch_size, config.patch_size
    grid = in_patches(hidden_states.shape[2:], patch)
    given = hidden_states, timestep, encoder_hidden_states, encoder_attention_mask
    history = before(transformer, *given, pooled_projections, image_embeds, *args, **kwargs)
    text = encoder_hidden_states.shape[1]
    if len(hidden_states) == 1:
        text = int(encoder_attention_mask.sum(dtype=torch.int))
    return VideoShape(*grid, text=history + image_embeds.shape[1] + text)


def before(
    transformer: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    pooled_projections: Tensor,
    image_embeds: Tensor,
    indices_latents: Tensor,
    guidance: Tensor | None = None,
    latents_clean: Any = None,
    indices_latents_clean: Any = None,
    latents_history_2x: Any = None,
    indices_latents_history_2x: Any = None,
    latents_history_4x: Any = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Number of tokens of the history, whose coarser patches are padded where they leave a
    rest."""
    parts = (
        (latents_clean, (1, 2, 2)),
        (latents_history_2x, (2, 4, 4)),
        (latents_history_4x, (4, 8, 8)),
    )
    return sum(
        prod(-(-size // side) for size, side in zip(x.shape[2:], patch, strict=True))
        for x, patch in parts
    )


def text_lengths(
    transformer: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    pooled_projections: Tensor,
    image_embeds: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[int, ...]:
    """Number of tokens beside the grid in each sample, without padding, as the model counts them.
    Waits for the device."""
    given = hidden_states, timestep, encoder_hidden_states, encoder_attention_mask
    history = before(transformer, *given, pooled_projections, image_embeds, *args, **kwargs)
    lengths = encoder_attention_mask.sum(1, dtype=torch.int)
    return tuple((history + image_embeds.shape[1] + lengths).tolist())
