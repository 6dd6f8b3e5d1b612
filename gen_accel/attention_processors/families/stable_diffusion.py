"""Stable Diffusion 1.5, 2.1 and XL, and AnimateDiff, which makes videos with them.

A UNet whose levels attend over smaller and smaller grids, each in raster order; text is seen by
cross-attention. Transformer blocks are counted as they run: down, in the middle, and up again.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gen_accel.attention_processors.families.base import (
    Attention,
    Colors,
    Family,
    Generation,
    Given,
    ImagePrompts,
    PipelineInputs,
    Sizes,
)
from gen_accel.attention_processors.families.layers import Flops, Lengths
from gen_accel.attention_processors.families.sites import (
    ImageAttention,
    Model,
    SelfAttention,
    image_sites,
)
from gen_accel.attention_processors.seam import Call
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

_CONTROLNET = "it needs a ControlNet and the frames that it reads"


class StableDiffusion(Family):
    models = "Stable Diffusion 1.5, 2.1 and XL"
    order = "image"
    kind = "image"
    attention = Attention(call="F.scaled_dot_product_attention")
    image_prompts = ImagePrompts("batched", adapters="stable_diffusion")
    generation = Generation(axes="chw")
    colors = (
        Colors(
            "AutoencoderKL",
            "block_out_channels",
            (128, 256, 512, 512),
            """
            0.3512 0.325 -0.2829 -0.212
            0.2297 0.4974 0.1762 -0.2616
            0.3227 0.235 0.2721 -0.7177
            """,
            bias=(0, 0, 0),
        ),
    )

    def self_attentions(self, transformer: Model) -> list[SelfAttention]:
        """Self-attentions; ValueError for a UNet without any. In Kandinsky's and DeepFloyd's
        UNets, image and text share the keys of one attention."""
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
            SelfAttention(
                name, attn, layer, attn.heads, attn.inner_dim // attn.heads, tokens[level]
            )
            for layer, (name, attn, level) in enumerate(found)
        ]

    def image_attentions(self, transformer: Model) -> list[ImageAttention]:
        """Cross-attentions, without AnimateDiff's motion modules. Published adapters number
        self-attention and cross-attention in turn, so that cross-attention has the odd numbers."""
        names = [name.removesuffix(".processor") for name in transformer.attn_processors]
        spatial = [name for name in names if "motion_modules" not in name]
        sites = image_sites(transformer, [name for name in spatial if not name.endswith("attn1")])
        return [site._replace(number=str(2 * i + 1)) for i, site in enumerate(sites)]

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The grid of the latents on the first level. Each level further down has half of its rows
        and columns, rounded up."""
        shape = given["sample"].shape
        return Tokens(VideoShape(shape[2] if len(shape) == 5 else 1, *shape[-2:]))


def _blocks(unet: Model) -> Iterator[tuple[str, Model, int]]:
    """Yield the transformer blocks in order of execution, without blocks over time, and the level
    of each."""
    for stage_name, stage, level in _stages(unet):
        for i, attention in enumerate(getattr(stage, "attentions", ())):
            # AnimateDiff's FreeNoise wraps blocks that it runs for some frames at a time.
            attention = getattr(attention, "module", attention)
            for j, block in enumerate(getattr(attention, "transformer_blocks", ())):
                yield f"{stage_name}.attentions.{i}.transformer_blocks.{j}", block, level


def _stages(unet: Model) -> Iterator[tuple[str, Model, int]]:
    """Yield the UNet's own blocks in order of execution, and how often the image was halved before
    each."""
    level = 0
    for i, stage in enumerate(unet.down_blocks):
        yield f"down_blocks.{i}", stage, level
        level += bool(stage.downsamplers)
    if unet.mid_block is not None:
        yield "mid_block", unet.mid_block, level
    for i, stage in enumerate(unet.up_blocks):
        yield f"up_blocks.{i}", stage, level
        level -= bool(stage.upsamplers)


def _at_level(level: int, tokens: Tokens, call: Call) -> Tokens:
    """Tokens of a level. Each downsampler halves the sides and rounds up; frames are samples."""
    _, height, width = tokens.video.grid
    return Tokens(VideoShape(1, -(-height // 2**level), -(-width // 2**level)))


class AnimateDiff(StableDiffusion):
    """Each frame is a sample of its own that attends to itself. The motion modules between the
    UNet's blocks are left alone: they attend over the frames of one place, which are few."""

    models = "AnimateDiff"
    order = "video, each frame by itself"
    kind = "frames"
    sizes = Sizes(temporal=1, spatial=8, fps=8, text=77)
    generation = Generation()
    pipelines = {
        "AnimateDiffPipeline": PipelineInputs("animatediff"),
        "AnimateDiffVideoToVideoPipeline": PipelineInputs(
            "animatediff", text=False, video="video", strength="strength", role="remade"
        ),
        "AnimateDiffPAGPipeline": PipelineInputs("animatediff pag"),
        "AnimateDiffSDXLPipeline": PipelineInputs("animatediff sdxl"),
        "AnimateDiffControlNetPipeline": _CONTROLNET,
        "AnimateDiffSparseControlNetPipeline": _CONTROLNET,
        "AnimateDiffVideoToVideoControlNetPipeline": _CONTROLNET,
        "PIAPipeline": PipelineInputs("pia", text=False, image="image"),
    }

    def cost(self, transformer: Model) -> Callable[[VideoShape, Lengths], Flops]:
        return partial(self._count, transformer)

    def _count(self, transformer: Model, video: VideoShape, lengths: Lengths) -> Flops:
        """Count FLOPs in a forward pass without values, as convolutions and levels differ in
        size."""
        with torch.device("meta"):
            if next(transformer.parameters()).device.type != "meta":
                transformer = transformer.from_config(transformer.config)
            config, frames = transformer.config, video.frames
            latents = torch.zeros(1, config.in_channels, *video.grid)
            text = torch.zeros(frames, int(lengths["text"]), config.cross_attention_dim)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                transformer(latents, torch.tensor(1.0), text)
        attention = 0.0
        for site in self.self_attentions(transformer):
            tokens: Any = site.tokens
            pixels = tokens(Tokens(video), None).video.tokens
            attention += 4.0 * frames * pixels**2 * site.heads * site.dim
        return Flops(attention, counter.get_total_flops() - attention)
