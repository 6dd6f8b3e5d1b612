"""`gen-accel train` and `gen-accel cache`: every field of a config is a flag."""

import inspect
import types
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from gen_accel.cli import early, train_plan
from gen_accel.cli.app import INTERRUPTED
from gen_accel.cli.on_ray import RayAddress, RayWorkers, cluster_of, with_address
from gen_accel.cli.printing import quiet
from gen_accel.lora.config import TrainConfig, print_config, read_values
from gen_accel.lora.options import packages_of
from gen_accel.lora.presets import PRESETS

CHECKPOINTING = "--gradient-checkpointing"
SEVERAL = (
    "stages",
    "sizes",
    "targets",
    "betas",
)  # may also be given in one flag, with commas between

TRAIN = """Train a LoRA through sparse attention, for videos longer than the model was made for.

With --adapter image_prompt it trains layers by which the model follows an image instead, and
leaves OUT/image_prompt, which gen_accel.load_image_prompt takes.

\b
gen-accel train --print-config > lora.yaml     every field, with what it means
gen-accel train lora.yaml --plan --gpu 4090    GB of each stage, and whether they fit
gen-accel train --preset longer --model DIR --data clips --print-config
gen-accel train --preset style --model demo --data clips --height 96 --width 96
gen-accel train lora.yaml --dry-run            two steps on a tiny model of the same class
gen-accel train lora.yaml                      cache the clips, train, write OUT/lora
gen-accel train lora.yaml --resume             go on after an interruption
accelerate launch --config_file configs/accelerate/fsdp.yaml -m gen_accel train lora.yaml
gen-accel train --model demo --data clips --height 96 --width 96 --stages 129:200 --rank 16

OUT/lora is a LoRA like any other: pipe.load_lora_weights(OUT/lora), and
gen_accel.attach(pipe, from_lora=OUT/lora) attaches the attention it was trained with.
OUT/report.html shows how it goes. --resume with more steps or further stages goes on where it
ended.
Ctrl-C saves a checkpoint and ends; nothing is lost by kill -9 but the steps since the last one.
"""

CACHE = """Encode clips and captions once, so that training needs neither of the encoders.

\b
gen-accel cache lora.yaml
gen-accel cache --model demo --data clips --out lora --height 96 --width 96 --stages 129:200
gen-accel cache lora.yaml --ray head:6379      by all GPUs of a cluster of Ray, the same cache

Clips are clip.mp4 with clip.txt beside it, a manifest (.jsonl or .csv with the columns video and
caption), or a datasets folder. What is cached already is kept, unless its clip, its caption, the
autoencoder or the text encoder changed. Where the config trains an image prompt, the image of each
clip is encoded too: the column image, clip.png beside clip.mp4, or else its middle frame.
`gen-accel train` does the same before it starts.
"""


def train(
    config: Path | None,
    resume: bool,
    dry_run: bool,
    plan: bool,
    print_config_: bool,
    gpu: list[str] | None,
    json: Path | None,
    preset: str | None,
    **flags: Any,
) -> None:
    values = read_values(config, _given(flags), preset)
    if print_config_:
        typer.echo(print_config(TrainConfig(**values)), nl=False)
        return
    if plan:
        if resume or dry_run:
            raise ValueError(
                f"--plan trains nothing: leave --{'resume' if resume else 'dry-run'} out"
            )
        train_plan.plan(values, gpu, json)
        return
    train_plan.check_unplanned(gpu, json)
    early.check_config(values)
    if not dry_run:
        early.check_places(values)
    early.announce("torch, diffusers and the model", asked=packages_of(values))
    chosen = TrainConfig(**values)
    quiet()
    if dry_run:
        if resume:
            raise ValueError("--dry-run makes two steps of its own: leave --resume out")
        from gen_accel.lora.dry_run import dry_run as run

        result = run(chosen)
        losses = ", ".join(f"{loss:.4f}" for loss in result.losses)
        typer.echo(f"{result.steps} steps on a tiny model, losses {losses}")
        typer.echo(
            "the fields go together; not looked at: memory and time (--plan), the model's files, "
            "the clips"
        )
        return
    from gen_accel.lora.trainer import train as run_training

    result = run_training(chosen, resume=resume)
    if result.folder is None:
        typer.echo(f"stopped after step {result.steps}; --resume goes on", err=True)
    else:
        typer.echo(f"{result.steps} steps, {result.seconds:.0f} s: {result.folder}")
    for line in result.lines:
        typer.echo(f"  {line}", err=result.folder is None)
    if result.folder is None:
        raise typer.Exit(INTERRUPTED)


def cache(
    config: Path | None,
    preset: str | None,
    ray: str | None,
    ray_workers: int | None,
    **flags: Any,
) -> None:
    values = read_values(config, _given(flags), preset)
    if values.get("data") is None:
        raise ValueError(
            "data is not given: --data FOLDER of videos, a manifest or a datasets folder"
        )
    early.check_config(values)
    early.check_places(values)
    cluster = cluster_of(ray, ray_workers, values.get("device", "auto"))
    early.announce("torch, diffusers and the model")
    chosen = TrainConfig(**values)
    quiet()
    from gen_accel.lora.prepare import cache_by, cache_clips

    typer.echo(cache_clips(chosen) if cluster is None else cache_by(cluster, chosen))


def add_to(app: typer.Typer) -> None:
    """Add both verbs, with a flag for each field of `TrainConfig`."""
    path = inspect.Parameter(
        "config",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        annotation=Annotated[
            Path | None, typer.Argument(metavar="CONFIG.yaml", help="Flags override it.")
        ],
        default=None,
    )
    switches = {
        "resume": "Go on from the newest whole checkpoint in OUT.",
        "dry_run": "Two steps on a tiny random model of the same class; nothing is read.",
        "plan": "GB of each stage, and whether they fit this machine and some cards; no model is "
        "loaded, nothing is trained.",
        "print_config_": "Print the config as YAML, with what each field means, and end.",
    }
    extra = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[
                bool, typer.Option(f"--{name.strip('_').replace('_', '-')}", help=text)
            ],
            default=False,
        )
        for name, text in switches.items()
    ]
    extra += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=None)
        for name, kind in (("gpu", train_plan.GpuNames), ("json", train_plan.PlanFile))
    ]
    known = "; ".join(f"{name}: {one.purpose}" for name, one in PRESETS.items())
    purpose = inspect.Parameter(
        "preset",
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[
            str | None,
            typer.Option(
                "--preset", help=f"Fields for a purpose; file and flags override. {known}."
            ),
        ],
        default=None,
    )
    by_ray = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=None)
        for name, kind in (("ray", RayAddress), ("ray_workers", RayWorkers))
    ]
    verbs = ((train, TRAIN, [*extra, purpose]), (cache, CACHE, [purpose, *by_ray]))
    for function, text, own in verbs:

        def verb(function: Any = function, **given: Any) -> None:
            function(**given)

        signature = inspect.Signature([path, *own, *_flags()])
        verb.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
        verb.__doc__ = text
        short = {"train": "Finetune a LoRA or an image prompt.", "cache": "Encode clips once."}
        app.command(name=function.__name__, short_help=short[function.__name__], cls=_Verb)(verb)


class _Verb(TyperCommand):
    """A verb that also takes --gradient-checkpointing, --no-gradient-checkpointing and --ray
    bare."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_address(with_words(args)))


def with_words(args: list[str]) -> list[str]:
    """Write out gradient checkpointing that is switched on or off without a word."""
    found = []
    for arg, after in zip(args, [*args[1:], "-"], strict=True):
        if arg == CHECKPOINTING and (after.startswith("-") or after.endswith((".yaml", ".yml"))):
            found += [CHECKPOINTING, "on"]
        elif arg == f"--no-{CHECKPOINTING[2:]}":
            found += [CHECKPOINTING, "off"]
        else:
            found.append(arg)
    return found


def _flags() -> list[inspect.Parameter]:
    hints = get_type_hints(TrainConfig)
    return [
        inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[_flag_type(hints[one.name]), _option(one)],
            default=None,
        )
        for one in fields(TrainConfig)
    ]


def _option(one: Any) -> Any:
    default = one.default
    if isinstance(default, tuple):
        default = " ".join(map(str, default)) or "none"
    # No flag has a default: the file decides where a flag is not given.
    name = one.name.replace("_", "-")
    known = f"{one.metadata['help']} [{'none' if default is None else default}]"
    if isinstance(one.default, bool):
        return typer.Option(f"--{name}/--no-{name}", help=known, show_default=False)
    return typer.Option(f"--{name}", help=known, rich_help_panel=one.metadata["group"])


def _flag_type(hint: Any) -> Any:
    """Type that the parser reads; `read_config` checks the value."""
    if get_origin(hint) is tuple:
        return list[str] | None
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not types.NoneType)
    return bool | None if hint is bool else str | None


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    given = {}
    for name, value in flags.items():
        if value is None or value == []:
            continue
        if name in SEVERAL:
            value = [part for text in value for part in text.split(",")]
        given[name] = value
    return given
