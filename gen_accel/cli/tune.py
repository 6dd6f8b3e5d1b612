"""`gen-accel tune`."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from gen_accel import registry
from gen_accel.cli import early
from gen_accel.cli.app import app
from gen_accel.cli.json_out import STANDARD_OUTPUT, JsonFile, check_json, show_result
from gen_accel.cli.options import Kernel, check_only
from gen_accel.cli.presets import print_curve
from gen_accel.cli.printing import print_files, quiet
from gen_accel.demo import NAME, model_named
from gen_accel.demo.words import check_known
from gen_accel.hub import check_pipeline
from gen_accel.io import read_text
from gen_accel.paths import check_files, check_output, expanded
from gen_accel.pipelines.generation.config import check_preset

QUALITY, STEPS, MOST_STEPS = 28.0, 20, 1000
COSTS, SCALES = ("seconds", "density"), ("mean", "even", "worst")
ALONE = ("quality", "steps", "out", "json")  # what goes with --preset


@app.command(short_help="The sparsest attention that keeps a quality.")
def tune(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(help="The preset to write, .json; its profile lies beside it.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a diffusers pipeline, a hub repo, or demo: the embedded."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A text file with one prompt on each line, of what the model is used for.",
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts that the choice is only measured on. Without: the second half.",
        ),
    ] = None,
    preset: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Choose anew from the profile of this one, without a model."
        ),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Without: the model's own number.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    steps: Annotated[
        int | None, typer.Option(help=f"Denoising steps, as many as will be used. [{STEPS}]")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Without: the model's own, or 1 where a LoRA holds it."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Each further prompt takes the next.")] = 0,
    quality: Annotated[
        float | None,
        typer.Option(
            help="Least mean PSNR to the dense videos, in dB; of latent_error, the largest. "
            f"[{QUALITY:g}]"
        ),
    ] = None,
    worst: Annotated[float | None, typer.Option(help="The same, of each prompt.")] = None,
    objective: Annotated[str, typer.Option(help=f"{' or '.join(registry.OBJECTIVES)}.")] = "psnr",
    cost: Annotated[
        str, typer.Option(help="What is made small: seconds of attention, or density.")
    ] = "seconds",
    scale: Annotated[
        str,
        typer.Option(
            help="Errors over the prompts count by their mean; even, so that no prompt decides "
            "alone; or by the worst."
        ),
    ] = "mean",
    minutes: Annotated[
        float | None, typer.Option(help="After which no further choices are measured.")
    ] = None,
    kernel: Kernel = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR_OR_REPO[:WEIGHT]", help="May be repeated."),
    ] = None,
    from_lora: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Tune with a LoRA of `gen-accel train`, its positions and guidance.",
        ),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Find the sparsest attention of a model that keeps a bound on quality, once, as a preset.

    Each head of each layer gets a method at each step. Some prompts are generated densely, and all
    methods are compared with that; the choice is then measured, on these prompts and on those held
    out. Ctrl-C loses nothing: the same line goes on.

    \b
    gen-accel tune --model models/wan --prompts prompts.txt --frames 81 --height 480 \\
        --width 832 --steps 20 --quality 28 --out preset.json
    gen-accel generate --model models/wan --prompt "a cat" --preset preset.json --out cat.mp4
    gen-accel show --preset preset.json                       what runs where
    gen-accel tune --preset preset.json --quality 25 --out faster.json
        another quality, from the profile alone: in seconds, without the model, not verified
    gen-accel tune --preset preset.json --steps 50 --out fifty.json
        another number of steps, in the same way
    gen-accel tune --model models/wan --prompts prompts.txt --held-out others.txt --frames 81 \\
        --height 480 --width 832 --quality 30 --worst 27 --scale worst --out careful.json
    gen-accel tune --model models/wan --prompts prompts.txt --frames 81 --height 480 \\
        --width 832 --objective latent_error --quality 0.05 --cost density --out sparse.json

    A preset is for one model, size and number of steps. Four to eight prompts are enough; one
    takes about as long as ten videos.
    """
    check_output(out, ".json")
    check_json(json)
    check_output(out.with_suffix(".safetensors"))
    check_output(out.with_name(f"{out.stem}.tuning.safetensors"))
    _check_numbers(quality=quality, worst=worst, minutes=minutes)
    _check_least(steps, frames=frames, height=height, width=width)
    if preset is not None:
        check_preset(str(preset))
        if str(preset) in registry.PRESETS and not preset.is_file():
            raise FileNotFoundError(f"no preset at {preset}: only a file can be solved anew")
        check_only(context, "preset", ALONE)
        if quality is None and steps is None:
            raise ValueError("--preset is solved anew for --quality, --steps or both: give one")
        if expanded(out).resolve() == expanded(preset).resolve():
            raise ValueError(f"--out must be another file than --preset {preset}")
        early.announce("torch")
        _solve(preset, quality, steps, out, json)
        return
    if model is None or prompts is None:
        raise ValueError("give --model and --prompts, or --preset to solve one anew")
    check_pipeline(model)
    check_files("file of prompts", prompts, held_out)
    for file in (prompts, held_out):
        _check_prompts(model, file)
    early.check_choice("objective", objective, registry.OBJECTIVES)
    early.check_choice("cost", cost, COSTS)
    early.check_choice("scale", scale, SCALES)
    if objective != "psnr" and quality is None:
        raise ValueError(f"--objective {objective} needs --quality, the largest, such as 0.05")
    early.check_names(kernels={"kernel": kernel}, device=device)
    registry.check_loading(dtype, "none")
    early.check_loras(lora or ())
    check_files("LoRA", from_lora)
    early.announce("torch, diffusers and the model")
    quiet()
    from gen_accel.pipelines.generation.config import read_prompts
    from gen_accel.pipelines.generation.loading import Loading
    from gen_accel.pipelines.generation.sampling import Clip
    from gen_accel.pipelines.generation.tune_model import tune_model

    found = tune_model(
        model_named(model),
        read_prompts(prompts),
        held_out=None if held_out is None else read_prompts(held_out),
        clip=Clip(
            frames=frames,
            height=height,
            width=width,
            steps=steps or STEPS,
            guidance_scale=guidance_scale,
            seed=seed,
        ),
        loading=Loading.read({"dtype": dtype, "device": device, "lora": lora or ()}),
        from_lora=from_lora,
        kernel=kernel,
        quality=QUALITY if quality is None else quality,
        worst=worst,
        objective=objective,
        cost=cost,
        scale=scale,
        minutes=minutes,
        out=expanded(out),
    )
    _print_found(found, out, json)


def _solve(
    preset: Path, quality: float | None, steps: int | None, out: Path, json: Path | None
) -> None:
    """Choose anew from a profile, for another number of steps first."""
    from gen_accel.pipelines.tuning import load_tuned

    found = load_tuned(preset)
    if steps is not None:
        found = found.solve(steps)
    if quality is not None:
        found = found.at(quality)
    _print_found(found.save(out), out, json)


def _print_found(found: Any, out: Path, json: Path | None) -> None:
    if json != STANDARD_OUTPUT:
        typer.echo(str(found))
        print_curve(found)
        print_files({"preset": out, "profile": out.with_suffix(".safetensors")})
    show_result((), found.preset.to_dict(), json)


def _check_prompts(model: str, file: Path | None) -> None:
    if model == NAME and file is not None:
        check_known(*(line for line in read_text(file).split("\n") if line.strip()))


def _check_numbers(**given: float | None) -> None:
    for name, value in given.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    minutes = given["minutes"]
    if minutes is not None and minutes <= 0:
        raise ValueError(f"minutes must be more than 0, got {minutes:g}")


def _check_least(steps: int | None, **given: int | None) -> None:
    for name, value in {"steps": steps, **given}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if steps is not None and steps > MOST_STEPS:
        raise ValueError(f"steps must be at most {MOST_STEPS}, got {steps}")
