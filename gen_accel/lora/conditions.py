"""Condition of a training: text alone, or the first frame of each clip too."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from gen_accel.hub import fetched
from gen_accel.json_files import read_fields
from gen_accel.kinds import FIRST, choose, part_of, takes

TEXT, FIRST_FRAME = "text", "first_frame"
MASK = "mask"  # of a clip: its tensor in a cache, and its name among a batch's conditions
_ASKED = {TEXT: (), FIRST_FRAME: (FIRST,)}
_ARGUMENTS = ("plain", "ltx")  # `Takes.by` whose first frame is one of the clip's own frames


class Conditioned(NamedTuple):
    """What a training shows the model beside noisy latents.

    Args:
        condition: "text" or "first_frame".
        pipeline: name of the pipeline class that makes videos so.
        is_own: whether that is the model's own class.
        transformer: config of the model's first transformer.
    """

    condition: str
    pipeline: str
    is_own: bool
    transformer: Mapping[str, Any]


def condition_for(
    index: Mapping[str, Any], transformer: Mapping[str, Any], config: Any
) -> Conditioned:
    """Choose the condition of a training, by default as the model's pipeline makes videos.

    Args:
        index: contents of the pipeline's `model_index.json`, or the config of a pipeline.
        transformer: config of its first transformer.
        config: the `TrainConfig`, or anything else with its `model`, `condition` and
            `first_frame_dropout`.

    Raises:
        ValueError: a condition that the weights do not have, or a share of clips without their
            first frame for weights that need one.
    """
    own, asked = str(index.get("_class_name")), config.condition
    found = _pipelines(index, transformer, own, config.model)
    if not found:
        raise ValueError(
            f"{own} of {config.model} makes videos neither from text nor from a first frame "
            "alone: only such models are trained"
        )
    if asked is None:
        row = takes(own)
        plain = TEXT if row is None or row.text else FIRST_FRAME
        asked = plain if plain in found else next(iter(found))
    if asked not in found:
        raise ValueError(
            f"condition must be {' or '.join(found)} for {own} of {config.model}, got {asked}"
        )
    if config.first_frame_dropout and TEXT not in found:
        raise ValueError(
            f"first_frame_dropout {config.first_frame_dropout:g} is for models that also make "
            f"videos from text alone, which {own} of {config.model} does not: leave it out"
        )
    if config.first_frame_dropout and asked == TEXT:
        raise ValueError(
            f"first_frame_dropout {config.first_frame_dropout:g} is for condition first_frame, "
            f"and {own} of {config.model} trains from text: give condition first_frame"
        )
    return Conditioned(asked, found[asked], found[asked] == own, transformer)


def condition_in(source: Any, config: Any) -> Conditioned:
    """Choose the condition of the pipeline in a folder or on the hub, by its configs alone.

    Args:
        source: path or name of the pipeline.
        config: see `condition_for`.

    Raises:
        ValueError: see `condition_for`.
        OSError: no pipeline there.
    """
    path = source if hasattr(source, "exists") and source.exists() else None
    index = read_fields(path / "model_index.json" if path else fetched(source, "model_index.json"))
    name = f"{part_of(index)}/config.json"
    about: Mapping[str, Any] = {}
    with suppress(OSError):  # where the class tells enough
        about = read_fields(path / name if path else fetched(source, name))
    return condition_for(index, about, config)


def _pipelines(
    index: Mapping[str, Any], transformer: Mapping[str, Any], own: str, model: object
) -> dict[str, str]:
    """Map each condition that the weights have to the class of pipeline for it."""
    if takes(own) is None:
        return {TEXT: own}
    found = {}
    for condition, kinds in _ASKED.items():
        with suppress(ValueError):
            name = choose(index, transformer, kinds, model)
            row = takes(name)
            assert row is not None, name
            if condition == TEXT or row.by in _ARGUMENTS:
                found[condition] = name
    return found
