"""`gen-accel train` and `gen-accel cache`: every field of a config is a flag."""

from functools import partial

import typer

from gen_accel.cli.app import INTERRUPTED, app
from gen_accel.cli.loading import QUANTISERS, loading, without
from gen_accel.cli.printing import FiguresConfig, terminal_width
from gen_accel.cli.verb import verb
from gen_accel.cluster import AUTO, cluster_of
from gen_accel.config import Config, option
from gen_accel.lora.config import TrainConfig, packages_of


class TrainLine(FiguresConfig):
    """Options of the command line of `train` alone."""

    resume: bool = option(
        False, "Options", "Continuation from the newest whole checkpoint in OUT."
    )
    dry_run: bool = option(
        False, "Options", "Two steps on a tiny random model of the same class; nothing is read."
    )
    plan: bool = option(
        False,
        "Options",
        "GB of each stage, and whether they fit this machine and some cards; nothing is trained.",
    )
    gpu: tuple[str, ...] = option(
        (),
        "Options",
        "Cards to --plan for: 4090, h100, a100 and others. Default: 4090, 5090 and h100.",
        metavar="CARD",
        commas=True,
    )

    @property
    def writes_alone(self) -> bool:
        return self.plan or self.dry_run


class CacheLine(Config):
    """Options of the command line of `cache` alone."""

    ray: str | None = option(
        None,
        "Options",
        "Address of a Ray cluster that encodes the clips, HOST:PORT. Without an address: the one "
        "of this machine, or this machine alone.",
        metavar="[ADDRESS]",
        bare=AUTO,
    )
    ray_workers: int | None = option(
        None,
        "Options",
        "Number of Ray workers. Default: one for each GPU, or each machine without GPUs.",
        metavar="N",
    )

    @property
    def writes_alone(self) -> bool:
        return True  # the cache, with which the next run goes on


@verb(
    app,
    TrainConfig,
    short_help="Finetune a LoRA or an image prompt.",
    more=TrainLine,
    positional=("config",),
)
def train(config: TrainConfig, line: TrainLine) -> None:
    """Train a LoRA through sparse attention, for videos longer than the model was made for.

    With --adapter image_prompt it trains layers by which the model follows an image instead, and
    leaves OUT/image_prompt, which gen_accel.load_image_prompt takes.

    \b
    gen-accel train --print-config > lora.yaml     every field, with what it means
    gen-accel train configs/lora/longer.yaml --model DIR --data clips     twice the length
    gen-accel train configs/lora/style.yaml --model DIR --data clips      a look
    gen-accel train lora.yaml --plan --gpu 4090    GB of each stage, and whether they fit
    gen-accel train lora.yaml --dry-run            two steps on a tiny model of the same class
    gen-accel train lora.yaml                      cache the clips, train, write OUT/lora
    gen-accel train lora.yaml --resume             go on after an interruption
    accelerate launch --config_file configs/accelerate/fsdp.yaml -m gen_accel train lora.yaml
    gen-accel train --model demo --data clips --height 96 --width 96 --stages 129:200 --rank 16

    OUT/lora is a LoRA like any other: pipe.load_lora_weights(OUT/lora), and
    gen_accel.attach(pipe, from_lora=OUT/lora) attaches the attention it was trained with.
    OUT/report.html shows how it goes. --resume with more steps or further stages goes on where it
    ended.
    Ctrl-C saves a checkpoint and ends; kill -9 loses no more than the steps since the last one.
    """
    if line.plan:
        if line.resume or line.dry_run:
            raise ValueError(
                f"--plan trains nothing: leave --{'resume' if line.resume else 'dry-run'} out"
            )
        _plan(config, line)
        return
    if line.gpu:
        raise ValueError(f"--gpu {line.gpu[0]} is for --plan: a training takes --device")
    if line.json_file is not None:
        raise ValueError(
            f"--json {line.json_file} is for --plan: a training writes OUT/metrics.jsonl"
        )
    if line.overwrite:
        raise ValueError(
            "--overwrite is for the file of --json: a training is never replaced, so go on with "
            "--resume, or give another --out"
        )
    if line.dry_run and line.resume:
        raise ValueError("--dry-run makes two steps of its own: leave --resume out")
    config.check()
    asked = packages_of(vars(config))
    if line.dry_run:
        with loading(asked=asked):
            from gen_accel.lora.trial import dry_run

        result = dry_run(config)
        losses = ", ".join(f"{loss:.4f}" for loss in result.losses)
        typer.echo(f"{result.steps} steps on a tiny model, losses {losses}")
        typer.echo(
            "the fields go together; not looked at: memory and time (--plan), the model's files, "
            "the clips"
        )
        return
    config.check_files()
    with loading("diffusers and the model", asked=asked):
        from gen_accel.lora import trainer

    result = trainer.train(config, resume=line.resume)
    if result.folder is None:
        typer.echo(f"stopped after step {result.steps}; --resume goes on", err=True)
    else:
        typer.echo(f"{result.steps} steps, {result.seconds:.0f} s: {result.folder}")
    for told in result.lines:
        typer.echo(f"  {told}", err=result.folder is None)
    if result.folder is None:
        raise typer.Exit(INTERRUPTED)


@verb(
    app,
    TrainConfig,
    short_help="Encode clips once.",
    more=CacheLine,
    positional=("config",),
)
def cache(config: TrainConfig, line: CacheLine) -> None:
    """Encode clips and captions once, so that training needs neither of the encoders.

    \b
    gen-accel cache lora.yaml
    gen-accel cache --model demo --data clips --out lora --height 96 --width 96 --stages 129:200
    gen-accel cache lora.yaml --ray head:6379      by all GPUs of a cluster of Ray, the same cache

    Clips are clip.mp4 with clip.txt beside it, a manifest (.jsonl or .csv with the columns video
    and caption), or a datasets folder. What is cached already is kept, unless its clip, its
    caption, the autoencoder or the text encoder changed. If the config trains an image prompt, the
    image of each clip is encoded too: the column image, clip.png beside clip.mp4, or else its
    middle frame. `gen-accel train` does the same before it starts.
    """
    if not config.sets:
        raise ValueError(
            "data is not given: --data FOLDER of videos, a manifest or a datasets folder"
        )
    config.check()
    cluster = cluster_of(line.ray, line.ray_workers, config.device)
    config.check_files()
    with loading("diffusers and the model"):
        from gen_accel.lora.prepare import cache_by, cache_clips

    typer.echo(cache_clips(config) if cluster is None else cache_by(cluster, config))


def _plan(config: TrainConfig, line: TrainLine) -> None:
    """Print the plan of a config."""
    from gen_accel.measure.cost.figures import card_named

    config.check(published=True)
    for card in line.gpu:
        card_named(card)
    with without(*QUANTISERS), loading():  # no weights are loaded
        from gen_accel.lora.forecast import forecast_training

    cards = [*line.gpu] or None
    found = forecast_training(config, gpus=cards, tell=partial(typer.echo, err=True))
    line.show(found.lines(terminal_width()), found.to_dict())
