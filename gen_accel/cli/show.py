"""`gen-accel show`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gen_accel import registry
from gen_accel.cli import early
from gen_accel.cli.app import app
from gen_accel.cli.json_out import (
    STANDARD_OUTPUT,
    JsonFile,
    check_json,
    show_result,
    terminal_width,
)
from gen_accel.cli.options import (
    PresetName,
    Settings,
    check_instead,
    check_only,
    method_of,
    whole_numbers,
)
from gen_accel.cli.presets import preset_lines
from gen_accel.cli.techniques import show_techniques
from gen_accel.demo import model_named
from gen_accel.paths import check_output
from gen_accel.pipelines.generation.config import check_preset

MOST_TOKENS = 2_000_000  # of a picture


@app.command(short_help="A picture of what a method keeps.")
def show(
    context: typer.Context,
    method: Annotated[
        str | None, typer.Argument(help="See `gen-accel list`; or module:Class of your own.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="In tokens; with --model, frames of the video.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="In tokens; with --model, pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="In tokens; with --model, pixels.")] = None,
    text: Annotated[int, typer.Option(help="Text tokens in the same attention.")] = 0,
    settings: Settings = None,
    preset: PresetName = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="As for `estimate`: sizes are then its frames and pixels, and a preset by name "
            "is what was tuned for it, or the rule where nothing was."
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Of a preset, the only one to show.")] = None,
    token: Annotated[
        str | None,
        typer.Option(metavar="F,R,C", help="Frame, row and column of the token to look from."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .png to write instead of drawing here; of a tuned preset, beside it: its "
            "settings and its frontier."
        ),
    ] = None,
    extend: Annotated[
        str | None,
        typer.Option(
            metavar="TECHNIQUE[,TECHNIQUE]",
            help="Techniques for longer video, in place of a method: what they do, and what goes "
            "with them; all: every one.",
        ),
    ] = None,
    trained_frames: Annotated[
        int | None,
        typer.Option(help="Number of frames that the model was trained on, for --extend."),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Draw which blocks a method keeps, and what one token sees, before any model runs.

    Of block_mixture, piecewise, sparse_linear, and reuse around them, whose pattern depends on q
    and k, it is that of smooth random ones.

    Sizes are in tokens, or with --model in frames and pixels: 161 frames of 720 x 1280 of Wan are
    41 x 45 x 80 tokens.

    \b
    gen-accel show radial --model wan --frames 161 --height 720 --width 1280
    gen-accel show radial --frames 33 --height 12 --width 12
    gen-accel show radial --frames 41 --height 45 --width 80 --set rule=paper --out mask.png
    gen-accel show neighborhood --frames 9 --height 12 --width 12 --set window=3,5,5 \\
        --token 0,0,0 --out corner.png
    gen-accel show --preset preset.json                     what `gen-accel tune` chose
    gen-accel show --preset preset.json --layer 7
    gen-accel show --preset balanced --model demo
    gen-accel show --preset preset.json --out preset.png    its settings, and the frontier
    gen-accel show --extend all                             techniques for longer video
    gen-accel show --extend riflex --model demo --frames 129
        what riflex does to 129 frames, and what cannot be chosen beside it

    Of a tuned preset, a file or the one of a name for a model, it is a table: what each head runs
    at each step, on the grid that it was tuned for or another one. A name without a model, or for
    a model that nothing was tuned for, is a rule, which is drawn like its method.
    """
    if extend is not None:
        early.check_names(techniques=() if extend == "all" else extend.split(","))
        check_only(context, "extend", ("model", "frames", "trained_frames", "json"))
        show_techniques(model, frames, extend, trained_frames, json)
        return
    if trained_frames is not None:
        raise ValueError(f"--trained-frames {trained_frames} goes with --extend")
    check_preset(preset)
    check_instead(context, preset)
    early.check_names(method=method or "radial")
    check_output(out, ".png")
    check_json(json)
    seen_from = _token(token)
    sizes = frames, height, width
    is_file = preset is not None and preset not in registry.PRESETS
    if model is not None:
        early.check_subject(model)
    if layer is not None and not is_file and (preset is None or model is None):
        raise ValueError(f"--layer is of a tuned preset, got {layer} without --preset FILE")
    if method is None and preset is None:
        raise ValueError("give a METHOD of `gen-accel list`, or --preset")
    if preset is None or (model is None and not is_file):
        _check_sizes(sizes, model)
    if out is None and token is not None:
        raise ValueError("--token is drawn in a picture only: add --out mask.png")
    early.announce("torch" if model is None else "torch and diffusers")
    if preset is not None and (is_file or model is not None):
        tuned = _tuned(str(preset), None if is_file else model)
        if tuned:
            if token is not None:
                raise ValueError("a tuned preset is shown as a table: leave --token out")
            shown = (None,) * 3 if model is not None and None in sizes else sizes
            if model is not None and None not in sizes:
                shown = _in_pixels(model, sizes, text).grid
            lines = [
                line for one in tuned.values() for line in _preset_lines(one, shown, text, layer)
            ]
            if out is not None:
                from gen_accel.pipelines.tuning import load_tuned

                if len(tuned) > 1:
                    raise ValueError(
                        f"{len(tuned)} presets {preset} were tuned for {model}: leave --out out, "
                        "or give the file of one"
                    )
                [file] = tuned
                lines.append(str(load_tuned(file).plot(out)))
            show_result(lines, [one.to_dict() for one in tuned.values()], json)
            return
        if layer is not None:
            raise ValueError(f"--layer is of a tuned preset, and {preset} is a rule for {model}")
        _check_sizes(sizes, model)
    from gen_accel.measure.pictures import mask_facts, mask_picture, mask_text

    lines: list[str] = []
    if preset is None:
        chosen = method_of(method or "", settings)
    else:
        from gen_accel.pipelines.tuning.preset import by_rule

        chosen, when, _ = by_rule(preset)
        lines += _wrapped(str(when))
    video = _in_tokens(sizes, text) if model is None else _in_pixels(model, sizes, text)
    if out is not None:
        lines.append(str(mask_picture(chosen, video, out, token=seen_from)))
    elif json != STANDARD_OUTPUT:
        lines += mask_text(chosen, video, terminal_width()).splitlines()
    show_result(lines, None if json is None else mask_facts(chosen, video), json)


def _tuned(preset: str, model: str | None) -> dict[Path, Any]:
    """Read a preset's file, or all of a name that were tuned for a model, by their files."""
    from gen_accel.pipelines.tuning import read_preset
    from gen_accel.pipelines.tuning.preset import files_in_the_box

    if model is None:
        return {Path(preset): read_preset(preset)}
    from gen_accel.measure.cost.model import subject_of

    return files_in_the_box(preset, subject_of(model_named(model), None).model)


def _preset_lines(
    found: Any, sizes: tuple[int | None, ...], text: int, layer: int | None
) -> list[str]:
    """Say what a preset holds, and its rules as a table."""
    from gen_accel.measure.pictures import rules_text
    from gen_accel.video import VideoShape

    own = found.made_for.grid
    frames, rows, columns = (
        size if asked is None else asked for asked, size in zip(sizes, own, strict=True)
    )
    heads = found.made_for.transformer.get("num_attention_heads")
    table = rules_text(
        found.method,
        VideoShape(frames, rows, columns, text),
        layer=layer,
        heads=heads if isinstance(heads, int) else None,
        width=min(terminal_width(), 80),
    )
    return [*preset_lines(found), "", *table.splitlines()]


def _check_sizes(sizes: tuple[int | None, ...], model: str | None) -> None:
    """Refuse missing sizes, and tokens that nobody can draw, which are pixels by mistake."""
    frames, height, width = sizes
    if frames is None or height is None or width is None:
        unit = "in tokens" if model is None else "in frames and pixels"
        raise ValueError(f"give --frames, --height and --width, {unit}")
    tokens = frames * height * width
    if model is None and tokens > MOST_TOKENS:
        wan = (frames - 1) // 4 + 1, height // 16, width // 16
        raise ValueError(
            f"{tokens:,} tokens: sizes are tokens here; {frames} x {height} x {width} pixels of "
            f"Wan are {' x '.join(map(str, wan))}: add --model wan"
        )


def _in_tokens(sizes: tuple[int | None, ...], text: int) -> Any:
    from gen_accel.video import VideoShape

    frames, rows, columns = (size or 0 for size in sizes)
    return VideoShape(frames, rows, columns, text)


def _in_pixels(model: str, sizes: tuple[int | None, ...], text: int) -> Any:
    """Grid of the tokens that a model's attention sees of a video in frames and pixels."""
    from gen_accel.measure.cost.model import subject_of
    from gen_accel.video import VideoShape

    frames, height, width = (size or 0 for size in sizes)
    subject = subject_of(model_named(model))
    seen = subject.seen(subject.grid(height, width, frames))
    return VideoShape(*seen.grid, text=text or seen.text)


def _token(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    numbers = whole_numbers(text, "--token")
    if len(numbers) != 3:
        raise ValueError(f"--token needs a frame, a row and a column, as in 0,3,3, got {text!r}")
    return numbers[0], numbers[1], numbers[2]


def _wrapped(text: str) -> list[str]:
    from textwrap import wrap

    return wrap(text, terminal_width(), subsequent_indent="  ", break_on_hyphens=False)
