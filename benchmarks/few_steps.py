"""Sparse attention in few steps: no dense step, one, or a density that falls from step to step.

    python benchmarks/few_steps.py                       # all of it, some hours on one core
    python benchmarks/few_steps.py --only 129:4 33:4     # frames:steps
    python benchmarks/few_steps.py --only 33:8 --settings Radial cache
    python benchmarks/few_steps.py --docs                # the table of docs/few_steps.md

Clips of 33 frames are the demo model's, guided, by `euler`; clips of 129 frames are of its LoRA
for longer videos, which holds its guidance, by `lcm`. Prompts and seeds are fixed: the same 16 for
all. Each clip is set beside the dense clip of the same prompt, seed and number of steps. A clip
that is there is not made again.
"""

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from kept import clip_file, keep_clip, kept_clip
from pages import RESULTS, machine, spread, write_table
from rich.progress import track

import gen_accel
from gen_accel import Dense, Piecewise, Radial, Reuse, Schedule
from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.demo import TRAINED_FRAMES, world
from gen_accel.demo.detector import detect
from gen_accel.demo.job import lora_path
from gen_accel.measure import psnr, write_json
from gen_accel.measure.machine import environment
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.generation.sampling import Clip, filled, sample
from gen_accel.pipelines.generation.step_cache import caching, skipped_steps
from gen_accel.pipelines.long_video.rope import apply_recipe
from gen_accel.registry import CACHES

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from demo_model.scoring import score

DOCS = Path(__file__).parents[1] / "docs" / "few_steps.md"
RESULT = RESULTS / "few_steps.json"
RUNS = ((129, 4), (33, 4), (129, 8), (33, 8), (33, 20), (129, 20))  # frames, steps
PROMPTS, SEED, SIZE = 16, 7000, 96
GUIDANCE, SHIFT = 3.0, {33: 3.0, 129: 11.0}
# Shares of the mean density, of the first step to the last. The second: the error that each of
# four steps makes by itself, to the power of 2/3, measured on other prompts and seeds. Where an
# error is as the inverse of the density, that makes their sum least.
SHAPES = {"falling": (1.6, 0.4), "most in the second quarter": (0.7, 1.9, 0.8, 0.6)}
PISA: Any = {"centre": "key", "order": "first", "score": "mean", "tile": "raster"}
SOL: Any = {"select": "threshold", "centre": "key", "score": "mean", "band": 1, "tile": "raster"}


def ramp(mean: float, steps: int, shares: tuple[float, ...]) -> tuple[float, ...]:
    """Densities of the steps: shares of their mean, on straight lines between those given."""
    along = np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, len(shares)), shares)
    return tuple(round(float(mean * x), 4) for x in along / along.mean())


class Setting(NamedTuple):
    """Method, schedule and step cache of clips."""

    method: Any
    schedule: Schedule | None = None
    cache: str | None = None


def settings(steps: int) -> dict[str, Setting]:
    """Settings by name, "dense" first, with which all are compared."""
    found, quarter = {"dense": Setting(Dense())}, steps // 4
    starts = {"first": 0, "second": quarter}
    schedules = {f"{name} quarter": range(n, n + quarter) for name, n in starts.items()}
    schedules |= {"a quarter, from the second step": range(1, 1 + quarter)}
    if quarter == 1:  # which is the second quarter then
        schedules.pop("second quarter")
    dense = {name: Schedule(dense=(*each,)) for name, each in schedules.items()}
    first = dense["first quarter"]
    for mean in (0.2, 0.1):
        plain = f"Piecewise({mean:g})"
        found |= {
            plain: Setting(Piecewise(mean)),
            **{
                f"{plain}, dense: {name}": Setting(Piecewise(mean), s) for name, s in dense.items()
            },
        }
        for shape, shares in SHAPES.items():
            densities = ramp(mean, steps, shares)
            found[f"Piecewise, {mean:g} on average, {shape}"] = Setting(Piecewise(densities))
    others = {
        "Piecewise(0.2, rest=None)": Piecewise(0.2, rest=None),
        "PISA at 0.2": Piecewise(0.2, **PISA),
        "Sol-Attn, tau 1": Piecewise(**SOL),
        "Radial": Radial(),
    }
    found |= {name: Setting(method) for name, method in others.items()}
    found |= {
        "Radial, dense: first quarter": Setting(Radial(), first),
        "Reuse(Radial), dense: first quarter": Setting(Reuse(Radial()), first),
        "Reuse(Piecewise(0.2)), dense: first quarter": Setting(Reuse(Piecewise(0.2)), first),
    }
    return found | {f"dense, --cache {name}": Setting(Dense(), cache=name) for name in CACHES}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="FRAMES:STEPS", help="of these alone")
    parser.add_argument("--settings", nargs="+", metavar="PART", help="with one in their names")
    parser.add_argument("--work", type=Path, default=Path("outputs/few_steps"))
    parser.add_argument("--docs", action="store_true", help="write the table of docs/few_steps.md")
    args = parser.parse_args()
    if args.docs:
        write_table(DOCS, "results", "\n".join(table(json.loads(RESULT.read_text("utf-8")))))
        return
    torch.set_num_threads(1)
    asked = args.only or [f"{frames}:{steps}" for frames, steps in RUNS]
    report: dict[str, Any] = {"runs": {}}
    if RESULT.exists():
        report = json.loads(RESULT.read_text("utf-8"))
    for one in asked:
        frames, steps = map(int, one.split(":"))
        report |= environment() | {"prompts": PROMPTS, "first_seed": SEED}
        found, known = report["runs"].setdefault(one, {}), settings(steps)
        for name, rows in run(frames, steps, args.work / one.replace(":", "_"), args.settings):
            found[name] = rows
            report["runs"][one] = {name: found[name] for name in known if name in found}
            write_json(RESULT, report)


def run(
    frames: int, steps: int, work: Path, parts: list[str] | None
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield each setting, and its rows, one a prompt.

    Args:
        parts: of the names of settings, "dense" aside; None: all.
    """
    is_long = frames > TRAINED_FRAMES
    scenes = world.scored_scenes(PROMPTS)
    pipe = load("demo", Loading(device="cpu", loras=(str(lora_path()),) if is_long else ()))
    for name, (method, schedule, cache) in settings(steps).items():
        if not (parts is None or name == "dense" or any(part in name for part in parts)):
            continue
        place = work / name.replace(" ", "_").replace(",", "")
        rows = []
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if is_long:
                recipe = read_recipe(lora_path())
                stack.enter_context(apply_recipe(recipe, pipe.transformer, pipe))
            handle = stack.enter_context(gen_accel.attach(pipe, method, schedule=schedule))
            stack.enter_context(caching(pipe, cache, schedule, steps))
            for i, scene in enumerate(track(scenes, f"{frames} frames, {steps} steps, {name}")):
                clip = Clip(
                    frames=frames,
                    height=SIZE,
                    width=SIZE,
                    steps=steps,
                    guidance_scale=1.0 if is_long else GUIDANCE,
                    max_tokens=16,
                    sampler="lcm" if is_long else "euler",
                    shift=SHIFT[frames],
                    seed=SEED + i,
                )
                row_file = place / f"{i:02d}.json"
                if not (row_file.exists() and clip_file(place, i).exists()):
                    start = time.process_time()
                    made = sample(pipe, scene.caption, filled(pipe, clip))
                    row: dict[str, Any] = {"seconds": time.process_time() - start, "density": 1.0}
                    if not method.is_dense:
                        row["density"] = handle.summary().density
                    if cache is not None:
                        row["skipped_steps"] = skipped_steps(handle.summary())
                    keep_clip(place, i, made.video)
                    write_json(row_file, row)
                row = json.loads(row_file.read_text("utf-8"))
                video = kept_clip(place, i)
                seen = detect(video)
                row |= {"right": score(seen, scene).right, "shows": seen.caption}
                if name != "dense":
                    row["psnr_db"] = psnr(video, kept_clip(work / "dense", i))
                rows.append({"prompt": scene.caption, "seed": SEED + i} | row)
        yield name, rows


def table(report: dict[str, Any]) -> Iterator[str]:
    """Rows of the page: each setting, beside the same density without a dense step or a ramp."""
    yield (
        f"{report['prompts']} prompts, one seed each; {machine(report)}. Density of the sparse "
        "steps. PSNR to the dense clip of the same steps: mean (worst to best). Gain: mean "
        "difference, clip by clip, to `Piecewise` of the same density in all steps, with its t. "
        "Right: clips that show what was asked, at its pace."
    )
    for one, settings in report["runs"].items():
        frames, steps = one.split(":")
        yield ""
        yield f"| {frames} frames, {steps} steps | density | PSNR, dB | gain, dB | right |"
        yield "|---|---|---|---|---|"
        for name, rows in settings.items():
            yield _row(name, rows, settings)


def _row(name: str, rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    right = f"{sum(row['right'] for row in rows)} of {len(rows)}"
    if name == "dense":
        return f"| {name} | 1 | | | {right} |"
    values = [float(row["psnr_db"]) for row in rows]  # "Infinity" of equal clips
    density = statistics.fmean(row["density"] for row in rows)
    gain = ""
    mean = next((m for m in ("0.2", "0.1") if m in name.split(",")[0] or m in name), None)
    plain = f"Piecewise({mean})"
    if mean is not None and name != plain:
        pairs = zip(values, (row["psnr_db"] for row in settings[plain]), strict=True)
        gain = _difference([a - b for a, b in pairs])
    return f"| {name} | {density:.2f} | {spread(values)} | {gain} | {right} |"


def _difference(values: list[float]) -> str:
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.1f} (t {mean / error:.1f})" if error else f"{mean:+.1f}"


if __name__ == "__main__":
    main()
