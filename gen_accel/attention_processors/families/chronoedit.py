"""ChronoEdit.

An image is edited by a video that leads to the new one. Tokens are those of Wan; after the first
steps, or from the start, the grid is of two frames, the first and the last.
"""

from typing import Any

from gen_accel.attention_processors.families import Preset, wan

MODELS = "ChronoEdit"
CLASSES = ("ChronoEditTransformer3DModel",)
ATTENTION_CALL = wan.ATTENTION_CALL
ORDER = wan.ORDER
KIND = "video"
TEMPORAL_FACTOR = wan.TEMPORAL_FACTOR  # where there are more than two
SPATIAL_FACTOR = wan.SPATIAL_FACTOR
PRESETS = {
    "ChronoEdit-14B": Preset(
        "nvidia/ChronoEdit-14B-Diffusers",
        16.4,
        {"in_channels": 36, "out_channels": 16, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
}
TEXT_TOKENS = wan.TEXT_TOKENS
LORA_TARGETS = wan.LORA_TARGETS
GUIDANCE = wan.GUIDANCE

layers = wan.layers
inputs = wan.inputs
self_attentions = wan.self_attentions
image_attentions = wan.image_attentions
video_shape = wan.video_shape
timestep = wan.timestep


def no_frames(transformer: Any, *args: Any, **kwargs: Any) -> str:
    return "ChronoEdit leaves out all frames but the first and the last on the way"
