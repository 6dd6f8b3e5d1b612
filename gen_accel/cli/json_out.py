"""The option --json, and the width of a terminal, which verbs that print share."""

import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated, Any, TextIO

import typer

from gen_accel.paths import check_output

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
        check_output(file)


def show_result(lines: Iterable[str], data: Any, file: Path | None) -> None:
    """Print lines, and write `data` to the file of --json; for "-", print that alone."""
    from gen_accel.io import plain, write_json

    if file == STANDARD_OUTPUT:
        text = json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False)
        typer.echo(text.encode(errors="backslashreplace"))  # of names that are not UTF-8
        return
    for line in lines:
        typer.echo(line)
    if file is not None:
        write_json(file, data)
        typer.echo(file)


class LinesFile:
    """Objects as JSON, a line each, in a file of --json.

    Args:
        path: "-" is standard output, which is kept free of all else meanwhile; None is nowhere.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._stdout: TextIO = sys.stdout
        self._open = ExitStack()
        if path != STANDARD_OUTPUT:
            check_output(path)

    def __enter__(self) -> "LinesFile":
        if self.path == STANDARD_OUTPUT:
            self._open.enter_context(redirect_stdout(sys.stderr))
        return self

    def __exit__(self, *raised: object) -> None:
        self._open.close()

    def write(self, objects: Iterable[Mapping[str, Any]]) -> None:
        if self.path is None:
            return
        from gen_accel.io import plain, replacing
        from gen_accel.paths import expanded

        lines = [json.dumps(plain(one), ensure_ascii=False, allow_nan=False) for one in objects]
        text = "".join(f"{line}\n" for line in lines)
        if self.path == STANDARD_OUTPUT:
            self._stdout.write(text)
            self._stdout.flush()
            return
        with replacing(expanded(self.path)) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def terminal_width() -> int:
    """Columns of the terminal; 80 where the output is no terminal, unless COLUMNS says more."""
    return max(40, get_terminal_size().columns)
