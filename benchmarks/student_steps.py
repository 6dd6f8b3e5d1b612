"""A LoRA of few steps beside its teacher and the model without it: what their clips show.

    gen-accel train student.yaml                               # docs/finetune.md, In few steps
    python benchmarks/student_steps.py outputs/student/lora    # 24 prompts that it never saw
    python benchmarks/student_steps.py LORA --long             # with the demo's LoRA for length
    python benchmarks/student_steps.py --docs                  # the tables of docs/few_steps.md

A clip that is there is not made again.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from few_steps import DOCS, SEED, SIZE, score
from kept import clip_file, keep_clip, kept_clip
from longer_videos import STEADY, held_out, strays
from pages import RESULTS, machine, read_result, right, spread, write_table
from rich.progress import track
from study import longer

import gen_accel
from gen_accel import Dense, Piecewise, Schedule
from gen_accel.attention_processors.attached.recipe import Recipe, read_recipe
from gen_accel.demo import words, world
from gen_accel.demo.detector import detect
from gen_accel.demo.job import lora_path
from gen_accel.measure import psnr, write_json
from gen_accel.measure.machine import environment
from gen_accel.method import Method
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.generation.sampling import Clip, filled, sample
from gen_accel.pipelines.long_video.rope import apply_recipe
from gen_accel.pipelines.sampler import equal_steps

SCENES = (*world.scored_scenes(world.HELD_OUT), *world.UNSEEN)
SHAPES = {*words.SHAPES}
TEACHER = "teacher"
LONG_SHIFT = 22.0  # of the fresh noise that the LoRA for longer videos is sampled with
Row = dict[str, Any]


class Run(NamedTuple):
    """How clips are made.

    Args:
        beside: run whose clips its own are compared with.
        share: of the student's steps, 3 for as many as its teacher takes by default.
    """

    with_lora: bool
    method: Method
    schedule: Schedule | None = None
    guided: bool = False
    share: int = 1
    beside: str = TEACHER


STUDENT = "student"
RUNS = {
    TEACHER: Run(False, Dense(), guided=True, share=3),
    "guided, without the LoRA": Run(False, Dense(), guided=True),
    "unguided, without the LoRA": Run(False, Dense()),
    STUDENT: Run(True, Dense()),
    "student, Piecewise(0.2)": Run(True, Piecewise(0.2), beside=STUDENT),
    "student, Piecewise(0.2), second step dense": Run(
        True, Piecewise(0.2), Schedule(dense=(1,)), beside=STUDENT
    ),
}


class LongRun(NamedTuple):
    """How clips of the demo's length are made, without guidance, sparse in all steps.

    Args:
        with_student: its LoRA is added to the one for longer videos.
        steps: 4 as the student was trained, more with fresh noise, as the other LoRA is sampled.
    """

    with_student: bool
    steps: int


LONG_RUNS = {
    "8 steps, with the student": LongRun(True, 8),
    "4 steps, with the student": LongRun(True, 4),
    "8 steps, without it": LongRun(False, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("lora", nargs="?", help="folder of a LoRA, trained with student_steps")
    parser.add_argument("--work", type=Path, default=Path("outputs/student_steps"))
    parser.add_argument("--long", action="store_true", help="clips of the demo's length")
    parser.add_argument("--docs", action="store_true", help="write the tables, make no clips")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.docs:
        for name, (result, rows) in TABLES.items():
            write_table(DOCS, name, "\n".join(rows(read_result(result))))
        return
    recipe = read_recipe(args.lora) if args.lora else None
    if recipe is None or recipe.sampler is None:
        parser.error(f"a LoRA that was trained with student_steps, got {args.lora}")
    kept = ("frames", "levels", "steps", "stages", "rank", "method", "teacher_guidance", "batch")
    report = environment() | {name: getattr(recipe, name) for name in kept} | {"runs": {}}
    make, name = (long_runs, "student_long") if args.long else (runs, "student_steps")
    for title, rows in make(args.lora, recipe, args.work):
        report["runs"][title] = rows
        write_json(RESULTS / f"{name}.json", report)


def runs(lora: str, recipe: Recipe, work: Path) -> Iterator[tuple[str, list[Row]]]:
    """Yield each of `RUNS` and its rows, one a prompt."""
    for name, run in RUNS.items():
        loras = [lora] if run.with_lora else []
        rows = clips(work / _named(name), loras, recipe, run)
        yield name, _compared(rows, work, name, run.beside)


def long_runs(lora: str, recipe: Recipe, work: Path) -> Iterator[tuple[str, list[Row]]]:
    """Yield each of `LONG_RUNS` and its rows, of the prompts and seeds that the LoRA for longer
    videos was scored by."""
    own, scenes = read_recipe(lora_path(guided=True)), [*held_out()] * 2
    for name, run in LONG_RUNS.items():
        loras = [str(lora_path(guided=True)), *([lora] if run.with_student else [])]
        as_trained = run.steps == len(recipe.levels)
        sampled: dict[str, Any] = (
            {"levels": recipe.levels} if as_trained else {"shift": LONG_SHIFT}
        )
        sampler = "euler" if as_trained else "lcm"
        clip = Clip(
            frames=own.frames, steps=run.steps, guidance_scale=1.0, sampler=sampler, **sampled
        )
        attached = Run(True, own.build_method())
        yield name, _made(work / _named(name), loras, own, attached, clip, scenes, 0)


def clips(place: Path, loras: list[str], recipe: Recipe, run: Run) -> list[Row]:
    """Rows of a run at the length that a student was trained at."""
    steps, last = run.share * len(recipe.levels), recipe.levels[-1]  # of equal steps, shifted
    clip = Clip(
        frames=recipe.frames,
        steps=steps,
        sampler="euler",
        levels=equal_steps(steps, last * (len(recipe.levels) - 1) / (1 - last)),
        guidance_scale=recipe.teacher_guidance if run.guided else 1.0,
    )
    return _made(place, loras, recipe, run, clip, SCENES, SEED)


def _made(
    place: Path,
    loras: list[str],
    recipe: Recipe,
    run: Run,
    clip: Clip,
    scenes: Sequence[world.Scene],
    seed: int,
) -> list[Row]:
    """Make what is not there of the clips of one run, and score them.

    Args:
        recipe: of the LoRA whose rule on positions counts.
        clip: without size and seed.
        seed: of the first clip.
    """
    pipe, rows = load("demo", Loading(device="cpu", loras=tuple(loras))), []
    if loras:
        pipe.fuse_lora()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(apply_recipe(recipe, pipe.transformer, pipe))
        handle = stack.enter_context(gen_accel.attach(pipe, run.method, schedule=run.schedule))
        for i, scene in enumerate(track(scenes, place.name)):
            row_file = place / f"{i:02d}.json"
            if not (row_file.exists() and clip_file(place, i).exists()):
                own = clip.replaced(height=SIZE, width=SIZE, max_tokens=16, seed=seed + i)
                start = time.process_time()
                made = sample(pipe, scene.caption, filled(pipe, own))
                row: Row = {"seconds": time.process_time() - start}
                assert clip.steps is not None
                row["calls"] = clip.steps * (2 if run.guided else 1)
                row["density"] = 1.0 if run.method.is_dense else handle.summary().density
                keep_clip(place, i, made.video)
                write_json(row_file, row)
            row, video = json.loads(row_file.read_text("utf-8")), kept_clip(place, i)
            seen = detect(video)
            row |= {"right": score(seen, scene).right, "shows": seen.caption}
            row["steady"] = row["right"] and strays(video, scene) <= STEADY
            rows.append({"prompt": scene.caption, "seed": seed + i} | row)
    return rows


def _compared(rows: list[Row], work: Path, name: str, beside: str) -> list[Row]:
    """Add the PSNR to another run's clips to rows, unless the run is that one."""
    if name == beside:
        return rows
    places = work / _named(name), work / _named(beside)
    pairs = ((kept_clip(place, i) for place in places) for i in range(len(rows)))
    return [row | {"psnr_db": psnr(*pair)} for row, pair in zip(rows, pairs, strict=True)]


def _named(title: str) -> str:
    return title.replace(" ", "_").replace(",", "")


def table(report: dict[str, Any]) -> list[str]:
    """Rows of the table of `RUNS`."""
    lines = [
        f"{len(report['runs'][TEACHER])} prompts that the LoRA never saw, one seed each, "
        f"{report['frames']} frames; "
        f"{machine(report)}. The student: rank {report['rank']}, {report['steps']} steps of "
        f"{report['batch']} clips, {len(report['levels'])} steps a video. PSNR to the teacher's "
        "clips, of sparse ones to the student's dense clips.",
        "",
        "| | calls | right | PSNR, dB: mean (worst to best) |",
        "|---|---|---|---|",
    ]
    for name, rows in report["runs"].items():
        lines.append(f"| {name} | {rows[0]['calls']} | {right(rows)} | {_psnr_of(rows)} |")
    return lines


def table_of_long(report: dict[str, Any]) -> list[str]:
    """Rows of the table of `LONG_RUNS`, the LoRA in 20 guided steps above them."""
    scored = longer.demo_clips()
    lines = [
        f"The demo's LoRA for longer videos, {read_recipe(lora_path(guided=True)).frames} frames; "
        f"{machine(report)}.",
        "",
        "| | calls | right | steady | right, of those that 20 dense steps get right |",
        "|---|---|---|---|---|",
    ]
    dense = [one["right"] for one in scored["dense"]]
    rows = {
        f"20 steps, guided, {name}": [
            one | {"calls": 40, "steady": one["right"] and one["strays"] <= STEADY}
            for one in scored[name]
        ]
        for name in ("dense", "sparse")
    }
    for name, found in (rows | report["runs"]).items():
        kept = [one["right"] for one, as_dense in zip(found, dense, strict=False) if as_dense]
        steady = f"{sum(one['steady'] for one in found)} of {len(found)}"
        told = (name, found[0]["calls"], right(found), steady, f"{sum(kept)} of {len(kept)}")
        lines.append(f"| {' | '.join(map(str, told))} |")
    wrong = [one for one in report["runs"][next(iter(LONG_RUNS))] if not one["right"]]
    shapes = sum(not {*one["prompt"].split()} & {*one["shows"].split()} & SHAPES for one in wrong)
    return [
        *lines,
        "",
        f"Of the {len(wrong)} wrong clips of {next(iter(LONG_RUNS))}, {shapes} have another shape "
        "or none.",
    ]


def table_of_tried(report: dict[str, Any]) -> list[str]:
    """Rows of what was tried on a few prompts, each once."""
    head = f"right, of {report['prompts']}"
    lines = [f"| | steps, sampler, shift | calls | {head} |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in report["runs"]]
    return lines


def _psnr_of(rows: list[Row]) -> str:
    values = [float(row["psnr_db"]) for row in rows if "psnr_db" in row]
    return spread(values) if values else ""


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {  # and result files
    "student": ("student_steps", table),
    "long": ("student_long", table_of_long),
    "tried": ("student_tried", table_of_tried),
}


if __name__ == "__main__":
    main()
