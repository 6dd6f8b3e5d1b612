"""Wan 2.1 and 2.2, text to video, image to video, and VACE.

Tokens are the video's alone, in raster order; text and image are seen by cross-attention. VACE's
control blocks run over the same grid.
"""

from typing import Any

from torch import Tensor, nn

from gen_accel.attention_processors.families import SelfAttention
from gen_accel.video import VideoShape

CLASSES = ("WanTransformer3DModel", "WanVACETransformer3DModel")
ATTENTION_CALL = "dispatch_attention_fn"


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    return [
        SelfAttention(f"{stack}.{layer}", block.attn1, layer, heads, dim)
        for stack in ("blocks", "vace_blocks")
        for layer, block in enumerate(getattr(transformer, stack, ()))
    ]


def video_shape(transformer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents; ValueError where patches leave a rest."""
    sizes, patch = tuple(hidden_states.shape[2:]), tuple(transformer.config.patch_size)
    if any(size % side for size, side in zip(sizes, patch, strict=True)):
        whole = tuple(size // side * side for size, side in zip(sizes, patch, strict=True))
        raise ValueError(
            f"latents of {sizes} (frames, height, width) are not whole patches of {patch}; "
            f"the nearest below are {whole}"
        )
    return VideoShape(*(size // side for size, side in zip(sizes, patch, strict=True)))


def timestep(hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(B,), or (B, tokens) where each token has its own (Wan 2.2 TI2V-5B)."""
    return timestep
