"""The option --json, and the width of a terminal, which verbs that print share."""

import json
from collections.abc import Iterable
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated, Any

import typer

from gen_accel.cli import early

STANDARD_OUTPUT = Path("-")

JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Also write the figures there; - is standard output, alone."
    ),
]


def check_json(file: Path | None) -> None:
    """Raise ValueError or OSError for a file of --json that cannot be written."""
    if file != STANDARD_OUTPUT:
        early.check_output(file)


def show_result(lines: Iterable[str], data: Any, file: Path | None) -> None:
    """Print lines, and write `data` to the file of --json; for "-", print that alone."""
    from gen_accel.files import plain, write_json

    if file == STANDARD_OUTPUT:
        typer.echo(json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False))
        return
    for line in lines:
        typer.echo(line)
    if file is not None:
        write_json(file, data)
        typer.echo(file)


def terminal_width() -> int:
    """Columns of the terminal; 80 where the output is no terminal, unless COLUMNS says more."""
    return max(40, get_terminal_size().columns)
