"""Ladder of a profile: the error to expect of a head at a step, and what is denser."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gen_accel.names import PRESETS
from gen_accel.paths import expanded
from gen_accel.pipelines.tuning.named import BOX
from gen_accel.pipelines.tuning.preset import Preset, read_profile
from gen_accel.pipelines.tuning.profile import Profile


class ProfileLadder:
    """`watch.Ladder` of a profile.

    Args:
        candidates: methods, in the order of the profile.
    """

    def __init__(self, profile: Profile, candidates: Sequence[Any]) -> None:
        squares = profile.squares.double().clamp_min(1e-30)[..., None]
        # Over the prompts the largest: a head errs too much if it errs more than on any of them.
        self._errors = (profile.errors.double() / squares).amax(0).sqrt()
        self._costs = profile.seconds.tolist()
        self._layers = {int(layer): place for place, layer in enumerate(profile.layers)}
        self._candidates = {
            layer: [one.for_layer(layer) for one in candidates] for layer in self._layers
        }
        self._numbers = {
            layer: {one: i for i, one in enumerate(own)} for layer, own in self._candidates.items()
        }
        self.rung = cache(self._rung)

    def expected(self, step: int, layer: int, head: int, method: Any) -> float | None:
        """Relative error of a candidate; None for anything that was not measured."""
        errors = self._of(step, layer, head)
        number = self._numbers.get(layer, {}).get(method)
        return None if errors is None or number is None else errors[number]

    def denser(self, step: int, layer: int, head: int, method: Any) -> Any:
        """Return the cheapest candidate that errs clearly less and costs more; the last one is
        dense."""
        number = self._numbers.get(layer, {}).get(method)
        if number is None:
            return method
        return self._candidates[layer][self.rung(step, layer, head, number)]

    def _rung(self, step: int, layer: int, head: int, number: int) -> int:
        errors = self._of(step, layer, head)
        if errors is None:
            return number
        better = [
            i
            for i, error in enumerate(errors)
            if error < 0.8 * errors[number] and self._costs[i] >= self._costs[number]
        ]
        return min(better, key=lambda i: (self._costs[i], errors[i]), default=number)

    def _of(self, step: int, layer: int, head: int) -> list[float] | None:
        place = self._layers.get(layer)
        S, _, H, _ = self._errors.shape
        if place is None or step >= S or head >= H:
            return None
        return self._errors[step, place, head].tolist()


def ladder_beside(preset: Preset, source: str | Path) -> ProfileLadder | None:
    """Make the ladder of a preset's profile, for rules of the same number of steps; None without a
    profile.

    Args:
        source: where the preset was read from, a file or a name.
    """
    if preset.profile is None:
        return None
    named = isinstance(source, str) and source in PRESETS
    folder = BOX if named else expanded(source).parent
    profile, candidates = read_profile(preset, folder)
    sigmas = preset.made_for.sigmas
    if len(sigmas) != len(profile.sigmas):
        profile = profile.at_steps(torch.tensor(sigmas))
    return ProfileLadder(profile, candidates)
