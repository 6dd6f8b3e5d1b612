"""`gen-accel generate --plan`: what a run will cost, in the place of the run."""

from collections.abc import Callable, Sequence
from typing import Any

import typer

from gen_accel.cli.json_out import terminal_width

ANY = "any prompt"  # where none is given, as none changes the cost


def plan_of(gpu: str | None) -> Callable[..., list[Any]]:
    """Return what takes the arguments of the library's `generate`, makes nothing, and returns the
    forecast of a video of that run.

    Args:
        gpu: a card; None: this machine.
    """

    def planned(model: str, prompts: Sequence[str], **options: Any) -> list[Any]:
        from gen_accel.pipelines.generation.forecast_job import forecast_generate

        if len(prompts) > 1:
            typer.echo(f"Each of {len(prompts)} videos:")
        return [forecast_generate(model, prompts or [ANY], gpu=gpu, **options)]

    return planned


def print_plan(found: Any) -> None:
    from gen_accel.measure.cost.words import forecast_lines

    for line in forecast_lines(found, terminal_width()):
        typer.echo(line)
