"""FLUX.1, also Fill, Depth, Canny and Kontext.

Image and text attend jointly, text first; images that are edited come last. Blocks of two streams
come first, then those of one, and layers are counted through both. An image prompt is added where
published adapters were trained for it: by the blocks of two streams, to what leaves the block,
with the queries as they are before rotation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    ImageAttention,
    ImageBranch,
    SelfAttention,
    image_sites,
    in_stacks,
    outside_graphs,
)
from gen_accel.attention_processors.seam import add_finish
from gen_accel.video import VideoShape

MODELS = "FLUX.1, Fill, Control, Kontext"
CLASSES = ("FluxTransformer2DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "text, image, references"
KIND = "image"
GUIDANCE = "sequential"

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    "feed_forward": (
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("proj_mlp", "proj_out"),
    ),
}


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    stacks = ("transformer_blocks", "single_transformer_blocks")
    return in_stacks(transformer, stacks, config.num_attention_heads, config.attention_head_dim)


def image_attentions(transformer: Any) -> list[ImageAttention]:
    blocks = range(len(transformer.transformer_blocks))
    names = [f"transformer_blocks.{i}.attn" for i in blocks]
    return image_sites(transformer, names, norm="norm_k")


def tap_image(transformer: Any, site: ImageAttention, add: ImageBranch) -> Callable[[], None]:
    finish = partial(_third, add)
    return add_finish(site.module, ATTENTION_CALL, finish, model=transformer)


def _third(
    add: ImageBranch, result: tuple, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> tuple:
    """Append a third result to the two of image and text; the block adds it ungated."""
    if not getattr(add, "acts", True):
        return result  # no need to compute queries
    q = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)))
    added = add(q, slice(0, len(q)))
    if added is None:
        return result
    image, text, *before = result
    return image, text, sum(before, added.flatten(2).to(image.dtype))


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of the image, read from the positions of its tokens. Waits for the device."""
    rows, columns = _image_grid(img_ids)
    others = hidden_states.shape[1] - rows * columns
    return VideoShape(1, rows, columns, text=encoder_hidden_states.shape[1] + others)


@outside_graphs
def _image_grid(ids: Tensor) -> tuple[int, int]:
    """Rows and columns of the first image, from positions (N, 3 or more) or (B, N, 3 or more):
    which image, row, column. Positions may be scaled. Waits for the device.

    Raises ValueError where the first image is not number 0: VisualCloze begins with examples.
    """
    ids = ids[0] if ids.ndim == 3 else ids
    first = (ids[:, 0] == ids[0, 0]).sum()
    columns = (ids[:, :2] == ids[0, :2]).all(1).sum()
    tokens, width, number = torch.stack([first, columns, ids[0, 0].long()]).tolist()
    if number:
        raise ValueError(
            f"img_ids must begin with image 0, the one that is made, got {number}: attach Dense() "
            "or detach for this pipeline"
        )
    return tokens // width, width


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
    pooled_projections: Tensor,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,), a thousandth of the scheduler's."""
    return timestep
