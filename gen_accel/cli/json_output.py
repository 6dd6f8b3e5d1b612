"""What a verb found as JSON, in a file or on standard output."""

import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from gen_accel.cli import early

STDOUT = "-"

JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Also write a JSON object of each video there, a line each; -: to standard output, "
        "and all else to stderr.",
    ),
]


class JsonLines:
    """Objects as JSON, a line each.

    Args:
        path: the file; "-" is standard output, which is kept free of all else until the verb
            ends; None is nowhere.
    """

    def __init__(self, context: typer.Context, path: Path | None) -> None:
        self.path = path
        self._stdout: TextIO = sys.stdout
        if path is None:
            return
        if str(path) == STDOUT:
            context.with_resource(redirect_stdout(sys.stderr))
        else:
            early.check_output(path)

    def write(self, objects: Iterable[Mapping[str, Any]]) -> None:
        if self.path is None:
            return
        from gen_accel.files import plain, replacing
        from gen_accel.paths import expanded

        lines = [json.dumps(plain(one), ensure_ascii=False, allow_nan=False) for one in objects]
        text = "".join(f"{line}\n" for line in lines)
        if str(self.path) == STDOUT:
            self._stdout.write(text)
            self._stdout.flush()
            return
        with replacing(expanded(self.path)) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
