"""HiDream-I1.

Image and text attend jointly, text last. The text comes from T5 and from two layers of Llama, of
which the second changes from block to block. Images that are not square are filled up to the
longest sequence that the model knows, with keys of zero which all see, as the model was trained.
Blocks of two streams come first, then those of one.
"""

from typing import Any

from torch import Tensor, nn

from gen_accel.attention_processors.families import SelfAttention, in_patches, in_stacks
from gen_accel.video import VideoShape

MODELS = "HiDream-I1"
CLASSES = ("HiDreamImageTransformer2DModel",)
ATTENTION_CALL = "F.scaled_dot_product_attention"
ORDER = "image, filling, text"
KIND = "image"

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("to_q", "to_k", "to_v", "to_out"),
        *("to_q_t", "to_k_t", "to_v_t", "to_out_t"),
    ),
    "feed_forward": ("w1", "w2", "w3"),
}


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    stacks = ("double_stream_blocks", "single_stream_blocks")
    return in_stacks(transformer, stacks, heads, dim, attention="block.attn1")


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    timesteps: Tensor,
    encoder_hidden_states_t5: Tensor,
    encoder_hidden_states_llama3: Tensor,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of (B, C, height, width) latents.

    Raises ValueError where patches leave a rest, and for latents given as tokens, whose grid may
    differ between samples.
    """
    if hidden_states.ndim != 4:
        raise ValueError(
            f"hidden_states must be (B, C, height, width) for {type(transformer).__name__} with a "
            f"method attached, got {tuple(hidden_states.shape)}"
        )
    side = transformer.config.patch_size
    _, rows, columns = in_patches((1, *hidden_states.shape[2:]), (1, side, side))
    filling = 0 if rows == columns else transformer.max_seq - rows * columns
    text = encoder_hidden_states_t5.shape[-2] + 2 * encoder_hidden_states_llama3.shape[-2]
    return VideoShape(1, rows, columns, text=filling + text)


def timestep(hidden_states: Tensor, timesteps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(B,)"""
    return timesteps
