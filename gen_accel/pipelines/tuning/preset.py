"""Presets: rules that were tuned for a model, in a JSON file, with their profile beside it."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast
from weakref import ref

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.attached.recipe import recipes_of, sizes
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.methods.mixed import Mixed, Rule
from gen_accel.attention_processors.methods.piecewise import Piecewise
from gen_accel.attention_processors.methods.profiled import Profiled
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
from gen_accel.parsing import shown
from gen_accel.paths import expanded
from gen_accel.pipelines.tuning.candidates import described, made_of, with_files
from gen_accel.registry import PRESETS
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


KIND, VERSION = "preset", 1
CANDIDATES = "candidates"  # key of a profile's metadata


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
    scheduler: dict[str, Any]
    sigmas: tuple[float, ...]
    dtype: str
    loras: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        pipe: "DiffusionPipeline",
        grid: tuple[int, int, int],
        call: Mapping[str, Any],
        sigmas: Sequence[float],
    ) -> "MadeFor":
        transformer = transformer_of(pipe)
        plain = (bool, int, float, str, type(None))
        scheduler = pipe.scheduler
        config = {
            key: value
            for key, value in dict(scheduler.config).items()
            if isinstance(value, plain) and not key.startswith("_")
        }
        return cls(
            sizes(transformer),
            grid,
            {name: value for name, value in call.items() if isinstance(value, plain)},
            {"class": type(scheduler).__name__, "config": config},
            tuple(sigmas),
            str(transformer.dtype).removeprefix("torch."),
            loras_of(transformer),
        )


def transformer_of(pipe_or_transformer: "DiffusionPipeline | nn.Module") -> "ModelMixin":
    """Return the first transformer of a pipeline."""
    return cast("ModelMixin", next(iter(served_transformers(pipe_or_transformer).values())))


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
    measured: dict[str, Any] = field(default_factory=dict)
    curve: tuple[dict[str, float], ...] = ()
    verified: bool = False
    profile: dict[str, str] | None = None
    made_by: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the preset as its file holds it."""
        rules = [
            described(rule.method)
            | {"layers": rule.layers, "heads": rule.heads, "steps": rule.steps}
            for rule in self.method.rules
        ]
        head = {"gen_accel": KIND, "version": VERSION, "steps": self.method.steps}
        rest = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("method", "made_for")
        }
        return head | {"rules": rules, "made_for": asdict(self.made_for)} | rest


def write_preset(
    path: str | Path,
    preset: Preset,
    profile: Profile | None = None,
    candidates: Sequence[Method] = (),
) -> Preset:
    """Write a preset, its profile first, so that no preset names a profile that is not there.

    Returns:
        The preset as it was written, with the hash of the profile.
    """
    path = expanded(path)
    check_preset_path(path)
    preset, candidates = _with_masses(path, preset, candidates)
    if profile is not None:
        beside = path.with_suffix(".safetensors")
        write_profile(beside, profile, candidates)
        known = {"file": beside.name, "sha256": file_sha256(beside)}
        preset = Preset(**{**_fields(preset), "profile": known})
    write_json(path, preset.to_dict())
    return preset


def _with_masses(
    path: Path, preset: Preset, candidates: Sequence[Method]
) -> tuple[Preset, tuple[Method, ...]]:
    """Write what the methods of rules and candidates were measured by beside a preset, each once,
    and name these files."""
    written: dict[str, str] = {}

    def place(method: Profiled) -> str:
        if method.sha256 not in written:
            beside = path.with_name(f"{path.stem}.{method.sha256[:8]}.safetensors")
            written[method.sha256] = str(method.save(beside).file)
        return written[method.sha256]

    candidates = tuple(with_files(one, place) for one in candidates)
    rules = tuple(replace(r, method=with_files(r.method, place)) for r in preset.method.rules)
    return replace(preset, method=Mixed(rules, preset.method.steps)), candidates


def _fields(preset: Preset) -> dict[str, Any]:
    return {name: getattr(preset, name) for name in preset.__dataclass_fields__}


def check_preset_path(path: Path) -> None:
    """Raise ValueError for a preset's file that is not called *.json."""
    if path.suffix != ".json":
        raise ValueError(f"a preset is a file called *.json, got {path}")


def write_profile(path: Path, profile: Profile, candidates: Sequence[Method]) -> None:
    listed = [described(one) for one in candidates]
    metadata = {KIND: str(VERSION), "made_by": __version__, CANDIDATES: json.dumps(listed)}
    with replacing(path) as partial:
        save_tensors(profile.tensors(), partial, metadata)


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
    try:
        return _parsed(data, path)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _parsed(data: dict[str, Any], path: Path) -> Preset:
    rules = tuple(_rule(one, path) for one in typed(data, "rules", list, origin=path))
    made_for = typed(data, "made_for", dict, origin=path)
    known = {
        "transformer": dict,
        "grid": list,
        "call": dict,
        "scheduler": dict,
        "sigmas": list,
        "dtype": str,
        "loras": list,
    }
    held = {name: typed(made_for, name, kind, origin=path) for name, kind in known.items()}
    for name in ("grid", "sigmas", "loras"):
        held[name] = tuple(held[name])
    grid = held["grid"]
    if len(grid) != 3 or not all(isinstance(size, int) and size > 0 for size in grid):
        raise ValueError(f"grid of {path} must be three sizes, got {shown(grid)}")
    steps = typed(data, "steps", int, origin=path)
    if len(held["sigmas"]) != steps + 1:
        raise ValueError(
            f"{path} must hold a noise level for each of its {steps} steps and the end, got "
            f"{len(held['sigmas'])}"
        )
    profile = typed(data, "profile", dict, type(None), origin=path)
    if profile is not None:
        for name in ("file", "sha256"):
            typed(profile, name, str, origin=path)
        if Path(profile["file"]).name != profile["file"]:
            raise ValueError(
                f"the profile of {path} must lie beside it, got {shown(profile['file'])}"
            )
    _check_held(data, path)
    return Preset(
        Mixed(rules, steps),
        MadeFor(**held),
        typed(data, "bound", dict, origin=path),
        float(typed(data, "cost", float, origin=path)),
        float(typed(data, "density", float, origin=path)),
        float(typed(data, "predicted", float, origin=path)),
        typed(data, "measured", dict, origin=path),
        tuple(fields_of(one, path) for one in typed(data, "curve", list, origin=path)),
        typed(data, "verified", bool, origin=path),
        profile,
        typed(data, "made_by", dict, origin=path),
    )


def _check_held(data: Mapping[str, Any], path: Path) -> None:
    """Refuse, by a ValueError, values that are read later and are of a wrong type."""
    typed(data["made_for"]["transformer"], "class", str, origin=f"transformer of {path}")
    scheduler = data["made_for"]["scheduler"]
    typed(scheduler, "class", str, origin=f"scheduler of {path}")
    typed(scheduler, "config", dict, origin=f"scheduler of {path}")
    bound = typed(data, "bound", dict, origin=path)
    for name in ("mean", "worst"):
        typed(bound, name, float, origin=f"bound of {path}", default=None)
    typed(bound, "objective", str, origin=f"bound of {path}", default="psnr")
    measured = typed(data, "measured", dict, origin=path)
    run = ("predicted", "cost", "density", "mean", "worst")
    for part, names in {"tuning": ("score",), "held_out": ("score",), "runs": run}.items():
        for one in typed(measured, part, list, origin=f"measured of {path}", default=[]):
            held = fields_of(one, f"{part} of {path}")
            for name in names:
                typed(held, name, float, origin=f"{part} of {path}")


def _rule(data: Any, path: Path) -> Rule:
    what = f"a rule of {path}"
    held = fields_of(data, what)
    numbers = {
        name: typed(held, name, list, type(None), origin=what)
        for name in ("layers", "heads", "steps")
    }
    return Rule(
        made_of(held, what, path.parent),
        *(None if numbers[name] is None else tuple(numbers[name]) for name in numbers),
    )


def check_model(preset: Preset, transformer: "ModelMixin", path: object) -> None:
    """Raise ValueError for a preset that was tuned on a model of another class or size."""
    have, tuned = sizes(transformer), preset.made_for.transformer
    wrong = [
        f"{name} {value!r} (this model: {have.get(name)!r})"
        for name, value in tuned.items()
        if name != "sha256" and have.get(name) != value
    ]
    if wrong:
        raise ValueError(
            f"{path} was tuned on another model: {', '.join(wrong)}; tune one for this model, "
            "gen-accel tune --model MODEL --prompts FILE --quality 28 --out PRESET.json"
        )


class PresetWatch:
    """A hook that warns, once, of a call that is unlike what a preset was tuned for.

    The hook holds the pipeline weakly, as the pipeline owns the model.
    """

    def __init__(self, pipe: "DiffusionPipeline | nn.Module", preset: Preset, grid: Any) -> None:
        self._pipe, self._made_for, self._grid, self._told = (
            ref(pipe),
            preset.made_for,
            grid,
            False,
        )

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling() or self._told:
            return
        self._told = True
        if others := self.others(module):
            warnings.warn(
                f"the preset was tuned for {'; '.join(others)}: what it was measured at may not "
                "hold",
                OtherThanTuned,
                stacklevel=2,
            )

    def others(self, module: Any) -> list[str]:
        """List what differs, with the value that was tuned for and the value now."""
        tuned, pipe = self._made_for, self._pipe()
        video: VideoShape | None = self._grid()
        guidance = getattr(pipe, "guidance_scale", None)
        now: dict[str, tuple[Any, Any]] = {
            "dtype": (tuned.dtype, str(module.dtype).removeprefix("torch.")),
            "LoRAs": (", ".join(tuned.loras) or "none", ", ".join(loras_of(module)) or "none"),
        }
        if video is not None:
            now["grid"] = tuple(tuned.grid), video.grid
        if guidance is not None and "guidance_scale" in tuned.call:
            now["guidance_scale"] = float(tuned.call["guidance_scale"]), float(guidance)
        return [
            f"{name} {was}, and runs with {has}" for name, (was, has) in now.items() if was != has
        ]

    def __deepcopy__(self, memo: dict) -> "PresetWatch":
        return self


BUNDLED_PRESETS = Path(__file__).parents[2] / "presets"


class NotMeasured(UserWarning):
    """A named preset is a rule: nothing was tuned for this model."""


class RulePreset(NamedTuple):
    """A preset by rule.

    Args:
        critical: density of `Piecewise`.
        start: share of the first steps that stay dense.
        steps: the least number of them, for models of 4 to 8 steps, each of which is long.
        layers: the first blocks that stay dense.
    """

    critical: float
    start: float
    steps: int
    layers: int


# As the published methods were measured at: a fifth to a quarter of the steps dense and the first
# block (Radial Attention, https://arxiv.org/abs/2506.19852, table 1), densities of 0.1 to 0.3
# (PISA, https://arxiv.org/abs/2602.01077; SLA, https://arxiv.org/abs/2509.24006).
RULES = {
    "quality": RulePreset(0.3, 0.25, 2, 1),
    "balanced": RulePreset(0.2, 0.2, 2, 1),
    "fast": RulePreset(0.1, 0.15, 1, 0),
}


def choose_preset(
    preset: str | Path | Preset,
    pipe_or_transformer: "DiffusionPipeline | nn.Module",
    schedule: Schedule | None,
    asked: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Any, Schedule | None, Preset | None]:
    """Return the method of a preset, its schedule, and the preset itself if it was tuned.

    Args:
        preset: a file, one of `PRESETS`, or what `read_preset` returned.
        schedule: as given beside it, which wins over the preset's own.
        asked: what is known of the call, by the pipeline's names, with "num_inference_steps". Of a
            name, a preset that was tuned for another call is passed over.

    Raises:
        ValueError: a preset of another model, or a file that is none.
        FileNotFoundError: there is no such file.

    Warns:
        NotMeasured: a name for a model that no preset was tuned for.
    """
    transformer = transformer_of(pipe_or_transformer)
    if isinstance(preset, str) and preset in PRESETS:
        found = in_the_box(preset, transformer, asked)
        if found is None:
            return by_rule(preset, schedule)
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
    name: str, transformer: "ModelMixin", asked: Mapping[str, Any] = MappingProxyType({})
) -> Preset | None:
    """Read the preset of that name that was tuned for a model, its LoRAs and a call; None without
    one."""
    loras = loras_of(transformer)
    for one in files_in_the_box(name, transformer).values():
        call = {**one.made_for.call, "num_inference_steps": one.method.steps}
        known = {key: value for key, value in asked.items() if value is not None}
        if one.made_for.loras == loras and known.items() <= call.items():
            return one
    return None


def files_in_the_box(name: str, transformer: "ModelMixin") -> dict[Path, Preset]:
    """Read all presets of that name that were tuned for a model, by whatever LoRAs."""
    own = sizes(transformer)["sha256"]
    found = {file: read_preset(file) for file in sorted(BUNDLED_PRESETS.glob(f"*-{name}.json"))}
    return {
        file: one for file, one in found.items() if one.made_for.transformer.get("sha256") == own
    }


def by_rule(name: str, schedule: Schedule | None = None) -> tuple[Piecewise, Schedule, None]:
    """Return a rule for any model: the settings that published methods were measured at."""
    rule = RULES[name]
    own = Schedule(dense_start=rule.start, dense_steps=rule.steps, dense_layers=rule.layers)
    said = _said(rule) if schedule is None else f"Piecewise({rule.critical:g})"
    warnings.warn(
        f"preset {name!r} is a rule for this model, not measured: {said}. For settings that keep "
        "a quality, gen-accel tune --model MODEL --prompts FILE --quality 28 --out PRESET.json",
        NotMeasured,
        stacklevel=4,
    )
    return Piecewise(rule.critical), own if schedule is None else schedule, None


def _said(rule: RulePreset) -> str:
    """Say a rule in words."""
    layers = "layer" if rule.layers == 1 else f"{rule.layers} layers"
    return (
        f"Piecewise({rule.critical:g}), dense in the first {rule.start:.0%} of the steps, "
        f"{rule.steps} at least{f', and in the first {layers}' if rule.layers else ''}"
    )
