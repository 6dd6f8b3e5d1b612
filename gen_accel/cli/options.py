"""Options that several verbs share, and their translation for the library."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

MethodName = Annotated[
    str, typer.Option("--method", help="See `gen-accel list`; or module:Class of your own.")
]

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Set a field of the method. May be repeated."
    ),
]

Kernel = Annotated[str, typer.Option(help="auto, or a name that never falls back to another.")]

DenseKernel = Annotated[
    str | None,
    typer.Option(
        help="What dense steps and layers run by: auto, or a name. Without: the model's own "
        "attention."
    ),
]

DenseStart = Annotated[float, typer.Option(help="Share of the first steps that stay dense.")]

DenseEnd = Annotated[float, typer.Option(help="Share of the last steps that stay dense.")]

DenseSteps = Annotated[int, typer.Option(help="How many of the first steps stay dense.")]

DenseLayers = Annotated[
    str, typer.Option(help="How many of the first layers stay dense, or their numbers: 0,7.")
]

Steps = Annotated[int | None, typer.Option(help="Denoising steps. Without: the model's own.")]


def method_of(name: str, settings: Sequence[str] | None) -> Any:
    """Build a method from a command line by `method_from`. Errors begin with the option as
    typed."""
    from gen_accel.attention_processors.methods.options import method_from

    try:
        return method_from(name, settings or ())
    except ValueError as error:
        about = [one for one in settings or () if one.partition("=")[0].strip() in str(error)]
        typed = " ".join(f"--set {one}" for one in about)
        raise ValueError(f"{typed}: {error}" if typed else str(error)) from error


def schedule(start: float = 0.0, end: float = 0.0, steps: int = 0, layers: str = "0") -> Any:
    from gen_accel.attention_processors.attached.schedule import Schedule

    numbers = whole_numbers(layers, "--dense-layers")
    return Schedule(
        dense_layers=numbers if "," in layers else numbers[0],
        dense_steps=steps,
        dense_start=start,
        dense_end=end,
    )


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.strip(",").split(","))
    except ValueError:
        raise ValueError(f"{option} takes whole numbers, as in 0,3,3, got {text!r}") from None
