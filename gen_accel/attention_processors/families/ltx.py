"""LTX-Video, for image prompts.

Tokens are the video's alone, in raster order; text is seen by cross-attention.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gen_accel.attention_processors.families import (
    ImageAttention,
    ImageBranch,
    image_sites,
    tap_cross_attention,
)
from gen_accel.video import VideoShape

CLASSES = ("LTXVideoTransformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
GUIDANCE = "batched"
TEMPORAL_FACTOR = 8  # frames in a latent frame, all but the first


def image_attentions(transformer: Any) -> list[ImageAttention]:
    blocks = range(len(transformer.transformer_blocks))
    names = [f"transformer_blocks.{i}.attn2" for i in blocks]
    return image_sites(transformer, names, norm="norm_k")


def tap_image(transformer: Any, site: ImageAttention, add: ImageBranch) -> Callable[[], None]:
    return tap_cross_attention(transformer, site, ATTENTION_CALL, add)


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    encoder_attention_mask: Tensor,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid that the pipeline names, as latents come as a row of tokens; ValueError where it
    gives coordinates instead, as it does for several conditions."""
    if num_frames is None or height is None or width is None:
        raise ValueError(
            f"num_frames, height and width must be given to {type(transformer).__name__}, got "
            f"{(num_frames, height, width)}: without them the grid of its tokens is unknown"
        )
    return VideoShape(num_frames, height, width)


def timestep(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,), or (B, tokens) where some are given (image to video)."""
    return timestep
