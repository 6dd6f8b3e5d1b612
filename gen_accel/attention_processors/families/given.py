"""First frames that condition a model, as the families' `first_frame` and `predict` share them."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["FIRST_FRAME", "IS_GIVEN", "in_place", "pixels_of"]

# Conditions of `predict`: latents of the first frame, and whether a sample is given its own (B,).
FIRST_FRAME, IS_GIVEN = "first_frame", "first_frame_is_given"


def pixels_of(pipe: Any, image: Any) -> Tensor:
    """Return a picture as the pipeline's autoencoder takes it, (1, 3, 1, H, W) in [-1, 1]."""
    pixels = pipe.video_processor.preprocess(image, height=image.height, width=image.width)
    return pixels.to(torch.float32).unsqueeze(2)


def in_place(
    noisy: Tensor, timestep: Tensor, conditions: dict[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Put the first frame's latents in the place of the first noisy ones.

    Args:
        noisy: (B, C, f, h, w).
        timestep: (B,).
        conditions: with FIRST_FRAME, (B, C, 1, h, w), and IS_GIVEN, unless all samples are given
            theirs.

    Returns:
        The latents, the timestep of each latent frame (B, f), 0 where it is given, and the other
        conditions.
    """
    rest = dict(conditions)
    first, is_given = rest.pop(FIRST_FRAME).to(noisy.dtype), rest.pop(IS_GIVEN, None)
    times = timestep[:, None].repeat(1, noisy.shape[2])
    if is_given is None:
        times[:, 0] = 0
    else:
        given = is_given.bool()
        times[:, 0] = torch.where(given, 0, times[:, 0])
        first = torch.where(given.view(-1, 1, 1, 1, 1), first, noisy[:, :, :1])
    return torch.cat([first, noisy[:, :, 1:]], 2), times, rest
