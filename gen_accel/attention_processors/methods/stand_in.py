"""Stand-ins for q and k, for pictures and estimates of methods whose pattern depends on them."""

import torch
from torch import Tensor

from gen_accel.video import VideoShape

# Tokens along an axis in which a feature turns about once, so that near tokens are alike.
REACH = 12.0


def smooth_qk(video: VideoShape, dim: int = 64) -> tuple[Tensor, Tensor]:
    """Return q and k, (1, 1, N, dim) each, the same every time: random waves over the grid, noise
    for the text.

    Tokens that lie close attend to each other most, as they do in most heads of video models.
    """
    generator = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*(torch.arange(float(size)) for size in video.grid), indexing="ij")
    place = torch.stack(axes, -1).flatten(0, 2)
    turns = torch.randn(3, dim, generator=generator) * (2 * torch.pi / REACH)
    phase = torch.rand(dim, generator=generator) * (2 * torch.pi)
    waves = (place @ turns + phase).cos() * 2**0.5
    text = torch.randn(video.text, dim, generator=generator)
    features = torch.cat([waves, text])[None, None]
    noise = torch.randn(2, *features.shape, generator=generator) * 0.5
    return features + noise[0], features + noise[1]
