"""Kandinsky 5, video from text or an image, and images.

Tokens of the self-attention are the video's, in raster order; text is seen by cross-attention,
which is left as it is, and so is the attention over the text alone. Some of the published models
have a sparse attention of their own (NABLA), for which the tokens are in tiles: with a method
attached it must be off.
"""

from typing import Any

from torch import Tensor, nn

from gen_accel.attention_processors.families import SelfAttention, in_patches, in_stacks
from gen_accel.video import VideoShape

MODELS = "Kandinsky 5"
CLASSES = ("Kandinsky5Transformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video"
KIND = "video"
FPS = 24
TEMPORAL_FACTOR = 4  # frames in a latent frame, all but the first

# By what they end in, inside the blocks: other layers are called `out_layer` too.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": tuple(
        f"{attention}.{name}"
        for attention in ("self_attention", "cross_attention")
        for name in ("to_query", "to_key", "to_value", "out_layer")
    ),
    "feed_forward": ("feed_forward.in_layer", "feed_forward.out_layer"),
}


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    dim = sum(config.axes_dims)
    heads, stacks = config.model_dim // dim, ("visual_transformer_blocks",)
    return in_stacks(transformer, stacks, heads, dim, attention="self_attention")


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    pooled_projections: Tensor,
    visual_rope_pos: Any,
    text_rope_pos: Tensor,
    scale_factor: Any = None,
    sparse_params: Any = None,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of (B, frames, height, width, C) latents; ValueError where patches leave a rest, or
    with the model's own sparse attention."""
    if sparse_params is not None:
        raise ValueError(
            f"sparse_params must be None for {type(transformer).__name__} with a method attached, "
            "got those of the model's own sparse attention; before the pipeline, call "
            'pipe.transformer.register_to_config(attention_type="regular")'
        )
    return VideoShape(*in_patches(hidden_states.shape[1:4], transformer.config.patch_size))


def timestep(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,)"""
    return timestep


def longest(transformer: Any) -> int:
    """The latent frames after patchify that its rotary table has positions for."""
    return transformer.visual_rope_embeddings.max_pos[0]
