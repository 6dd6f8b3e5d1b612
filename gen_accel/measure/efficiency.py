"""Kernel efficiency: the share of the ideal speed-up, 1 / computed density, that kernels reach.

Efficiency is measured once for a device and kept in a file.
"""

import statistics
from pathlib import Path

import torch
from torch import nn

from gen_accel.attention_processors import Neighborhood, Radial
from gen_accel.files import cache_folder
from gen_accel.functional import attention
from gen_accel.measure.kept import kept
from gen_accel.measure.timing import device_name, interleaved
from gen_accel.version import __version__
from gen_accel.video import VideoShape


def known_efficiency(
    device: torch.device, dtype: torch.dtype, head_dim: int, windows: bool, again: bool = False
) -> tuple[float, str]:
    """Return the efficiency from the cache, or measure it now; with its origin in words.

    What is measured while others use the processor is not kept.

    Args:
        windows: see `measure_efficiency`.
        again: measure even if the cache knows.
    """
    name, kind = device_name(device), str(dtype).removeprefix("torch.")
    key = " | ".join(
        [
            name,
            f"torch {torch.__version__}",
            kind,
            f"head dim {head_dim}",
            "windows" if windows else "blocks",
            f"gen_accel {__version__}",
        ]
    )
    found, busy = kept(
        cache_file(),
        key,
        lambda: measure_efficiency(device, dtype, head_dim, windows),
        what="the kernel efficiency",
        valid=lambda value: isinstance(value, float) and value > 0,
        again=again,
    )
    note = f"; {busy}, so it is not kept" if busy else ""
    return found, f"measured on {name}, {kind}{note}"


def cache_file() -> Path:
    """Path of the file with measured efficiencies. Delete it to measure anew."""
    return cache_folder() / "efficiency.json"


@torch.no_grad()
def measure_efficiency(
    device: torch.device, dtype: torch.dtype, head_dim: int, windows: bool
) -> float:
    """Measure the speed-up over dense SDPA times computed density, of the kernel that "auto"
    picks.

    One small case at a density of about 0.1, whose frames the tiles divide: about 8k tokens on the
    CPU, where this takes a few seconds, and about 33k on a GPU, which fewer would not fill.

    Args:
        windows: for methods with a rule on token pairs inside their blocks, which costs more.
    """
    on_cpu = device.type == "cpu"
    video, heads = (VideoShape(57, 12, 12), 2) if on_cpu else (VideoShape(228, 12, 12), 12)
    method = Radial(decay_factor=0.15 if on_cpu else 1.5)
    if windows:
        method = Neighborhood((-1, 4, 4))
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, video.tokens, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    seconds = interleaved(
        {
            "dense": lambda: nn.functional.scaled_dot_product_attention(q, k, v),
            "sparse": lambda: attention(q, k, v, video=video, method=method),
        },
        rounds=3 if on_cpu else 10,
        device=device,
    )
    speedup = statistics.median(seconds["dense"]) / statistics.median(seconds["sparse"])
    return speedup * method.plan(video).computed_density
