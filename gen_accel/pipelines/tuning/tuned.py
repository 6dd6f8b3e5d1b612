"""Result of `tune`: rules, the profile that others can be solved from, and a picture of both."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, linear_regression
from typing import TYPE_CHECKING

import diffusers
import numpy as np
import torch

from gen_accel.attention_processors.attached.attachment import Attachment, attach_method
from gen_accel.attention_processors.attached.calibrate import (
    StopObserving,
    check_bare,
    observe_dense,
)
from gen_accel.attention_processors.attached.clock import first_transformer, noise_levels
from gen_accel.attention_processors.attached.layer import Observed
from gen_accel.attention_processors.methods.dense import Dense
from gen_accel.attention_processors.methods.mixed import Mixed, Rule
from gen_accel.io import replacing
from gen_accel.measure.machine import device_name
from gen_accel.method import Method
from gen_accel.parsing import shown
from gen_accel.paths import check_output, expanded
from gen_accel.pipelines.sampler import EXACT, exact
from gen_accel.pipelines.tuning import measuring, solving
from gen_accel.pipelines.tuning.measuring import AttentionSample, PipelineCall, generate
from gen_accel.pipelines.tuning.preset import (
    Measured,
    Preset,
    Profile,
    ScoreBound,
    check_model,
    holds,
    read_preset,
    read_profile,
    write_preset,
)
from gen_accel.pipelines.tuning.solving import Point, SolveOptions, rules_of_point
from gen_accel.registry import needed_for

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from typing_extensions import Unpack

    from gen_accel.attention_processors.attached.attachment import AttachOptions
    from gen_accel.pipelines.tuning.config import Objective

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
HAND, TUNED, OWN = "#9c9ca6", "#0b6b5d", "#eb5e28"  # colours of the frontier


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
    def measured(self) -> Measured:
        return self.preset.measured

    def attach(self, pipe: "DiffusionPipeline", **options: "Unpack[AttachOptions]") -> Attachment:
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
        return self._chosen(point, replace(self.preset, bound=bound))

    def solve(self, num_inference_steps: int) -> "Tuned":
        """Choose again for another number of steps, at the same predicted error, from the profile.
        The result is not verified.

        Raises:
            ValueError: the noise levels of so many steps cannot be told without the pipeline.
        """
        sigmas = torch.tensor(_sigmas(self.preset.made_for.scheduler, num_inference_steps))
        made_for = replace(self.preset.made_for, sigmas=tuple(sigmas.tolist()))
        return self._solved(self.profile.at_steps(sigmas), replace(self.preset, made_for=made_for))

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
        tuning, call, kernel = self._call_on(pipe)
        name = self.preset.bound.get("objective", "psnr")
        if name not in ("psnr", "latent_error") and objective is None:
            raise ValueError(
                f"the bound is on {shown(name)}: give objective=, the function itself"
            )
        if name != "latent_error":
            measuring.check_decodes(pipe)
        wanted: Objective = "latent_error" if name == "latent_error" else objective or name
        tick = tick or (lambda done, total: None)
        prompts, runs = [*tuning, *held_out], []
        for i, prompt in enumerate(prompts):
            tick(i, len(prompts))
            latents = []
            for method in (Dense(), self.method):
                with attach_method(pipe, method, kernel=kernel, record=False):
                    latents.append(generate(pipe, prompt, i, call))
            dense, sparse = latents
            runs.append(measuring.scored(pipe, wanted, prompt, call.seed + i, sparse, dense))
        tick(len(prompts), len(prompts))
        measured: Measured = {"tuning": runs[: len(tuning)], "held_out": runs[len(tuning) :]}
        if "runs" in self.measured:
            measured["runs"] = self.measured["runs"]
        verified = holds(self.preset.bound, [one["score"] for one in measured["tuning"]])
        return replace(self, preset=replace(self.preset, measured=measured, verified=verified))

    def priced(self, pipe: "DiffusionPipeline") -> "Tuned":
        """Time all candidates where this pipeline runs, and choose again by these seconds, at the
        same predicted error: for another card, or another number of threads, than was tuned on.
        It takes half a dense video. The result is not verified.

        Args:
            pipe: the pipeline that was tuned, with nothing attached.

        Raises:
            ValueError: another model or grid, or a pipeline that something is attached to.
        """
        check_bare(pipe, "priced")
        prompts, call, kernel = self._call_on(pipe)
        heard: dict[int, AttentionSample] = {}

        def hear(seen: Observed, prompt: int) -> None:
            step, number = handle.clock.step, seen.layer.number
            if step < call.steps // 2:
                return
            if step > call.steps // 2 or number in heard:
                raise StopObserving
            heard[number] = AttentionSample.of(seen)

        probe = Mixed((Rule(self.candidates[0]),), call.steps)  # not run, as an observer is there
        with attach_method(pipe, probe, kernel=kernel, record=False) as handle:
            observe_dense(
                handle, pipe, prompts[:1], hear, steps=call.steps, seed=call.seed, call=call.more
            )
        if not heard:
            raise ValueError(
                "no attention over a known grid was seen, so that nothing can be timed"
            )
        grid, tuned = next(iter(heard.values())).video.grid, self.preset.made_for.grid
        if grid != tuned:
            raise ValueError(f"the preset was tuned on {tuned} tokens, and the model makes {grid}")
        shares, dense = measuring.seconds_of(heard, self.candidates, kernel)
        made_by = self.preset.made_by | {
            "device": device_name(pipe._execution_device),
            "threads": torch.get_num_threads(),
        }
        return self._solved(
            replace(self.profile, seconds=shares.float(), dense_seconds=torch.tensor(dense)),
            replace(self.preset, made_by=made_by),
        )

    def plot(self, path: str | Path) -> Path:
        """Write a PNG: the method of each layer, head and step, and the frontier with hand
        settings. Raises ValueError for a path without .png."""
        return settings_picture(self, path)

    @property
    def _bounded(self) -> float:
        return solving.bounded(self.profile, self.point.settings, self.options)

    def _call_on(self, pipe: "DiffusionPipeline") -> tuple[tuple[str, ...], PipelineCall, str]:
        """Tuning prompts, call and kernel, to generate with again; ValueError for a pipeline of
        another model."""
        preset = self.preset
        check_model(preset, first_transformer(pipe), "the preset")
        prompts = tuple(preset.made_by.get("prompts", ()))
        if not prompts:
            raise ValueError("the preset does not name its tuning prompts: tune again")
        seed = preset.made_by.get("seed", 0)
        call = PipelineCall(preset.method.steps, seed, preset.made_for.call)
        return prompts, call, preset.made_by.get("kernel", "auto")

    def _solved(self, profile: Profile, preset: Preset) -> "Tuned":
        """Choose from another profile, at the same error."""
        points = tuple(solving.curve(profile, self.options))
        point = solving.at_error(profile, self._bounded, self.options) or points[-1]
        return replace(self, profile=profile, points=points)._chosen(point, preset)

    def _chosen(self, point: Point, preset: Preset) -> "Tuned":
        preset = replace(
            preset,
            method=rules_of_point(point, self.profile, self.candidates),
            cost=point.cost,
            density=point.density,
            predicted=point.predicted,
            measured={"runs": self.measured.get("runs", [])},  # by which `at` tells scores
            curve=solving.curve_of(self.points),
            verified=False,
        )
        return replace(self, preset=preset, point=point)

    def _error_at(self, quality: float) -> float:
        """Predicted error at which the mean score is `quality`, by the runs that were measured:
        the score falls with the logarithm of the error."""
        measured = self.measured.get("runs", [])
        runs = sorted(
            {(math.log(one["predicted"]), one["mean"]) for one in measured if one["predicted"] > 0}
        )
        if not runs:
            raise ValueError(
                "nothing was measured, from which a score could be told: tune with the model"
            )
        places, scores = zip(*runs, strict=True)
        if len(runs) > 1:
            slope = min(linear_regression(places, scores).slope, -1e-6)
        elif self.preset.bound.get("objective") == "latent_error":
            return math.exp(places[0]) * quality / scores[0]  # the error itself
        else:
            slope = -20 / math.log(10)
        return math.exp(min(fmean(places) + (quality - fmean(scores)) / slope, LARGEST))

    def __str__(self) -> str:
        preset = self.preset
        lines = [
            f"{preset.method.steps} steps on {' x '.join(map(str, preset.made_for.grid))} tokens: "
            f"density {preset.density:.3f}, attention {preset.cost:.2f} of dense"
        ]
        titles = {"tuning prompts": "tuning", "held-out prompts": "held_out"}
        for title, name in titles.items():
            if scores := [run["score"] for run in preset.measured.get(name, [])]:
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
    except (TypeError, ValueError) as error:
        raise ValueError(f"the options in {path} cannot be read: {error}") from error
    if preset.method.steps != profile.steps:  # it was solved for another number of steps
        profile = profile.at_steps(torch.tensor(preset.made_for.sigmas))
    heads = profile.errors.shape[3]
    settings = solving.settings_of(preset.method, profile.layers.tolist(), heads, candidates)
    points = tuple(solving.curve(profile, options))
    point = solving.point_of(profile, settings)
    return Tuned(preset, profile, candidates, points, point, options)


def _sigmas(scheduler: Mapping[str, object], steps: int) -> list[float]:
    """Noise levels of so many steps of a scheduler that a preset describes."""
    name = str(scheduler["class"])
    kind = getattr(diffusers, name.removeprefix(EXACT), None)
    if kind is not None and name.startswith(EXACT):
        kind = exact(kind)
    if kind is None or not hasattr(kind, "from_config"):
        raise ValueError(f"diffusers has no scheduler {shown(scheduler['class'])}")
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
    heads, layers = found.profile.errors.shape[3], found.profile.layers.tolist()
    middles = [heads * i + (heads - 1) / 2 for i in range(len(layers))]
    left.set_yticks(middles, list(map(str, layers)))
    for i in range(1, len(layers)):
        left.axhline(heads * i - 0.5, color="white", linewidth=1.5)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("step")
    left.set_ylabel("layer, a row for each head" if heads > 1 else "layer")
    left.set_title("Setting: colour by method, lighter is sparser", fontsize=11)
    patches = [
        Patch(color="#" + bytes(COLOURS.get(name, OTHER)).hex(), label=name) for name in names
    ]
    figure.legend(handles=patches, ncols=len(patches), frameon=False, loc="outside lower left")

    by_density = found.options.cost == "density"
    rising = [point for point in found.points if point.predicted > 1e-6]
    own = found.point._replace(predicted=max(found.point.predicted, 1e-6))
    for points, label, marker, size, colour in (
        (hand_settings(found), "one setting everywhere, some dense steps first", "o", 3.5, HAND),
        (rising, "tuned", "-o", 3.5, TUNED),
        ([own], "the preset", "*", 14, OWN),
    ):
        places = [point.density if by_density else point.cost for point in points]
        predicted = [point.predicted for point in points]
        right.plot(places, predicted, marker, markersize=size, color=colour, label=label)
    right.set_yscale("log")
    right.set_xlabel("share of token pairs" if by_density else "attention seconds over dense")
    right.set_ylabel("predicted error of the final latents")
    right.set_title("Frontier", fontsize=11)
    right.legend(frameon=False, fontsize=9)
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
    densities = found.profile.densities.double().mean(0).numpy()
    shares = LIGHTEST + (1 - LIGHTEST) * np.minimum(densities / 0.6, 1)
    shares[[one.is_dense for one in found.candidates]] = 1
    full = np.array([COLOURS.get(kind, OTHER) for kind in kinds])
    colours = (shares[:, None] * full + (1 - shares[:, None]) * 255).round().astype(np.uint8)
    settings = found.point.settings.permute(1, 2, 0).flatten(0, 1).numpy()
    names = [name for name in dict.fromkeys(kinds) if name in {kinds[i] for i in settings.flat}]
    return colours[settings], names


def hand_settings(found: Tuned) -> list[Point]:
    """Predicted figures of every candidate in all layers, after 0 to 4 dense steps."""
    dense, points = len(found.candidates) - 1, []
    for candidate in range(dense):
        for first in range(min(5, found.profile.steps)):
            settings = torch.full_like(found.point.settings, candidate)
            settings[:first] = dense
            points.append(solving.point_of(found.profile, settings))
    return points
