"""Qwen-Image, also Edit and Layered.

Image and text attend jointly, text first, its padding hidden by a mask; images that are edited
come last. The layers of Qwen-Image-Layered are the frames of one grid, the first one the whole
picture.
"""

from typing import Any

from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    SelfAttention,
    in_stacks,
    prefix_lengths,
)
from gen_accel.video import VideoShape

MODELS = "Qwen-Image, Edit, Layered"
CLASSES = ("QwenImageTransformer2DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "text, image, references"
KIND = "image"
MASKS_ALIKE = True

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    "feed_forward": (
        *("img_mlp.net.0.proj", "img_mlp.net.2"),
        *("txt_mlp.net.0.proj", "txt_mlp.net.2"),
    ),
}


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    return in_stacks(transformer, ("transformer_blocks",), heads, dim)


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    timestep: Tensor,
    img_shapes: list,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """Grid of the generated images: the first of several images of a sample, and all layers but
    the last, which is the condition."""
    images = img_shapes[0]
    if not isinstance(images, list):
        images = [images]
    frames, rows, columns = images[0]
    if transformer.config.use_layer3d_rope:
        frames = len(images) - 1
    others = hidden_states.shape[1] - frames * rows * columns
    return VideoShape(frames, rows, columns, text=encoder_hidden_states.shape[1] + others)


def before(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    return encoder_hidden_states.shape[1]


def text_lengths(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    timestep: Tensor,
    img_shapes: list,
    *args: Any,
    **kwargs: Any,
) -> tuple[int, ...] | None:
    """Number of text tokens in each sample, without padding; None with images to edit, which come
    behind the padding. Waits for the device."""
    given = hidden_states, encoder_hidden_states, encoder_hidden_states_mask, timestep, img_shapes
    others = video_shape(transformer, *given).text - encoder_hidden_states.shape[1]
    if encoder_hidden_states_mask is None or others:
        return None
    return prefix_lengths(encoder_hidden_states_mask)


def timestep(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,), a thousandth of the scheduler's."""
    return timestep
