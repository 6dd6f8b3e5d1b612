"""`gen-accel demo`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gen_accel.cli import early
from gen_accel.cli.app import app
from gen_accel.cli.options import PresetName, Settings, check_instead, method_of
from gen_accel.cli.printing import print_comparison, print_files, quiet
from gen_accel.demo import NAME
from gen_accel.demo.words import check_known
from gen_accel.hub import check_pipeline
from gen_accel.paths import check_files, check_folder_path, expanded
from gen_accel.pipelines.generation.config import check_preset


@app.command(short_help="One clip, dense and sparse, on one clock.")
def demo(
    context: typer.Context,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write to. Without: outputs/demo, or outputs/demo_image with an image.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="A caption such as: a blue square moves up slowly.")
    ] = None,
    image_prompt: Annotated[
        Path | None,
        typer.Option(metavar="IMAGE", help="What moves is what this picture shows."),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="1 more than a multiple of 4.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise that both start from.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Without: what the LoRA was trained through, or radial."),
    ] = None,
    settings: Settings = None,
    preset: PresetName = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or mps. The model is too small for a GPU to gain.")
    ] = "cpu",
    model: Annotated[
        Path | None, typer.Option(help="Another folder than the embedded model.")
    ] = None,
    with_lora: Annotated[
        bool | None,
        typer.Option(
            "--with-lora/--without-lora",
            help="The model with its LoRA for longer videos. [with, of the embedded model]",
        ),
    ] = None,
) -> None:
    """Generate one clip dense and sparse with the embedded model, a step of each in turn.

    Writes report.html with everything on one page: the clips side by side, both denoisings on one
    clock, what the model makes without its LoRA, and the figures. Each of them is a file too.
    Needs no GPU and no download, and takes about two minutes on two cores.

    \b
    gen-accel demo
    gen-accel demo --prompt "a blue square moves up slowly" --seed 3
    gen-accel demo --frames 257                                 longer, and more to gain
    gen-accel demo --method radial --set decay_factor=0.5       sparser
    gen-accel demo --method neighborhood --set window=9,7,7
    gen-accel demo --preset balanced                            or a file of `gen-accel tune`
    python -m gen_accel.demo.clips --images --out outputs/stills --frames 5 --count 72
    gen-accel demo --image-prompt outputs/stills/0008.png

    The prompts that the model knows: a COLOUR SHAPE moves DIRECTION SPEED, with red, green, blue
    or yellow; circle, square or triangle; left, right, up or down; slowly or quickly.

    With --image-prompt, 33 frames of "something moves right slowly", or of --prompt: the text
    says how it moves, a picture such as those of `demo.clips` what does. Without --out, into
    outputs/demo_image.
    """
    early.check_names(method=method or "radial", device=device)
    if model is not None and str(model) == NAME:
        model = None
    check_pipeline(NAME if model is None else str(model))
    if model is None and prompt is not None:
        check_known(prompt)
    check_preset(preset, steps)
    check_instead(context, preset)
    check_files("image", image_prompt)
    check_folder_path("out", out)
    out = None if out is None else expanded(out)
    early.announce()
    quiet()
    given: dict[str, Any] = {"prompt": prompt, "frames": frames, "steps": steps, "model": model}
    given |= {"seed": seed, "preset": preset}
    if method is not None or settings:
        given["method"] = method_of(method or "radial", settings)
    if image_prompt is None:
        from gen_accel.demo.job import run

        given |= {"out": out, "with_lora": with_lora}
    else:
        from gen_accel.demo.image_prompts import run

        if with_lora is not None:
            raise ValueError("--with-lora and --without-lora do not go with --image-prompt")
        given |= {"out": out, "image": image_prompt}
    chosen = {name: value for name, value in given.items() if value is not None}
    report, files = run(device=device, **chosen)
    print_comparison(report)
    print_files(files)
