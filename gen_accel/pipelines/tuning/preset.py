"""Presets: rules that were tuned for a model, in a JSON file, with their profile beside it."""

import json
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Any,
    TypedDict,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from gen_accel.attention_processors import method_name
from gen_accel.attention_processors.attached.clock import first_transformer
from gen_accel.attention_processors.attached.recipe import recipes_of, sizes
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.methods.mixed import Mixed, Rule
from gen_accel.attention_processors.methods.piecewise import Piecewise
from gen_accel.attention_processors.methods.profiled import Profiled
from gen_accel.attention_processors.methods.registry import method_of_file, saved_options
from gen_accel.io import (
    fields_of,
    file_sha256,
    parse_json,
    read_fields,
    read_tensors,
    replacing,
    save_tensors,
    typed,
    write_json,
)
from gen_accel.method import Method
from gen_accel.parsing import example, fits, shown, tuples, wrong_type
from gen_accel.paths import BUNDLED_PRESETS, check_output, expanded
from gen_accel.registry import MOST_TOKENS, PRESETS, RULES
from gen_accel.version import __version__
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


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
    def added(self) -> Tensor:
        """(P, S, L, H, C) float64: what each choice adds to the squared error of a prompt at the
        end, the weight of the step times the head's share of its layer's relative error."""
        whole = self.squares.double().sum(-1)[..., None, None]
        relative = self.errors.double() / whole.clamp_min(torch.finfo(torch.float64).tiny)
        return self.step_weights().square()[:, :, None, None, None] * relative

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
        added = self.added
        if scale == "worst":
            return added.amax(0)
        if scale == "even":
            whole = added.sum((1, 2, 3)).mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
            added = added * (whole.log().mean().exp() / whole)[:, None, None, None, None]
        return added.mean(0)

    def predicted(self, settings: Tensor) -> Tensor:
        """Relative errors of the final latents, (P,), for settings (S, L, H)."""
        index = settings[None, ..., None].expand(*self.errors.shape[:-1], 1)
        return self.added.gather(-1, index).sum((1, 2, 3, 4)).sqrt()

    def at_steps(self, sigmas: Tensor) -> "Profile":
        """Profile of a run with other noise levels, (S' + 1,), read off this one: errors, and
        weights over the length of a step, are interpolated over the logarithm of the noise.
        """
        old, new = log_noise(self.sigmas), log_noise(sigmas)
        lengths = step_lengths(sigmas)
        rates = self.step_weights() / step_lengths(self.sigmas)
        weights = interpolated(old, rates, new) * lengths

        def moved(x: Tensor) -> Tensor:
            """Interpolate (P, S, ...) to (P, S', ...)."""
            last = x.double().movedim(1, -1)
            rows = interpolated(old, last.reshape(-1, self.steps), new)
            return rows.view(*last.shape[:-1], -1).movedim(-1, 1).float().contiguous()

        return replace(
            self,
            sigmas=sigmas,
            errors=moved(self.errors),
            squares=moved(self.squares),
            levels=torch.arange(len(sigmas) - 1),
            weights=weights.float(),
        )

    @classmethod
    def of(cls, tensors: dict[str, Tensor], origin: str | Path) -> "Profile":
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
    known, at = places[order].numpy(), wanted.numpy()
    return torch.from_numpy(np.stack([np.interp(at, known, x) for x in values[:, order].numpy()]))


def levels_of(steps: int, most: int) -> list[int]:
    """Steps whose weight is measured: all of a short run, else the first, the last two and others
    evenly between them."""
    if steps <= most:
        return [*range(steps)]
    ends = {0, 1, 2, steps - 2, steps - 1}
    between = max(0, most - len(ends))
    inner = {2 + math.ceil((steps - 4) * (i + 1) / (between + 1)) for i in range(between)}
    return sorted(ends | {min(step, steps - 2) for step in inner})


KIND, VERSION = "preset", 1
CANDIDATES = "candidates"  # key of a profile's metadata
TRIED = ("predicted", "cost", "density", "mean", "worst")  # of a choice, by profile and by scores
HEADS, LAYERS = "num_attention_heads", "num_.*(layers|blocks)"  # of a model's config
MOST_COUNTED = 10_000  # heads, or layers, of a model
PLAIN = (bool, int, float, str, type(None))  # classes of what a file holds of a call


class OtherThanTuned(UserWarning):
    """A preset runs at another grid, guidance, LoRA or dtype than it was tuned for."""


@dataclass(frozen=True)
class MadeFor:
    """Model, size and call that a preset was tuned on.

    Args:
        transformer: class and sizes, as a LoRA's recipe has them.
        grid: frames, rows and columns, in tokens.
        call: what the pipeline was called with beside the prompt and the steps.
        scheduler: its class, and its config.
        sigmas: noise levels of the steps, and the end.
        loras: names of the active adapters, and the hash of the data of those trained here.
    """

    transformer: dict[str, Any]
    grid: tuple[int, int, int]
    call: dict[str, Any]
    scheduler: dict[str, object]
    sigmas: tuple[float, ...]
    dtype: str
    loras: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        pipe: "DiffusionPipeline",
        grid: tuple[int, int, int],
        call: Mapping[str, object],
        sigmas: Sequence[float],
    ) -> "MadeFor":
        transformer, scheduler = first_transformer(pipe), pipe.scheduler
        config = {k: v for k, v in plain_of(scheduler.config).items() if not k.startswith("_")}
        return cls(
            sizes(transformer),
            grid,
            plain_of(call),
            {"class": type(scheduler).__name__, "config": config},
            tuple(sigmas),
            str(transformer.dtype).removeprefix("torch."),
            loras_of(transformer),
        )


def plain_of(values: Mapping[str, object]) -> dict[str, object]:
    """Return the values that are numbers, text or None."""
    return {name: value for name, value in values.items() if isinstance(value, PLAIN)}


def loras_of(transformer: "ModelMixin") -> tuple[str, ...]:
    """Name the active adapters of a model, each with what is known of its training."""
    if not getattr(transformer, "peft_config", None):
        return ()
    known = recipes_of(transformer)
    try:
        active = sorted(transformer.active_adapters())
    except ValueError:  # all are switched off
        return ()
    return tuple(
        f"{known[name].data[:16]}-{known[name].steps}" if name in known else name
        for name in active
    )


class ScoreBound(TypedDict, total=False):
    """Bound on the scores of the tuning prompts: their least mean, and the least of any."""

    mean: float
    worst: float
    objective: str


class ScoredPrompt(TypedDict):
    """Score of a prompt by its sparse video, and the relative error of the latents."""

    prompt: str
    seed: int
    score: float
    latent_error: float


class Measured(TypedDict, total=False):
    """Scores of the prompts; figures and scores of the choices that were tried, see `TRIED`; and
    seconds of attention."""

    tuning: list[ScoredPrompt]
    held_out: list[ScoredPrompt]
    runs: list[dict[str, float]]
    attention_seconds: dict[str, float]


class ProfileFile(TypedDict):
    """Name and hash of the file of a profile."""

    file: str
    sha256: str


def least_scores(bound: ScoreBound) -> dict[str, float]:
    """The least mean and the least score of any, by name; only what is bounded."""
    least = {"mean": bound.get("mean"), "worst": bound.get("worst")}
    return {name: value for name, value in least.items() if value is not None}


def holds(bound: ScoreBound, scores: Sequence[float]) -> bool:
    """Whether scores keep a bound."""
    least = least_scores(bound)
    mean, worst = least.get("mean", -math.inf), least.get("worst", -math.inf)
    return fmean(scores) >= mean and min(scores) >= worst


@dataclass(frozen=True)
class Preset:
    """Rules, what they were tuned for, and what was measured.

    Args:
        method: the rules.
        bound: what was asked for.
        cost: seconds of attention, as a share of dense, by the profile's table.
        density: share of token pairs, dense steps counted as 1.
        predicted: relative error of the final latents by the profile.
        measured: by prompt, on the tuning prompts and on the ones held out.
        curve: cost, density and predicted error of the other choices.
        verified: whether the bound was measured and holds on the tuning prompts.
        profile: file beside the preset, and its hash; None without one.
        made_by: versions, device and minutes.
    """

    method: Mixed
    made_for: MadeFor
    bound: ScoreBound
    cost: float
    density: float
    predicted: float
    measured: Measured = field(default_factory=lambda: Measured())
    curve: tuple[dict[str, float], ...] = ()
    verified: bool = False
    profile: ProfileFile | None = None
    made_by: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Return the preset as its file holds it."""
        rules = [
            described(rule.method)
            | {"layers": rule.layers, "heads": rule.heads, "steps": rule.steps}
            for rule in self.method.rules
        ]
        head = {"gen_accel": KIND, "version": VERSION, "steps": self.method.steps}
        rest = {name: getattr(self, name) for name in HELD}
        return head | {"rules": rules, "made_for": asdict(self.made_for)} | rest


# Fields that a file holds as a preset has them.
HELD = tuple(one.name for one in fields(Preset) if one.name not in ("method", "made_for"))


def write_preset(
    path: str | Path,
    preset: Preset,
    profile: Profile | None = None,
    candidates: Sequence[Method] = (),
) -> Preset:
    """Write a preset, its profile first, so that no preset names a profile that is not there. What
    the methods of rules and candidates were measured by lies beside it, each once. Returns the
    preset as it was written, with the hash of the profile.
    """
    path = expanded(path)
    check_output(path, ".json")
    written: dict[str, str] = {}

    def placed(method: Method) -> Method:
        if not isinstance(method, Profiled) or method.masses is None:
            return method
        if method.sha256 not in written:
            beside = path.with_name(f"{path.stem}.{method.sha256[:8]}.safetensors")
            written[method.sha256] = str(method.save(beside).file)
        return replace(method, file=written[method.sha256])

    rules = tuple(replace(rule, method=placed(rule.method)) for rule in preset.method.rules)
    preset = replace(preset, method=Mixed(rules, preset.method.steps))
    listed = [described(placed(one)) for one in candidates]
    if profile is not None:
        beside = path.with_suffix(".safetensors")
        metadata = {KIND: str(VERSION), "made_by": __version__, CANDIDATES: json.dumps(listed)}
        with replacing(beside) as partial:
            save_tensors(vars(profile), partial, metadata)
        known: ProfileFile = {"file": beside.name, "sha256": file_sha256(beside)}
        preset = replace(preset, profile=known)
    write_json(path, preset.to_dict())
    return preset


def read_profile(preset: Preset, folder: Path) -> tuple[Profile, tuple[Method, ...]]:
    """Read the profile that a preset names, and its candidates.

    Raises:
        FileNotFoundError: it is not beside the preset.
        ValueError: the preset has none, or the file is not the one that it was written with.
    """
    if preset.profile is None:
        raise ValueError(
            "the preset has no profile, from which another could be solved: tune again"
        )
    path = folder / preset.profile["file"]
    if not path.is_file():
        raise FileNotFoundError(f"the preset's profile is missing: {path}")
    if file_sha256(path) != preset.profile["sha256"]:
        raise ValueError(f"{path} is not the profile that the preset was written with")
    tensors, metadata = read_tensors(path)
    listed = parse_json(metadata.get(CANDIDATES, "null"), f"the candidates in {path}")
    if not isinstance(listed, list):
        raise ValueError(f"{path} does not say its candidates, got {shown(listed)}")
    return Profile.of(tensors, path), tuple(made_of(one, path, folder) for one in listed)


def read_preset(source: str | Path) -> Preset:
    """Read a preset's file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no preset of this version, with what is wrong.
    """
    path = expanded(source)
    if not path.is_file():
        raise FileNotFoundError(f"no preset at {path}")
    data = read_fields(path)
    if data.get("gen_accel") != KIND:
        raise ValueError(f"{path} is no preset: gen-accel tune writes one")
    version = typed(data, "version", int, origin=path)
    if version != VERSION:
        raise ValueError(f"{path} is a preset of version {version}, not {VERSION}: tune again")
    steps = typed(data, "steps", int, origin=path)
    kinds = get_type_hints(Preset)
    held = _checked(data, {name: kinds[name] for name in HELD}, path)
    for one in held["measured"].get("runs", ()):
        for name in TRIED:
            typed(fields_of(one, f"runs of {path}"), name, float, origin=f"runs of {path}")
    given = fields_of(data.get("made_for"), f"made_for of {path}")
    made_for = MadeFor(**_checked(given, get_type_hints(MadeFor), path))
    typed(made_for.transformer, "class", str, origin=f"transformer of {path}")
    for name, kind in (("class", str), ("config", dict)):
        typed(made_for.scheduler, name, kind, origin=f"scheduler of {path}")
    if min(made_for.grid) < 1 or math.prod(made_for.grid) > MOST_TOKENS:
        raise ValueError(
            f"grid of {path} must be three sizes, of at most {MOST_TOKENS:,} tokens, got "
            f"{shown(made_for.grid)}"
        )
    if len(made_for.sigmas) != steps + 1:
        raise ValueError(
            f"{path} must hold a noise level for each of its {steps} steps and the end, got "
            f"{len(made_for.sigmas)}"
        )
    if (profile := held["profile"]) and Path(profile["file"]).name != profile["file"]:
        raise ValueError(f"the profile of {path} must lie beside it, got {shown(profile['file'])}")
    try:
        rules = [_rule(one, path) for one in typed(data, "rules", list, origin=path)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        method = Mixed(tuple(rules), steps)
    except ValueError as error:
        raise ValueError(f"the rules of {path} cannot be read: {error}") from None
    _check_within(method, made_for, path)
    return Preset(method, made_for, **held)


def _check_within(method: Mixed, made_for: MadeFor, path: Path) -> None:
    """Refuse rules for heads or layers that the model they were made for does not have, as far as
    its config counts them."""
    sizes = {name: n for name, n in made_for.transformer.items() if type(n) is int}
    counts = {n: x for n, x in sizes.items() if n == HEADS or re.fullmatch(LAYERS, n)}
    for name, count in counts.items():
        if not 0 < count <= MOST_COUNTED:
            raise ValueError(
                f"{name} of {path} must be from 1 to {MOST_COUNTED:,}, got {shown(count)}"
            )
    stacks = [n for name, n in counts.items() if name != HEADS]
    named = {
        "heads": (method.named_heads, counts.get(HEADS, math.inf)),
        "layers": (method.named_layers, sum(stacks) if stacks else math.inf),
    }
    for name, (numbers, count) in named.items():
        if numbers and numbers[-1] >= count:
            raise ValueError(
                f"a rule of {path} names {name[:-1]} {shown(numbers[-1])}, of a model with "
                f"{shown(count)} {name}: tune again"
            )


def _checked(
    given: object, kinds: Mapping[str, Any], origin: object, optional: Collection[str] = ()
) -> dict[str, Any]:
    """Return the fields of a file that `kinds` names, lists as tuples. Raises ValueError for a
    field that is missing, or of another type, at any depth."""
    held, found = fields_of(given, origin), {}
    for name, kind in kinds.items():
        if name not in held and name in optional:
            continue
        if name not in held:
            raise ValueError(f"{origin} has no {name}")
        value, is_list = held[name], get_origin(kind) is list
        if not fits(value, kind):
            raise wrong_type(f"{name} of {origin}", kind, value, f"{name}={example(kind)!r}")
        parts = [one for one in (kind, *get_args(kind)) if is_typeddict(one)]
        for part, one in product(parts, value if is_list else [value]):
            if one is not None:
                hints = get_type_hints(part)
                _checked(one, hints, f"{name} of {origin}", part.__optional_keys__)
        found[name] = value if is_list else tuples(value)
    return found


def _rule(data: object, path: Path) -> Rule:
    what = f"a rule of {path}"
    held = fields_of(data, what)
    numbers = [
        typed(held, name, list, type(None), origin=what) for name in ("layers", "heads", "steps")
    ]
    method = made_of(held, what, path.parent)
    try:
        return Rule(method, *map(tuples, numbers))
    except ValueError as error:
        raise ValueError(f"{what} cannot be read: {error}") from None


def described(method: Method) -> dict[str, object]:
    """A method as JSON holds it. The files of profiles are named without their folder."""
    options = saved_options(method)
    if file := _profile_of(options):
        options["file"] = Path(file).name
    return {"method": method_name(method), "options": options}


def _profile_of(options: Mapping[str, object]) -> str:
    """File of a profile that options name; "" for none."""
    file = options.get("file")
    return file if isinstance(file, str) and "sha256" in options else ""


def made_of(data: object, origin: str | Path, folder: Path) -> Method:
    """Make the method that `described` wrote; ValueError for anything else.

    Args:
        folder: where the files of profiles lie, which are named without one.
    """
    held = fields_of(data, origin)
    name = typed(held, "method", str, origin=origin)
    options = {**typed(held, "options", dict, origin=origin)}
    if file := _profile_of(options):
        if Path(file).name != file:
            raise ValueError(f"a profile of {origin} must lie beside it, got {shown(file)}")
        options["file"] = str(folder / file)
    try:
        return method_of_file(name, options)
    except ValueError as error:
        raise ValueError(f"{error}; if another version wrote {origin}, tune again") from error


def check_model(preset: Preset, transformer: "ModelMixin", path: object) -> None:
    """Raise ValueError for a preset that was tuned on a model of another class or size."""
    have, tuned = sizes(transformer), preset.made_for.transformer
    wrong = [
        f"{name} {shown(value)} (this model: {shown(have.get(name))})"
        for name, value in tuned.items()
        if name != "sha256" and have.get(name) != value
    ]
    if wrong:
        raise ValueError(
            f"{path} was tuned on another model: {', '.join(wrong)}; tune one for this model, "
            "gen-accel tune --model MODEL --prompts FILE --quality 28 --out PRESET.json"
        )


def preset_watch(
    pipe: "DiffusionPipeline | nn.Module",
    preset: Preset,
    grid: Callable[[], VideoShape | None],
) -> Callable[["ModelMixin", tuple[object, ...]], None]:
    """Make a hook that warns, once, of a call that is unlike what a preset was tuned for. It holds
    the pipeline weakly, as the pipeline owns the model."""
    owner, tuned, was_told = ref(pipe), preset.made_for, False

    def watch(module: "ModelMixin", args: tuple[object, ...]) -> None:
        nonlocal was_told
        if torch.compiler.is_compiling() or was_told:
            return
        was_told = True
        video, guidance = grid(), getattr(owner(), "guidance_scale", None)
        now: dict[str, tuple[object, object]] = {
            "dtype": (tuned.dtype, str(module.dtype).removeprefix("torch.")),
            "LoRAs": (", ".join(tuned.loras) or "none", ", ".join(loras_of(module)) or "none"),
        }
        if video is not None:
            now["grid"] = tuned.grid, video.grid
        if guidance is not None and "guidance_scale" in tuned.call:
            now["guidance_scale"] = float(tuned.call["guidance_scale"]), float(guidance)
        others = [
            f"{name} {was}, and runs with {has}" for name, (was, has) in now.items() if was != has
        ]
        if others:
            warnings.warn(
                f"the preset was tuned for {'; '.join(others)}: what it was measured at may not "
                "hold",
                OtherThanTuned,
                stacklevel=2,
            )

    return watch


class NotMeasured(UserWarning):
    """A named preset is a rule: nothing was tuned for this model."""


def choose_preset(
    preset: str | Path | Preset,
    pipe_or_transformer: "DiffusionPipeline | nn.Module",
    schedule: Schedule | None,
    asked: Mapping[str, object] = MappingProxyType({}),
    *,
    quiet: bool = False,
) -> tuple[Method, Schedule | None, Preset | None]:
    """Return the method of a preset, its schedule, and the preset itself if it was tuned.

    Args:
        preset: a file, one of `PRESETS`, or what `read_preset` returned.
        schedule: as given beside it, which wins over the preset's own.
        asked: what is known of the call, by the pipeline's names, with "num_inference_steps". Of a
            name, a preset that was tuned for another call is passed over.
        quiet: without the warning, for a name that nobody gave.

    Raises:
        ValueError: a preset of another model, or a file that is none.
        FileNotFoundError: there is no such file.

    Warns:
        NotMeasured: a name for a model that no preset was tuned for.
    """
    transformer = first_transformer(pipe_or_transformer)
    if isinstance(preset, str) and preset in PRESETS:
        found = in_the_box(preset, transformer, asked)
        if found is None:
            return by_rule(preset, schedule, quiet=quiet)
    elif isinstance(preset, Preset):
        found = preset
    else:
        try:
            found = read_preset(preset)
        except FileNotFoundError as error:
            names = ", ".join(PRESETS)
            raise FileNotFoundError(f"{error}; the names of presets are {names}") from None
    check_model(found, transformer, "the preset" if isinstance(preset, Preset) else preset)
    return found.method, schedule, found


def in_the_box(
    name: str, transformer: "ModelMixin", asked: Mapping[str, object] = MappingProxyType({})
) -> Preset | None:
    """Read the preset of that name that was tuned for a model, its LoRAs and a call; None without
    one."""
    own, loras = sizes(transformer)["sha256"], loras_of(transformer)
    known = {key: value for key, value in asked.items() if value is not None}
    for one in map(read_preset, sorted(BUNDLED_PRESETS.glob(f"*-{name}.json"))):
        call = {**one.made_for.call, "num_inference_steps": one.method.steps}
        is_own = one.made_for.transformer.get("sha256") == own
        if is_own and one.made_for.loras == loras and known.items() <= call.items():
            return one
    return None


def by_rule(
    name: str, schedule: Schedule | None = None, *, quiet: bool = False
) -> tuple[Piecewise, Schedule, None]:
    """Return a rule for any model: the densities and dense shares that published methods were
    measured at; `quiet` as `choose_preset` has it."""
    rule = RULES[name]
    own = Schedule(dense_start=rule.start, dense_layers=rule.layers)
    chosen = Piecewise(rule.critical), own if schedule is None else schedule, None
    if quiet:
        return chosen
    said = f"Piecewise({rule.critical:g})"
    if schedule is None:
        said += f", dense in {rule.start:.0%} of the steps, from the second on"
        said += ", and in the first layer" * rule.layers  # one at most
    warnings.warn(
        f"preset {name!r} is a rule for this model, not measured: {said}. For settings that keep "
        "a quality, gen-accel tune --model MODEL --prompts FILE --quality 28 --out PRESET.json",
        NotMeasured,
        stacklevel=4,
    )
    return chosen
