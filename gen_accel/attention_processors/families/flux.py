"""FLUX.1, also Fill, Depth, Canny and Kontext, FLUX.2 and FLUX.3.

Image and text attend jointly, text first; images that are edited come last. Blocks of two streams
come first, then those of one, and layers are counted through both.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families.base import (
    BOTH_FEED_FORWARDS,
    JOINT,
    SEPARATE,
    Attention,
    Family,
    Given,
    ImagePrompts,
)
from gen_accel.attention_processors.families.sites import (
    ImageAttention,
    ImageBranch,
    Model,
    SelfAttention,
    outside_graphs,
    without_text,
)
from gen_accel.attention_processors.seam import add_finish
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape


class FluxBlocks(Family):
    """Joint attention with the text first and the timestep a thousandth of the scheduler's."""

    order = "text, image, references"
    kind = "image"
    attention = Attention(
        stacks=("transformer_blocks", "single_transformer_blocks"), text="before"
    )

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The grid of the image, read from the positions of its tokens. Waits for the device."""
        rows, columns = _image_grid(given["img_ids"])
        before = self._beside(transformer, given)
        others = given["hidden_states"].shape[1] - rows * columns
        return Tokens(VideoShape(1, rows, columns, text=before + others), before)


@outside_graphs
def _image_grid(ids: Tensor) -> tuple[int, int]:
    """Rows and columns of the first image, from positions (N, 3 or more) or (B, N, 3 or more):
    which image, row, column. Positions may be scaled. Waits for the device.

    Raises ValueError if the first image is not number 0: VisualCloze begins with examples.
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


class Flux(FluxBlocks):
    """An image prompt is added where published adapters were trained for it: by the blocks of two
    streams, to what leaves the block, with the queries as they are before rotation."""

    models = "FLUX.1, Fill, Control, Kontext"
    lora_targets = {
        "attention": JOINT,
        "feed_forward": (*BOTH_FEED_FORWARDS, "proj_mlp", "proj_out"),
    }
    image_prompts = ImagePrompts("sequential", "transformer_blocks.attn", "flux")

    def tap_image(
        self, transformer: nn.Module, site: ImageAttention, add: ImageBranch
    ) -> Callable[[], None]:
        finish = partial(_third, add)
        return add_finish(site.module, self.attention.call, finish, model=transformer)


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


class Flux2(FluxBlocks):
    """The attention of blocks of one stream projects together with the feed-forward."""

    models = "FLUX.2"
    lora_targets = {
        "attention": (*JOINT, "to_qkv_mlp_proj"),
        "feed_forward": (
            "ff.linear_in",
            "ff.linear_out",
            "ff_context.linear_in",
            "ff_context.linear_out",
        ),
    }

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The grid of the image. ValueError if keys of references are kept from step to step: then
        references see themselves alone, in attention calls of another kind."""
        if (mode := given.get("kv_cache_mode")) is not None:
            raise ValueError(
                f"kv_cache_mode must be None for {type(transformer).__name__} with a method "
                f"attached, got {mode!r}: detach, or use a pipeline that keeps no keys of "
                "references"
            )
        return super().tokens(transformer, given)


class Flux3(FluxBlocks):
    """First blocks in which the image attends to itself, then blocks in which text, image and
    references attend jointly, in this order. The blocks of the text alone and of the references
    alone are left as they are."""

    models = "FLUX.3"
    order = "image, then text, image, references"
    lora_targets = {
        "attention": SEPARATE,
        "feed_forward": ("ff.linear_in", "ff.linear_out"),
    }
    attention = Attention(stacks=("mode_blocks.image", "single_transformer_blocks"), text="before")

    def self_attentions(self, transformer: Model) -> list[SelfAttention]:
        sites, alone = super().self_attentions(transformer), transformer.config.num_layers
        return [site._replace(tokens=without_text) for site in sites[:alone]] + sites[alone:]

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        before = self._beside(transformer, given)
        references = given.get("image_cond_hidden_states")
        others = 0 if references is None else references.shape[1]
        grid = 1, *_image_grid(given["img_ids"])
        return Tokens(VideoShape(*grid, text=before + others), before)
