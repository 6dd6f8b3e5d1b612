"""`gen-accel export`."""

from pathlib import Path
from typing import Annotated

import typer

from gen_accel.cli import early
from gen_accel.cli.app import app
from gen_accel.cli.printing import print_rows
from gen_accel.paths import check_files, check_replaceable, expanded
from gen_accel.registry import check_export


@app.command(short_help="Write a LoRA as ComfyUI loads it.")
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="lora of a training, or its file.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write, *.safetensors.")],
    format: Annotated[str, typer.Option(help="comfyui: names of the original model.")] = "comfyui",
    dtype: Annotated[
        str, typer.Option(help="Of the matrices: float32, bfloat16 or float16.")
    ] = "float32",
) -> None:
    """Write a LoRA in the names of the original model, as ComfyUI loads it.

    \b
    gen-accel export outputs/lora/lora --out ComfyUI/models/loras/longer.safetensors
    gen-accel export outputs/lora/lora --out longer.safetensors --dtype bfloat16

    Any LoRA loader of ComfyUI loads the file. The node Load LoRA (gen_accel) attaches the
    attention that it was trained with, too. A LoRA for two experts becomes two files.
    """
    check_files("folder", folder)
    check_export(out, format, dtype)
    check_replaceable(expanded(out))
    early.announce("torch")
    from gen_accel.io import megabytes
    from gen_accel.lora.comfyui import export as write

    done = write(folder, out, format=format, dtype=dtype)
    method = done.recipe.build_method()
    rows = {
        str(path): f"{layers} layers, {megabytes(path.stat().st_size)}"
        for path, layers in done.files.items()
    }
    print_rows({**rows, "largest rank": str(done.rank), "trained with": repr(method)})
