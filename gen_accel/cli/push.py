"""`gen-accel push`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gen_accel.cli import early
from gen_accel.cli.app import app
from gen_accel.cli.printing import print_rows
from gen_accel.hub import check_repository
from gen_accel.paths import check_files


@app.command(short_help="Upload a LoRA, an image prompt or presets to the hub.")
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="lora or image_prompt of a training, or presets.")
    ],
    repository: Annotated[
        str, typer.Argument(metavar="REPO", help="OWNER/NAME; created where it is missing.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Private; a public one of that name is refused.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List files, sizes and the card, without network.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Upload a LoRA, an image prompt or presets to the hub, with a model card, in one commit.

    \b
    gen-accel push outputs/lora/lora OWNER/NAME --dry-run
    gen-accel push outputs/lora/lora OWNER/NAME --private

    What gen_accel wrote is uploaded: safetensors, JSON and README.md. All other files in the
    folder are left out and listed. The license is yours to name, in the head of README.md. The
    token is the one of `hf auth login`, or HF_TOKEN.
    """
    check_files("folder", folder)
    check_repository(repository)
    early.announce("torch and diffusers")
    from gen_accel.lora import push as upload

    _print(upload(folder, repository, private=private, message=message, dry_run=dry_run))


def _print(done: Any) -> None:
    from gen_accel.io import megabytes

    sizes = {
        name: megabytes(size) if size >= 1e5 else f"{size:,} bytes"
        for name, size in done.files.items()
    }
    whole = megabytes(sum(done.files.values()))
    print_rows({done.kind: f"{len(done.files)} files, {whole}, for {done.repository}", **sizes})
    if done.left_out:
        typer.echo(f"left out: {', '.join(done.left_out)}")
    for note in done.notes:
        typer.echo(f"note: {note}")
    if done.url is None:
        made = "the card that would be made" if done.is_new_card else "the card"
        typer.echo(f"{made}:\n\n{done.card}")
        typer.echo("nothing was uploaded: leave --dry-run out")
        return
    typer.echo(done.url)
