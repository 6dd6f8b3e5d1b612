"""`gen-accel tune`."""

from typing import TYPE_CHECKING

import typer

from gen_accel.cli.app import app
from gen_accel.cli.loading import loading
from gen_accel.cli.printing import CURVE, FiguresConfig, curve_rows, print_files, print_table
from gen_accel.cli.verb import verb
from gen_accel.demo import check_known
from gen_accel.paths import DEMO
from gen_accel.pipelines.generation.config import read_prompts
from gen_accel.pipelines.tuning.config import TuneConfig

if TYPE_CHECKING:
    from gen_accel.pipelines.tuning import Tuned

MOST_ROWS = 12  # of a curve


@verb(
    app,
    TuneConfig,
    short_help="The sparsest attention that keeps a quality.",
    more=FiguresConfig,
)
def tune(config: TuneConfig, line: FiguresConfig) -> None:
    """Find the sparsest attention of a model that keeps a bound on quality, once, as a preset.

    Each head of each layer gets a method at each step. Some prompts are generated densely, and all
    methods are compared with that; the choice is then measured, on these prompts and on those held
    out. Ctrl-C loses nothing: the same line goes on.

    \b
    gen-accel tune --model models/wan --prompts prompts.txt --frames 81 --height 480 \\
        --width 832 --steps 20 --quality 28 --out preset.json
    gen-accel generate --model models/wan --prompt "a cat" --preset preset.json --out cat.mp4
    gen-accel show --preset preset.json                       what runs where
    gen-accel tune --preset preset.json --quality 25 --out faster.json
        another quality, from the profile alone: in seconds, without the model, not verified
    gen-accel tune --preset preset.json --steps 50 --out fifty.json
        another number of steps, in the same way
    gen-accel tune --model models/wan --prompts prompts.txt --held-out others.txt --frames 81 \\
        --height 480 --width 832 --quality 30 --worst 27 --scale worst --out careful.json
    gen-accel tune --model models/wan --prompts prompts.txt --frames 81 --height 480 \\
        --width 832 --objective latent_error --quality 0.05 --cost density --out sparse.json

    A preset is for one model, size and number of steps. Four to eight prompts are enough; one
    takes about as long as ten videos.
    """
    config.check()
    if config.preset is not None:
        with loading(None):
            from gen_accel.pipelines.tuning import load_tuned

        found = load_tuned(config.preset)
        if config.steps is not None:
            found = found.solve(config.steps)
        if config.quality is not None:
            found = found.at(config.quality)
        _print(found.save(config.out), config, line)
        return
    for file in (config.prompts, config.held_out) if config.model == DEMO else ():
        check_known(*(() if file is None else read_prompts(file)))
    with loading("diffusers and the model"):
        from gen_accel.pipelines.tuning.tune_model import tune_model

    _print(tune_model(config), config, line)


def _print(found: "Tuned", config: TuneConfig, line: FiguresConfig) -> None:
    if not line.is_quiet:
        from rich.table import Table

        typer.echo(str(found))
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for name in CURVE:
            table.add_column(name, justify="left" if name == "" else "right")
        print_table(table, curve_rows(found.preset.to_dict(), MOST_ROWS))
        print_files({"preset": config.out, "profile": config.out.with_suffix(".safetensors")})
    line.show((), found.preset.to_dict())
