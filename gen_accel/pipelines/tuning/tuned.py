"""Result of `tune`: rules, the profile that others can be solved from, and a picture of both."""

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
from gen_accel.io import replacing
from gen_accel.measure.machine import device_name
from gen_accel.method import Method
from gen_accel.paths import check_output, expanded
from gen_accel.pipelines.tuning import solving
from gen_accel.pipelines.tuning.measuring import priced, scored
from gen_accel.pipelines.tuning.preset import (
    Preset,
    Profile,
    ScoreBound,
    holds,
    read_preset,
    read_profile,
    write_preset,
)
from gen_accel.pipelines.tuning.solving import Point, SolveOptions
from gen_accel.registry import needed_for

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from matplotlib.axes import Axes

LARGEST = 100.0  # logarithm of an error that any choice keeps
# Of each family at full density; sparser settings are lighter.
COLOURS = {
    "Piecewise": (11, 107, 93),
    "Radial": (190, 82, 32),
    "Neighborhood": (58, 92, 172),
    "BlockMixture": (122, 62, 138),
    "SparseLinear": (148, 118, 20),
    "Dense": (58, 58, 62),
}
OTHER = (110, 110, 118)
LIGHTEST = 0.25  # share of the colour in the sparsest setting


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
        bound: ScoreBound = {**self.preset.bound, "mean": quality}
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
        return settings_picture(self, path)

    def _with(
        self, point: Point, profile: Profile, points: Sequence[Point], bound: ScoreBound
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
                    f"({preset.bound.get('objective')}, {len(scores)})"
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
    try:
        options = SolveOptions(**preset.made_by.get("options", {}))
        options = options._replace(by=tuple(options.by))
    except TypeError as error:
        raise ValueError(f"the options in {path} cannot be read: {error}") from error
    options.check(str(path))
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


def settings_picture(found: Tuned, path: str | Path) -> Path:
    """Write a PNG: on the left the setting of each layer and head at each step, on the right the
    frontier. Raises ValueError or OSError for a path that is no .png, or cannot be written."""
    path = expanded(path)
    check_output(path, ".png")
    with needed_for("a picture of what was tuned", extra="quality"):
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

    figure = Figure(figsize=(13, 6.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    image, names = cells(found)
    left.imshow(image, aspect="auto", interpolation="nearest")
    heads = found.profile.errors.shape[3]
    layers = found.profile.layers.tolist()
    left.set_yticks(
        [heads * i + (heads - 1) / 2 for i in range(len(layers))], [str(one) for one in layers]
    )
    for i in range(1, len(layers)):
        left.axhline(heads * i - 0.5, color="white", linewidth=1.5)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("step")
    left.set_ylabel("layer, a row for each head" if heads > 1 else "layer")
    patches = [
        Patch(color="#{:02x}{:02x}{:02x}".format(*COLOURS.get(name, OTHER)), label=name)
        for name in names
    ]
    figure.legend(handles=patches, ncols=len(patches), frameon=False, loc="outside lower left")
    left.set_title("Setting: colour by method, lighter is sparser", fontsize=11)
    _draw_frontier(right, found)
    preset = found.preset
    figure.suptitle(
        f"density {preset.density:.3f}, attention {preset.cost:.2f} of dense, "
        f"{preset.method.steps} steps" + ("" if preset.verified else ", not verified"),
        fontsize=12,
    )
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
    return path


def cells(found: Tuned) -> tuple[np.ndarray, list[str]]:
    """Colours of all heads, (L H, S, 3) uint8, and the names of the methods among them."""
    kinds = [type(one).__name__ for one in found.candidates]
    densities = found.profile.densities.double().mean(0).tolist()
    colours = []
    for one, kind, density in zip(found.candidates, kinds, densities, strict=True):
        share = 1.0 if one.is_dense else LIGHTEST + (1 - LIGHTEST) * min(density / 0.6, 1)
        colour = np.array(COLOURS.get(kind, OTHER))
        colours.append((share * colour + (1 - share) * 255).round())
    settings = found.point.settings.permute(1, 2, 0).flatten(0, 1).numpy()
    names = [name for name in dict.fromkeys(kinds) if name in {kinds[i] for i in settings.flat}]
    return np.array(colours)[settings].astype(np.uint8), names


def hand_settings(found: Tuned, dense_steps: Sequence[int] = (0, 1, 2, 3, 4)) -> list[Point]:
    """Predicted figures of every candidate in all layers, after so many dense steps."""
    dense = len(found.candidates) - 1
    return [
        solving.uniform(found.profile, candidate, first, dense)
        for candidate in range(dense)
        for first in dense_steps
        if first < found.profile.steps
    ]


def _draw_frontier(axes: "Axes", found: Tuned) -> None:
    by_density = found.options.cost == "density"

    def place(point: Point) -> float:
        return point.density if by_density else point.cost

    hand = hand_settings(found)
    axes.scatter(
        [place(p) for p in hand],
        [p.predicted for p in hand],
        s=12,
        color="#9c9ca6",
        label="one setting everywhere, some dense steps first",
    )
    rising = [point for point in found.points if point.predicted > 1e-6]
    axes.plot(
        [place(p) for p in rising],
        [p.predicted for p in rising],
        "-o",
        markersize=3.5,
        color="#0b6b5d",
        label="tuned",
    )
    axes.plot(
        place(found.point),
        max(found.point.predicted, 1e-6),
        "*",
        markersize=14,
        color="#eb5e28",
        label="the preset",
    )
    axes.set_yscale("log")
    axes.set_xlabel("share of token pairs" if by_density else "attention seconds over dense")
    axes.set_ylabel("predicted error of the final latents")
    axes.set_title("Frontier", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
