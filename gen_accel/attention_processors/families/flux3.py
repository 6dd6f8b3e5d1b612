"""FLUX.3.

First blocks in which the image attends to itself, then blocks in which text, image and references
attend jointly, in this order. The blocks of the text alone and of the references alone are left as
they are.
"""

from typing import Any

from torch import Tensor, nn

from gen_accel.attention_processors.families import SelfAttention, in_stacks, without_text
from gen_accel.attention_processors.families.flux import _image_grid
from gen_accel.video import VideoShape

MODELS = "FLUX.3"
CLASSES = ("Flux3Transformer2DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "image, then text, image, references"
KIND = "image"

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.linear_in", "ff.linear_out"),
}


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    stacks = ("mode_blocks.image", "single_transformer_blocks")
    sites = in_stacks(transformer, stacks, config.num_attention_heads, config.attention_head_dim)
    alone = config.num_layers
    return [site._replace(tokens=without_text) for site in sites[:alone]] + sites[alone:]


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    image_cond_hidden_states: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of the image, read from the positions of its tokens. Waits for the device."""
    text = encoder_hidden_states.shape[1]
    if image_cond_hidden_states is not None:
        text += image_cond_hidden_states.shape[1]
    return VideoShape(1, *_image_grid(img_ids), text=text)


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
