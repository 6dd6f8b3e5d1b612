"""Techniques for video longer than a model was trained on, one a file.

A technique is a frozen dataclass of its options, see `technique.Technique`. `extend` puts one or
several on a live pipeline and takes them off again. `apply_rule` is for training at a longer
length.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from inspect import cleandoc
from typing import TYPE_CHECKING, Any

from torch import nn

from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.attached.recipe import CONFIG, Recipe
from gen_accel.attention_processors.families import family_for, family_of
from gen_accel.attention_processors.families.sites import Model
from gen_accel.attention_processors.methods.registry import values_of
from gen_accel.attention_processors.seam import is_compiled
from gen_accel.io import read_json
from gen_accel.parsing import shown
from gen_accel.paths import expanded
from gen_accel.pipelines.long_video.continuation import Continuation
from gen_accel.pipelines.long_video.position_interpolation import PositionInterpolation
from gen_accel.pipelines.long_video.riflex import Riflex, check_heads
from gen_accel.pipelines.long_video.technique import Target, Technique
from gen_accel.pipelines.long_video.temporal_rule import TemporalRule
from gen_accel.registry import TECHNIQUES, check_techniques, split_technique
from gen_accel.video import latent_frames, temporal_patch, vae_factor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

__all__ = [
    "RULES",
    "TECHNIQUES",
    "Continuation",
    "Extension",
    "NeverCalled",
    "PositionInterpolation",
    "Riflex",
    "Target",
    "Technique",
    "apply_rule",
    "check_names",
    "check_rule",
    "excluded",
    "extend",
    "known_trained_frames",
    "refusals",
    "summary_of",
]

RULES = ("none", "riflex", "position_interpolation")  # on temporal rotary frequencies
_CLASSES = {
    "riflex": "Riflex",
    "position_interpolation": "PositionInterpolation",
    "ultravico": "UltraViCo",
    "rotating_anchors": "RotatingAnchors",
    "window_noise": "WindowNoise",
    "continuation": "Continuation",
    "fresh_noise": "FreshNoise",
}


def extend(
    pipe_or_transformer: "DiffusionPipeline | nn.Module",
    technique: str | Technique | Sequence[str | Technique],
    *,
    num_frames: int,
    trained_frames: int | None = None,
    **options: object,
) -> "Extension":
    """Make a pipeline generate longer video than its model was trained on.

        with gen_accel.extend(pipe, "riflex", num_frames=161) as longer:
            video = longer(prompt="a cat surfs").frames

    Works before and after `gen_accel.attach`, with any method. The techniques act on calls whose
    grid is longer than the model was trained at, and on no others.

    Args:
        technique: a name of `TECHNIQUES`, with options as in "riflex:k=4", an instance such as
            `Riflex(k=4)`, or several of them.
        num_frames: length of the video asked for, in pixel frames.
        trained_frames: length that the model was trained at, in pixel frames. By default the
            length in `gen_accel.json` in the model's own folder, or the family's, see
            `known_trained_frames`. Give it for a model that was tuned at another length.
        options: options of a single technique that is given by its name.

    Raises:
        ValueError: an unknown technique or option, techniques that do not go together, lengths
            that the model does not take, a class that no family serves, or a model that is
            extended already.
        TypeError: neither a pipeline nor a module.
    """
    techniques = _techniques(technique, options)
    target = _target(pipe_or_transformer, num_frames, trained_frames)
    goes_on = any(isinstance(technique, Continuation) for technique in techniques)
    for name, transformer in target.transformers.items():
        longest = target.families[name].longest(transformer)
        if longest is not None and target.frames > longest and not goes_on:
            most = target.pixel_frames(longest)
            asked = target.pixel_frames(target.frames)
            raise ValueError(
                f"num_frames must be at most {most}, as far as the position table of {name} goes, "
                f"got {asked}; continuation goes further"
            )
    return Extension(techniques, target)


def apply_rule(transformer: nn.Module, rule: str, *, frames: int, trained: int) -> TemporalRule:
    """Change the temporal rotary frequencies as `extend` does, for training at that length.

    Args:
        rule: one of `RULES`; "none" changes nothing.
        frames: length to make the frequencies for, in latent frames after patchify. Longer grids
            get frequencies for their own length.
        trained: length that the base model was trained at, in the same unit. Grids up to this
            length keep the model's own frequencies.

    Raises:
        ValueError: what `check_rule` refuses, lengths below 1, or a model that has a rule already.
    """
    check_rule(transformer, rule)
    made = {"riflex": Riflex(), "position_interpolation": PositionInterpolation()}.get(rule)
    frequencies = None if made is None else made.frequencies
    return TemporalRule({"transformer": transformer}, frequencies, frames=frames, trained=trained)


def apply_recipe(
    recipe: Recipe, transformer: "ModelMixin", pipe_or_transformer: "DiffusionPipeline | nn.Module"
) -> TemporalRule:
    """Change the temporal rotary frequencies as they were when a LoRA trained; raises as
    `apply_rule` does."""
    if recipe.rope == "none" or recipe.trained_frames is None:
        return apply_rule(transformer, "none", frames=1, trained=1)
    patch, factor = temporal_patch(transformer), vae_factor(pipe_or_transformer, "temporal") or 4
    frames = latent_frames("frames", recipe.frames, factor, patch)
    trained = latent_frames("trained_frames", recipe.trained_frames, factor, patch)
    return apply_rule(transformer, recipe.rope, frames=frames, trained=trained)


def check_rule(transformer: nn.Module, rule: str) -> None:
    """Refuse a rule that a model cannot have.

    Raises ValueError for an unknown rule, a class that no family serves, or a model that has not
    the rotary frequencies that the rule changes.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {shown(rule)}")
    if rule == "none":
        return
    family = family_for(transformer, "rules on rotary frequencies")
    family.temporal_frequencies(transformer)
    if rule == "riflex":
        check_heads(family)


def check_names(techniques: Sequence[str], what: str = "technique") -> None:
    """Refuse, by a ValueError, names outside of `TECHNIQUES`, or names that exclude each other."""
    check_techniques(techniques, what)
    if techniques:
        _techniques(techniques, {})


def refusals(
    pipe_or_transformer: "DiffusionPipeline | nn.Module",
    chosen: Sequence[str | Technique] = (),
    *,
    num_frames: int,
    trained_frames: int | None = None,
) -> dict[str, str]:
    """Say of each technique that is not chosen why it cannot be: it does not go with the ones that
    are, or the model does not carry it. Techniques that can be are left out.

    Nothing stays on the model, which may be one of `skeleton`.

    Args:
        chosen: as for `extend`, or none.
        num_frames, trained_frames: as for `extend`.

    Raises:
        ValueError: chosen techniques that do not go together, or lengths that the model does not
            take.
    """
    found = excluded(chosen)
    _target(pipe_or_transformer, num_frames, trained_frames)
    for name in TECHNIQUES:
        if name in found or name in _names(chosen):
            continue
        try:
            extend(
                pipe_or_transformer, name, num_frames=num_frames, trained_frames=trained_frames
            ).remove()
        except ValueError as error:
            found[name] = str(error)
    return found


def excluded(chosen: Sequence[str | Technique] = ()) -> dict[str, str]:
    """Say of each technique that does not go with the chosen ones why. Raises ValueError for
    chosen techniques that do not go together."""
    made = _techniques(chosen, {}) if chosen else ()
    found = {}
    for name in TECHNIQUES:
        if name in _names(made):
            continue
        try:
            _techniques((*made, name), {})
        except ValueError as error:
            found[name] = str(error)
    return found


def summary_of(name: str) -> str:
    """The first line of what a technique's class says of it."""
    return cleandoc(_class_of(name).__doc__ or "").split("\n")[0]


def known_trained_frames(transformer: Model) -> int:
    """Return the length that a model was trained at, in pixel frames.

    It is read from `gen_accel.json`, with `{"trained_frames": 33}`, in the folder that the
    pipeline was loaded from. Without this file it is the length that the family was published at.

    Raises ValueError if the length is unknown, the file is malformed, or no family serves the
    class.
    """
    loaded, known = transformer.config.get("_name_or_path"), None
    file = expanded(loaded or ".").resolve().parent / CONFIG  # beside the transformer's folder
    if loaded and file.is_file():
        said = read_json(file)
        known = said.get("trained_frames") if isinstance(said, dict) else said
        if known is not None and (type(known) is not int or known < 1):
            raise ValueError(
                f"{file} must hold trained_frames as a whole number from 1 on, got {shown(known)}"
            )
    if known is None:
        known = family_of(transformer).sizes_of(transformer.config).frames
    if known is None:
        raise ValueError(f"trained_frames must be given for {type(transformer).__name__}")
    return known


class NeverCalled(UserWarning):
    """A technique was taken off a pipeline before anything was generated."""


class Extension:
    """Handle that `extend` returns. Call it in place of the pipeline.

    Take it off by `remove()`, or by leaving its `with`, which warns with `NeverCalled` if nothing
    ran.
    """

    def __init__(self, techniques: tuple[Technique, ...], target: Target) -> None:
        self.techniques, self.target = techniques, target
        self._called = False
        self._undo: list[Callable[[], None]] = []
        try:
            for technique in techniques:
                self._undo.append(technique.apply(target))
        except BaseException:
            self.remove()
            raise

    def __call__(self, **arguments: object) -> Any:
        """Run the pipeline with its own keyword arguments.

        `num_frames` defaults to the length given to `extend`.

        Raises RuntimeError after `remove`, and TypeError for a transformer without a pipeline.
        """
        if not self._undo:
            raise RuntimeError("the extension was removed; call gen_accel.extend again")
        self._called = True
        if self.target.pipe is None:
            raise TypeError(
                "a transformer alone generates nothing: extend the pipeline to call it"
            )
        arguments.setdefault("num_frames", self.target.pixel_frames(self.target.frames))
        for technique in self.techniques:
            if hasattr(technique, "generate"):
                return technique.generate(self.target, arguments)  # pyright: ignore[reportAttributeAccessIssue]
        return self.target.pipe(**arguments)

    @property
    def runs(self) -> int:
        """Number of times that the pipeline runs, one after the other, for the video asked for."""
        return max(getattr(one, "runs", lambda target: 1)(self.target) for one in self.techniques)

    @property
    def effects(self) -> dict[str, str]:
        """Effect of each technique on the video asked for, in a line, by name."""
        return {one.name: one.describe(self.target) for one in self.techniques}

    def describe(self) -> str:
        """Describe the effect of each technique on the video asked for, a line each."""
        return "\n".join(f"{name}: {said}" for name, said in self.effects.items())

    def remove(self) -> None:
        """Take all techniques off. Does nothing the second time."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "Extension":
        if not any(hasattr(technique, "generate") for technique in self.techniques):
            # These act on any call of the model, also outside of this handle.
            for module in self.target.transformers.values():
                if is_compiled(module):  # a hook would recompile its graphs
                    self._called = True
                else:
                    self._undo.append(module.register_forward_pre_hook(self._mark).remove)
        return self

    def _mark(self, module: nn.Module, args: tuple) -> None:
        self._called = True

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.remove()
        if kind is None and not self._called:
            names = ", ".join(technique.name for technique in self.techniques)
            warnings.warn(
                f"{names} was put on and never called: call what `extend` returns in the place of "
                "the pipeline",
                NeverCalled,
                stacklevel=2,
            )


def _techniques(
    given: str | Technique | Sequence[str | Technique], options: dict[str, object]
) -> tuple[Technique, ...]:
    several = (given,) if not isinstance(given, Sequence) or isinstance(given, str) else given
    if not several:
        raise ValueError(f"technique must name at least one of {', '.join(TECHNIQUES)}")
    named = [one for one in several if isinstance(one, str)]
    if options and not len(several) == len(named) == 1:
        raise ValueError(
            f"options {', '.join(options)} go with one technique given by its name; give instances"
        )
    made = tuple(_technique(one, options) for one in several)
    names = [technique.name for technique in made]
    runs = [technique.name for technique in made if hasattr(technique, "generate")]
    for technique in made:
        if names.count(technique.name) > 1:
            raise ValueError(f"technique {technique.name} is given twice")
        for other, reason in technique.excludes.items():
            if other in names:
                raise ValueError(f"{technique.name} does not go with {other}: {reason}")
    if len(runs) > 1:
        raise ValueError(f"{' and '.join(runs)} do not go together: each runs the pipeline")
    return made


def _technique(given: str | Technique, options: dict[str, object]) -> Technique:
    if not isinstance(given, str):
        if isinstance(given, type) or not hasattr(given, "apply"):
            raise ValueError(f"technique must be a name or an instance, got {shown(given)}")
        return given
    name, settings = split_technique(given)
    kind = _class_of(name)
    if settings and options:
        raise ValueError(
            f"options of {name} are given twice: {shown(given)} and {', '.join(options)}"
        )
    if settings:
        return kind(**values_of(kind, name, settings))
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            takes = ", ".join(known) or "no options"
            raise ValueError(f"{name} has no option {option}; it takes {takes}")
    return kind(**options)


def _class_of(name: str) -> type[Any]:
    if name not in _CLASSES:
        raise ValueError(f"technique must be one of {', '.join(TECHNIQUES)}, got {shown(name)}")
    return getattr(import_module(f"{__name__}.{name}"), _CLASSES[name])


def _names(techniques: Sequence[str | Technique]) -> set[str]:
    return {split_technique(one)[0] if isinstance(one, str) else one.name for one in techniques}


def _target(
    pipe_or_transformer: "DiffusionPipeline | nn.Module",
    num_frames: int,
    trained_frames: int | None,
) -> Target:
    transformers = served_transformers(pipe_or_transformer)
    families = {
        name: family_for(getattr(module, "_orig_mod", module), "longer video")
        for name, module in transformers.items()
    }
    alone = isinstance(pipe_or_transformer, nn.Module)
    pipe: Any = None if alone else pipe_or_transformer
    name, transformer = next(iter(transformers.items()))
    if trained_frames is None:
        trained_frames = known_trained_frames(transformer)
    factor = (
        vae_factor(pipe, "temporal") or families[name].sizes_of(transformer.config).temporal or 1
    )
    patch = temporal_patch(transformer)
    return Target(
        pipe,
        transformers,
        families,
        latent_frames("num_frames", num_frames, factor, patch),
        latent_frames("trained_frames", trained_frames, factor, patch),
        factor,
        patch,
    )
