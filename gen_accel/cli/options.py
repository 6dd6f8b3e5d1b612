"""Options that several verbs share, and their translation for the library."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from gen_accel import registry

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Set a field of the method. May be repeated."
    ),
]

PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="FILE|NAME",
        help="What `gen-accel tune` wrote, or quality, balanced, fast. In the place of --method.",
    ),
]

Kernel = Annotated[str, typer.Option(help="auto, or a name that never falls back to another.")]

Steps = Annotated[int | None, typer.Option(help="Denoising steps. Without: the model's own.")]

Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="NAME[,NAME]",
        help="Of lpips, vmaf and cvvdp, beside PSNR and SSIM. Without: lpips and vmaf, where they "
        "can be computed.",
    ),
]


def check_metrics(given: str | None) -> tuple[str, ...] | None:
    """Return the metrics of --metrics; ValueError for one that is not known, or whose tool is not
    here."""
    if given is None:
        return None
    asked = tuple(name for name in given.split(",") if name)
    registry.check_metrics(asked)
    if "vmaf" in asked:
        from gen_accel.measure.perceptual import vmaf_missing

        if reason := vmaf_missing():
            raise ValueError(reason)
    if "cvvdp" in asked:
        from gen_accel.measure.perceptual import cvvdp_missing

        if reason := cvvdp_missing():
            raise ValueError(reason)
    return asked


def method_of(name: str, settings: Sequence[str] | None) -> Any:
    """Build a method from a command line by `method_from`. Errors begin with the option as
    typed."""
    from gen_accel.attention_processors.methods.registry import method_from

    try:
        return method_from(name, settings or ())
    except ValueError as error:
        about = [one for one in settings or () if one.partition("=")[0].strip() in str(error)]
        typed = " ".join(f"--set {one}" for one in about)
        raise ValueError(f"{typed}: {error}" if typed else str(error)) from error


def check_instead(context: typer.Context, preset: str | None) -> None:
    """Refuse --method and --set beside --preset."""
    if preset is None:
        return
    wrong = [option for name, option in given(context).items() if name in ("method", "settings")]
    if wrong:
        raise ValueError(
            f"--preset {preset} takes the place of --method and --set: leave "
            f"{' and '.join(wrong)} out"
        )


def check_card(gpu: str | None) -> None:
    """Raise ValueError, with the nearest names, for a card that is not in the table."""
    if gpu is not None:
        from gen_accel.measure.cost.cards import card_named

        card_named(gpu)


def check_only(context: typer.Context, option: str, others: Iterable[str]) -> None:
    """Refuse options besides `option` and `others`, which would be ignored."""
    wrong = [opt for name, opt in given(context).items() if name not in (option, *others)]
    if wrong:
        allowed = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        name = option.replace("_", "-")
        raise ValueError(f"--{name} goes with {allowed} only, got {', '.join(wrong)}")


def given(context: typer.Context) -> dict[str, str]:
    """Map the parameters that the command line gives to their options as typed."""
    return {
        str(parameter.name): parameter.opts[0]
        for parameter in context.command.params
        if getattr(context.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
    }


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
