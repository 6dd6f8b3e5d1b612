"""AnyFlow.

Tokens are the video's alone, in raster order; text and image are seen by cross-attention. Latents
come frames first, before their channels.
"""

from typing import Any

from torch import Tensor

from gen_accel.attention_processors.families import Preset, in_patches, wan
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.video import VideoShape

MODELS = "AnyFlow"
CLASSES = ("AnyFlowTransformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video"
KIND = "video"
LATENT_AXES = "fchw"
FPS = 16
TEMPORAL_FACTOR = 4  # frames in a latent frame, all but the first
SPATIAL_FACTOR = wan.SPATIAL_FACTOR
PRESETS = {"AnyFlow-Wan2.1-T2V-14B": Preset("nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers", 14.3)}
TEXT_TOKENS = wan.TEXT_TOKENS
LORA_TARGETS = wan.LORA_TARGETS
AUTOENCODER = wan.AUTOENCODER
GUIDANCE = "batched"


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"text_embedder|attn2\.to_[kv]$": "text",
            r"time|delta_embedder": "frames",
        },
        {
            r"attn2\.to_q$": ("video", "text"),
        },
    )


self_attentions = wan.self_attentions
image_attentions = wan.image_attentions


def video_shape(transformer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> VideoShape:
    """The grid of (B, frames, C, height, width) latents; ValueError where patches leave a rest."""
    frames, _, *sides = hidden_states.shape[1:]
    return VideoShape(*in_patches((frames, *sides), transformer.config.patch_size))


def no_context_parallel(transformer: Any) -> str:
    return "its rotary embeddings are a dict, which diffusers cannot split"


def timestep(hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(B, frames), the timestep at which a step of the flow map begins."""
    return timestep
