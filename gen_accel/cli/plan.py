"""`gen-accel show` and `estimate`: what a run will cost, before it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gen_accel import names
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
    DenseEnd,
    DenseLayers,
    DenseStart,
    DenseSteps,
    GpuName,
    MethodName,
    PresetName,
    Settings,
    check_card,
    check_instead,
    method_of,
    schedule,
    whole_numbers,
)
from gen_accel.cli.presets import preset_lines
from gen_accel.demo import model_named

STEPS = 50  # of an estimate
MOST_TOKENS = 2_000_000  # of a picture
# Fields of each point of --curve, by what they are called in JSON.
CURVE = (
    *(("num_frames", "num_frames"), ("tokens", "tokens"), ("density", "density")),
    *(("attention_share", "attention_share"), ("speedup", "speedup")),
)


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

    Of a tuned preset, a file or the one of a name for a model, it is a table: what each head runs
    at each step, on the grid that it was tuned for or another one. A name without a model, or for
    a model that nothing was tuned for, is a rule, which is drawn like its method.
    """
    early.check_preset(preset)
    check_instead(context, preset)
    early.check_names(method=method or "radial")
    early.check_output(out, ".png")
    check_json(json)
    seen_from = _token(token)
    sizes = frames, height, width
    is_file = preset is not None and preset not in names.PRESETS
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
        from gen_accel.pipelines.tuning.named import by_rule

        chosen, when, _ = by_rule(preset)
        lines += _wrapped(str(when))
    video = _in_tokens(sizes, text) if model is None else _in_pixels(model, sizes, text)
    if out is not None:
        lines.append(str(mask_picture(chosen, video, out, token=seen_from)))
    elif json != STANDARD_OUTPUT:
        lines += mask_text(chosen, video, terminal_width()).splitlines()
    show_result(lines, None if json is None else mask_facts(chosen, video), json)


@app.command(short_help="Seconds, GB and the speed-up to expect, without running.")
def estimate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            help="Folder or hub repository of a pipeline, a published model's name such as "
            "Wan2.1-T2V-14B, a family or class of `gen-accel models`, or demo: the embedded."
        ),
    ],
    frames: Annotated[int, typer.Option(help="Of the video, not latents.")],
    height: Annotated[int, typer.Option(help="Pixels.")],
    width: Annotated[int, typer.Option(help="Pixels.")],
    method: MethodName = "radial",
    settings: Settings = None,
    preset: PresetName = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps. Without: the preset's own, or 50.")
    ] = None,
    dense_start: DenseStart = 0.0,
    dense_end: DenseEnd = 0.0,
    dense_steps: DenseSteps = 0,
    dense_layers: DenseLayers = "0",
    text: Annotated[
        int | None,
        typer.Option(help="Tokens of the prompt; else as many as the pipelines make of any."),
    ] = None,
    gpu: GpuName = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    offload: Annotated[
        str, typer.Option(help="What waits in CPU memory: none, model, group or sequential.")
    ] = "none",
    efficiency: Annotated[
        float | None,
        typer.Option(help="Share of the ideal speed-up that the kernel reaches; else measured."),
    ] = None,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Measure again what the cache folder knows.")
    ] = False,
    curve: Annotated[
        bool,
        typer.Option("--curve", help="Also density and speed-up at other numbers of frames."),
    ] = False,
    bound: Annotated[
        bool,
        typer.Option(
            "--bound",
            help="With --method neighborhood: also the best strides and tiles for its window.",
        ),
    ] = False,
    json: JsonFile = None,
) -> None:
    """Seconds, memory and speed-up to expect, without running or loading the model.

    \b
    gen-accel estimate --model Wan2.1-T2V-14B --height 720 --width 1280 --frames 161 \\
        --gpu h100
    gen-accel estimate --model hunyuan_video --height 720 --width 1280 --frames 129 \\
        --gpu 4090 --offload model
    gen-accel estimate --model models/wan --height 480 --width 832 --frames 81 \\
        --set decay_factor=0.2 --dense-start 0.25 --dense-layers 1
    gen-accel estimate --model Wan2.1-T2V-1.3B --height 480 --width 832 --frames 81 \\
        --efficiency 0.7 --json cost.json
    gen-accel estimate --model models/wan --height 480 --width 832 --frames 81 \\
        --preset preset.json
    gen-accel estimate --model wan --height 480 --width 832 --frames 81 --gpu 4090 --curve
        also how it changes with the number of frames
    gen-accel estimate --model HunyuanVideo --height 768 --width 1280 --frames 117 --gpu h100 \\
        --method neighborhood --set window=18,24,24 --bound
        also the speed-up that whole tiles of a kernel allow, by stride
    gen-accel generate --model models/wan --prompt "a cat surfs" --plan --gpu h100
        the same figures, for exactly the run that the other options describe

    With --gpu, seconds are ranges from the card's data sheet. Without, they are of this machine,
    whose rates and kernel efficiency are measured the first time, which takes seconds.
    """
    early.check_subject(model)
    early.check_names(method=method)
    early.check_preset(preset, steps)
    names.check_loading(dtype, offload)
    check_card(gpu)
    check_json(json)
    check_instead(context, preset)
    if bound and (method != "neighborhood" or preset is not None):
        raise ValueError(f"--bound is for the method neighborhood, got {preset or method}")
    early.announce()
    from gen_accel.measure.cost.forecast import forecast as run
    from gen_accel.measure.cost.words import curve_lines, forecast_lines

    source = model_named(model)
    dense = schedule(dense_start, dense_end, dense_steps, dense_layers)
    if preset is None:
        chosen = method_of(method, settings)
    else:
        from gen_accel.measure.cost.model import subject_of
        from gen_accel.pipelines.tuning.named import choose_preset

        own = None if dense == schedule() else dense
        asked: dict[str, Any] = {"num_frames": frames, "height": height, "width": width}
        asked["num_inference_steps"] = steps
        chosen, dense, tuned = choose_preset(preset, subject_of(source, text).model, own, asked)
        steps = tuned.method.steps if steps is None and tuned is not None else steps
    result = run(
        source,
        chosen,
        gpu=gpu,
        dtype=dtype,
        offload=offload,
        text=text,
        efficiency=efficiency,
        remeasure=remeasure,
        height=height,
        width=width,
        num_frames=frames,
        schedule=dense,
        steps=STEPS if steps is None else steps,
    )
    lines, data = forecast_lines(result, terminal_width()), result.to_dict()
    if curve:
        from gen_accel.measure.cost.estimate import over_lengths

        points = over_lengths(source, result.estimate)
        lines += ["", *curve_lines(points)]
        data["curve"] = [{name: getattr(one, field) for name, field in CURVE} for one in points]
    if bound:
        from gen_accel.measure.cost.bounds import best_tiles, bound_lines
        from gen_accel.video import VideoShape

        grid = result.estimate.video.grid
        bounds = best_tiles(VideoShape(*grid), chosen)
        lines += ["", *bound_lines(bounds, terminal_width())]
        data["bounds"] = [one.to_dict() for one in bounds]
    show_result(lines, data, json)


def _tuned(preset: str, model: str | None) -> dict[Path, Any]:
    """Read a preset's file, or all of a name that were tuned for a model, by their files."""
    from gen_accel.pipelines.tuning import read_preset
    from gen_accel.pipelines.tuning.named import files_in_the_box

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
