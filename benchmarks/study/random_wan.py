"""Calls of attention of a Wan of half the width, whose weights are random.

What such a model shows: rotary positions, normed queries and keys, head dim 128, latents that are
alike near by. What it cannot show: anything that training puts into the weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn.functional import interpolate

from gen_accel import Radial, VideoShape, attach
from study.captured import STEPS, Captured

# Wan 2.1 1.3B has 12 heads, a feed-forward width of 8960 and 30 layers.
CONFIG = {"num_attention_heads": 6, "attention_head_dim": 128, "ffn_dim": 4480, "num_layers": 4}
COARSE = 4  # latent pixels and frames over which a clip hardly changes
TEXT = 64


def capture(steps: Sequence[int], video: VideoShape, seed: int = 0) -> list[Captured]:
    """Calls of each layer at some of `STEPS` steps, on smooth latents that are mixed with noise.

    Args:
        steps: counted from 0; the share of noise falls from 1 at the first to 0 after the last.
    """
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**CONFIG).eval()
    size = video.frames, 2 * video.height, 2 * video.width
    clip, noise = smooth(size), torch.randn(1, 16, *size)
    text = torch.randn(1, TEXT, model.config["text_dim"])
    found: list[Captured] = []
    with attach(model, Radial()) as handle, torch.inference_mode():
        for step in steps:

            def observe(seen: Any, step: int = step) -> None:
                tensors = (x.clone() for x in (seen.q, seen.k, seen.v, seen.dense))
                found.append(Captured(0, step, seen.layer.number, *tensors))

            handle.observe = observe
            share = 1 - step / STEPS
            model((1 - share) * clip + share * noise, torch.tensor([1000 * share]), text)
        handle.observe = None
    return found


def smooth(size: tuple[int, int, int]) -> Tensor:
    """(1, 16, F, H, W): noise of a grid `COARSE` times as coarse, interpolated, of variance 1."""
    coarse = torch.randn(1, 16, *(max(2, side // COARSE) for side in size))
    fine = interpolate(coarse, size, mode="trilinear", align_corners=True)
    return fine / fine.std()
