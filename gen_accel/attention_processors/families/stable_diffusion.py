"""Stable Diffusion 1.5, 2.1 and XL.

A UNet whose levels attend over smaller and smaller grids, each in raster order; text is seen by
cross-attention. Transformer blocks are counted as they run: down, in the middle, and up again.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gen_accel.attention_processors.families import (
    ImageAttention,
    SelfAttention,
    image_sites,
)
from gen_accel.attention_processors.seam import Call
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

MODELS = "Stable Diffusion 1.5, 2.1 and XL"
CLASSES = ("UNet2DConditionModel",)
ATTENTION_CALL = "F.scaled_dot_product_attention"
ORDER = "image"
KIND = "image"
GUIDANCE = "batched"

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
}


def self_attentions(transformer: Any) -> list[SelfAttention]:
    """Self-attentions; ValueError for a UNet without any. In Kandinsky's and DeepFloyd's UNets,
    image and text share the keys of one attention."""
    found = [
        (name, block.attn1, level)
        for name, block, level in _blocks(transformer)
        if not block.only_cross_attention
    ]
    if not found:
        raise ValueError(
            f"this {type(transformer).__name__} has no self-attention over the image alone; "
            f"down_block_types are {tuple(transformer.config.down_block_types)}"
        )
    # One function for a whole level, so that its layers may share graphs of torch.compile.
    tokens = {level: partial(_at_level, level) for _, _, level in found}
    return [
        SelfAttention(name, attn, layer, attn.heads, attn.inner_dim // attn.heads, tokens[level])
        for layer, (name, attn, level) in enumerate(found)
    ]


def _blocks(transformer: Any) -> Iterator[tuple[str, Any, int]]:
    """Yield the transformer blocks in order of execution, without blocks over time, and the level
    of each."""
    for stage_name, stage, level in _stages(transformer):
        for i, attention in enumerate(getattr(stage, "attentions", ())):
            # AnimateDiff's FreeNoise wraps blocks that it runs for some frames at a time.
            attention = getattr(attention, "module", attention)
            for j, block in enumerate(getattr(attention, "transformer_blocks", ())):
                yield f"{stage_name}.attentions.{i}.transformer_blocks.{j}", block, level


def _stages(transformer: Any) -> Iterator[tuple[str, Any, int]]:
    """Yield the UNet's own blocks in order of execution, and how often the image was halved before
    each."""
    level = 0
    for i, stage in enumerate(transformer.down_blocks):
        yield f"down_blocks.{i}", stage, level
        level += bool(stage.downsamplers)
    if transformer.mid_block is not None:
        yield "mid_block", transformer.mid_block, level
    for i, stage in enumerate(transformer.up_blocks):
        yield f"up_blocks.{i}", stage, level
        level -= bool(stage.upsamplers)


def _at_level(level: int, tokens: Tokens, call: Call) -> Tokens:
    """Tokens of a level. Each downsampler halves the sides and rounds up; frames are samples."""
    _, height, width = tokens.video.grid
    return Tokens(VideoShape(1, -(-height // 2**level), -(-width // 2**level)))


def image_attentions(transformer: Any) -> list[ImageAttention]:
    """Cross-attentions, without AnimateDiff's motion modules. Published adapters number
    self-attention and cross-attention in turn, so that cross-attention has the odd numbers."""
    names = [name.removesuffix(".processor") for name in transformer.attn_processors]
    spatial = [name for name in names if "motion_modules" not in name]
    sites = image_sites(transformer, [name for name in spatial if not name.endswith("attn1")])
    return [site._replace(number=str(2 * i + 1)) for i, site in enumerate(sites)]


def video_shape(transformer: Any, sample: Tensor, *args: Any, **kwargs: Any) -> VideoShape:
    """The grid of (B, C, height, width) latents. Each level further down has half of its rows and
    columns, rounded up."""
    return VideoShape(1, *sample.shape[2:])


def timestep(sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Tensor:
    """(B,) or of no dimension."""
    return torch.as_tensor(timestep)
