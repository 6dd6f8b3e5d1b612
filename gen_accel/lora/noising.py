"""Noise of training: how clean latents are mixed with it, and the target of the prediction."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Noising:
    """Mixing of clean latents and noise, as a family's models were trained.

        noisy = a clean + s noise,    target = noise - clean, or for v-prediction a noise - s clean

    Flow matching has a = 1 - sigma and s = sigma.

    Args:
        family: the model's family, whose `scales` are a and s and whose PREDICTS is the target.
        schedule: config of the pipeline's scheduler; None for the published one.

    Raises:
        ValueError: a schedule that the family's models were not trained with.
    """

    def __init__(self, family: Any, schedule: Mapping[str, Any] | None = None) -> None:
        self._family = family
        self._schedule = dict(schedule or {})
        family.scales(self._schedule, torch.zeros(1))  # refuses a wrong schedule before training

    def mix(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Mix clean latents and noise, each (B, ...), at noise levels (B,) in [0, 1]."""
        keep, add = self._scales(sigma, clean)
        return keep * clean + add * noise

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return what the model should predict of `mix`, (B, ...)."""
        if self._family.PREDICTS == "flow":
            return noise - clean
        keep, add = self._scales(sigma, clean)
        return keep * noise - add * clean

    def snr(self, sigma: Tensor) -> Tensor:
        """Return the signal-to-noise ratios (a / s)^2, (B,), by which losses are weighted."""
        keep, add = self._family.scales(self._schedule, sigma)
        return (keep / add) ** 2

    def _scales(self, sigma: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (like.ndim - 1)
        keep, add = self._family.scales(self._schedule, sigma)
        return keep.view(shape), add.view(shape)


def shift_of(schedule: Mapping[str, Any], tokens: int) -> float:
    """Return the shift of noise levels that a pipeline samples with.

    Args:
        schedule: config of its scheduler. Where this shifts by the number of tokens, the shift is
            the one that diffusers' flow-matching pipelines make of it.
        tokens: tokens of the video.
    """
    if schedule.get("use_dynamic_shifting") and schedule.get("base_shift") is not None:
        few, many = (schedule.get(f"{end}_image_seq_len", n) for end, n in _LENGTHS)
        low, high = schedule["base_shift"], schedule["max_shift"]
        mu = low + (high - low) * (tokens - few) / (many - few)
        return mu if schedule.get("time_shift_type") == "linear" else math.exp(mu)
    return float(schedule.get("shift", schedule.get("flow_shift")) or 1.0)


# Ends of the line between shifts, in tokens, as FlowMatchEulerDiscreteScheduler has them.
_LENGTHS = (("base", 256), ("max", 4096))
