"""Where it is computed: one diffusers model family a file, with these names.

CLASSES                       the transformer classes it serves
ATTENTION_CALL                the global name of the attention call in their processors
self_attentions(transformer)  the attentions over the video's tokens, as `SelfAttention`s
video_shape(transformer, ...) the token grid, read from the arguments of a forward pass
timestep(...)                 of a forward pass, read from its arguments
text_lengths(transformer, ...) of each sample in tokens, where video and text attend jointly and
                              a mask hides the padding of the text

For training:

LORA_TARGETS                  names of a group of layers to what they end in, inside the blocks
CAUSAL_VAE                    the first latents of a long clip are the latents of its beginning
encode_video(pipe, video, generator) latents as the transformer takes them
encode_prompt(pipe, prompts, max_tokens) the transformer's arguments, batch first
predict(transformer, noisy, sigma, conditions) the velocity, noise - clean

For longer video:

TRAINED_FRAMES                that the published models were trained on
TEMPORAL_FACTOR               frames in a latent frame, all but the first, which is one frame
longest(transformer)          latent frames that it has positions for, where they are a table
temporal_frequencies(transformer) of its rotary pairs on the time axis, in rad a latent frame
set_temporal_frequencies(transformer, freqs) uses these instead, or its own again for None

A family holds geometry and names; the processors' code stays diffusers' own.
"""

from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["FAMILIES", "SelfAttention", "encoded", "family_of", "served_classes"]

FAMILIES = ("wan", "hunyuan_video")


class SelfAttention(NamedTuple):
    """One attention over the video's tokens.

    Args:
        layer: the number of its block, which `Schedule.dense_layers` counts.
        heads, dim: attention heads, and the dim of one.
    """

    name: str
    module: Any
    layer: int
    heads: int
    dim: int


def encoded(pipe: Any, video: Tensor, generator: torch.Generator | None) -> Tensor:
    """What the autoencoder makes of a video, float32 and not yet scaled; see a family's
    `encode_video`."""
    vae, step = pipe.vae, pipe.vae_scale_factor_temporal
    if (video.shape[2] - 1) % step:
        raise ValueError(f"video must have {step} n + 1 frames, got {video.shape[2]}")
    weight = next(vae.parameters())
    posterior = vae.encode(video.to(weight.device, weight.dtype)).latent_dist
    latents = posterior.mode() if generator is None else posterior.sample(generator)
    return latents.float()


def served_classes() -> dict[str, str]:
    """Transformer class to the family that serves it."""
    return {name: family for family in FAMILIES for name in _module(family).CLASSES}


def family_of(transformer: Any) -> ModuleType:
    """Raises ValueError for a class that no family serves."""
    served = served_classes()
    for kind in type(transformer).__mro__:  # sharding makes a subclass with a name of its own
        if kind.__name__ in served:
            return _module(served[kind.__name__])
    name = type(transformer).__name__
    raise ValueError(f"no family serves {name}; served: {', '.join(sorted(served))}")


def _module(family: str) -> ModuleType:
    return import_module(f"{__name__}.{family}")
