"""ConsisID.

Tokens are those of CogVideoX 1.0. The face is seen by cross-attention beside the blocks, which has
no processor and is left as it is.
"""

from gen_accel.attention_processors.families import cogvideox

MODELS = "ConsisID"
CLASSES = ("ConsisIDTransformer3DModel",)
ATTENTION_CALL = cogvideox.ATTENTION_CALL
ORDER = cogvideox.ORDER
KIND = "video"
TEMPORAL_FACTOR = cogvideox.TEMPORAL_FACTOR
LORA_TARGETS = cogvideox.LORA_TARGETS

self_attentions = cogvideox.self_attentions
video_shape = cogvideox.video_shape
before = cogvideox.before
timestep = cogvideox.timestep
