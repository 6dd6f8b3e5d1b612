"""FLUX.1, for image prompts.

Image and text attend jointly, text first. An image prompt is added where published adapters were
trained for it: by the blocks of two streams, to what leaves the block, with the queries as they
are before rotation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from gen_accel.attention_processors.families import ImageAttention, ImageBranch, image_sites
from gen_accel.attention_processors.seam import add_finish
from gen_accel.video import VideoShape

CLASSES = ("FluxTransformer2DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
GUIDANCE = "sequential"


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
    """To the two results of image and text a third, which the block adds ungated."""
    if not getattr(add, "acts", True):
        return result  # no queries for nothing
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
    """The grid of the image, read from the positions of its tokens, and the text. Images that are
    edited come after it and are left out. Waits for the device."""
    ids = img_ids[0] if img_ids.ndim == 3 else img_ids
    last = ids[ids[:, 0] == 0].amax(0).long().tolist()
    return VideoShape(1, last[1] + 1, last[2] + 1, text=encoder_hidden_states.shape[1])


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
