"""`tune`: profile, seconds, weights of steps, choice, verification."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gen_accel.attention_processors import METHODS
from gen_accel.attention_processors.attached.attachment import AttachOptions, attach_method
from gen_accel.attention_processors.attached.calibrate import (
    StopObserving,
    TileErrors,
    check_bare,
    observe_dense,
)
from gen_accel.attention_processors.attached.clock import first_transformer, served_transformers
from gen_accel.attention_processors.attached.layer import Observed
from gen_accel.attention_processors.attached.profiling import collect, seen_by
from gen_accel.attention_processors.methods.dense import Dense
from gen_accel.attention_processors.methods.piecewise import Piecewise
from gen_accel.attention_processors.methods.profiled import Masses, read_masses
from gen_accel.io import parse_json, plain, read_tensors, replacing, save_tensors
from gen_accel.measure.machine import device_name
from gen_accel.method import Box, Method, check_method
from gen_accel.parsing import shown
from gen_accel.paths import check_output, expanded
from gen_accel.pipelines.tuning import solving
from gen_accel.pipelines.tuning.measuring import (
    PipelineCall,
    PromptErrors,
    check_decodes,
    decoded,
    generate,
    observe,
    scored,
    seconds_of,
    weight_of_step,
)
from gen_accel.pipelines.tuning.preset import (
    MadeFor,
    Measured,
    Preset,
    Profile,
    ScoredPrompt,
    described,
    holds,
    least_scores,
    levels_of,
    loras_of,
    plain_of,
)
from gen_accel.pipelines.tuning.solving import Point, SolveOptions, rules_of_point
from gen_accel.pipelines.tuning.tuned import Tuned
from gen_accel.registry import AXES, Axis, Cost, Scale
from gen_accel.version import __version__
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from gen_accel.pipelines.tuning.config import Objective, TuneOptions

ABOUT, NOTES = "tuning", "notes"
Tile = Box | tuple[Box, ...] | None  # of all layers, or of each; None: "auto"


class State:
    """Tensors and scores by name; each change is on the disk when it returns.

    Args:
        path: the file; None keeps nothing.
        about: everything that the measurements depend on.

    Raises ValueError for the file of a tuning that differs in `about`, with what differs.
    """

    def __init__(self, path: Path | None, about: Mapping[str, object]) -> None:
        self.path = path
        self.about = _as_json(about)
        self.tensors: dict[str, Tensor] = {}
        self.notes: dict[str, Any] = {}
        if path is None or not path.is_file():
            return
        tensors, metadata = read_tensors(path)
        earlier = parse_json(metadata.get(ABOUT, "null"), path)
        if earlier != self.about:
            found = earlier if isinstance(earlier, dict) else {}
            names = [n for n in {**found, **self.about} if found.get(n) != self.about.get(n)]
            raise ValueError(
                f"{path} is of another tuning, which differs in "
                f"{', '.join(sorted(names)) if found else 'everything'}: give another --out, or "
                "remove it"
            )
        self.tensors, self.notes = tensors, parse_json(metadata.get(NOTES, "{}"), path)

    def put(self, tensors: Mapping[str, Tensor], begin: str = "") -> None:
        """Add tensors, whose names begin with `begin`."""
        self.tensors |= {f"{begin}{name}": x.cpu() for name, x in tensors.items()}
        self._write()

    def note(self, name: str, value: object) -> None:
        """Add a note, of what JSON holds."""
        self.notes[name] = _as_json(value)
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            metadata = {ABOUT: json.dumps(self.about), NOTES: json.dumps(self.notes)}
            with replacing(self.path) as partial:
                save_tensors(self.tensors, partial, metadata)

    def remove(self) -> None:
        """Remove the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _as_json(value: object) -> Any:
    return json.loads(json.dumps(plain(value)))


MASS_STEPS, MASS_PROMPTS = 6, 2  # that `Profiled` is measured in
PSNR_OF_ALL = 21.0  # dB, about, where latents err by as much as they hold

# Stage, what is done of it, and how much there is.
Tick = Callable[[str, int, int], None]


def tune(
    pipe: "DiffusionPipeline",
    prompts: Sequence[str],
    *,
    quality: float | None = None,
    worst: float | None = None,
    objective: "Objective" = "psnr",
    held_out: Sequence[str] | None = None,
    cost: Cost = "seconds",
    candidates: Sequence[Method] | None = None,
    by: Sequence[Axis] = AXES,
    scale: Scale = "mean",
    num_inference_steps: int = 20,
    seed: int = 0,
    rows: int = 64,
    weighed_steps: int = 6,
    minutes: float | None = None,
    out: str | Path | None = None,
    kernel: str = "auto",
    tick: Tick | None = None,
    **call: Any,
) -> Tuned:
    """Find the sparsest attention of a pipeline that keeps a bound on quality.

        found = gen_accel.tune(
            pipe, prompts, quality=28, out="preset.json", num_frames=81, height=480, width=832
        )
        print(found)
        handle = gen_accel.attach(pipe, preset="preset.json")

    Each tuning prompt is generated densely, and all candidates are compared with its attention. A
    small disturbance of one step at a time tells what an error at that step does to the video. The
    cheapest settings for each head, layer and step follow, for any bound. The bound is then
    measured: the tuning prompts are generated with some of these settings, until the cheapest that
    keeps it is found, and the prompts held out are generated with that one.

    Args:
        pipe: a pipeline with nothing attached. Load LoRAs first.
        prompts: what the model is used for. Without `held_out` the second half is held out; four
            and more are tuned on if there are eight.
        quality: least mean score over the tuning prompts. Of "psnr", dB to the dense video, 28 by
            default.
        worst: least score of any tuning prompt.
        objective: "psnr", "latent_error" (quality is then the largest), or a function of the dense
            and the sparse video, (F, H, W, 3) uint8, to a score that is better if larger.
        held_out: prompts that are generated at the end only.
        cost: what is made small, "seconds" of attention or "density".
        candidates: methods with their settings; without, some settings of each family.
        by: what settings may differ by: "steps", "layers", "heads".
        scale: errors over the tuning prompts are summed by their "mean"; "even", so that no prompt
            decides alone; or by the "worst".
        num_inference_steps: as many as will be used. A preset is for one number of steps; from
            its profile it can be solved for others.
        seed: of the first prompt's noise; each further prompt, those held out included, takes the
            next.
        rows: queries of each head that candidates are compared at, in calls of more than 160 times
            as many tokens; smaller calls are compared whole.
        weighed_steps: number of steps whose weight is measured.
        minutes: after which no further settings are tried. The result is then the cheapest that
            was found to keep the bound.
        out: file of the preset, *.json. The work done so far is kept beside it until the end, so
            that a killed run goes on.
        kernel: as in `gen_accel.attach`.
        tick: is told the stage, what is done of it, and how much there is.
        call: what else the pipeline is called with: sizes, guidance scale.

    Raises:
        ValueError: no prompts, something attached, a compiled or offloaded model, candidates that
            no rule takes, or a bound that only dense attention keeps, with the best that was
            reached.
    """
    from gen_accel.pipelines.tuning.config import TuneOptions  # with pydantic, of an extra

    options = TuneOptions(
        quality=quality,
        worst=worst,
        objective=objective,
        cost=cost,
        scale=scale,
        by=tuple(by),
        rows=rows,
        weighed_steps=weighed_steps,
        minutes=minutes,
        kernel=kernel,
    )
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    return Tuning(
        pipe,
        prompts,
        held_out,
        PipelineCall(num_inference_steps, seed, call),
        options,
        candidates,
        None if out is None else expanded(out),
        tick or (lambda stage, done, total: None),
    ).go()


def default_candidates(
    video: VideoShape,
    *,
    tile: Tile = None,
    families: Sequence[str] = tuple(METHODS),
    masses: Masses | None = None,
) -> tuple[Method, ...]:
    """Candidates of each method that has some, as far as they fit the grid, and `Dense()`.

    Args:
        tile: box of each layer, as `gen_accel.calibrate` finds it; None: "auto".
        families: names of methods.
        masses: what dense runs of the model showed, for `Profiled`; None: it is left out.
    """
    unknown = sorted({*families} - {*METHODS})
    if unknown:
        raise ValueError(
            f"families must be of {tuple(METHODS)}, got {', '.join(map(repr, unknown))}"
        )
    known = {"tile": tile, "profile": "" if masses is None else masses.digest}
    # On a small grid some windows are the same.
    found = dict.fromkeys(
        one for name in families for one in METHODS[name].candidates(video, **known)
    )
    return (*(one for one in found if _fits(one, video)), Dense())


def _fits(method: Method, video: VideoShape) -> bool:
    """Whether a method can be planned on a grid, and leaves something out there."""
    try:
        return method.planned(video).density < 1
    except ValueError:
        return False


def _checked(candidates: Sequence[Method], device: torch.device) -> tuple[Method, ...]:
    """Return candidates with `Dense()` as the last, and their options for the device. ValueError
    for none but `Dense()`, two that are equal, or one that no rule takes."""
    for one in candidates:
        check_method(one)
        if one.defines("step_state") or one.changes_by:
            raise ValueError(
                f"{one!r} cannot be a candidate: it remembers earlier steps, or changes by itself"
            )
    sparse = [one.for_device(device) for one in candidates if not one.is_dense]
    if not sparse:
        raise ValueError("candidates must hold a sparse method, got none")
    if len({*sparse}) < len(sparse):
        raise ValueError("candidates must differ from each other")
    return (*sparse, Dense())


class Tuning:
    """One run of `tune`.

    Attributes:
        prompts: the tuning prompts, then those held out.
        count: number of the tuning prompts.
        state: `prompt{i}.` errors, squares and so on of a prompt; `seconds.shares` and
            `seconds.dense`; `weight{i}.{step}`; and scores as notes.
    """

    def __init__(
        self,
        pipe: "DiffusionPipeline",
        prompts: Sequence[str],
        held_out: Sequence[str] | None,
        call: PipelineCall,
        options: "TuneOptions",
        candidates: Sequence[Method] | None,
        out: Path | None,
        tick: Tick,
    ) -> None:
        self.pipe, self.call, self.options, self.bound = pipe, call, options, options.bound
        self.solved_for = SolveOptions(options.cost, options.scale, options.by)
        if isinstance(prompts, str) or isinstance(held_out, str):
            raise ValueError("prompts must be a list of them, got one text")
        if held_out is None:
            half = (len(prompts) + 1) // 2
            prompts, held_out = prompts[:half], prompts[half:]
        self.prompts, self.count = [*prompts, *held_out], len(prompts)
        if not prompts or not all(isinstance(one, str) and one for one in self.prompts):
            raise ValueError(f"prompts must be texts, one at least, got {shown(tuple(prompts))}")
        self.out, self.kernel, self.tick = out, options.kernel, tick
        self.began = time.monotonic()
        self.until = self.began + 60 * (options.minutes or math.inf)
        if out is not None:
            check_output(out, ".json")
        check_bare(pipe, "tune")
        for name, transformer in served_transformers(pipe).items():
            if any(parameter.is_meta for parameter in transformer.parameters()):
                raise ValueError(f"{name} is offloaded: tune without, so that seconds can be told")
        if options.objective != "latent_error":
            check_decodes(pipe)
        if options.objective == "psnr":
            from gen_accel.measure.quality import check_installed

            check_installed()
        self.transformer = first_transformer(pipe)
        self.video, tile = self._scout(candidates is None)
        if candidates is None:
            found = default_candidates(self.video, tile=tile, masses=self._masses())
            self.candidates = _checked(found, self.transformer.device)
        else:
            self.candidates = _checked(candidates, self.transformer.device)
            for one in self.candidates[:-1]:
                if not _fits(one, self.video):
                    raise ValueError(
                        f"candidate {one!r} does not fit {self.video}, or leaves nothing out there"
                    )
        self.state = State(self._beside("tuning"), self._about())
        self._dense_videos: dict[int, np.ndarray] = {}

    def go(self) -> Tuned:
        profile = self._profile()
        points = solving.curve(profile, self.solved_for)
        if len(points) == 1:
            raise ValueError(
                "no candidate takes less time than dense attention here, as with few tokens: take "
                "density as the cost, or a larger video"
            )
        self.tick("solve", 1, 1)
        point, runs, verified = self._verify(profile, points)
        measured: Measured = {
            "tuning": self._scores(point, profile, range(self.count)),
            "held_out": self._hold_out(point, profile),
            "runs": runs,
        }
        if timed := self.state.notes.get("attention_seconds"):
            measured["attention_seconds"] = timed
        preset = Preset(
            rules_of_point(point, profile, self.candidates),
            MadeFor.of(self.pipe, self.video.grid, self.call.more, profile.sigmas.tolist()),
            self.bound,
            point.cost,
            point.density,
            point.predicted,
            measured,
            solving.curve_of(points),
            verified,
            made_by={
                "gen_accel": __version__,
                "torch": torch.__version__,
                "device": device_name(self.transformer.device),
                "threads": torch.get_num_threads(),
                "kernel": self.kernel,
                "minutes": round((time.monotonic() - self.began) / 60, 2),
                "options": asdict(self.solved_for),
                "prompts": self.prompts[: self.count],
                "held_out": self.prompts[self.count :],
                "seed": self.call.seed,
            },
        )
        found = Tuned(preset, profile, self.candidates, tuple(points), point, self.solved_for)
        if self.out is not None:
            found = found.save(self.out)
        self.state.remove()
        if (masses := self._beside("tuning-masses")) is not None:
            masses.unlink(missing_ok=True)
        return found

    def _beside(self, name: str) -> Path | None:
        """File beside the preset, for what is kept until the end."""
        return self.out and self.out.with_name(f"{self.out.stem}.{name}.safetensors")

    def _about(self) -> dict[str, object]:
        """Describe everything that the measurements depend on."""
        kinds = {name: type(value).__name__ for name, value in self.call.more.items()}
        return {
            "prompts": self.prompts[: self.count],
            "held_out": self.prompts[self.count :],
            "steps": self.call.steps,
            "seed": self.call.seed,
            "call": kinds | plain_of(self.call.more),
            "candidates": [described(one) for one in self.candidates],
            "grid": self.video.grid,
            "model": str(self.transformer.config.get("_name_or_path", "")),
            "dtype": str(self.transformer.dtype),
            "loras": loras_of(self.transformer),
            "objective": self.bound.get("objective"),
            "rows": self.options.rows,
            "weighed_steps": self.options.weighed_steps,
            "kernel": self.kernel,
        }

    def _scout(self, tiles: bool) -> tuple[VideoShape, Tile]:
        """Find the grid by the first forward pass, and boxes of `Piecewise` by a step a fifth of
        the way, densely, if `tiles` are wanted.
        """
        probe = Piecewise(0.2)
        errors, grids = TileErrors(probe.tile_tokens), []
        at = self.call.steps // 5 if tiles else 0

        def look(seen: Observed, prompt: int) -> None:
            step = handle.clock.step
            self.tick("scout", min(step, at), at + 1)
            if step > at or (grids and not tiles):
                raise StopObserving
            whole = handle.clock.tokens
            grids.append(seen.video if whole is None else whole.video)
            if step == at and tiles:
                errors.add_call(probe.within(seen.video, grids[-1]), seen)

        steps, seed, more = self.call.steps, self.call.seed, self.call.more
        with attach_method(self.pipe, probe, kernel=self.kernel, record=False) as handle:
            observe_dense(
                handle, self.pipe, self.prompts[:1], look, steps=steps, seed=seed, call=more
            )
        if not grids:
            raise ValueError(
                "no attention over a known grid was seen, so that nothing can be tuned"
            )
        fit = errors.fit() if tiles else None
        self.tick("scout", at + 1, at + 1)
        return grids[0], None if fit is None else fit.tile

    def _masses(self) -> Masses:
        """Read the mass of dense attention by blocks, in a few long steps of some prompts. It is
        kept in a file until the end, as runs of a GPU differ in their last bits."""
        self.tick("masses", 0, 1)
        steps, seed, call = min(self.call.steps, MASS_STEPS), self.call.seed, self.call.more
        prompts = self.prompts[: min(self.count, MASS_PROMPTS)]
        path, found = self._beside("tuning-masses"), None
        if path is not None and path.is_file():
            found = read_masses(path)
            own = seen_by(prompts, steps=steps, every=1, seed=seed, call=call), self.video.grid
            found = found if (found.seen, found.grid) == own else None
        if found is None:
            found = collect(self.pipe, prompts, steps=steps, every=1, seed=seed, call=call)
            if path is not None:
                found.save(path)
        self.tick("masses", 1, 1)
        return found

    def _profile(self) -> Profile:
        """Stages 1 to 3: errors, seconds and weights."""
        state, held = self.state, self.state.tensors
        steps = levels_of(self.call.steps, self.options.weighed_steps)
        for i, prompt in enumerate(self.prompts[: self.count]):
            left = [step for step in steps if f"weight{i}.{step}" not in held]
            if f"prompt{i}.errors" in held and not left and "seconds.shares" in held:
                continue
            self.tick("profile", i, self.count)
            seen, heard = observe(
                self.pipe,
                prompt,
                i,
                self.call,
                self.candidates,
                rows=self.options.rows,
                kernel=self.kernel,
            )
            if f"prompt{i}.errors" not in held:
                found = {n: x for n, x in seen._asdict().items() if isinstance(x, Tensor)}
                state.put(found, f"prompt{i}.")
            self.tick("profile", i + 1, self.count)
            if "seconds.shares" not in held:
                self.tick("seconds", 0, 1)
                shares, dense = seconds_of(heard, self.candidates, self.kernel)
                state.put({"shares": shares, "dense": torch.tensor(dense)}, "seconds.")
                self.tick("seconds", 1, 1)
            self._weigh(i, prompt, seen, left, len(steps))
        tuned = range(self.count)

        def stacked(name: str) -> Tensor:
            return torch.stack([held[f"prompt{i}.{name}"] for i in tuned])

        weights = [torch.stack([held[f"weight{i}.{step}"] for step in steps]) for i in tuned]
        return Profile(
            held["prompt0.layers"],
            held["prompt0.sigmas"],
            stacked("errors"),
            stacked("squares"),
            stacked("densities").mean(0),
            held["seconds.shares"].float(),
            held["seconds.dense"].float(),
            torch.tensor(steps),
            torch.stack(weights).float(),
        )

    def _weigh(
        self, i: int, prompt: str, seen: PromptErrors, left: Sequence[int], count: int
    ) -> None:
        """Measure the weights of the steps that are left of one prompt."""
        errors, squares = (self.state.tensors[f"prompt0.{name}"] for name in ("errors", "squares"))
        means = errors.double().mean((0, 1, 2)) / squares.double().mean()
        order = sorted((error, i) for i, error in enumerate(means.tolist()) if error > 0)
        _, number = order[len(order) // 2]  # the candidate in the middle of all that err
        total = count * self.count
        for done, step in enumerate(left, (i + 1) * count - len(left)):
            self.tick("weights", done, total)
            weight = weight_of_step(
                self.pipe,
                prompt,
                i,
                self.call,
                seen,
                step=step,
                method=self.candidates[number],
                relative=seen.errors[step, ..., number].sum(-1) / seen.squares[step].sum(-1),
                kernel=self.kernel,
            )
            self.state.put({f"weight{i}.{step}": torch.tensor(weight)})
        self.tick("weights", (i + 1) * count, total)

    def _verify(
        self, profile: Profile, points: Sequence[Point]
    ) -> tuple[Point, list[dict[str, float]], bool]:
        """Find the cheapest point of the frontier that keeps the bound on the tuning prompts.

        Returns the point, the mean scores of all points that were tried, and whether the point was
        found to keep the bound.
        """
        tried: dict[int, list[float]] = {}
        low, high = 0, len(points) - 1  # the last one is dense
        found: int | None = None
        total = 1 + math.ceil(math.log2(max(len(points), 2)))
        place = self._first_guess(points)
        while low < high and (not tried or time.monotonic() < self.until):
            self.tick("verify", min(len(tried), total - 1), total)
            scores = self._scores(points[place], profile, range(self.count))
            tried[place] = [run["score"] for run in scores]
            if holds(self.bound, tried[place]):
                found = high = place
            else:
                low = place + 1
            place = (low + high) // 2
        self.tick("verify", total, total)
        runs: list[dict[str, float]] = [
            {
                "predicted": points[i].predicted,
                "cost": points[i].cost,
                "density": points[i].density,
                "mean": fmean(scores),
                "worst": min(scores),
            }
            for i, scores in sorted(tried.items())
        ]
        if found is not None:
            return points[found], runs, True
        if time.monotonic() >= self.until and low < len(points) - 1:
            return points[low], runs, False
        best = max((run["mean"] for run in runs), default=-math.inf)
        unit = " dB" if self.bound.get("objective") == "psnr" else ""
        said = [f"{name} at least {x:g}{unit}" for name, x in least_scores(self.bound).items()]
        raise ValueError(
            f"only dense attention keeps the bound: {self.bound.get('objective')}, "
            f"{' and '.join(said)}; the best that was reached is a mean of {best:.3g}, at density "
            f"{runs[-1]['density']:.2f}: ask for less, or give denser candidates"
        )

    def _first_guess(self, points: Sequence[Point]) -> int:
        """Choose where to begin: at the error that such a PSNR mostly has, or half way."""
        if self.options.objective != "psnr":
            return (len(points) - 1) // 2
        wanted = 10 ** ((PSNR_OF_ALL - self.bound.get("mean", PSNR_OF_ALL)) / 20)
        near = min(range(len(points)), key=lambda i: abs(points[i].predicted - wanted))
        return min(near, len(points) - 2)

    def _scores(
        self, point: Point, profile: Profile, numbers: Sequence[int]
    ) -> list[ScoredPrompt]:
        """Score a choice on prompts, by their numbers."""
        method, notes = rules_of_point(point, profile, self.candidates), self.state.notes
        keys = [f"score{i}@{point.cost:.12g}:{point.predicted:.12g}" for i in numbers]
        for i, key in zip(numbers, keys, strict=True):
            if key in notes:
                continue
            latents, _ = self._run(i, method)
            dense, objective = self.state.tensors[f"prompt{i}.latents"], self.options.objective
            if objective != "latent_error" and i not in self._dense_videos:
                on_device = dense.to(latents.device, latents.dtype)
                self._dense_videos[i] = decoded(self.pipe, on_device)
            video, seed = self._dense_videos.get(i), self.call.seed + i
            run = scored(self.pipe, objective, self.prompts[i], seed, latents, dense, video)
            self.state.note(key, run)
        return [notes[key] for key in keys]

    def _hold_out(self, point: Point, profile: Profile) -> list[ScoredPrompt]:
        """Score the prompts held out; attention is timed on the first, dense and sparse."""
        rest, total = range(self.count, len(self.prompts)), len(self.prompts) - self.count
        for i in rest:
            self.tick("hold out", i - self.count, total)
            if f"prompt{i}.latents" not in self.state.tensors:
                latents, dense = self._run(i, Dense(), timed=True)
                self.state.put({f"prompt{i}.latents": latents})
                if i == self.count:
                    method = rules_of_point(point, profile, self.candidates)
                    timed = {"dense": dense, "sparse": self._run(i, method, timed=True)[1]}
                    self.state.note("attention_seconds", timed)
            self._scores(point, profile, [i])
        self.tick("hold out", max(total, 1), max(total, 1))
        return self._scores(point, profile, rest)

    def _run(self, i: int, method: Method, *, timed: bool = False) -> tuple[Tensor, float]:
        """Latents of a prompt, and seconds of its attention if it is timed."""
        options: AttachOptions = {"kernel": self.kernel, "record": timed, "timed": timed}
        with attach_method(self.pipe, method, **options) as handle:
            latents = generate(self.pipe, self.prompts[i], i, self.call)
            return latents, sum(record.seconds or 0.0 for record in handle.records.values())
