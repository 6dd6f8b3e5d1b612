"""Tiny random models of diffusers' own classes, one file a family, and how they are called.

A file holds `CASES`: each is a class, or a use of one, that the family says it serves.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import diffusers
from torch import Tensor, nn

from gen_accel.attention_processors.families import FAMILIES, family_named

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """One model and its calls.

    Args:
        build: the model in evaluation mode, with the same weights each time.
        inputs: arguments of a forward pass, `inputs(frames, height, width, batch=2, lengths=None,
            time=700.0)`, the same values each time: grids are in tokens, `lengths` are those of
            the samples' texts without their padding, and `time` falls from 1000 to 0.
        poke: changes in place, in arguments of `inputs`, all that the first sample's token at
            (frame, row, column) is made of, and no other's.
        latents: the argument that holds the latents.
        grids: that the tests run. Neither's sides are multiples of a tile's.
        lengths: of the texts of two samples, where a mask hides the padding.
        padding: changes in place what the padding of these texts holds.
        call: of the model; gives a tensor with the samples first.
        row: the arguments of one sample alone, given all and its number.
        local: the first attention sees the token of `poke` alone changed. Else its queries change
            most.
        pipeline: a pipeline around a model of `build`, where its parts can be tiny.
        generate: what it makes in two steps, latents, of the same noise and prompt each time.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    poke: Callable[[dict[str, Any], int, int, int], None]
    grids: tuple[Grid, ...] = ((5, 9, 11), (3, 5, 7))
    lengths: tuple[int, int] | None = None
    padding: Callable[[dict[str, Any], tuple[int, int]], None] | None = None
    call: Callable[[nn.Module, dict[str, Any]], Tensor] = field(
        default=lambda model, inputs: model(**inputs, return_dict=False)[0]
    )
    row: Callable[[dict[str, Any], int], dict[str, Any]] = field(
        default=lambda inputs, row: {name: _row(value, row) for name, value in inputs.items()}
    )
    local: bool = True
    pipeline: Callable[[], Any] | None = None
    generate: Callable[[Any], Tensor] | None = None


@dataclass(frozen=True)
class Training:
    """A pipeline from text to video whose model trains, with all that it encodes by.

    Args:
        pipeline: makes it, with the same weights each time.
        size: frames, height and width in pixels of a short clip.
        options: of a call, beside prompt, size, steps and `latents`: without guidance.
        tokens: of a text.
        level: noise level of a timestep that the transformer is given.
        lay: clean or noisy latents (B, C, f, h, w) as the pipeline holds them.
        starts: the same as the pipeline takes them; by default as it holds them.
        ends: the same as the pipeline returns them; by default as it holds them.
        fed: the same as the transformer is given them; by default as the pipeline holds them.
        said: what the transformer gives, for a prediction (B, C, f, h, w); by default that as the
            pipeline holds latents.
        near: tolerance of the noise levels, where the scheduler rounds its timesteps.
        rules: rules on rotary frequencies that are for the model.
        compared: whether a call of the transformer is one that `predict` makes, by its arguments.
        apart: arguments that are not compared, as the prediction does not depend on them.
        rate: argument of the pipeline for frames a second, where it takes them.
        is_even: whether latent frames lie evenly in time.
        coloured: pixels in [-1, 1] as the autoencoder takes and gives them.
        heard: the sound that a call of the transformer is given, by its arguments, as
            `predict_heard` takes it, and its noise level, of a model that needs sound.
    """

    name: str
    pipeline: Callable[[], Any]
    size: tuple[int, int, int]
    options: dict[str, Any] = field(default_factory=dict)
    tokens: int = 16
    level: Callable[[Tensor], Tensor] = field(default=lambda timestep: timestep.double() / 1000)
    lay: Callable[[Tensor], Tensor] = field(default=lambda latents: latents)
    starts: Callable[[Tensor], Tensor] | None = None
    ends: Callable[[Tensor], Tensor] | None = None
    fed: Callable[[Tensor], Tensor] | None = None
    said: Callable[[Tensor], Tensor] | None = None
    near: float = 1e-4
    rules: tuple[str, ...] = ("riflex", "position_interpolation")
    compared: Callable[[dict[str, Any]], bool] = field(default=lambda given: True)
    apart: tuple[str, ...] = ()
    rate: str | None = None
    is_even: bool = True
    coloured: Callable[[Tensor], Tensor] = field(default=lambda pixels: pixels)
    heard: Callable[[dict[str, Any]], tuple[Tensor, Tensor]] | None = None


def _row(value: Any, row: int) -> Any:
    return value[row : row + 1] if isinstance(value, Tensor) and value.ndim else value


def is_here(kind: str) -> bool:
    """Whether this diffusers has the class."""
    return hasattr(diffusers, kind) or hasattr(diffusers.models, kind)


def cases() -> list[Case]:
    """Of all families, but those whose classes this diffusers does not have."""
    return [case for family in FAMILIES for case in cases_of(family)]


def cases_of(family: str) -> list[Case]:
    return of_family(family, "CASES")


def of_family(family: str, what: str) -> list[Any]:
    try:
        return getattr(import_module(f"support.tiny.{family}"), what)
    except ImportError as error:
        if "from 'diffusers" in str(error):
            return []
        raise


def trainings() -> list[tuple[str, Training]]:
    """Families that train, each with its pipelines."""
    found = []
    for family in FAMILIES:
        if family_named(family).serves("training"):
            found += [(family, one) for one in of_family(family, "TRAINING")]
    return found
