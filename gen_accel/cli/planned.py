"""`gen-accel generate --plan`: what a run will cost, in the place of the run."""

from collections.abc import Callable, Sequence
from typing import Any

import typer

from gen_accel.cli.json_out import terminal_width

ANY = "any prompt"  # where none is given, as none changes the cost


def print_plan(gpu: str | None) -> Callable[..., list[Any]]:
    """Return what takes the arguments of the library's `generate`, prints what that run will cost,
    and makes nothing.

    Args:
        gpu: a card; None: this machine.
    """

    def planned(model: str, prompts: Sequence[str], **options: Any) -> list[Any]:
        from gen_accel.measure.forecast_words import forecast_lines
        from gen_accel.pipelines.generation.forecast_job import forecast_generate

        found = forecast_generate(model, prompts or [ANY], gpu=gpu, **options)
        if len(prompts) > 1:
            typer.echo(f"Each of {len(prompts)} videos:")
        for line in forecast_lines(found, terminal_width()):
            typer.echo(line)
        return []

    return planned
