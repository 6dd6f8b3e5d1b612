"""AnimateDiff, on Stable Diffusion 1.5 and XL.

The UNet of `stable_diffusion`, in which each frame is a sample of its own that attends to itself.
The motion modules between its blocks are left alone: they attend over the frames of one place,
which are few.
"""

from typing import Any

from torch import Tensor

from gen_accel.attention_processors.families import stable_diffusion
from gen_accel.video import VideoShape

MODELS = "AnimateDiff"
CLASSES = ("UNetMotionModel",)
ATTENTION_CALL = stable_diffusion.ATTENTION_CALL
ORDER = "video, each frame by itself"
KIND = "frames"
FPS = 8
LORA_TARGETS = stable_diffusion.LORA_TARGETS
GUIDANCE = stable_diffusion.GUIDANCE
TEMPORAL_FACTOR = 1  # frames in a latent frame

self_attentions = stable_diffusion.self_attentions
image_attentions = stable_diffusion.image_attentions
timestep = stable_diffusion.timestep


def video_shape(transformer: Any, sample: Tensor, *args: Any, **kwargs: Any) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents on the first level."""
    return VideoShape(*sample.shape[2:])
