"""A LoRA of few steps beside its teacher and the model without it: what their clips show.

    gen-accel train student.yaml                               # docs/finetune.md, In few steps
    python benchmarks/student_steps.py outputs/student/lora    # 24 prompts that it never saw

A clip that is there is not made again. The table goes to docs/few_steps.md.
"""

import argparse
import json
import statistics
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from few_steps import DOCS, SEED, SIZE, score
from kept import clip_file, keep_clip, kept_clip
from pages import RESULTS, machine, write_table
from rich.progress import track

import gen_accel
from gen_accel import Dense, Piecewise, Schedule
from gen_accel.attention_processors.attached.recipe import Recipe, read_recipe
from gen_accel.demo import world
from gen_accel.demo.detector import detect
from gen_accel.measure import psnr, write_json
from gen_accel.measure.machine import environment
from gen_accel.method import Method
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.generation.sampling import Clip, filled, sample
from gen_accel.pipelines.long_video.rope import apply_recipe
from gen_accel.pipelines.sampler import equal_steps

RESULT = RESULTS / "student_steps.json"
SCENES = (*world.scored_scenes(world.HELD_OUT), *world.UNSEEN)
TEACHER = "teacher"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("lora", help="folder of a LoRA that was trained with student_steps")
    parser.add_argument("--work", type=Path, default=Path("outputs/student_steps"))
    parser.add_argument("--prompts", type=int, default=len(SCENES), help="the first of them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = read_recipe(args.lora)
    if recipe.sampler is None:
        parser.error(f"{args.lora} was not trained with student_steps")
    kept = ("frames", "levels", "steps", "stages", "rank", "method", "teacher_guidance", "batch")
    report = environment() | {name: getattr(recipe, name) for name in kept}
    report["runs"] = {}
    for name, run in RUNS.items():
        report["runs"][name] = clips(name, run, args, recipe)
        write_json(RESULT, report)
    write_table(DOCS, "student", "\n".join(table(report)))


def clips(name: str, run: Run, args: argparse.Namespace, recipe: Recipe) -> list[dict[str, Any]]:
    """Rows of a run, one a prompt."""
    loras, steps = (args.lora,) if run.with_lora else (), run.share * len(recipe.levels)
    pipe, rows = load("demo", Loading(device="cpu", loras=loras)), []
    place = args.work / name.replace(" ", "_").replace(",", "")
    last = recipe.levels[-1]  # of equal steps, shifted
    shift = last * (len(recipe.levels) - 1) / (1 - last)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(apply_recipe(recipe, pipe.transformer, pipe))
        handle = stack.enter_context(gen_accel.attach(pipe, run.method, schedule=run.schedule))
        for i, scene in enumerate(track(SCENES[: args.prompts], name)):
            clip = Clip(
                frames=recipe.frames,
                height=SIZE,
                width=SIZE,
                steps=steps,
                guidance_scale=recipe.teacher_guidance if run.guided else 1.0,
                max_tokens=16,
                sampler="euler",
                levels=equal_steps(steps, shift),
                seed=SEED + i,
            )
            row_file = place / f"{i:02d}.json"
            if not (row_file.exists() and clip_file(place, i).exists()):
                start = time.process_time()
                made = sample(pipe, scene.caption, filled(pipe, clip))
                row: dict[str, Any] = {"seconds": time.process_time() - start}
                row["calls"] = steps * (2 if run.guided else 1)
                row["density"] = 1.0 if run.method.is_dense else handle.summary().density
                keep_clip(place, i, made.video)
                write_json(row_file, row)
            row, video = json.loads(row_file.read_text("utf-8")), kept_clip(place, i)
            seen = detect(video)
            row |= {"right": score(seen, scene).right, "shows": seen.caption}
            if name != run.beside:
                other = kept_clip(args.work / run.beside, i)
                row["psnr_db"] = psnr(video, other)
            rows.append({"prompt": scene.caption, "seed": SEED + i} | row)
    return rows


def table(report: dict[str, Any]) -> list[str]:
    """Rows of a table of all runs."""
    lines = [
        f"{len(report['runs'][TEACHER])} prompts that the LoRA never saw, one seed each, "
        f"{report['frames']} frames; "
        f"{machine(report)}. The student: rank {report['rank']}, {report['steps']} steps of "
        f"{report['batch']} clips, {len(report['levels'])} steps a video. PSNR to the teacher's "
        "clips, of sparse ones to the student's dense clips.",
        "",
        "| | calls | right | PSNR, dB: mean, worst |",
        "|---|---|---|---|",
    ]
    for name, rows in report["runs"].items():
        right = f"{sum(row['right'] for row in rows)} of {len(rows)}"
        values = [float(row["psnr_db"]) for row in rows if "psnr_db" in row]
        told = f"{statistics.fmean(values):.1f} ({min(values):.1f})" if values else ""
        lines.append(f"| {name} | {rows[0]['calls']} | {right} | {told} |")
    return lines


if __name__ == "__main__":
    main()
