"""Tuned settings beside hand settings on the demo model, on prompts that were not tuned on.

    python benchmarks/tune.py --frames 65 --steps 10 --families old   # tune, then judge
    python benchmarks/tune.py --docs                                  # tables of docs/tune.md

A preset is tuned on the tuning prompts. Points of its frontier, and hand settings, then make the
fresh prompts' clips, with seeds that nothing else uses, and each clip is scored against the dense
clip of its seed. `at_equal_quality` reads off the line between the hand settings how many token
pairs, and how much time of attention, a hand setting of the same mean PSNR takes. Scores are kept
clip by clip under `--work`, so that an interrupted run goes on; `--worker K/N` makes a part of
them. Seconds are taken by `--timed N`, dense and all settings in turn, on an idle machine.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from pages import weights_of, write_between_marks
from rich.progress import track
from study import tuned as tables

import gen_accel
from gen_accel import Dense, Mixed, Piecewise, Radial, Rule, SparseLinear
from gen_accel.attention_processors import METHODS
from gen_accel.attention_processors.attached.attachment import attach_method
from gen_accel.demo import world
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment
from gen_accel.measure.quality import psnr
from gen_accel.pipelines.tuning import Tuned, load_tuned, tune
from gen_accel.pipelines.tuning.measuring import PipelineCall, decoded, generate, relative_error
from gen_accel.pipelines.tuning.solving import point_of, rules_of_point, settings_of
from gen_accel.pipelines.tuning.stages import default_candidates

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs" / "tune.md"
SIZE, GUIDANCE_SCALE = 96, 3.0
TUNING_SEED, FRESH_SEED = 100, 700
OLD = ("radial", "neighborhood", "block_mixture", "sparse_linear")
SETS = {"old": OLD, "all": tuple(METHODS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--families", choices=SETS, default="all")
    parser.add_argument("--tuning", type=int, default=4, help="prompts that are tuned on")
    parser.add_argument("--fresh", type=int, default=16, help="prompts that judge")
    parser.add_argument("--scale", choices=("mean", "even", "worst"), default="mean")
    parser.add_argument("--quality", type=float, default=30.0, help="bound of the preset, in dB")
    parser.add_argument(
        "--densities",
        type=float,
        nargs="+",
        default=(0.25, 0.45),
        help="of the points of the frontier that are judged",
    )
    parser.add_argument("--hands", nargs="+", help="hand settings, by how they begin; all")
    parser.add_argument(
        "--preset", type=Path, help="judge this one, of as many steps, tuned at another length"
    )
    parser.add_argument("--priced", action="store_true", help="time the candidates once more")
    parser.add_argument("--timed", type=int, default=0, help="rounds of seconds, on one prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", default="0/1", help="K/N: make every N-th clip, no more")
    parser.add_argument("--work", type=Path, default=Path("outputs/tune"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", action="store_true", help="write the tables of docs/tune.md")
    args = parser.parse_args()
    if args.docs:
        write_between_marks(DOCS, tables.lines())
        return
    torch.set_num_threads(args.threads)
    pipe: Any = WanPipeline.from_pretrained(gen_accel.demo.path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    found = tuned(pipe, args)
    if args.priced:
        found = found.priced(pipe).verify(pipe, held_out=captions(2, fresh=True))
        print(found.save(args.work / f"{title(args)}_{args.steps}_{args.quality:g}.json"))
    settings = hand(args.steps, args.hands) | points(found, args.densities)
    scores = judged(pipe, settings, args)
    if args.worker != "0/1":
        return
    report = {
        "frames": args.frames,
        "steps": args.steps,
        "families": args.families,
        "tuning_prompts": args.tuning,
        "tuned_at": 4 * (found.preset.made_for.grid[0] - 1) + 1,
        "scale": args.scale,
        "environment": environment(),
        "weights": weights_of(),
        "tuned": told(found),
        "settings": summed(settings, scores, found),
    }
    if args.timed:
        seconds = timings(pipe, settings, args)
        for name, times in seconds.items():
            report["settings"].setdefault(name, {})["attention_share"] = times
    report["rank_correlation"] = rank_correlation(report["settings"])
    report["at_equal_quality"] = at_equal_quality(report["settings"])
    write_json(args.out or RESULTS / f"{title(args)}.json", report)
    print(json.dumps(report["at_equal_quality"], indent=1))


def title(args: argparse.Namespace) -> str:
    """Name of the result file."""
    name = f"tune_{args.frames}_{args.families}"
    name += "" if args.tuning == 4 else f"_{args.tuning}_prompts"
    return name + ("" if args.scale == "mean" else f"_{args.scale}")


def captions(count: int, *, fresh: bool) -> list[str]:
    """Captions of the demo's world, drawn once; the fresh ones are none that is tuned on."""
    order = torch.randperm(len(world.SCENES), generator=torch.Generator().manual_seed(2027))
    held = order[32:] if fresh else order[:32]
    return [world.SCENES[i].caption for i in held[:count].tolist()]


def call_of(args: argparse.Namespace, seed: int) -> PipelineCall:
    sizes = {"height": SIZE, "width": SIZE, "num_frames": args.frames}
    more = {"guidance_scale": GUIDANCE_SCALE, "max_sequence_length": 16}
    return PipelineCall(args.steps, seed, sizes | more)


def tuned(pipe: Any, args: argparse.Namespace) -> Tuned:
    """Tune once, and read what was tuned afterwards."""
    path = args.preset or args.work / f"{title(args)}_{args.steps}_{args.quality:g}.json"
    if path.exists():
        return load_tuned(path)
    call = call_of(args, TUNING_SEED)
    grid = gen_accel.VideoShape((args.frames - 1) // 4 + 1, SIZE // 8, SIZE // 8)
    candidates = None
    if args.families != "all":
        candidates = default_candidates(grid, families=SETS[args.families])
    said = ""

    def tick(stage: str, done: int, total: int) -> None:
        nonlocal said
        if stage != said:
            print(f"{time.strftime('%H:%M:%S')} {stage}", flush=True)
        said = stage

    found = tune(
        pipe,
        captions(args.tuning, fresh=False),
        held_out=captions(2, fresh=True),
        quality=args.quality,
        candidates=candidates,
        scale=args.scale,
        num_inference_steps=args.steps,
        seed=TUNING_SEED,
        out=path,
        tick=tick,
        **call.more,
    )
    print(found)
    return found


def hand(steps: int, beginnings: Sequence[str] | None = None) -> dict[str, Mixed]:
    """Settings that a user would choose: one method, after some dense steps."""

    def after(share: float, method: Any) -> Mixed:
        first = round(share * steps)
        return Mixed((Rule(method, steps=(first, steps)),), steps)

    tenth = max(1, round(steps / 10))
    late = Mixed((Rule(Dense(), steps=(tenth, 3 * tenth)), Rule(Piecewise(0.2))), steps)
    found = {
        "Radial(0.5), 30 % dense": after(0.3, Radial(decay_factor=0.5)),
        "Radial(1), 20 % dense": after(0.2, Radial(decay_factor=1.0)),
        "Radial(1), 40 % dense": after(0.4, Radial(decay_factor=1.0)),
        "Radial(2), 40 % dense": after(0.4, Radial(decay_factor=2.0)),
        "SparseLinear(0.2), 30 % dense": after(0.3, SparseLinear(0.2)),
        "Piecewise(0.2), 20 % dense": after(0.2, Piecewise(0.2)),
        "Piecewise(0.2), 30 % dense": after(0.3, Piecewise(0.2)),
        "Piecewise(0.2), 10 to 30 % dense": late,
    }
    begin = tuple(beginnings or ("",))
    return {name: one for name, one in found.items() if name.startswith(begin)}


def points(found: Tuned, densities: Sequence[float]) -> dict[str, Mixed]:
    """The preset, and the points of the frontier that are nearest to some densities."""
    every = found.points
    near = {min(range(len(every)), key=lambda i: abs(every[i].density - d)) for d in densities}
    made = {
        f"tuned, {every[i].density:.3f}": rules_of_point(every[i], found.profile, found.candidates)
        for i in sorted(near)
    }
    return made | {"preset": found.method}


def judged(
    pipe: Any, settings: dict[str, Mixed], args: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Scores of each setting on the fresh prompts."""
    call = call_of(args, FRESH_SEED)
    prompts = captions(args.fresh, fresh=True)
    first, workers = map(int, args.worker.split("/"))
    folder = args.work / f"{args.frames}x{args.steps}"
    dense: dict[int, tuple[torch.Tensor, np.ndarray]] = {}
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    for i in track(range(len(prompts)), description="prompts"):
        if i % workers != first and workers > 1:
            continue
        for name, method in settings.items():
            file = folder / f"{key_of(method)}-{i:02d}.json"
            if not file.exists():
                if i not in dense:
                    latents = generate(pipe, prompts[i], i, call)
                    dense[i] = latents, decoded(pipe, latents)
                with attach_method(pipe, method) as handle:
                    latents = generate(pipe, prompts[i], i, call)
                    share = handle.summary().flops_share
                    kept = [(r.density, r.calls) for r in handle.records.values()]
                density = sum(d * n for d, n in kept) / sum(n for _, n in kept)
                video = decoded(pipe, latents)
                score = {
                    "psnr": min(psnr(video, dense[i][1]), 99.0),
                    "latent_error": relative_error(latents, dense[i][0]),
                    "density": density,
                    "flops": share,
                }
                write_json(file, score)
            scores[name].append(json.loads(file.read_text()))
    return scores


def key_of(method: Mixed) -> str:
    """Name of a setting's scores, by its rules."""
    return hashlib.sha256(repr(method).encode()).hexdigest()[:16]


def summed(
    settings: dict[str, Mixed], scores: dict[str, list[dict[str, float]]], found: Tuned
) -> dict[str, dict[str, Any]]:
    made = {}
    for name in settings:
        values = [one["psnr"] for one in scores[name]]
        made[name] = {
            "density": fmean(one["density"] for one in scores[name]),
            "psnr": fmean(values),
            "worst": min(values),
            "each": values,
            "latent_error": fmean(one["latent_error"] for one in scores[name]),
        }
        if (predicted := predicted_error(found, settings[name])) is not None:
            made[name]["predicted"] = predicted
    for point in found.points:
        name = f"tuned, {point.density:.3f}"
        if name in made:
            made[name]["tabled_cost"] = point.cost
    made["preset"]["tabled_cost"] = found.point.cost
    return made


def predicted_error(found: Tuned, method: Mixed) -> float | None:
    """Predicted relative error of the final latents; None where a rule is no candidate."""
    layers, heads = found.profile.layers.tolist(), found.profile.errors.shape[3]
    try:
        settings = settings_of(method, layers, heads, found.candidates)
    except ValueError:
        return None
    return point_of(found.profile, settings).predicted


def rank_correlation(settings: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Spearman's correlation of the predicted error with what was measured, over all settings
    that it is known of."""
    known = [one for one in settings.values() if "predicted" in one]
    ranks = {
        name: np.argsort(np.argsort([one[name] for one in known]))
        for name in ("predicted", "latent_error", "psnr")
    }
    found = {
        name: float(np.corrcoef(ranks["predicted"], ranks[name])[0, 1])
        for name in ("latent_error", "psnr")
    }
    return {"settings": len(known)} | found


def timings(
    pipe: Any, settings: dict[str, Mixed], args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Seconds of attention and of denoising of one clip, over dense ones, in turn."""
    call, prompt = call_of(args, FRESH_SEED), captions(1, fresh=True)[0]
    methods: dict[str, Any] = {"dense": Dense()} | settings
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for _ in range(args.timed):
        for name, method in methods.items():
            with attach_method(pipe, method, timed=True) as handle:
                start = time.perf_counter()
                generate(pipe, prompt, 0, call)
                whole = time.perf_counter() - start
                attention = sum(record.seconds or 0.0 for record in handle.records.values())
            taken[name].append((attention, whole))
    dense = [median(one[i] for one in taken["dense"]) for i in (0, 1)]
    made = {}
    for name, pairs in taken.items():
        shares = [median(one[i] for one in pairs) / dense[i] for i in (0, 1)]
        made[name] = {"attention": shares[0], "denoising": shares[1]}
    made["dense"] |= {"attention_seconds": dense[0], "denoising_seconds": dense[1]}
    return made


def told(found: Tuned) -> dict[str, Any]:
    preset = found.preset
    names = ("density", "cost", "predicted", "verified", "bound", "measured", "made_by")
    return {name: getattr(preset, name) for name in names} | {
        "candidates": [str(one) for one in found.candidates],
        "levels": found.profile.levels.tolist(),
        "sigmas": found.profile.sigmas.tolist(),
        "step_weights": found.profile.step_weights().tolist(),
        "seconds": found.profile.seconds.tolist(),
    }


def at_equal_quality(settings: dict[str, Any]) -> dict[str, Any]:
    """For each tuned point, what a hand setting of the same mean PSNR takes: on the line between
    the hand settings that no other one beats."""
    made: dict[str, Any] = {}
    tuned_ones = {n: s for n, s in settings.items() if n.startswith(("tuned", "preset"))}
    old = {n: s for n, s in settings.items() if n.startswith(("Radial", "Sparse"))}
    new = {n: s for n, s in settings.items() if n[0].isupper()}
    for among, hands in (("old_hand_settings", old), ("hand_settings", new)):
        rows = {}
        for name, one in tuned_ones.items():
            row = {}
            for what in ("density", "attention"):
                line = sorted((s["psnr"], _price(s, what)) for s in hands.values())
                price, own = on_line([x for x in line if x[1]], one["psnr"]), _price(one, what)
                if price is not None and own:
                    row[what] = 1 - own / price
            if row:
                rows[name] = row | {"psnr": one["psnr"], "worst": one["worst"]}
        made[among] = rows
    return made


def _price(setting: dict[str, Any], what: str) -> float:
    if what == "density":
        return setting["density"]
    return setting.get("attention_share", {}).get("attention", 0.0)


def on_line(pairs: Sequence[tuple[float, float]], psnr: float) -> float | None:
    """Least price at a PSNR, between two settings; None beyond them."""
    prices = []
    for low, cheap in pairs:
        for high, dear in pairs:
            if low <= psnr <= high and high > low:
                prices.append(cheap + (dear - cheap) * (psnr - low) / (high - low))
    return min(prices, default=None)


if __name__ == "__main__":
    main()
