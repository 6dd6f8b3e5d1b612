"""Techniques for longer video, as `gen-accel show --extend` prints them."""

from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import Any

from gen_accel import registry
from gen_accel.cli import early
from gen_accel.cli.json_out import check_json, show_result, terminal_width
from gen_accel.demo import model_named
from gen_accel.hub import check_pipeline

INDENT = "    "


def show_techniques(
    model: str | None,
    frames: int | None,
    extend: str,
    trained_frames: int | None,
    json: Path | None,
) -> None:
    """Print what each technique does, which of them a model takes at a length, and which go
    together; what cannot be chosen with the reason.

    Args:
        extend: techniques that are chosen already, with commas between, or "all" for none yet.
    """
    chosen = () if extend == "all" else tuple(extend.split(","))
    check_json(json)
    for name, value in {"frames": frames, "trained_frames": trained_frames}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if model is None:
        if frames is not None or trained_frames is not None:
            raise ValueError("--frames and --trained-frames are of a model: add --model")
        early.announce("torch")
        from gen_accel.pipelines.long_video import excluded

        _show({"chosen": [*chosen]}, excluded(chosen), {}, json)
        return
    check_pipeline(model)
    early.announce()
    from gen_accel.pipelines.generation.sampling import first_transformer
    from gen_accel.pipelines.generation.skeleton import skeleton
    from gen_accel.pipelines.long_video import effects, known_trained_frames, refusals

    pipe = skeleton(model_named(model))
    if trained_frames is None:
        trained_frames = known_trained_frames(first_transformer(pipe))
    lengths: dict[str, Any] = {
        "num_frames": trained_frames if frames is None else frames,
        "trained_frames": trained_frames,
    }
    refused = refusals(pipe, chosen, **lengths)
    does = effects(pipe, chosen, **lengths) if chosen else {}
    about = {"model": model, "frames": lengths["num_frames"], "trained_frames": trained_frames}
    _show({**about, "chosen": [*chosen]}, refused, does, json)


def _show(about: dict[str, Any], refused: dict[str, str], does: dict[str, str], json: Any) -> None:
    from gen_accel.pipelines.long_video import summary_of

    taken = {registry.split_technique(one)[0] for one in about["chosen"]}
    found = [
        {
            "name": name,
            "does": summary_of(name),
            "chosen": name in taken,
            "refused": refused.get(name),
            "effect": does.get(name),
        }
        for name in registry.TECHNIQUES
    ]
    show_result(_lines(about, found), {**about, "techniques": found}, json)


def _lines(about: dict[str, Any], found: list[dict[str, Any]]) -> Iterator[str]:
    width = terminal_width()
    if "model" in about:
        yield (
            f"{about['model']}, {about['frames']} frames, trained at {about['trained_frames']}:"
        )
        yield ""
    for one in found:
        yield from wrap(f"{one['name']}: {one['does']}", width, subsequent_indent=INDENT)
        if one["chosen"]:
            yield from _told("chosen" + (f": {one['effect']}" if one["effect"] else ""), width)
        elif one["refused"]:
            yield from _told(f"no: {one['refused']}", width)


def _told(text: str, width: int) -> list[str]:
    return wrap(text, width, initial_indent=INDENT, subsequent_indent=INDENT)
