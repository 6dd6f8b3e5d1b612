"""q, k and v for the tests of methods."""

import torch

from gen_accel import VideoShape

PLAIN = VideoShape(4, 4, 8)  # boxes of 16 divide it
RAGGED = VideoShape(3, 5, 6, text=5)  # no block of the tests divides it


def random_qkv(video, batch=2, heads=2, dim=8, seed=0, dtype=torch.float32):
    """(B, H, N, D) each, of a normal distribution."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, heads, video.tokens, dim)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(3)]
