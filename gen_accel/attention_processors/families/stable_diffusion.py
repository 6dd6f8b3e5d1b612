"""Stable Diffusion 1.5 and XL, for image prompts.

A UNet whose levels attend over smaller and smaller grids; text is seen by cross-attention.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gen_accel.attention_processors.families import (
    ImageAttention,
    ImageBranch,
    image_sites,
    tap_cross_attention,
)
from gen_accel.video import VideoShape

CLASSES = ("UNet2DConditionModel",)
ATTENTION_CALL = "F.scaled_dot_product_attention"
GUIDANCE = "batched"


def image_attentions(transformer: Any) -> list[ImageAttention]:
    """Cross-attention. Published adapters number all attentions, and in each block the one over
    the image comes first, so that these have the odd numbers."""
    names = [name.removesuffix(".processor") for name in transformer.attn_processors]
    crosses = [name for name in names if not name.endswith("attn1")]
    sites = image_sites(transformer, crosses)
    return [site._replace(number=str(2 * i + 1)) for i, site in enumerate(sites)]


def tap_image(transformer: Any, site: ImageAttention, add: ImageBranch) -> Callable[[], None]:
    return tap_cross_attention(transformer, site, ATTENTION_CALL, add)


def video_shape(transformer: Any, sample: Tensor, *args: Any, **kwargs: Any) -> VideoShape:
    """The grid of (B, C, height, width) latents. Each level further down has half of its rows and
    columns, rounded up."""
    return VideoShape(1, *sample.shape[2:])


def timestep(sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Tensor:
    """(B,) or of no dimension."""
    return torch.as_tensor(timestep)
