"""Kandinsky 5, video from text or an image, and images.

Tokens of the self-attention are the video's, in raster order; text is seen by cross-attention. The
attention over the text alone is left as it is. Some of the published models have a sparse
attention of their own (NABLA), for which the tokens are in tiles: it must be off with a method
attached, and for image prompts with masks or scales by frame.
"""

from typing import Any

from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    ImageAttention,
    Preset,
    SelfAttention,
    image_sites,
    in_patches,
    in_stacks,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.video import VideoShape

MODELS = "Kandinsky 5"
CLASSES = ("Kandinsky5Transformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video"
KIND = "video"
LATENT_AXES = "fhwc"
GUIDANCE = "sequential"
FPS = 24
TEMPORAL_FACTOR = 4  # frames in a latent frame, all but the first
SPATIAL_FACTOR = 8
PRESETS = {
    "Kandinsky-5.0-T2V-Lite": Preset(
        "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
        2.0,
        {"model_dim": 1792, "ff_dim": 7168, "num_visual_blocks": 32},
    ),
}
TEXT_TOKENS = 512

# Layers by the end of their names, inside the blocks: other layers are called `out_layer` too.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": tuple(
        f"{attention}.{name}"
        for attention in ("self_attention", "cross_attention")
        for name in ("to_query", "to_key", "to_value", "out_layer")
    ),
    "feed_forward": ("feed_forward.in_layer", "feed_forward.out_layer"),
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"modulation|time|pooled": "one",
            r"^text_|cross_attention\.to_(key|value)": "text",
        },
        {
            r"^text_.*to_query$": ("text", "text"),
            r"cross_attention\.to_query$": ("video", "text"),
        },
    )


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    dim = sum(config.axes_dims)
    heads, stacks = config.model_dim // dim, ("visual_transformer_blocks",)
    return in_stacks(transformer, stacks, heads, dim, attention="self_attention")


def image_attentions(transformer: Any) -> list[ImageAttention]:
    return _cross_attentions(transformer, "cross_attention")


def _cross_attentions(transformer: Any, place: str) -> list[ImageAttention]:
    """
    Args:
        place: of the cross-attention in a block.
    """
    blocks = range(len(transformer.visual_transformer_blocks))
    names = [f"visual_transformer_blocks.{i}.{place}" for i in blocks]
    projections = {"heads": "num_heads", "to_k": "to_key", "to_v": "to_value", "norm": "key_norm"}
    return image_sites(transformer, names, **projections)


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
            f"sparse_params must be None for {type(transformer).__name__} where the places of its "
            "tokens count, got those of the model's own sparse attention; before the pipeline, "
            'call pipe.transformer.register_to_config(attention_type="regular")'
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
