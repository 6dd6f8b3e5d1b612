"""Clips with none or some of the steps dense, or a density for each step, in few and in many.

    python benchmarks/few_steps.py                       # all of it, some hours on one core
    python benchmarks/few_steps.py --only 129:4 33:4     # frames:steps
    python benchmarks/few_steps.py --only 33:8 --settings Radial cache
    python benchmarks/few_steps.py --docs                # the tables of docs/few_steps.md

Clips of 33 frames are the demo model's, guided, by `euler`; clips of 129 frames are of its LoRA
for longer videos, which holds its guidance, by `lcm`. Prompts and seeds are fixed: the same 16 for
all. Each clip is set beside the dense clip of the same prompt, seed and number of steps. A clip
that is there is not made again.
"""

import argparse
import re
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import RESULTS, begun, machine, read_result, spread, write_table
from quality import Difference, Suite, made

from gen_accel import Dense, Piecewise, Radial, Reuse
from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.demo import TRAINED_FRAMES
from gen_accel.demo.job import lora_path
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment
from gen_accel.registry import CACHES

DOCS = Path(__file__).parents[1] / "docs" / "few_steps.md"
# Frames and steps, by the result file, which is also the name of its table on the page.
RUNS = {
    "few_steps": ((129, 4), (33, 4), (129, 8), (33, 8)),
    "dense_steps": ((33, 20), (33, 50), (129, 20)),
}
PROMPTS, SEED, SIZE = 16, 7000, 96
GUIDANCE, SHIFT = 3.0, {33: 3.0, 129: 11.0}
# Shares of the mean density, of the first step to the last. The second: the error that each of
# four steps makes by itself, to the power of 2/3, measured on other prompts and seeds. Where an
# error is as the inverse of the density, that makes their sum least.
SHAPES = {"falling": (1.6, 0.4), "most in the second quarter": (0.7, 1.9, 0.8, 0.6)}
# Densities of the first step, of a fifth of the steps from the second on, and of all others.
RAMPED = 0.2, 0.7, 0.29
MANY = 12  # steps, from which on fewer than a quarter may be dense
PISA: Any = {"centre": "key", "order": "first", "score": "mean", "tile": "raster"}
SOL: Any = {"select": "threshold", "centre": "key", "score": "mean", "band": 1, "tile": "raster"}


def ramp(mean: float, steps: int, shares: tuple[float, ...]) -> tuple[float, ...]:
    """Densities of the steps: shares of their mean, on straight lines between those given."""
    along = np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, len(shares)), shares)
    return tuple(round(float(mean * x), 4) for x in along / along.mean())


def fewer(steps: int) -> dict[str, dict[str, Any]]:
    """One step, two, and a fifth of them dense: at the start, and from the second on."""
    found = {}
    for count in (1, 2, steps // 5):
        for first in (1, 2):
            last = first + count - 1
            words = {1: f"step {first}", 2: f"steps {first} and {last}"}
            name = words.get(count, f"steps {first} to {last}")
            found[name] = {"dense_at": (*range(first - 1, last),)}
    return found


def as_costly(mean: float, steps: int) -> dict[str, dict[str, Any]]:
    """Fields that keep more blocks in the place of dense steps beside a density of `mean`."""
    fifth, half = steps // 5, steps // 10
    in_all = {count: mean + (1 - mean) * count / steps for count in (1, 2, fifth)}
    found: dict[str, dict[str, Any]] = {
        f"{count} dense: {more:.3g} in all steps": {"method": Piecewise(round(more, 4))}
        for count, more in in_all.items()
    }
    if mean == RAMPED[0]:
        _, there, after = RAMPED
        ramped = Piecewise((mean, *(there,) * fifth, after))
        found[f"a fifth dense: {there:g} there, {after:g} after"] = {"method": ramped}
    more, at = mean + (1 - mean) * half / (steps - half), (*range(1, 1 + half),)
    name = f"{2 * half} dense: {more:.3g} and {half} dense"
    return found | {name: {"method": Piecewise(round(more, 4)), "dense_at": at}}


def settings(steps: int) -> dict[str, dict[str, Any]]:
    """Fields of `generate` by the name of a setting, "dense" first, with which all are
    compared."""
    found: dict[str, dict[str, Any]] = {"dense": {"method": Dense()}}
    quarter = steps // 4
    starts = {"first quarter": 0, "second quarter": quarter, "a quarter, from the second step": 1}
    if quarter == 1:
        starts.pop("second quarter")  # is that from the second step
    dense = {name: {"dense_at": (*range(n, n + quarter),)} for name, n in starts.items()}
    if steps >= MANY:
        dense |= fewer(steps)
    first = dense["first quarter"]
    for mean in (0.2, 0.1):
        plain = f"Piecewise({mean:g})"
        found[plain] = {"method": Piecewise(mean)}
        found |= {f"{plain}, dense: {name}": found[plain] | one for name, one in dense.items()}
        if steps >= MANY:
            found[f"{plain}, dense: the first layer"] = found[plain] | {"dense_layers": 1}
            costly = as_costly(mean, steps).items()
            found |= {f"{plain}, as costly as {name}": fields for name, fields in costly}
        for shape, shares in SHAPES.items():
            densities = ramp(mean, steps, shares)
            found[f"Piecewise, {mean:g} on average, {shape}"] = {"method": Piecewise(densities)}
    others = {
        "Piecewise(0.2, rest=None)": Piecewise(0.2, rest=None),
        "PISA at 0.2": Piecewise(0.2, **PISA),
        "Sol-Attn, tau 1": Piecewise(**SOL),
        "Radial": Radial(),
    }
    found |= {name: {"method": method} for name, method in others.items()}
    if steps >= MANY:
        [*_, at_first, from_second] = fewer(steps).items()
        for name, at in (at_first, from_second):
            found[f"Radial, dense: {name}"] = found["Radial"] | at
    after = (Radial(), Reuse(Radial()), Reuse(Piecewise(0.2)))
    names = ("Radial", "Reuse(Radial)", "Reuse(Piecewise(0.2))")
    for name, method in zip(names, after, strict=True):
        found[f"{name}, dense: first quarter"] = {"method": method} | first
    return found | {
        f"dense, --cache {name}": {"method": Dense(), "cache": name} for name in CACHES
    }


def suite(frames: int, steps: int) -> Suite:
    """Clips of a length in some steps, by all settings."""
    fields: dict[str, Any] = {"frames": frames, "height": SIZE, "width": SIZE, "steps": steps}
    fields |= {"max_tokens": 16, "dense_start": 0.0, "shift": SHIFT[frames]}
    if frames > TRAINED_FRAMES:
        rope = read_recipe(lora_path()).rope
        fields |= {"loras": (str(lora_path()),), "extend": (rope,)}
        fields |= {"sampler": "lcm", "guidance_scale": 1.0}
    else:
        fields |= {"sampler": "euler", "guidance_scale": GUIDANCE}
    return Suite("scored", PROMPTS, SEED, fields, settings(steps), beside="dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="FRAMES:STEPS", help="of these alone")
    parser.add_argument(
        "--settings", nargs="+", default=[], metavar="PART", help="with one in their names"
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/few_steps"))
    parser.add_argument("--docs", action="store_true", help="write the table of docs/few_steps.md")
    args = parser.parse_args()
    if args.docs:
        for name in RUNS:
            write_table(DOCS, name, "\n".join(table(read_result(name))))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for file, runs in RUNS.items():
        path = RESULTS / f"{file}.json"
        report = begun(path, {"runs": {}})
        for frames, steps in runs:
            one = f"{frames}:{steps}"
            if args.only and one not in args.only:
                continue
            report |= environment() | {"prompts": PROMPTS, "first_seed": SEED}
            found, known = report["runs"].setdefault(one, {}), settings(steps)
            work = args.work / one.replace(":", "_")
            for name, rows in made(suite(frames, steps), work, args.settings):
                found[name] = rows
                report["runs"][one] = {name: found[name] for name in known if name in found}
                write_json(path, report)


def table(report: dict[str, Any]) -> Iterator[str]:
    """Rows of the page: each setting, beside the same density without a dense step or a ramp."""
    yield (
        f"{report['prompts']} prompts, one seed each; {machine(report)}. Density of the sparse "
        "steps. PSNR to the dense clip of the same steps: mean (worst to best). Gain: mean "
        "difference, clip by clip, to the same method, or `Piecewise` of the same density, in all "
        "steps, with its t. Right: clips that show what was asked, at its pace."
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
    plain, gain = name.split(", ")[0], ""
    if plain in ("dense", name) or plain not in settings:
        mean = re.search(r"\b0\.\d\b", name.split(":")[0])
        plain = f"Piecewise({mean[0]})" if mean else name
    if name != plain:
        gain = str(Difference.of(values, [row["psnr_db"] for row in settings[plain]]))
    return f"| {name} | {density:.2f} | {spread(values)} | {gain} | {right} |"


if __name__ == "__main__":
    main()
