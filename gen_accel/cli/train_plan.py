"""`gen-accel train --plan`: what a training will need, in the place of the training."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from gen_accel.cli import early
from gen_accel.cli.json_out import check_json, show_result, terminal_width
from gen_accel.cli.loading import without_quantisers
from gen_accel.cli.options import check_card
from gen_accel.cli.printing import quiet
from gen_accel.lora.config import TrainConfig

GpuNames = Annotated[
    list[str] | None,
    typer.Option(
        "--gpu",
        metavar="CARD",
        help="With --plan, a card to plan for, several times for several: 4090, h100, a100 and "
        "others. Without: 4090, 5090 and h100.",
    ),
]

PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="With --plan, also write the figures there; - is standard output, alone.",
    ),
]


def check_unplanned(gpu: Sequence[str] | None, json: Path | None) -> None:
    """Raise ValueError for options of --plan in a training."""
    if gpu:
        raise ValueError(f"--gpu {gpu[0]} is for --plan: a training takes --device")
    if json is not None:
        raise ValueError(f"--json {json} is for --plan: a training writes OUT/metrics.jsonl")


def plan(values: Mapping[str, Any], gpu: Sequence[str] | None, json: Path | None) -> None:
    """Print the plan of a config.

    Args:
        values: fields of the config that are given.
        gpu: cards, each perhaps several with commas between; None or none: a few common ones.
        json: file of the figures.
    """
    cards = [name for text in gpu or () for name in text.split(",")]
    early.check_config(values, published=True)
    for card in cards:
        check_card(card)
    check_json(json)
    early.announce("torch and diffusers")
    config = TrainConfig(**values)
    with without_quantisers():  # no weights are loaded
        quiet()
        from gen_accel.lora.forecast import forecast_training
        from gen_accel.lora.training_plan import training_lines

    found = forecast_training(config, gpus=cards or None, tell=partial(typer.echo, err=True))
    show_result(training_lines(found, terminal_width()), found.to_dict(), json)
