"""FLUX.2.

Image and text attend jointly, text first; reference images come last. Blocks of two streams come
first, then those of one, whose attention projects together with its feed-forward.
"""

from typing import Any

from torch import Tensor, nn

from gen_accel.attention_processors.families import SelfAttention, in_stacks
from gen_accel.attention_processors.families.flux import _image_grid
from gen_accel.video import VideoShape

MODELS = "FLUX.2"
CLASSES = ("Flux2Transformer2DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "text, image, references"
KIND = "image"

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj"),
    ),
    "feed_forward": (
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
    ),
}


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    stacks = ("transformer_blocks", "single_transformer_blocks")
    return in_stacks(transformer, stacks, config.num_attention_heads, config.attention_head_dim)


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    *args: Any,
    kv_cache_mode: str | None = None,
    **kwargs: Any,
) -> VideoShape:
    """The grid of the image, read from the positions of its tokens. Waits for the device.

    Raises ValueError where keys of references are kept from step to step: then references see
    themselves alone, in attention calls of another kind.
    """
    if kv_cache_mode is not None:
        raise ValueError(
            f"kv_cache_mode must be None for {type(transformer).__name__} with a method attached, "
            f"got {kv_cache_mode!r}: detach, or use a pipeline that keeps no keys of references"
        )
    rows, columns = _image_grid(img_ids)
    others = hidden_states.shape[1] - rows * columns
    return VideoShape(1, rows, columns, text=encoder_hidden_states.shape[1] + others)


def before(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    return encoder_hidden_states.shape[1]


def timestep(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,), a thousandth of the scheduler's."""
    return timestep
