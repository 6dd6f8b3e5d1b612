"""`tune`: profile, seconds, weights of steps, choice, verification."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gen_accel.attention_processors.attached.attachment import Attachment, attach_method
from gen_accel.attention_processors.attached.calibrate import TileErrors
from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.attached.layer import Observed
from gen_accel.attention_processors.attached.observing import check_bare
from gen_accel.attention_processors.attached.profiling import collect, seen_by
from gen_accel.attention_processors.methods.dense import Dense
from gen_accel.attention_processors.methods.masses import Masses, read_masses
from gen_accel.attention_processors.methods.piecewise import Piecewise
from gen_accel.io import parse_json, plain, read_tensors, replacing, save_tensors
from gen_accel.measure.machine import device_name
from gen_accel.method import Method
from gen_accel.paths import expanded
from gen_accel.pipelines.tuning import solving
from gen_accel.pipelines.tuning.candidates import (
    checked,
    default_candidates,
    described,
    fits,
    middle,
)
from gen_accel.pipelines.tuning.measuring import (
    AttentionSample,
    PipelineCall,
    PromptErrors,
    StopGeneration,
    check_decodes,
    decoded,
    generate,
    observe,
    relative_error,
    score_of_videos,
    seconds_of,
    weight_of_step,
)
from gen_accel.pipelines.tuning.preset import (
    MadeFor,
    Preset,
    Profile,
    ScoreBound,
    check_preset_path,
    holds,
    least_scores,
    levels_of,
    loras_of,
    transformer_of,
)
from gen_accel.pipelines.tuning.solving import Point, SolveOptions
from gen_accel.pipelines.tuning.tuned import Tuned, curve_of, rules_of_point
from gen_accel.registry import AXES, Axis, Cost, Scale
from gen_accel.version import __version__
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from gen_accel.pipelines.tuning.config import Objective, TuneOptions

ABOUT, NOTES = "tuning", "notes"


class State:
    """Tensors and notes by name; each change is on the disk when it returns.

    Args:
        path: the file; None keeps nothing.
        about: everything that the measurements depend on.

    Raises:
        ValueError: the file is of a tuning that differs in `about`, with what differs.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.path = path
        self.about = json.loads(json.dumps(plain(about)))
        self.tensors: dict[str, Tensor] = {}
        self.notes: dict[str, Any] = {}
        if path is not None and path.is_file():
            self._read(path)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors."""
        self.tensors |= {name: x.cpu() for name, x in tensors.items()}
        self._write()

    def note(self, name: str, value: Any) -> None:
        """Add a note, of what JSON holds."""
        self.notes[name] = json.loads(json.dumps(plain(value)))
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            metadata = {ABOUT: json.dumps(self.about), NOTES: json.dumps(self.notes)}
            with replacing(self.path) as partial:
                save_tensors(self.tensors, partial, metadata)

    def of(self, prefix: str) -> dict[str, Tensor] | None:
        """Return the tensors called prefix.name, by name; None without any."""
        start = f"{prefix}."
        return {
            name.removeprefix(start): x
            for name, x in self.tensors.items()
            if name.startswith(start)
        } or None

    def remove(self) -> None:
        """Remove the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        tensors, metadata = read_tensors(path)
        about = parse_json(metadata.get(ABOUT, "null"), path)
        if about != self.about:
            raise ValueError(
                f"{path} is of another tuning, which differs in {differences(about, self.about)}: "
                "give another --out, or remove it"
            )
        self.tensors, self.notes = tensors, parse_json(metadata.get(NOTES, "{}"), path)


def differences(earlier: Any, now: Mapping[str, Any]) -> str:
    """Name what differs between two descriptions."""
    if not isinstance(earlier, dict):
        return "everything"
    names = [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
    return ", ".join(sorted(names))


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
    levels: int = 6,
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
        levels: steps whose weight is measured.
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
        levels=levels,
        minutes=minutes,
        kernel=kernel,
    )
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    run = _Tuning(
        pipe,
        _split(prompts, held_out),
        PipelineCall(num_inference_steps, seed, call),
        options,
        candidates,
        None if out is None else expanded(out),
        tick or (lambda stage, done, total: None),
    )
    return run.go()


def _split(
    prompts: Sequence[str], held_out: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if isinstance(prompts, str) or isinstance(held_out, str):
        raise ValueError("prompts must be a list of them, got one text")
    prompts = tuple(prompts)
    if held_out is not None:
        tuning, rest = prompts, tuple(held_out)
    else:
        half = (len(prompts) + 1) // 2
        tuning, rest = prompts[:half], prompts[half:]
    if not tuning or not all(isinstance(one, str) and one for one in (*tuning, *rest)):
        raise ValueError(f"prompts must be texts, one at least, got {prompts!r}")
    return tuning, rest


class _Tuning:
    """One run of `tune`."""

    def __init__(
        self,
        pipe: "DiffusionPipeline",
        prompts: tuple[tuple[str, ...], tuple[str, ...]],
        call: PipelineCall,
        options: "TuneOptions",
        candidates: Sequence[Method] | None,
        out: Path | None,
        tick: Tick,
    ) -> None:
        self.pipe, self.call, self.options, self.bound = pipe, call, options, options.bound
        self.solved_for = SolveOptions(options.cost, options.scale, options.by)
        self.tuning, self.held_out = prompts
        self.out, self.kernel, self.tick = out, options.kernel, tick
        self.until = (
            math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
        )
        self.began = time.monotonic()
        if out is not None:
            check_preset_path(out)
        _check(pipe)
        if options.objective != "latent_error":
            check_decodes(pipe)
        if options.objective == "psnr":
            from gen_accel.measure.quality import check_installed

            check_installed()
        self.transformer = transformer_of(pipe)
        self.video, tile = self._scout(candidates is None)
        masses = self._masses() if candidates is None else None
        given = candidates
        if given is None:
            given = default_candidates(self.video, tile=tile, masses=masses)
        self.candidates = checked(given, self.transformer.device)
        if candidates is not None:
            for one in self.candidates[:-1]:
                if not fits(one, self.video):
                    raise ValueError(
                        f"candidate {one!r} does not fit {self.video}, or leaves nothing out there"
                    )
        path = None if out is None else out.with_name(f"{out.stem}.tuning.safetensors")
        self.state = State(path, self._about())
        self._dense_videos: dict[int, np.ndarray] = {}

    def go(self) -> Tuned:
        profile = self._profile()
        points = solving.curve(profile, self.solved_for)
        if len(points) == 1:
            raise ValueError(
                "no candidate takes less time than dense attention here, as with few tokens: give "
                "cost='density', or a larger video"
            )
        self.tick("solve", 1, 1)
        point, runs, verified = self._verify(profile, points)
        measured = {
            "tuning": self._scores(point, profile, range(len(self.tuning))),
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
            curve_of(points),
            verified,
            None,
            {
                "gen_accel": __version__,
                "torch": torch.__version__,
                "device": device_name(self.transformer.device),
                "threads": torch.get_num_threads(),
                "kernel": self.kernel,
                "minutes": round((time.monotonic() - self.began) / 60, 2),
                "options": self.solved_for._asdict(),
                "prompts": [*self.tuning],
                "held_out": [*self.held_out],
                "seed": self.call.seed,
            },
        )
        found = Tuned(preset, profile, self.candidates, tuple(points), point, self.solved_for)
        if self.out is not None:
            found = found.save(self.out)
        self.state.remove()
        if self._kept_masses is not None:
            self._kept_masses.unlink(missing_ok=True)
        return found

    def _about(self) -> dict[str, Any]:
        """Describe everything that the measurements depend on."""
        plain = (bool, int, float, str, type(None))
        more = {
            k: v if isinstance(v, plain) else type(v).__name__ for k, v in self.call.more.items()
        }
        return {
            "prompts": self.tuning,
            "held_out": self.held_out,
            "steps": self.call.steps,
            "seed": self.call.seed,
            "call": more,
            "candidates": [described(one) for one in self.candidates],
            "grid": self.video.grid,
            "model": str(self.transformer.config.get("_name_or_path", "")),
            "dtype": str(self.transformer.dtype),
            "loras": loras_of(self.transformer),
            "objective": self.bound.get("objective"),
            "rows": self.options.rows,
            "levels": self.options.levels,
            "kernel": self.kernel,
        }

    def _scout(self, tiles: bool) -> tuple[VideoShape, Any]:
        """Find the grid by the first forward pass, and boxes of `Piecewise` by a step a fifth of
        the way, densely.

        Args:
            tiles: look for the boxes.
        """
        probe = Piecewise(0.2)
        tokens = probe.tile_tokens
        errors, seen = TileErrors(tokens), []
        at = self.call.steps // 5 if tiles else 0

        def look(call: Observed) -> None:
            step = handle.clock.step
            self.tick("scout", min(step, at), at + 1)
            if step > at or (seen and not tiles):
                raise StopGeneration
            whole = handle.clock.tokens
            seen.append(call.video if whole is None else whole.video)
            if step == at and tiles:
                errors.add_call(probe.within(call.video, seen[-1]), call)

        with attach_method(self.pipe, probe, kernel=self.kernel, record=False) as handle:
            handle.observe = look
            with suppress(StopGeneration):
                generate(self.pipe, self.tuning[0], 0, self.call)
        if not seen:
            raise ValueError(
                "no attention over a known grid was seen, so that nothing can be tuned"
            )
        fit = errors.fit() if tiles else None
        self.tick("scout", at + 1, at + 1)
        return seen[0], None if fit is None else fit.tile

    def _masses(self) -> Masses:
        """Read the mass of dense attention by blocks, in a few long steps of some prompts. It is
        kept in a file until the end, as runs of a GPU differ in their last bits."""
        self.tick("masses", 0, 1)
        about: dict[str, Any] = {"steps": min(self.call.steps, MASS_STEPS), "every": 1}
        about |= {"seed": self.call.seed, "call": self.call.more}
        prompts, path = self.tuning[:MASS_PROMPTS], self._kept_masses
        if path is not None and path.is_file():
            found = read_masses(path)
            if found.seen == seen_by(prompts, **about) and found.grid == self.video.grid:
                self.tick("masses", 1, 1)
                return found
        found = collect(self.pipe, prompts, **about)
        if path is not None:
            found.save(path)
        self.tick("masses", 1, 1)
        return found

    @property
    def _kept_masses(self) -> Path | None:
        out = self.out
        return None if out is None else out.with_name(f"{out.stem}.tuning-masses.safetensors")

    def _profile(self) -> Profile:
        """Stages 1 to 3: errors, seconds and weights."""
        state, P = self.state, len(self.tuning)
        steps = levels_of(self.call.steps, self.options.levels)
        for i, prompt in enumerate(self.tuning):
            known = state.of(f"prompt{i}")
            left = [step for step in steps if f"weight{i}.{step}" not in state.tensors]
            if known is not None and not left and "seconds.shares" in state.tensors:
                continue
            self.tick("profile", i, P)
            seen, heard = observe(
                self.pipe,
                prompt,
                i,
                self.call,
                self.candidates,
                rows=self.options.rows,
                kernel=self.kernel,
            )
            if known is None:
                state.put(_kept(i, seen))
            self.tick("profile", i + 1, P)
            if "seconds.shares" not in state.tensors:
                self._time(heard)
            self._weigh(i, prompt, seen, left, len(steps))
        return self._joined(steps)

    def _time(self, heard: dict[int, AttentionSample]) -> None:
        self.tick("seconds", 0, 1)
        shares, dense = seconds_of(heard, self.candidates, self.kernel)
        self.state.put({"seconds.shares": shares, "seconds.dense": torch.tensor(dense)})
        self.tick("seconds", 1, 1)

    def _weigh(
        self, i: int, prompt: str, seen: PromptErrors, left: Sequence[int], count: int
    ) -> None:
        """Measure the weights of the steps that are left of one prompt."""
        first = self.state.of("prompt0")
        assert first is not None
        errors = first["errors"].double().mean((0, 1, 2)) / first["squares"].double().mean()
        number = middle(errors.tolist())
        total = count * len(self.tuning)
        for step in left:
            done = i * count + count - len(left) + left.index(step)
            self.tick("weights", done, total)
            relative = seen.errors[step, ..., number].sum(-1) / seen.squares[step].sum(-1)
            weight = weight_of_step(
                self.pipe,
                prompt,
                i,
                self.call,
                seen,
                step=step,
                method=self.candidates[number],
                relative=relative,
                kernel=self.kernel,
            )
            self.state.put({f"weight{i}.{step}": torch.tensor(weight)})
        self.tick("weights", (i + 1) * count, total)

    def _joined(self, steps: Sequence[int]) -> Profile:
        state, P = self.state.tensors, range(len(self.tuning))
        weights = [[state[f"weight{i}.{step}"] for step in steps] for i in P]

        def stacked(name: str) -> Tensor:
            return torch.stack([state[f"prompt{i}.{name}"] for i in P])

        return Profile(
            state["prompt0.layers"],
            state["prompt0.sigmas"],
            stacked("errors"),
            stacked("squares"),
            stacked("densities").mean(0),
            state["seconds.shares"].float(),
            state["seconds.dense"].float(),
            torch.tensor(steps),
            torch.stack([torch.stack(row) for row in weights]).float(),
        )

    def _verify(
        self, profile: Profile, points: Sequence[Point]
    ) -> tuple[Point, list[dict[str, float]], bool]:
        """Find the cheapest point of the frontier that keeps the bound on the tuning prompts.

        Returns the point, the mean scores of all points that were tried, and whether the point was
        found to keep the bound.
        """
        tried: dict[int, list[dict[str, Any]]] = {}
        low, high = 0, len(points) - 1  # the last one is dense
        found: int | None = None
        total = 1 + math.ceil(math.log2(max(len(points), 2)))
        place = self._first_guess(points)
        while low < high and (not tried or time.monotonic() < self.until):
            self.tick("verify", min(len(tried), total - 1), total)
            tried[place] = self._scores(points[place], profile, range(len(self.tuning)))
            if holds(self.bound, [run["score"] for run in tried[place]]):
                found = high = place
            else:
                low = place + 1
            place = (low + high) // 2
        self.tick("verify", total, total)
        runs = [
            {
                "predicted": points[i].predicted,
                "cost": points[i].cost,
                "density": points[i].density,
                "mean": fmean(run["score"] for run in scores),
                "worst": min(run["score"] for run in scores),
            }
            for i, scores in sorted(tried.items())
        ]
        if found is None:
            if time.monotonic() >= self.until and low < len(points) - 1:
                return points[low], runs, False
            best = max((run["mean"] for run in runs), default=-math.inf)
            raise ValueError(
                f"only dense attention keeps the bound: {_said(self.bound)}; the best that was "
                f"reached is a mean of {best:.3g}, at density {runs[-1]['density']:.2f}: ask for "
                "less, or give denser candidates"
            )
        return points[found], runs, True

    def _first_guess(self, points: Sequence[Point]) -> int:
        """Choose where to begin: at the error that such a PSNR mostly has, or half way."""
        if self.options.objective != "psnr":
            return (len(points) - 1) // 2
        wanted = 10 ** ((PSNR_OF_ALL - self.bound.get("mean", PSNR_OF_ALL)) / 20)
        near = min(range(len(points)), key=lambda i: abs(points[i].predicted - wanted))
        return min(max(near, 0), max(len(points) - 2, 0))

    def _scores(
        self, point: Point, profile: Profile, numbers: Sequence[int]
    ) -> list[dict[str, Any]]:
        """Score a choice on prompts, by their numbers: the tuning prompts, then those held out."""
        prompts = [*self.tuning, *self.held_out]
        method = rules_of_point(point, profile, self.candidates)
        found = []
        for i in numbers:
            key = f"score{i}@{point.cost:.12g}:{point.predicted:.12g}"
            if key not in self.state.notes:
                with attach_method(self.pipe, method, kernel=self.kernel, record=False):
                    latents = generate(self.pipe, prompts[i], i, self.call)
                error, score = self._score(i, latents)
                run = {"prompt": prompts[i], "seed": self.call.seed + i, "score": score}
                self.state.note(key, run | {"latent_error": error})
            found.append(self.state.notes[key])
        return found

    def _score(self, i: int, latents: Tensor) -> tuple[float, float]:
        """Error of the latents, and the score of the video."""
        dense = self.state.tensors[f"prompt{i}.latents"]
        error = relative_error(latents, dense)
        if self.options.objective == "latent_error":
            return error, -error
        if i not in self._dense_videos:
            self._dense_videos[i] = decoded(self.pipe, dense.to(latents.device, latents.dtype))
        videos = self._dense_videos[i], decoded(self.pipe, latents)
        return error, score_of_videos(self.options.objective, *videos)

    def _hold_out(self, point: Point, profile: Profile) -> list[dict[str, Any]]:
        """Score the prompts held out; attention is timed on the first, dense and sparse."""
        first, total = len(self.tuning), len(self.held_out)
        for k, prompt in enumerate(self.held_out):
            i = first + k
            self.tick("hold out", k, total)
            if f"prompt{i}.latents" not in self.state.tensors:
                with attach_method(self.pipe, Dense(), kernel=self.kernel, timed=True) as handle:
                    latents = generate(self.pipe, prompt, i, self.call)
                    dense_seconds = _attention_seconds(handle)
                self.state.put({f"prompt{i}.latents": latents})
                if k == 0:
                    method = rules_of_point(point, profile, self.candidates)
                    with attach_method(
                        self.pipe, method, kernel=self.kernel, timed=True
                    ) as handle:
                        generate(self.pipe, prompt, i, self.call)
                        sparse_seconds = _attention_seconds(handle)
                    timed = {"dense": dense_seconds, "sparse": sparse_seconds}
                    self.state.note("attention_seconds", timed)
            self._scores(point, profile, [i])
        self.tick("hold out", max(total, 1), max(total, 1))
        return self._scores(point, profile, range(first, first + total))


def _said(bound: ScoreBound) -> str:
    unit = " dB" if bound.get("objective") == "psnr" else ""
    said = [f"{name} at least {value:g}{unit}" for name, value in least_scores(bound).items()]
    return f"{bound.get('objective')}, {' and '.join(said)}"


def _attention_seconds(handle: Attachment) -> float:
    return sum(record.seconds or 0.0 for record in handle.records.values())


def _kept(i: int, seen: PromptErrors) -> dict[str, Tensor]:
    names = ("errors", "squares", "densities", "layers", "sigmas", "latents")
    return {f"prompt{i}.{name}": getattr(seen, name) for name in names}


def _check(pipe: "DiffusionPipeline") -> None:
    """Refuse, by a ValueError, a pipeline whose attention cannot be observed."""
    check_bare(pipe, "tune")
    for name, transformer in served_transformers(pipe).items():
        if any(parameter.is_meta for parameter in transformer.parameters()):
            raise ValueError(f"{name} is offloaded: tune without, so that seconds can be told")
