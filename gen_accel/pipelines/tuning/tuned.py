"""Result of `tune`: rules, and the profile that others can be solved from."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch

from gen_accel.attention_processors.attached.attachment import Attachment, attach_method
from gen_accel.attention_processors.attached.clock import noise_levels
from gen_accel.attention_processors.methods.dense import Dense
from gen_accel.attention_processors.methods.mixed import Mixed, Rule
from gen_accel.measure.machine import device_name
from gen_accel.method import Method
from gen_accel.paths import expanded
from gen_accel.pipelines.tuning import solving
from gen_accel.pipelines.tuning.config import Bound, SolveOptions, holds
from gen_accel.pipelines.tuning.measuring import priced, scored
from gen_accel.pipelines.tuning.preset import (
    Preset,
    Profile,
    read_preset,
    read_profile,
    write_preset,
)
from gen_accel.pipelines.tuning.solving import Point

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LARGEST = 100.0  # logarithm of an error that any choice keeps


@dataclass(frozen=True)
class Tuned:
    """Result of `tune`. Printable.

    Args:
        preset: rules, what they were made for, and what was measured.
        profile, candidates: what they were solved from.
        points: the frontier, from the cheapest choice to dense.
        point: the choice of the preset.
    """

    preset: Preset
    profile: Profile = field(repr=False)
    candidates: tuple[Method, ...] = field(repr=False)
    points: tuple[Point, ...] = field(repr=False)
    point: Point = field(repr=False)
    options: SolveOptions = field(default_factory=SolveOptions, repr=False)

    @property
    def method(self) -> Mixed:
        return self.preset.method

    @property
    def verified(self) -> bool:
        return self.preset.verified

    @property
    def measured(self) -> dict[str, Any]:
        return self.preset.measured

    def attach(self, pipe: "DiffusionPipeline", **options: Any) -> Attachment:
        """Attach the rules to a pipeline. `gen_accel.attach(pipe, preset=...)` also warns of calls
        unlike the ones that were tuned for."""
        return attach_method(pipe, self.method, **options)

    def save(self, path: str | Path) -> "Tuned":
        """Write the preset to a *.json file, and the profile to *.safetensors beside it."""
        written = write_preset(path, self.preset, self.profile, self.candidates)
        return replace(self, preset=written)

    def at(self, quality: float) -> "Tuned":
        """Choose again for another mean score, from the profile and what was measured of it,
        without a model. The result is not verified.

        Args:
            quality: as `tune` takes it.

        Raises:
            ValueError: nothing was measured, from which a score could be told, or only dense
                attention has the score.
        """
        if self.preset.bound.get("objective") == "latent_error":
            quality = -quality
        error = self._error_at(quality) * self._bounded / max(self.point.predicted, 1e-12)
        point = solving.at_error(self.profile, error, self.options)
        if point is None:
            raise ValueError(
                f"only dense attention keeps a mean score of {abs(quality):g}, by the profile: "
                "ask for less"
            )
        bound: Bound = {**self.preset.bound, "mean": quality}
        return self._with(point, self.profile, self.points, bound)

    def solve(self, num_inference_steps: int) -> "Tuned":
        """Choose again for another number of steps, at the same predicted error, from the profile.
        The result is not verified.

        Raises:
            ValueError: the noise levels of so many steps cannot be told without the pipeline.
        """
        sigmas = torch.tensor(_sigmas(self.preset.made_for.scheduler, num_inference_steps))
        profile = self.profile.at_steps(sigmas)
        points = tuple(solving.curve(profile, self.options))
        point = solving.at_error(profile, self._bounded, self.options) or points[-1]
        made_for = replace(self.preset.made_for, sigmas=tuple(sigmas.tolist()))
        found = self._with(point, profile, points, self.preset.bound)
        return replace(found, preset=replace(found.preset, made_for=made_for))

    def verify(
        self,
        pipe: "DiffusionPipeline",
        *,
        held_out: Sequence[str] = (),
        objective: Callable[[np.ndarray, np.ndarray], float] | None = None,
        tick: Callable[[int, int], None] | None = None,
    ) -> "Tuned":
        """Generate the tuning prompts, densely and with these rules, and score them. The result is
        verified if the bound holds; if not, choose again with `at` for more.

        Args:
            pipe: the pipeline that was tuned, with nothing attached.
            held_out: further prompts, whose scores are kept beside, with seeds of their own.
            objective: the function, where the bound is on one of your own.
            tick: is told how many prompts are done, and how many there are.

        Raises:
            ValueError: another model, or a missing function.
        """
        runs = scored(self.preset, pipe, held_out, objective, tick or (lambda done, total: None))
        verified = holds(self.preset.bound, [one["score"] for one in runs["tuning"]])
        kept = {"runs": self.measured["runs"]} if "runs" in self.measured else {}
        preset = replace(self.preset, measured={**runs, **kept}, verified=verified)
        return replace(self, preset=preset)

    def priced(self, pipe: "DiffusionPipeline") -> "Tuned":
        """Time all candidates where this pipeline runs, and choose again by these seconds, at the
        same predicted error: for another card, or another number of threads, than was tuned on.
        It takes half a dense video. The result is not verified.

        Args:
            pipe: the pipeline that was tuned, with nothing attached.

        Raises:
            ValueError: another model or grid, or a pipeline that something is attached to.
        """
        shares, dense = priced(self.preset, self.candidates, pipe)
        profile = replace(self.profile, seconds=shares, dense_seconds=dense)
        points = tuple(solving.curve(profile, self.options))
        point = solving.at_error(profile, self._bounded, self.options) or points[-1]
        found = self._with(point, profile, points, self.preset.bound)
        made_by = self.preset.made_by | {
            "device": device_name(pipe._execution_device),
            "threads": torch.get_num_threads(),
        }
        return replace(found, preset=replace(found.preset, made_by=made_by))

    @property
    def _bounded(self) -> float:
        return solving.bounded(self.profile, self.point.settings, self.options)

    def plot(self, path: str | Path) -> Path:
        """Write a PNG: the method of each layer, head and step, and the frontier with hand
        settings. Raises ValueError for a path without .png."""
        from gen_accel.pipelines.tuning.picture import settings_picture

        return settings_picture(self, path)

    def _with(
        self, point: Point, profile: Profile, points: Sequence[Point], bound: Bound
    ) -> "Tuned":
        preset = replace(
            self.preset,
            method=rules_of_point(point, profile, self.candidates),
            bound=bound,
            cost=point.cost,
            density=point.density,
            predicted=point.predicted,
            measured={"runs": self.measured.get("runs", [])},  # by which `at` tells scores
            curve=curve_of(points),
            verified=False,
        )
        return replace(self, preset=preset, profile=profile, points=tuple(points), point=point)

    def _error_at(self, quality: float) -> float:
        """Predicted error at which the mean score is `quality`, by the runs that were measured:
        the score falls with the logarithm of the error."""
        runs = [run for run in self.measured.get("runs", []) if run["predicted"] > 0]
        if not runs:
            raise ValueError(
                "nothing was measured, from which a score could be told: tune with the model"
            )
        runs = sorted({(math.log(run["predicted"]), run["mean"]) for run in runs})
        if self.preset.bound.get("objective") == "latent_error" and len(runs) < 2:
            (place, score), slope = runs[0], runs[0][1]  # the error itself: -exp(log error)
            return math.exp(place) * quality / score
        if len(runs) < 2:
            slope = -20 / math.log(10)
            place, score = runs[0]
        else:
            xs, ys = (torch.tensor(x, dtype=torch.float64) for x in zip(*runs, strict=True))
            slope = min(
                (
                    ((xs - xs.mean()) * (ys - ys.mean())).sum() / (xs - xs.mean()).square().sum()
                ).item(),
                -1e-6,
            )
            place, score = xs.mean().item(), ys.mean().item()
        return math.exp(min(place + (quality - score) / slope, LARGEST))

    def __str__(self) -> str:
        preset = self.preset
        lines = [
            f"{preset.method.steps} steps on {' x '.join(map(str, preset.made_for.grid))} tokens: "
            f"density {preset.density:.3f}, attention {preset.cost:.2f} of dense"
        ]
        for name, title in (("tuning", "tuning prompts"), ("held_out", "held-out prompts")):
            runs = preset.measured.get(name, [])
            if runs:
                scores = [run["score"] for run in runs]
                lines.append(
                    f"{title}: mean {fmean(scores):.1f}, worst {min(scores):.1f} "
                    f"({preset.bound['objective']}, {len(scores)})"
                )
        lines.append("verified" if preset.verified else "not verified: predicted from the profile")
        return "\n".join(lines)


def load_tuned(path: str | Path) -> Tuned:
    """Read a preset with its profile, to choose again from it. No model is needed.

    Raises:
        FileNotFoundError, ValueError: as `read_preset`; a preset without a profile.
    """
    path = expanded(path)
    preset = read_preset(path)
    profile, candidates = read_profile(preset, path.parent)
    options = SolveOptions.read(preset.made_by.get("options", {}), origin=str(path))
    if preset.method.steps != profile.steps:  # it was solved for another number of steps
        profile = profile.at_steps(torch.tensor(preset.made_for.sigmas))
    heads = profile.errors.shape[3]
    settings = solving.settings_of(preset.method, profile.layers.tolist(), heads, candidates)
    points = tuple(solving.curve(profile, options))
    point = solving.point_of(profile, settings)
    return Tuned(preset, profile, candidates, points, point, options)


def rules_of_point(point: Point, profile: Profile, candidates: Sequence[Method]) -> Mixed:
    """Rules of a point; of dense attention, one rule that says so."""
    if (point.settings == len(candidates) - 1).all():
        return Mixed((Rule(Dense()),), len(point.settings))
    return solving.rules_of(point.settings, profile.layers.tolist(), candidates)


def curve_of(points: Sequence[Point]) -> tuple[dict[str, float], ...]:
    """Describe the points of a frontier, as a preset holds them."""
    return tuple(
        {"cost": one.cost, "density": one.density, "predicted_error": one.predicted}
        for one in points
    )


def _sigmas(scheduler: Mapping[str, Any], steps: int) -> list[float]:
    """Noise levels of so many steps of a scheduler that a preset describes."""
    kind = getattr(diffusers, str(scheduler["class"]), None)
    if kind is None or not hasattr(kind, "from_config"):
        raise ValueError(f"diffusers has no scheduler {scheduler['class']!r}")
    try:
        made = kind.from_config(scheduler["config"])
        made.set_timesteps(steps)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the noise levels of {steps} steps of {scheduler['class']} cannot be told without "
            f"the pipeline, which sets them itself ({error}): tune again at {steps} steps"
        ) from error
    return [*noise_levels(made, steps)]
