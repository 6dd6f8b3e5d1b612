"""Profile of a model: how far each candidate's attention is from dense, and what it costs.

Errors are read in dense generations, for each layer, head and step. The weight of a step says how
an error in its attention grows to an error of the latents at the end.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Profile:
    """Errors, costs and weights that settings are solved from. P prompts, S steps, L layers, H
    heads, C candidates, J levels.

    Args:
        layers: numbers of the L layers.
        sigmas: (S + 1,) noise levels of the steps, from the first on, the end of the last one
            included.
        errors: (P, S, L, H, C) fp32, mean squares of the candidate's error over rows of a head.
        squares: (P, S, L, H) fp32, mean squares of the dense output over these rows.
        densities: (L, C) fp32, share of token pairs that a candidate keeps.
        seconds: (C,) fp32, of a layer, as a share of dense attention.
        dense_seconds: of dense attention of one layer.
        levels: (J,) int64, steps whose weight was measured.
        weights: (P, J) fp32, relative error of the final latents, over the root of the sum over
            layers of squared relative errors of the attention at that step.
    """

    layers: Tensor
    sigmas: Tensor
    errors: Tensor
    squares: Tensor
    densities: Tensor
    seconds: Tensor
    dense_seconds: Tensor
    levels: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        P, S, L, H, C = self.errors.shape
        shapes = {
            "layers": (L,),
            "sigmas": (S + 1,),
            "squares": (P, S, L, H),
            "densities": (L, C),
            "seconds": (C,),
            "dense_seconds": (),
            "levels": self.levels.shape[:1],
            "weights": (P, *self.levels.shape[:1]),
        }
        for name, shape in shapes.items():
            found = tuple(getattr(self, name).shape)
            if found != tuple(shape):
                raise ValueError(f"{name} of a profile must be {tuple(shape)}, got {found}")

    @property
    def steps(self) -> int:
        return self.errors.shape[1]

    @property
    def relative(self) -> Tensor:
        """(P, S, L, H, C) float64, each head's share of its layer's squared relative error."""
        whole = self.squares.double().sum(-1)[..., None, None]
        return self.errors.double() / whole.clamp_min(torch.finfo(torch.float64).tiny)

    def step_weights(self) -> Tensor:
        """(P, S) float64 weights of all steps. Between the levels that were measured, the weight
        over the length of the step is interpolated over the logarithm of the noise."""
        lengths = step_lengths(self.sigmas)
        places = log_noise(self.sigmas)
        rates = self.weights.double() / lengths[self.levels]
        return interpolated(places[self.levels], rates, places) * lengths

    def unit_errors(self, *, scale: str = "mean") -> Tensor:
        """(S, L, H, C) float64: what each choice adds to the squared error at the end.

        Args:
            scale: over the prompts: "mean"; "even", the mean where a candidate in general adds as
                much to each prompt as to any other, so that no prompt decides alone; or "worst",
                which bounds each prompt's own sum.
        """
        added = self.step_weights().square()[:, :, None, None, None] * self.relative
        if scale == "worst":
            return added.amax(0)
        if scale == "even":
            whole = added.sum((1, 2, 3)).mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
            added = added * (whole.log().mean().exp() / whole)[:, None, None, None, None]
        return added.mean(0)

    def predicted(self, settings: Tensor) -> Tensor:
        """Relative errors of the final latents, (P,), for settings (S, L, H)."""
        added = self.step_weights().square()[:, :, None, None, None] * self.relative
        index = settings[None, ..., None].expand(*added.shape[:-1], 1)
        return added.gather(-1, index).sum((1, 2, 3, 4)).sqrt()

    def at_steps(self, sigmas: Tensor) -> "Profile":
        """Profile of a run with other noise levels, (S' + 1,), read off this one: errors, and
        weights over the length of a step, are interpolated over the logarithm of the noise.
        """
        old, new = log_noise(self.sigmas), log_noise(sigmas)
        lengths = step_lengths(sigmas)
        rates = self.step_weights() / step_lengths(self.sigmas)
        weights = interpolated(old, rates, new) * lengths
        P, _, L, H, C = self.errors.shape
        by_step = self.errors.double().permute(0, 2, 3, 4, 1).reshape(-1, self.steps)
        errors = interpolated(old, by_step, new).view(P, L, H, C, -1).permute(0, 4, 1, 2, 3)
        by_step = self.squares.double().permute(0, 2, 3, 1).reshape(-1, self.steps)
        squares = interpolated(old, by_step, new).view(P, L, H, -1).permute(0, 3, 1, 2)
        return replace(
            self,
            sigmas=sigmas,
            errors=errors.float().contiguous(),
            squares=squares.float().contiguous(),
            levels=torch.arange(len(sigmas) - 1),
            weights=weights.float(),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name, for a file."""
        return {name: getattr(self, name).contiguous() for name in self.__dataclass_fields__}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], origin: Any) -> "Profile":
        """Make a profile of a file's tensors; ValueError for missing, surplus or wrong ones."""
        names = {*cls.__dataclass_fields__}
        if {*tensors} != names:
            wrong = ", ".join(sorted({*tensors} ^ names))
            raise ValueError(
                f"the profile in {origin} must hold {sorted(names)}; differs: {wrong}"
            )
        try:
            return cls(**tensors)
        except (ValueError, IndexError) as error:
            raise ValueError(f"the profile in {origin} cannot be read: {error}") from error


def log_noise(sigmas: Tensor) -> Tensor:
    """(S,) float64, the logarithm of the noise at the beginning of each step."""
    return sigmas[:-1].double().clamp_min(1e-6).log()


def step_lengths(sigmas: Tensor) -> Tensor:
    """(S,) float64, how far the noise level moves in each step."""
    return (sigmas[:-1].double() - sigmas[1:].double()).abs().clamp_min(1e-9)


def interpolated(places: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """Interpolate (R, J) values linearly between their places, (J,), constant beyond both ends:
    (R, W) for the wanted places, (W,)."""
    order = places.argsort()
    places, values = places[order].contiguous(), values[:, order]
    if len(places) == 1:
        return values.expand(-1, len(wanted)).clone()
    right = torch.searchsorted(places, wanted.contiguous()).clamp(1, len(places) - 1)
    left = right - 1
    span = (places[right] - places[left]).clamp_min(1e-12)
    share = ((wanted - places[left]) / span).clamp(0, 1)
    return values[:, left] * (1 - share) + values[:, right] * share


def levels_of(steps: int, most: int) -> list[int]:
    """Steps whose weight is measured: all of a short run, else the first, the last two and others
    evenly between them."""
    if steps <= most:
        return [*range(steps)]
    ends = {0, 1, 2, steps - 2, steps - 1}
    between = max(0, most - len(ends))
    inner = {2 + math.ceil((steps - 4) * (i + 1) / (between + 1)) for i in range(between)}
    return sorted(ends | {min(step, steps - 2) for step in inner})
