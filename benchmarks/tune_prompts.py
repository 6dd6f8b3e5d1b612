"""Gain of more tuning prompts, and of other weightings, on prompts that were not tuned on.

    python benchmarks/tune.py --tuning 8 --worker 0/16   # tunes on eight prompts
    python benchmarks/tune_prompts.py outputs/tune/tune_65_all_8_prompts_10_30.json

The profile holds the errors of each prompt by itself. Settings are solved from its first 2, 4 and
8 prompts and by each weighting, all of them with the same attention time in the profile's table,
and make the fresh prompts' clips. Scores are kept clip by clip, as `tune.py` keeps them.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
import tune
from diffusers import WanPipeline
from pages import weights_of

import gen_accel
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment
from gen_accel.pipelines.tuning import Tuned, load_tuned, solving
from gen_accel.pipelines.tuning.preset import Profile
from gen_accel.pipelines.tuning.solving import Point, SolveOptions, rules_of_point
from gen_accel.registry import Scale

COUNTS = (2, 4, 8)
RESULT = tune.RESULTS / "tune_prompts.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tuned", type=Path, help="a preset with its profile, of eight prompts")
    parser.add_argument("--cost", type=float, default=0.4, help="attention time, a share of dense")
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--fresh", type=int, default=16, help="prompts that judge")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", default="0/1", help="K/N: make every N-th clip, no more")
    parser.add_argument("--work", type=Path, default=Path("outputs/tune"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe: Any = WanPipeline.from_pretrained(gen_accel.demo.path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    found = load_tuned(args.tuned)
    chosen = {
        (count, scale): at_cost(
            of_prompts(found, count), replace(found.options, scale=scale), args
        )
        for count in COUNTS
        for scale in get_args(Scale)
    }
    settings = {
        f"{count} {scale}": rules_of_point(point, found.profile, found.candidates)
        for (count, scale), point in chosen.items()
    }
    scores = tune.judged(pipe, settings, args)
    if args.worker != "0/1":
        return
    rows = []
    for (count, scale), point in chosen.items():
        values = [one["psnr"] for one in scores[f"{count} {scale}"]]
        rows.append(
            {
                "prompts": count,
                "scale": scale,
                "cost": point.cost,
                "density": fmean(one["density"] for one in scores[f"{count} {scale}"]),
                "psnr": fmean(values),
                "worst": min(values),
                "each": values,
            }
        )
    report = {"frames": args.frames, "steps": args.steps, "cost": args.cost, "rows": rows}
    write_json(RESULT, report | {"environment": environment(), "weights": weights_of()})


def of_prompts(found: Tuned, count: int) -> Profile:
    """Profile of the first prompts alone."""
    profile = found.profile
    if count > len(profile.errors):
        raise SystemExit(f"the profile holds {len(profile.errors)} prompts, {count} are compared")
    first = {name: getattr(profile, name)[:count] for name in ("errors", "squares", "weights")}
    return replace(profile, **first)


def at_cost(profile: Profile, options: SolveOptions, args: argparse.Namespace) -> Point:
    """Find the choice with the least error that costs no more than is asked, by bisection."""
    low, high = math.log(1e-5), math.log(1e3)
    best = None
    for _ in range(60):
        middle = (low + high) / 2
        point = solving.at_error(profile, math.exp(middle), options)
        if point is not None and point.cost <= args.cost:
            best, high = point, middle
        else:
            low = middle
    if best is None:
        raise SystemExit(f"no choice takes {args.cost:g} of dense attention or less")
    return best


if __name__ == "__main__":
    main()
