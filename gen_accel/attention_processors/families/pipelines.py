"""Choice of the pipeline class that makes a video from what is given: text, frames or a video.

The families hold a row for each class whose transformer or UNet is served and makes videos.
Classes of one set of weights can be loaded from each other's folders.
"""

from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

from gen_accel.attention_processors.families import families
from gen_accel.attention_processors.families.base import Entries, Given, PipelineInputs
from gen_accel.hub import index_file
from gen_accel.io import read_fields, read_index
from gen_accel.registry import FIRST, KINDS, LAST, TEXT, VIDEO

PARTS = ("transformer", "transformer_2", "unet")
OPTIONS = {FIRST: "--image FIRST.png", LAST: "--last-image LAST.png", VIDEO: "--video IN.mp4"}


@cache
def pipelines() -> Mapping[str, PipelineInputs | str]:
    """Pipeline classes to what they take, or why `generate` does not use them."""
    return {name: row for family in families() for name, row in family.pipelines.items()}


def takes(name: object) -> PipelineInputs | None:
    """Look up what pipelines of a class take; None for one that is not used or not known."""
    row = pipelines().get(str(name))
    return row if isinstance(row, PipelineInputs) else None


def table() -> str:
    """Write in Markdown what each group of classes with the same weights makes a video from, if it
    is more than text, and the classes that are not used."""
    lines = [
        "| pipelines of diffusers | text | first frame | last frame | video | a published model |",
        "|---|---|---|---|---|---|",
    ]
    for weights in dict.fromkeys(one.weights for one in _used().values()):
        group = {name: one for name, one in _used().items() if one.weights == weights}
        held = {kind for one in group.values() for kind in one.kinds}
        if held == {TEXT}:
            continue
        roles = [one.role for one in group.values()]
        roles += ["remade" for one in group.values() if one.strength]
        cells = [
            ", ".join(f"`{name}`" for name in group),
            *("yes" if kind in held else "" for kind in (TEXT, FIRST, LAST)),
            ", ".join(dict.fromkeys(role for role in roles if role)),
            ", ".join(dict.fromkeys(one.model for one in group.values() if one.model)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    unused = [f"- `{name}`: {why}." for name, why in pipelines().items() if isinstance(why, str)]
    return "\n".join([*lines, "", "These are for Python alone:", "", *unused])


def pipeline_of(model: str) -> str | None:
    """Name the class of pipeline of a published model; None for one that is not in the list."""
    return next((name for name, one in _used().items() if one.model == model), None)


@cache
def _used() -> dict[str, PipelineInputs]:
    return {name: row for name, row in pipelines().items() if isinstance(row, PipelineInputs)}


def choose(
    index: Given,
    config: Given,
    asked: Collection[str],
    model: object,
    *,
    strength: bool = False,
) -> str:
    """Return the name of the pipeline class that makes a video from what is given.

    Args:
        index: see `io.read_index`.
        config: of its first transformer; empty if it is not known.
        asked: of `registry.KINDS`, without "text".
        model: for messages.
        strength: whether the share that is remade is given too.

    Raises:
        ValueError: the weights cannot, with the models that can; or they need more.
    """
    own = str(index.get("_class_name"))
    row = takes(own)
    if row is None:
        reason = pipelines().get(own)
        if isinstance(reason, str):
            raise ValueError(f"{own} of {model} is not for this: {reason}; call it in Python")
        if asked:
            raise ValueError(f"{own} of {model} is not known to take {_words(asked)}")
        return own
    siblings = _siblings(own, row)
    able = [name for name, one in siblings.items() if _does(one, config, index, asked)]
    for name in able:
        if not strength or siblings[name].strength:
            return name
    if able:
        raise ValueError(f"{able[0]}, for {model}, takes no strength: leave --strength out")
    raise ValueError(_refusal(own, row, config, index, asked, model))


def choose_in(folder: Path, asked: Collection[str], *, strength: bool = False) -> str:
    """Return what `choose` does for the pipeline in a folder."""
    index = read_index(index_file(folder))
    config = folder / part_of(index) / "config.json"
    found = read_fields(config) if config.is_file() else {}
    return choose(index, found, asked, folder, strength=strength)


def part_of(index: Entries) -> str:
    """Name of the first transformer of a pipeline."""
    return next((part for part in PARTS if index.get(part)), PARTS[0])


def _siblings(own: str, row: PipelineInputs) -> dict[str, PipelineInputs]:
    """Classes of the same weights with what they take, its own first."""
    return {own: row} | {n: one for n, one in _used().items() if one.weights == row.weights}


def _does(one: PipelineInputs, config: Given, index: Given, asked: Collection[str]) -> bool:
    """Whether pipelines of a class with these weights take what is asked."""
    return not one.lacks(asked) and not one.fits(config, index, asked)


def _refusal(
    own: str,
    row: PipelineInputs,
    config: Given,
    index: Given,
    asked: Collection[str],
    model: object,
) -> str:
    """Say what the model takes, and what to give or which model to use instead."""
    can = [
        held
        for held in ((), (FIRST,), (LAST,), (FIRST, LAST), (VIDEO,))
        if any(_does(one, config, index, held) for one in _siblings(own, row).values())
    ]
    made = f"{own} of {model} makes a video from {' or '.join(map(_words, can))}"
    more = [set(held) - set(asked) for held in can if set(held) > set(asked)]
    if more:
        least = min(more, key=len)
        return f"{made}: give {' and '.join(OPTIONS[kind] for kind in KINDS if kind in least)}"
    line = row.weights.split()[0]
    others = [
        other.both if other.both and LAST in asked else other.model
        for other in _used().values()
        if other.weights.split()[0] == line and not other.lacks(asked)
    ]
    found = dict.fromkeys(name for name in others if name and name != str(model))
    use = f", or use {' or '.join(found)}" if found else ""
    held = max((held for held in can if set(held) < set(asked)), key=len, default=())
    extra = " and ".join(OPTIONS[kind].split()[0] for kind in asked if kind not in held)
    return f"{made}: leave {extra} out{use}"


def _words(asked: Collection[str]) -> str:
    """Name kinds in words: "a first frame and a last frame"."""
    return " and ".join(f"a {kind}" for kind in KINDS if kind in asked) or "text alone"
