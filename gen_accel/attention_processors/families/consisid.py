"""ConsisID.

Tokens are those of CogVideoX 1.0. The face is seen by cross-attention beside the blocks, which has
no processor and is left as it is.
"""

from typing import Any

from gen_accel.attention_processors.families import cogvideox
from gen_accel.attention_processors.families.layers import Layers

MODELS = "ConsisID"
CLASSES = ("ConsisIDTransformer3DModel",)
ATTENTION_CALL = cogvideox.ATTENTION_CALL
ORDER = cogvideox.ORDER
KIND = "video"
LATENT_AXES = "fchw"
TEMPORAL_FACTOR = cogvideox.TEMPORAL_FACTOR
SPATIAL_FACTOR = cogvideox.SPATIAL_FACTOR
TEXT_TOKENS = cogvideox.TEXT_TOKENS
LORA_TARGETS = cogvideox.LORA_TARGETS


def layers(transformer: Any) -> Layers:
    """Layers without the cross-attention to the face, whose cost depends on the face."""
    stock = cogvideox.layers(transformer)
    rows = {"local_facial_extractor|perceiver": "none", **stock.rows}
    return stock._replace(rows=rows, uncounted="the face")


self_attentions = cogvideox.self_attentions
video_shape = cogvideox.video_shape
before = cogvideox.before
timestep = cogvideox.timestep
