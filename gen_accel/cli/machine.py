"""`gen-accel list`, `models`, `build` and `doctor`: what there is and what runs here."""

import sys
from typing import Annotated

import typer

from gen_accel.cli.app import app
from gen_accel.cli.printing import print_rows


@app.command(name="list", short_help="Methods with their options, and kernels.")
def list_() -> None:
    """Methods with their options, and kernels with where they run.

    \b
    gen-accel list
    gen-accel generate ... --method radial --set decay_factor=0.5 --set sink=false

    A kernel that cannot run on this machine is listed with the reason.
    """
    from gen_accel.cli import inventory

    typer.echo("Methods, which change the answer:")
    for method in inventory.methods():
        typer.echo(f"\n  {method.name}: {method.description}")
        for field, (default, values) in method.fields.items():
            typer.echo(f"    {field}={default}".ljust(30) + f" {values}")
    typer.echo("\nKernels, which do not:")
    for kernel in inventory.kernels():
        typer.echo(f"\n  {kernel.name}: {kernel.description}")
        for where, reasons in kernel.refused.items():
            verdict = f"no: {'; '.join(reasons)}" if reasons else "yes"
            typer.echo(f"    {where}".ljust(20) + verdict)
    typer.echo("\nModels: see `gen-accel models`.")


@app.command(short_help="The models that are served, as a table.")
def models(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As the page docs/models.md.")
    ] = False,
) -> None:
    """Classes of diffusers that are served, with their methods, the order of their tokens, what a
    LoRA trains, and whether they take image prompts; and those that are refused, with the reason.

    \b
    gen-accel models
    gen-accel models --markdown > docs/models.md
    """
    import diffusers
    from rich.console import Console
    from rich.table import Table

    from gen_accel.cli import inventory

    if markdown:
        typer.echo(inventory.models_page(), nl=False)
        return
    found = inventory.models()
    table = Table("models")
    table.add_column("class", no_wrap=True)
    for name in ("methods", "tokens", "LoRA targets", "image prompts"):
        table.add_column(name)
    for model in found:
        if not model.refused:
            targets = ", ".join(model.lora_targets["attention"])
            images = "yes" if model.image_prompts else ""
            methods = inventory.methods_of(model)
            table.add_row(model.models, model.name, methods, model.order, targets, images)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    missing = [model.name for model in found if not model.here]
    if missing:
        typer.echo(f"diffusers {diffusers.__version__} does not have: {', '.join(missing)}")
    for model in found:
        if model.refused:
            typer.echo(f"{model.name} cannot be served: {model.refused}")


@app.command(short_help="Compile the CPU kernel for this machine.")
def build() -> None:
    """Compile the kernel `native` for this machine: 15 seconds, once. It is the fastest on a CPU,
    forward and backward, and "auto" takes it from then on; all methods run without it too.

    Needs a C++ compiler, on Linux and x86-64. Lies in the user's cache; a new version, another
    torch or another processor needs it built anew.

    \b
    gen-accel build
    """
    from gen_accel.kernels.native.build import build as compile_kernel

    try:
        typer.echo(compile_kernel())
    except RuntimeError as error:
        raise ValueError(str(error)) from error


@app.command(short_help="Versions, devices, and what is missing.")
def doctor() -> None:
    """Versions and devices, what is missing, and the command that adds it.

    \b
    gen-accel doctor
    """
    from gen_accel.measure.environment import checks

    found = checks()
    print_rows({check.name: check.found or "missing" for check in found})
    for check in found:
        if check.found is None:
            typer.echo(f"{check.name}: {check.fix}")
