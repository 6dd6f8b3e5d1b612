"""ChronoEdit.

An image is edited by a video that leads to the new one. Tokens are those of Wan; after the first
steps, or from the start, the grid is of two frames, the first and the last.
"""

from gen_accel.attention_processors.families import wan

MODELS = "ChronoEdit"
CLASSES = ("ChronoEditTransformer3DModel",)
ATTENTION_CALL = wan.ATTENTION_CALL
ORDER = wan.ORDER
KIND = "video"
TEMPORAL_FACTOR = wan.TEMPORAL_FACTOR  # where there are more than two
LORA_TARGETS = wan.LORA_TARGETS

self_attentions = wan.self_attentions
video_shape = wan.video_shape
timestep = wan.timestep
