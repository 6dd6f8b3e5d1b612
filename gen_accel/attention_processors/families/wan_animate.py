"""Wan 2.2 Animate.

Tokens are those of Wan, with the image of the character as the first frame of the grid. The face
adapters, in which a frame sees the face at its time, are left as they are.
"""

from typing import Any

from gen_accel.attention_processors.families import Preset, wan
from gen_accel.attention_processors.families.layers import Layers

MODELS = "Wan 2.2 Animate"
CLASSES = ("WanAnimateTransformer3DModel",)
ATTENTION_CALL = wan.ATTENTION_CALL
ORDER = wan.ORDER
KIND = "video"
TEMPORAL_FACTOR = wan.TEMPORAL_FACTOR  # after the first latent, which is the image
SPATIAL_FACTOR = wan.SPATIAL_FACTOR
PRESETS = {"Wan2.2-Animate-14B": Preset("Wan-AI/Wan2.2-Animate-14B-Diffusers", 15.2)}
TEXT_TOKENS = wan.TEXT_TOKENS
LORA_TARGETS = wan.LORA_TARGETS
GUIDANCE = wan.GUIDANCE


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"face|pose": "none",
            r"text_embedder|attn2\.to_[kv]$": "text",
            r"image_embedder|attn2\.add_[kv]_proj$": "image",
            r"time": "one",
        },
        {
            r"blocks.*attn2\.to_q$": ("video", "text + image"),
        },
        lengths={"image": wan._image_tokens(transformer.config)},
        uncounted="the pose and the face",
    )


self_attentions = wan.self_attentions
image_attentions = wan.image_attentions
video_shape = wan.video_shape
timestep = wan.timestep


def no_context_parallel(transformer: Any) -> str:
    return "its face adapters need all tokens of a frame"


def no_frames(transformer: Any, *args: Any, **kwargs: Any) -> str:
    return "Wan 2.2 Animate makes a video in segments, each behind the image of the character"
