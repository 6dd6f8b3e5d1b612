"""A LoRA of few steps beside its teacher and the model without it: what their clips show.

    gen-accel train student.yaml                               # docs/finetune.md, In few steps
    python benchmarks/student_steps.py outputs/student/lora    # 24 prompts that it never saw
    python benchmarks/student_steps.py LORA --long             # with the demo's LoRA for length
    python benchmarks/student_steps.py --docs                  # the tables of docs/few_steps.md

A clip that is there is not made again.
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from few_steps import DOCS, SIZE
from pages import RESULTS, begun, machine, read_result, right, spread, weights_of, write_table
from quality import STEADY, Row, Suite, made
from study import longer

from gen_accel import Dense, Piecewise
from gen_accel.attention_processors.attached.recipe import Recipe, read_recipe
from gen_accel.demo import SHAPES as ALL_SHAPES
from gen_accel.demo.job import lora_path
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment
from gen_accel.pipelines.sampler import equal_steps

SHAPES = {*ALL_SHAPES}
CLIPS, SEED = 48, 7000
TEACHER, STUDENT = "teacher", "student"
EIGHT = "8 steps, with the student"
LONG_SHIFT = 22.0  # of the fresh noise that the LoRA for longer videos is sampled with
SIZES = {"height": SIZE, "width": SIZE, "max_tokens": 16, "dense_start": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("lora", nargs="?", help="folder of a LoRA, trained with student_steps")
    parser.add_argument("--work", type=Path, default=Path("outputs/student_steps"))
    parser.add_argument("--long", action="store_true", help="clips of the demo's length")
    parser.add_argument("--name", default=EIGHT, help="row of its 8 steps, with --long")
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
    about = environment() | {name: getattr(recipe, name) for name in kept}
    about["weights"] = weights_of()
    make, name = (long_suite, "student_long") if args.long else (short_suite, "student_steps")
    path = RESULTS / f"{name}.json"
    found: dict[str, list[Row]] = begun(path, {"runs": {}})["runs"] if args.long else {}
    warnings.simplefilter("ignore")
    suite = make(args.lora, recipe)
    for title, rows in made(suite, args.work / name):
        guided = (suite.fields | suite.settings[title])["guidance_scale"] > 1
        calls = steps_of(suite, title) * (1 + guided)
        found[args.name if title == EIGHT else title] = [row | {"calls": calls} for row in rows]
        write_json(path, about | {"runs": found})


def steps_of(suite: Suite, title: str) -> int:
    """Number of denoising steps of a setting."""
    fields = suite.fields | suite.settings[title]
    return len(fields["levels"]) if fields.get("levels") else fields["steps"]


def short_suite(lora: str, recipe: Recipe) -> Suite:
    """Clips of the length that a student was trained at: its own, its teacher's, and the model's
    without it."""
    count, last = len(recipe.levels), recipe.levels[-1]  # of equal steps, shifted
    shift = last * (count - 1) / (1 - last)
    fields: dict[str, Any] = {**SIZES, "frames": recipe.frames, "sampler": "euler"}
    guided = {"guidance_scale": recipe.teacher_guidance}
    few, many = ({"levels": equal_steps(n * count, shift)} for n in (1, 3))  # 3 as taught
    own = {**few, "loras": (lora,), "beside": STUDENT}
    sparse = {mean: own | {"method": Piecewise(mean)} for mean in (0.2, 0.1)}
    second = {"dense_at": (1,)}
    settings = {
        TEACHER: many | guided,
        "guided, without the LoRA": few | guided,
        "unguided, without the LoRA": few,
        STUDENT: own | {"beside": TEACHER},
        **{f"student, Piecewise({mean})": one for mean, one in sparse.items()},
        **{f"student, Piecewise({m}), second step dense": x | second for m, x in sparse.items()},
    }
    fields |= {"guidance_scale": 1.0, "method": Dense()}
    return Suite("held_out", CLIPS, SEED, fields, settings, beside=TEACHER)


def long_suite(lora: str, recipe: Recipe) -> Suite:
    """Clips of the demo's length, of the prompts and seeds that the LoRA for longer videos was
    scored by: that LoRA with the student or without, unguided and sparse in all steps. As many
    steps as the student was trained for are as it was taught; 8 of a student of fewer have fresh
    noise, as the LoRA for longer videos is sampled."""
    own = read_recipe(lora_path(guided=True))
    fields = {**SIZES, "frames": own.frames, "guidance_scale": 1.0, "method": own.build_method()}
    fields |= {"extend": (own.rope,)}
    loras = (str(lora_path(guided=True)),)
    taught: dict[str, Any] = {"sampler": recipe.sampler, "levels": recipe.levels}
    few = len(recipe.levels) < 8
    fresh = {"sampler": "lcm", "shift": LONG_SHIFT, "steps": 8} if few else taught
    settings = {EIGHT: fresh | {"loras": (*loras, lora)}}
    if few:
        settings["4 steps, with the student"] = taught | {"loras": (*loras, lora)}
    settings["8 steps, without it"] = fresh | {"loras": loras}
    return Suite("held_out", CLIPS, 0, fields, settings, beside=EIGHT)


def table(report: dict[str, Any]) -> list[str]:
    """Rows of the table of `short_suite`."""
    lines = [
        f"{len(report['runs'][TEACHER])} clips of prompts that the LoRA never saw, "
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
    """Rows of the table of `long_suite`, the LoRA in 20 guided steps above them."""
    scored = longer.demo_clips()
    lines = [
        f"The demo's LoRA for longer videos, {read_recipe(lora_path(guided=True)).frames} frames.",
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
    wrong = [one for one in report["runs"][EIGHT] if not one["right"]]
    shapes = sum(not {*one["prompt"].split()} & {*one["shows"].split()} & SHAPES for one in wrong)
    return [
        *lines,
        "",
        f"Of the {len(wrong)} wrong clips of {EIGHT}, {shapes} have another shape or none.",
    ]


def table_of_tried(report: dict[str, Any]) -> list[str]:
    """Rows of what was tried on a few prompts, each once, and of the levels that they name."""
    lines = ["| | steps, sampler, shift or levels | calls | right |", "|---|---|---|---|"]
    for row in report["runs"]:
        right = f"{row['right']} of {row['of']}"
        lines.append(f"| {row['loras']} | {row['how']} | {row['calls']} | {right} |")
    lines += ["", "| levels | noise at which each step begins |", "|---|---|"]
    for name, each in report["levels"].items():
        lines.append(f"| {name} | {', '.join(map(str, each))} |")
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
