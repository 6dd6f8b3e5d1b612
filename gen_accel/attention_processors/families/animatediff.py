"""AnimateDiff, on Stable Diffusion 1.5 and XL.

The UNet of `stable_diffusion`, in which each frame is a sample of its own that attends to itself.
The motion modules between its blocks are left alone: they attend over the frames of one place,
which are few.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gen_accel.attention_processors.families import stable_diffusion
from gen_accel.attention_processors.families.layers import Flops
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

MODELS = "AnimateDiff"
CLASSES = ("UNetMotionModel",)
ATTENTION_CALL = stable_diffusion.ATTENTION_CALL
ORDER = "video, each frame by itself"
KIND = "frames"
FPS = 8
LORA_TARGETS = stable_diffusion.LORA_TARGETS
GUIDANCE = stable_diffusion.GUIDANCE
SPATIAL_FACTOR = 8
TEXT_TOKENS = 77
TEMPORAL_FACTOR = 1  # frames in a latent frame

self_attentions = stable_diffusion.self_attentions
image_attentions = stable_diffusion.image_attentions
timestep = stable_diffusion.timestep


def video_shape(transformer: Any, sample: Tensor, *args: Any, **kwargs: Any) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents on the first level."""
    return VideoShape(*sample.shape[2:])


def flops(transformer: Any, video: VideoShape, lengths: Mapping[str, int]) -> Flops:
    """Count FLOPs in a forward pass without values, as convolutions and levels differ in size."""
    with torch.device("meta"):
        if next(transformer.parameters()).device.type != "meta":
            transformer = type(transformer).from_config(transformer.config)
        config, frames = transformer.config, video.frames
        latents = torch.zeros(1, config.in_channels, *video.grid)
        text = torch.zeros(frames, lengths["text"], config.cross_attention_dim)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            transformer(latents, torch.tensor(1.0), text)
    attention = 0.0
    for site in self_attentions(transformer):
        tokens: Any = site.tokens
        pixels = tokens(Tokens(video), None).video.tokens
        attention += 4.0 * frames * pixels**2 * site.heads * site.dim
    return Flops(attention, counter.get_total_flops() - attention)
