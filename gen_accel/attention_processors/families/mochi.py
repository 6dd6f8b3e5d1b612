"""Mochi 1, for image prompts.

Video and text attend jointly, video first, in a call of its own for each sample, which leaves the
padding of its text out.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gen_accel.attention_processors.families import (
    ImageAttention,
    ImageBranch,
    image_sites,
    in_patches,
    tap_joint_attention,
)
from gen_accel.video import VideoShape

CLASSES = ("MochiTransformer3DModel",)
ATTENTION_CALL = "F.scaled_dot_product_attention"
GUIDANCE = "batched"
TEMPORAL_FACTOR = 6  # frames in a latent frame, all but the first


def image_attentions(transformer: Any) -> list[ImageAttention]:
    blocks = range(len(transformer.transformer_blocks))
    names = [f"transformer_blocks.{i}.attn1" for i in blocks]
    return image_sites(transformer, names, norm="norm_k")


def tap_image(transformer: Any, site: ImageAttention, add: ImageBranch) -> Callable[[], None]:
    return tap_joint_attention(transformer, site, ATTENTION_CALL, add, by_sample=True)


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents, and the text with its padding; ValueError
    where patches leave a rest."""
    side = transformer.config.patch_size
    grid = in_patches(hidden_states.shape[2:], (1, side, side))
    return VideoShape(*grid, text=encoder_hidden_states.shape[1])


def timestep(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,), which rises from step to step."""
    return timestep
