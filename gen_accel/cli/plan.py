"""`gen-accel show`, `estimate` and `simulate`: what a run will cost, before it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gen_accel import names
from gen_accel.cli import early
from gen_accel.cli.app import app
from gen_accel.cli.options import (
    DenseEnd,
    DenseLayers,
    DenseStart,
    DenseSteps,
    MethodName,
    PresetName,
    Settings,
    check_instead,
    given,
    method_of,
    schedule,
    whole_numbers,
)
from gen_accel.cli.presets import preset_lines
from gen_accel.demo import model_named

STEPS = 50  # of an estimate


@app.command(short_help="A picture of what a method keeps.")
def show(
    context: typer.Context,
    method: Annotated[
        str | None, typer.Argument(help="See `gen-accel list`; or module:Class of your own.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="In tokens: of the latent video.")] = None,
    height: Annotated[int | None, typer.Option(help="In tokens.")] = None,
    width: Annotated[int | None, typer.Option(help="In tokens.")] = None,
    text: Annotated[int, typer.Option(help="Text tokens in the same attention.")] = 0,
    settings: Settings = None,
    preset: PresetName = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Of a preset by name: what was tuned for this model, a folder, a hub repo, or "
            "demo: the embedded. The rule where nothing was."
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Of a preset, the only one to show.")] = None,
    token: Annotated[
        str | None,
        typer.Option(metavar="F,R,C", help="Frame, row and column of the token to look from."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A .png to write instead of drawing here.")
    ] = None,
) -> None:
    """Draw which blocks a method keeps, and what one token sees, before any model runs.

    Of block_mixture, piecewise, sparse_linear, and reuse around them, whose pattern depends on q
    and k, it is that of smooth random ones.

    Sizes are in tokens. From pixels, for Wan: frames (n - 1) / 4 + 1, height / 16, width / 16,
    so that 161 frames of 720 x 1280 are 41 x 45 x 80. For the demo model: height / 8, width / 8.

    \b
    gen-accel show radial --frames 33 --height 12 --width 12
    gen-accel show radial --frames 41 --height 45 --width 80 --set rule=paper --out mask.png
    gen-accel show neighborhood --frames 9 --height 12 --width 12 --set window=3,5,5 \\
        --token 0,0,0 --out corner.png
    gen-accel show --preset preset.json                     what `gen-accel tune` chose
    gen-accel show --preset preset.json --layer 7
    gen-accel show --preset balanced --model demo

    Of a tuned preset, a file or the one of a name for a model, it is a table: what each head runs
    at each step, on the grid that it was tuned for or another one. A name without a model, or for
    a model that nothing was tuned for, is a rule, which is drawn like its method.
    """
    early.check_preset(preset)
    check_instead(context, preset)
    early.check_names(method=method or "radial")
    early.check_output(out, ".png")
    seen_from = _token(token)
    is_file = preset is not None and preset not in names.PRESETS
    if model is not None:
        if preset is None or is_file:
            raise ValueError(f"--model is for a preset by name, got {model} without --preset NAME")
        early.check_subject(model)
    elif layer is not None and not is_file:
        raise ValueError(f"--layer is of a tuned preset, got {layer} without --preset FILE")
    if is_file or model is not None:
        early.announce("torch")
        tuned = _tuned(str(preset), model)
        if tuned:
            wrong = [option for name, option in given(context).items() if name in ("out", "token")]
            if wrong:
                wrong = ", ".join(wrong)
                raise ValueError(f"a tuned preset is shown as a table: leave {wrong} out")
            for one in tuned:
                _show_preset(one, (frames, height, width), text, layer)
            return
        if layer is not None:
            raise ValueError(f"--layer is of a tuned preset, and {preset} is a rule for {model}")
    if method is None and preset is None:
        raise ValueError("give a METHOD of `gen-accel list`, or --preset")
    if frames is None or height is None or width is None:
        raise ValueError("give --frames, --height and --width, in tokens")
    if out is None and token is not None:
        raise ValueError("--token is drawn in a picture only: add --out mask.png")
    early.announce("torch")
    from gen_accel.measure.pictures import mask_picture, mask_text
    from gen_accel.video import VideoShape

    if preset is None:
        chosen = method_of(method or "", settings)
    else:
        from gen_accel.pipelines.tuning.named import by_rule

        chosen, when, _ = by_rule(preset)
        typer.echo(str(when))
    video = VideoShape(frames, height, width, text)
    if out is not None:
        typer.echo(mask_picture(chosen, video, out, token=seen_from))
    else:
        typer.echo(mask_text(chosen, video, _terminal_width()))


@app.command(short_help="The speed-up to expect, without running.")
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
    efficiency: Annotated[
        float | None,
        typer.Option(help="Share of the ideal speed-up that the kernel reaches; else measured."),
    ] = None,
) -> None:
    """Tokens, FLOPs and the speed-up to expect, without running or loading the model.

    \b
    gen-accel estimate --model Wan2.1-T2V-14B --height 720 --width 1280 --frames 161
    gen-accel estimate --model hunyuan_video --height 720 --width 1280 --frames 129
    gen-accel estimate --model models/wan --height 480 --width 832 --frames 81 \\
        --set decay_factor=0.2 --dense-start 0.25 --dense-layers 1
    gen-accel estimate --model Wan2.1-T2V-1.3B --height 480 --width 832 --frames 81 \\
        --efficiency 0.7
    gen-accel estimate --model models/wan --height 480 --width 832 --frames 81 \\
        --preset preset.json

    Kernel efficiency is measured on this machine the first time, which takes seconds.
    """
    early.check_subject(model)
    early.check_names(method=method)
    early.check_preset(preset, steps)
    check_instead(context, preset)
    early.announce()
    from gen_accel.measure.estimate import estimate as run

    source = model_named(model)
    dense = schedule(dense_start, dense_end, dense_steps, dense_layers)
    if preset is None:
        chosen = method_of(method, settings)
    else:
        from gen_accel.measure.subject import subject_of
        from gen_accel.pipelines.tuning.named import choose_preset

        own = None if dense == schedule() else dense
        asked: dict[str, Any] = {"num_frames": frames, "height": height, "width": width}
        asked["num_inference_steps"] = steps
        chosen, dense, tuned = choose_preset(preset, subject_of(source, text).model, own, asked)
        steps = tuned.method.steps if steps is None and tuned is not None else steps
    result = run(
        source,
        chosen,
        height=height,
        width=width,
        num_frames=frames,
        schedule=dense,
        text=text,
        steps=STEPS if steps is None else steps,
        efficiency=efficiency,
    )
    typer.echo(str(result))


@app.command(short_help="The bound that tiles put on a speed-up.")
def simulate(
    method: Annotated[str, typer.Argument(help="neighborhood.")],
    frames: Annotated[int, typer.Option(help="In tokens: of the latent video.")],
    height: Annotated[int, typer.Option(help="In tokens.")],
    width: Annotated[int, typer.Option(help="In tokens.")],
    window: Annotated[
        str | None, typer.Option(metavar="F,R,C", help="Without: searched under --density.")
    ] = None,
    stride: Annotated[
        str | None, typer.Option(metavar="F,R,C", help="Without: the best are listed.")
    ] = None,
    dilation: Annotated[str, typer.Option(metavar="F,R,C")] = "1,1,1",
    is_causal: Annotated[str, typer.Option(metavar="F,R,C")] = "false,false,false",
    tile_q: Annotated[
        str | None,
        typer.Option(metavar="F,R,C", help="Query tile. Without: NATTEN's on Hopper, Blackwell."),
    ] = None,
    tile_k: Annotated[str | None, typer.Option(metavar="F,R,C", help="Key tile.")] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Key tiles start at the first key, not on a grid.")
    ] = False,
    density: Annotated[
        float | None, typer.Option(help="Most of the token pairs that may be kept, 0 to 1.")
    ] = None,
    top: Annotated[int, typer.Option(help="How many choices to list.")] = 10,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the figures there.")
    ] = None,
) -> None:
    """How much faster neighborhood attention can be, for a stride and tiles, without running.

    A kernel computes whole tiles of keys, so that a window often costs more than the pairs that it
    keeps. Sizes are in tokens: see `gen-accel show --help`.

    \b
    gen-accel simulate neighborhood --frames 30 --height 48 --width 80 --window 18,24,24
        the best strides and tiles for a window
    gen-accel simulate neighborhood --frames 30 --height 48 --width 80 --density 0.1
        the best windows too, that keep a tenth of all pairs or a little less
    gen-accel simulate neighborhood --frames 30 --height 48 --width 80 --window 18,24,24 \\
        --stride 16,8,8 --tile-q 4,8,8 --tile-k 2,8,8 --json bound.json
        one choice
    gen-accel simulate neighborhood --frames 1 --height 256 --width 256 --window 1,80,80 \\
        --tile-q 1,16,16 --tile-k 1,16,8
        an image; the best strides for a kernel's tiles

    Of two choices with one bound, take the smaller stride: its windows are centred better.
    """
    if method != "neighborhood":
        raise ValueError(f"simulate knows the method 'neighborhood', got {method!r}")
    early.check_output(json)
    tiles = _tiles(tile_q, tile_k)
    if stride is not None and (window is None or not tiles or density is not None):
        raise ValueError(
            "--stride is for one choice, with --window, --tile-q and --tile-k, without --density"
        )
    early.announce("torch")
    from gen_accel.attention_processors.methods.options import method_from
    from gen_accel.measure import write_json
    from gen_accel.measure.simulate import TILES, best_choices
    from gen_accel.measure.simulate import simulate as run
    from gen_accel.video import VideoShape

    given = {"window": window or "1,1,1", "stride": stride or "1,1,1"}
    given |= {"dilation": dilation, "is_causal": is_causal}
    chosen = method_from(method, [f"{name}={value}" for name, value in given.items()])
    video = VideoShape(frames, height, width)
    if stride is None:
        bounds = best_choices(
            video,
            chosen.window if window else None,
            density=density,
            dilation=chosen.dilation,
            is_causal=chosen.is_causal,
            tiles=tiles or TILES,
            dynamic=dynamic,
            top=top,
        )
        _print_bounds(bounds)
    else:
        [(query, key)] = tiles
        bounds = [run(video, chosen, tile_q=query, tile_k=key, dynamic=dynamic)]
        typer.echo(str(bounds[0]))
    if json is not None:
        write_json(json, [bound.to_dict() for bound in bounds])
        typer.echo(json)


def _tuned(preset: str, model: str | None) -> list[Any]:
    """Read a preset's file, or all of a name that were tuned for a model."""
    from gen_accel.pipelines.tuning import read_preset
    from gen_accel.pipelines.tuning.named import all_in_the_box

    if model is None:
        return [read_preset(preset)]
    from gen_accel.measure.subject import subject_of

    return all_in_the_box(preset, subject_of(model_named(model), None).model)


def _show_preset(found: Any, sizes: tuple[int | None, ...], text: int, layer: int | None) -> None:
    """Print what a preset says, and its rules as a table."""
    from gen_accel.measure.rules_table import rules_text
    from gen_accel.video import VideoShape

    own = found.made_for.grid
    frames, rows, columns = (
        size if asked is None else asked for asked, size in zip(sizes, own, strict=True)
    )
    width = min(_terminal_width(), 80)
    heads = found.made_for.transformer.get("num_attention_heads")
    table = rules_text(
        found.method,
        VideoShape(frames, rows, columns, text),
        layer=layer,
        heads=heads if isinstance(heads, int) else None,
        width=width,
    )
    typer.echo("\n".join([*preset_lines(found), "", table]))


def _tiles(query: str | None, key: str | None) -> Any:
    if query is None and key is None:
        return ()
    if query is None or key is None:
        raise ValueError("--tile-q and --tile-k go together, got one of them")
    return ((whole_numbers(query, "--tile-q"), whole_numbers(key, "--tile-k")),)


def _token(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    numbers = whole_numbers(text, "--token")
    if len(numbers) != 3:
        raise ValueError(f"--token needs a frame, a row and a column, as in 0,3,3, got {text!r}")
    return numbers[0], numbers[1], numbers[2]


def _print_bounds(bounds: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    first = bounds[0]
    typer.echo(f"{first.video} = {first.video.tokens} tokens")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("window")
    for name in ("stride", "tile-q", "tile-k", "bound", "by FLOPs", "most", "of", "unmasked"):
        table.add_column(name, justify="left" if "-" in name or name == "stride" else "right")
    for bound in bounds:
        sides = (bound.method.window, bound.method.stride, bound.tile_q, bound.tile_k)
        table.add_row(
            *(",".join(map(str, side)) for side in sides),
            f"{bound.speedup:.2f}x",
            f"{bound.flop_speedup:.2f}x",
            f"{bound.most}",
            f"{bound.key_tiles:g}",
            f"{bound.whole:.0%}",
        )
    Console(highlight=False, markup=False).print(table)
    typer.echo("most of the key tiles that a query tile visits; share of them without a mask")


def _terminal_width() -> int:
    from shutil import get_terminal_size

    return get_terminal_size().columns
