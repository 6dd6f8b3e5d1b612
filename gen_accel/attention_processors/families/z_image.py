"""Z-Image.

The image attends to itself in the first blocks, and then jointly with the text, which comes last.
Image and text are each padded to a multiple of 32 tokens by learned tokens, which are seen.
Padding to the longest text of a batch is hidden by a mask. The blocks of the text alone are left
as they are.
"""

from typing import Any

from torch import Tensor

from gen_accel.attention_processors.families import SelfAttention, in_patches
from gen_accel.attention_processors.seam import Call
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

MODELS = "Z-Image"
CLASSES = ("ZImageTransformer2DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "image, filling, text"
KIND = "image"
TIMESTEPS_RISE = True

_MULTIPLE = 32  # of tokens of an image and of a text

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
}


def self_attentions(transformer: Any) -> list[SelfAttention]:
    heads = transformer.n_heads
    dim = transformer.dim // heads
    sites = [
        SelfAttention(f"{stack}.{place}", block.attention, place, heads, dim, tokens)
        for stack, tokens in (("noise_refiner", _image), ("layers", None))
        for place, block in enumerate(getattr(transformer, stack))
    ]
    return [site._replace(layer=layer) for layer, site in enumerate(sites)]


def _image(tokens: Tokens, call: Call) -> Tokens:
    grid = tokens.video.grid
    return Tokens(VideoShape(*grid, text=call.k.shape[1] - tokens.video.video_tokens))


def video_shape(
    transformer: Any,
    x: list,
    t: Tensor,
    cap_feats: list,
    return_dict: bool = True,
    controlnet_block_samples: Any = None,
    siglip_feats: Any = None,
    image_noise_mask: Any = None,
    patch_size: int = 2,
    f_patch_size: int = 1,
    **kwargs: Any,
) -> VideoShape:
    """The grid of latents (C, frames, height, width) each.

    Raises ValueError for samples of several images, or of different sizes, and where patches leave
    a rest.
    """
    if isinstance(x[0], list) or any(image.shape != x[0].shape for image in x):
        raise ValueError(
            "x must be one latent of the same size for each sample with a method attached to "
            f"{type(transformer).__name__}: detach for several images, run other sizes apart"
        )
    grid = in_patches(x[0].shape[1:], (f_patch_size, patch_size, patch_size))
    image = VideoShape(*grid)
    text = max(_filled(len(text)) for text in cap_feats)
    return VideoShape(*grid, text=_filled(image.tokens) - image.tokens + text)


def text_lengths(
    transformer: Any, x: list, t: Tensor, cap_feats: list, *args: Any, **kwargs: Any
) -> tuple[int, ...]:
    """Number of text tokens in each sample, with the learned padding of image and text."""
    video = video_shape(transformer, x, t, cap_feats, *args, **kwargs)
    image = _filled(video.video_tokens) - video.video_tokens
    return tuple(image + _filled(len(text)) for text in cap_feats)


def _filled(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE


def timestep(x: list, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(B,), 1 less a thousandth of the scheduler's, so that it rises from step to step."""
    return t
