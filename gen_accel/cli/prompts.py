"""`gen-accel prompts`."""

from pathlib import Path
from typing import Annotated

import typer

from gen_accel.cli import early
from gen_accel.cli.app import app

LISTS = ("vbench",)


@app.command(short_help="Prompts of a benchmark, for `generate --prompts`.")
def prompts(
    name: Annotated[str, typer.Argument(metavar="LIST", help="vbench.")],
    dimension: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="One that VBench scores by these prompts, such as subject_consistency. May be "
            "repeated. Without: all 16.",
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="So many prompts alone, spread evenly over the list.")
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            help="Lines of each prompt, with a seed each. VBench asks for 5 videos of a prompt, "
            "and 25 for temporal_flickering."
        ),
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Text file to write, or with --place the folder. Without: printed."),
    ] = None,
    place: Annotated[
        Path | None,
        typer.Option(
            metavar="VIDEO",
            help="The --out of a `generate --prompts`: put its numbered videos into the folder "
            "--out, under the names that VBench expects.",
        ),
    ] = None,
    of: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="With --place: the prompts of the videos."),
    ] = None,
) -> None:
    """Write VBench's prompts to a file, and give videos of them the names that VBench expects.

    \b
    gen-accel prompts vbench --dimension subject_consistency --samples 5 --out prompts.txt
    gen-accel generate --model models/wan --prompts prompts.txt --out clips/clip.mp4
    gen-accel prompts vbench --place clips/clip.mp4 --prompts prompts.txt --out for_vbench
        clips/clip-000.mp4 as for_vbench/PROMPT-0.mp4, clip-001.mp4 as PROMPT-1.mp4 and so on
    gen-accel metrics for_vbench --suite vbench

    The list is VBench 0.1.5's (Huang et al., CVPR 2024, Apache-2.0): 946 prompts, of which 944
    differ.
    """
    early.check_choice("list of prompts", name, LISTS)
    if place is not None:
        _place(place, of, out)
        return
    if of is not None:
        raise ValueError(f"--prompts {of} goes with --place VIDEO")
    early.check_output(out)
    if not 1 <= samples <= 1000:
        raise ValueError(f"samples must be 1 to 1000, got {samples}")
    from gen_accel.measure.vbench_prompts import vbench_prompts

    texts = [text for text in vbench_prompts(dimension or (), count=count) for _ in range(samples)]
    if out is None:
        typer.echo("\n".join(texts))
        return
    from gen_accel.files import replacing
    from gen_accel.paths import expanded

    with replacing(expanded(out)) as partial:
        partial.write_text("\n".join(texts) + "\n", encoding="utf-8")
    typer.echo(f"{out}  ({len(texts)} prompts)")


def _place(video: Path, of: Path | None, out: Path | None) -> None:
    if of is None or out is None:
        raise ValueError(f"--place {video} needs --prompts FILE and --out FOLDER")
    early.check_files("file of prompts", [of])
    early.check_folder("out", out)
    early.announce("torch and diffusers")
    from gen_accel.measure.vbench_prompts import place_videos
    from gen_accel.paths import expanded
    from gen_accel.pipelines.generation.generate import read_prompts
    from gen_accel.pipelines.generation.prompt_list import numbered

    texts = read_prompts(of)
    placed = place_videos(texts, numbered(expanded(video), len(texts)), expanded(out))
    typer.echo(f"{out}  ({len(placed)} of {len(texts)} videos)")
