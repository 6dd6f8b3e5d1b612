"""Quality of every method on the demo model, beside dense attention and beside one another.

    python benchmarks/methods.py --errors      # of attention, on captured q, k and v
    python benchmarks/methods.py --ablation    # what each part of a pooled rest buys
    python benchmarks/methods.py --random      # the same on a Wan with random weights
    python benchmarks/methods.py --clips       # whole clips; --worker 1/2, 2/2 share them
    python benchmarks/methods.py --scores      # the same by each score of Piecewise, paired
    python benchmarks/methods.py --others      # ways that were measured and not built
    python benchmarks/methods.py --choices     # rivals of the default's choice and rest; --lora,
                                               # --frames 33
    python benchmarks/methods.py --docs        # tables and pictures in docs/ and README

Prompts are the first scenes of the list that the demo model is scored by, the i-th with seed i:
they were fixed before any clip was made. Alpha and tau are found on prompts that are not measured.
See README.md.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pages import weights_of
from study import ablation, captured, choices, clips, errors, others, page, random_wan, settings
from study.variants import Variant

from gen_accel import Piecewise, SparseLinear, attach
from gen_accel.measure import psnr, write_json
from gen_accel.measure.machine import environment, other_machine, processor

RESULTS = Path(__file__).parent / "results"
KEPT = Path("outputs/methods")  # clips and rows so far
MEASURED, FITTED = (0, 1, 2, 3, 4, 5), (6, 7)  # prompts
FEWER_LAYERS = 0, 1, 3, 4  # of the six, for errors of the ablation
FEWEST = 1, 4  # of all its combinations
RANDOM_LAYERS = 0, 3  # of the four of `random_wan`
FEWER = 3  # of those measured, for clips of a cell of the ablation
STEPS_SEEN = 5, 12
ROUNDS = 7
# Of --scores: prompts of no other mode, and steps.
SCORED, SCORED_STEPS = range(8, 24), 12
# Of --clips, by density.
POOLED = {
    0.2: settings.POOLED,
    0.1: ("Piecewise", "PISA", "Sol-Attn"),
    0.05: ("Piecewise",),
    0.3: ("Piecewise",),
}
CALIBRATED = {  # their tiles are chosen first
    0.2: ("Piecewise", "PISA", "Sol-Attn"),
    0.1: ("Piecewise",),
    0.05: ("Piecewise",),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    for name in ("errors", "ablation", "random", "clips", "scores", "others", "choices", "docs"):
        mode.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--frames", type=int, default=captured.FRAMES)
    parser.add_argument("--prompts", type=int, nargs="+", default=MEASURED)
    parser.add_argument("--only", nargs="+", help="beginnings of settings of --clips")
    parser.add_argument("--name", help="of the JSON file of --clips in results/")
    parser.add_argument("--worker", default="1/1", help="K/N: every N-th setting from K (--clips)")
    parser.add_argument("--whole", action="store_true", help="all combinations of --ablation")
    parser.add_argument("--lora", action="store_true", help="the demo's LoRA (--choices)")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.docs:
        page.write()
        return
    modes = {
        "errors": of_errors,
        "ablation": of_ablation,
        "random": of_random,
        "clips": of_clips,
        "scores": of_scores,
        "others": of_others,
        "choices": of_choices,
    }
    run = next(run for name, run in modes.items() if getattr(args, name))
    prompts = [captured.PROMPTS[i] for i in args.prompts]
    head = environment() | {"frames": args.frames, "prompts": prompts}
    run(args, head if args.random else head | {"weights": weights_of()})


def of_errors(args: argparse.Namespace, head: dict[str, Any]) -> None:
    """Every method at every density: error, density, milliseconds in turns with dense."""
    pipe, video = captured.pipeline(), captured.grid(args.frames)
    some = args.prompts[:2]
    calls = captured.capture(pipe, some, STEPS_SEEN, args.frames)
    others = captured.capture(pipe, FITTED[:1], STEPS_SEEN, args.frames)
    report = head | {"steps": STEPS_SEEN, "prompts_seen": some, "rows": []}
    tile = None
    for density in settings.DENSITIES:
        made = settings.pooled(density, lambda x: errors.density_of(x, others, video))
        methods = settings.old(density, video) | made
        if tile is None:
            tile = calibrated_tile(pipe, methods["Piecewise"], args.frames)
        methods["Piecewise, calibrated"] = methods["Piecewise"].tiled(tile)
        methods["SparseLinear"], branches = fitted(pipe, methods["SparseLinear"], args.frames)
        taken = errors.milliseconds(methods, calls[0], video, ROUNDS, branches)
        for name, method in methods.items():
            known = branches if isinstance(method, SparseLinear) else None
            found = errors.error_of(method, calls, video, known)
            row = {"method": name, "asked": density, "options": str(method), **found}
            row |= {"ms": taken[name], "dense_ms": taken["dense"]}
            keep_row(report, row, RESULTS / f"methods_errors_{args.frames}.json")
        for rest in ("none", "key", "second order"):
            found = errors.oracle(density, rest, calls, video)
            row = {"method": f"oracle's choice, rest {rest}", "asked": density, **found}
            keep_row(report, row, RESULTS / f"methods_errors_{args.frames}.json")


def fitted(pipe: Any, method: SparseLinear, frames: int) -> tuple[Any, dict[int, Any]]:
    """The method with its tiles, and the branches of each layer, fitted to prompts that are not
    measured."""
    with attach(pipe, method) as handle:
        clips.fit_to(pipe, fit_prompts(), frames)
        return handle.method, dict(enumerate(handle.branches.values()))


def calibrated_tile(pipe: Any, method: Any, frames: int) -> Any:
    """The boxes that `calibrate` chooses on a prompt that is not measured."""
    with attach(pipe, method, schedule=clips.SCHEDULE) as handle:
        clips.fit_to(pipe, fit_prompts()[:1], frames, captured.STEPS)
        return handle.method.tile


def fit_prompts() -> list[str]:
    return [captured.PROMPTS[i] for i in FITTED]


def of_ablation(args: argparse.Namespace, head: dict[str, Any]) -> None:
    pipe, video = captured.pipeline(), captured.grid(args.frames)
    steps = (ablation.MADE_AT, *STEPS_SEEN)
    prompts = args.prompts[: 1 if args.whole else 2]
    layers = FEWEST if args.whole else FEWER_LAYERS
    calls = captured.capture(pipe, prompts, steps, args.frames)
    calls = [call for call in calls if call.layer in layers]
    facts = {"steps": STEPS_SEEN, "made_at": ablation.MADE_AT, "layers": layers}
    facts |= {"prompts": [captured.PROMPTS[i] for i in prompts]}
    report = head | facts | {"rows": []}
    name = "methods_ablation_whole" if args.whole else "methods_ablation"
    for row in ablation.cells(calls, video, whole=args.whole):
        keep_row(report, row, RESULTS / f"{name}.json")


def of_random(args: argparse.Namespace, head: dict[str, Any]) -> None:
    """The cells of the ablation on calls of a model that nobody trained."""
    video, steps = captured.grid(args.frames), (ablation.MADE_AT, *STEPS_SEEN)
    calls = [c for c in random_wan.capture(steps, video) if c.layer in RANDOM_LAYERS]
    facts = {"steps": STEPS_SEEN, "made_at": ablation.MADE_AT, "layers": RANDOM_LAYERS}
    report = head | {"prompts": [], "model": random_wan.CONFIG} | facts | {"rows": []}
    for row in ablation.cells(calls, video, whole=args.whole):
        keep_row(report, row, RESULTS / "methods_random.json")


def of_clips(args: argparse.Namespace, head: dict[str, Any]) -> None:
    """Each setting is a file of its own until it stands in the results: a run goes on where
    another ended, and several share the work."""
    folder = KEPT / f"{args.frames}"
    path = RESULTS / f"{args.name or f'methods_clips_{args.frames}'}.json"
    head |= {"processor": processor()}  # without its rate: no figure here is a time
    pipe = captured.pipeline()
    every = clip_settings(pipe, args.frames)
    names = [n for n in every if args.only is None or n.startswith((*args.only,))]
    first, workers = map(int, args.worker.split("/"))
    dense = clips.keep_dense(pipe, folder, args.prompts, args.frames)
    for name in names[first - 1 :: workers]:
        if name in collected(path, folder, head):
            continue
        method, fit = every[name]()
        known = fit_prompts() if fit else ()
        steps = captured.STEPS if isinstance(method, Piecewise) else clips.FIT_STEPS
        some = args.prompts[: FEWER if isinstance(method, Variant) else None]
        rows = clips.measured(pipe, method, some, args.frames, folder, known, steps)
        where = {key: head[key] for key in ("device", "processor", "weights")}
        made = {"setting": name, "options": str(method), **where, "rows": rows}
        write_json(folder / f"{name}.json", made)
        print(clip_line(name, rows), flush=True)
    found = collected(path, folder, head)
    some = [found[name] for name in every if name in found]
    write_json(path, head | {"dense": dense, "settings": some})


def collected(path: Path, folder: Path, head: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by name, of the results so far on this device and in the folder of this run."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = all(known.get(key) == head[key] for key in ("frames", "prompts"))
    there = known["settings"] if same and not is_other(known, head) else []
    made = [json.loads(one.read_text(encoding="utf-8")) for one in folder.glob("*.json")]
    there += [one for one in made if not is_other(one, head)]
    return {setting["setting"]: setting for setting in there}


def is_other(known: dict[str, Any], head: dict[str, Any]) -> bool:
    """Whether figures are of another machine or of other weights."""
    return bool(other_machine(known, head)) or known.get("weights") != head["weights"]


def of_scores(args: argparse.Namespace, head: dict[str, Any]) -> None:
    """Clips by each score and their dense one, prompt by prompt. A run goes on where another ended
    on this device."""
    path, pipe = RESULTS / "methods_scores.json", captured.pipeline()
    report = head | {"steps": SCORED_STEPS, "rows": []}
    report["prompts"] = [captured.PROMPTS[i] for i in SCORED]
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known and not is_other(known, head):
        report["rows"] = known["rows"]
    made = {row["prompt"] for row in report["rows"]}
    for prompt in SCORED:
        if prompt in made:
            continue
        dense, rows = clips.clip(pipe, prompt, args.frames, SCORED_STEPS), []
        for density in (0.2, 0.1):
            for score in ("loss", "pooled"):
                method = Piecewise(density, score=score)
                with attach(pipe, method, schedule=clips.SCHEDULE) as handle:
                    clip = clips.clip(pipe, prompt, args.frames, SCORED_STEPS)
                    found = {"psnr_db": psnr(clip, dense), "density": handle.summary().density}
                rows.append({"prompt": prompt, "score": score, "asked": density, **found})
        for row in rows:  # of all or none of a prompt
            keep_row(report, row, path)


def of_others(args: argparse.Namespace, head: dict[str, Any]) -> None:
    pipe, video = captured.pipeline(), captured.grid(args.frames)
    calls = captured.capture(pipe, args.prompts[:2], STEPS_SEEN, args.frames)
    report = head | {"steps": STEPS_SEEN, "density": 0.2, "rows": []}
    for row in others.rows(calls, video, 0.2):
        keep_row(report, row, RESULTS / "methods_others.json")


def of_choices(args: argparse.Namespace, head: dict[str, Any]) -> None:
    """Rivals of the default, prompt by prompt; with the demo's LoRA and at another length the
    closest ones. A run goes on where another ended on this device."""
    length = "" if args.frames == captured.FRAMES else f"_{args.frames}"
    own = "_lora" if args.lora else length
    path = RESULTS / f"methods_choices{own}.json"
    video, names = captured.grid(args.frames), choices.CLOSEST if own else None
    facts: dict[str, Any] = {"steps": STEPS_SEEN, "layers": FEWER_LAYERS}
    if not own:
        facts |= {"single_tokens": [*choices.of_single_tokens(video, ROUNDS)]}
    report = head | facts | {"rows": []}
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known and not is_other(known, head):
        report["rows"] = known["rows"]
    made = {row["prompt"] for row in report["rows"]}
    taking = captured.of_lora(args.frames) if args.lora else nullcontext(captured.pipeline())
    with taking as pipe:
        for prompt in args.prompts:
            if prompt in made:
                continue
            guidance = 1.0 if args.lora else captured.GUIDANCE
            calls = captured.capture(pipe, [prompt], STEPS_SEEN, args.frames, guidance)
            with torch.no_grad():
                some = [call for call in calls if call.layer in FEWER_LAYERS]
                rows = [*choices.rows(some, video, names)]
            for row in rows:  # of all or none of a prompt
                keep_row(report, {"prompt": prompt, **row}, path)


def clip_settings(pipe: Any, frames: int) -> dict[str, Callable[[], tuple[Any, bool]]]:
    """Settings by name: what makes the method, and whether it is calibrated first."""
    video = captured.grid(frames)
    found: dict[str, Callable[[], tuple[Any, bool]]] = {}
    for density, names in POOLED.items():
        for name in names:
            found[f"{name} {density}"] = lambda name=name, density=density: (
                pooled_at(pipe, density, frames)[name],
                False,
            )
    for density, names in CALIBRATED.items():
        for name in names:
            found[f"{name}, calibrated {density}"] = lambda name=name, density=density: (
                pooled_at(pipe, density, frames)[name],
                True,
            )
    for name, method in settings.old(0.2, video).items():
        fit = isinstance(method, SparseLinear)
        found[f"{name} 0.2"] = lambda method=method, fit=fit: (method, fit)
    for name, density in equal_times(frames).items():
        method = settings.old(density, video)[name]
        fit = isinstance(method, SparseLinear)
        found[f"{name}, as slow as Piecewise 0.2"] = lambda method=method, fit=fit: (method, fit)
    parts = {
        "choice mean": Variant("mean"),
        "choice spread": Variant("spread"),
        "choice threshold": Variant("threshold"),
        "choice oracle": Variant("oracle"),
        "rest none": Variant(rest="none"),
        "rest key": Variant(rest="key"),
        "rest key + slope": Variant(rest="key + slope"),
        "rest mixed": Variant(rest="mixed"),
        "rest query": Variant(rest="query"),
        "tile 1 x 6 x 12": Variant(tile=(1, 6, 12)),
        "tile 33 x 2 x 1": Variant(tile=(33, 2, 1)),
        "tile raster": Variant(tile="raster"),
        "query block 128": Variant(block_q=128),
        "query block 256": Variant(block_q=256),
    }
    for name, variant in parts.items():
        found[name] = lambda variant=variant: (at_density(variant, pipe, frames), False)
    return found


def equal_times(frames: int) -> dict[str, float]:
    """Densities of the old methods at which a call takes as long as Piecewise's at 0.2, where
    `--errors` has measured it."""
    path = RESULTS / f"methods_errors_{frames}.json"
    if not path.exists():
        return {}
    return settings.equal_time(json.loads(path.read_text(encoding="utf-8"))["rows"], 0.2)


def at_density(variant: Variant, pipe: Any, frames: int, density: float = 0.2) -> Variant:
    """A cell of the ablation at a density, as `pooled_at`."""
    calls = seen(pipe, frames)
    layout = variant.layout(captured.grid(frames))
    scores = [variant.scores(call.q, call.k, call.v, layout) for call in calls]
    return replace(variant, **ablation.setting(variant, density, layout, scores))


@cache
def pooled_at(pipe: Any, density: float, frames: int) -> dict[str, Any]:
    """The methods with a rest at a density, found on a prompt that is not measured."""
    calls, video = seen(pipe, frames), captured.grid(frames)
    return settings.pooled(density, lambda x: errors.density_of(x, calls, video))


@cache
def seen(pipe: Any, frames: int) -> list[captured.Captured]:
    """Calls of a prompt that is not measured."""
    return captured.capture(pipe, FITTED[:1], STEPS_SEEN[:1], frames)


def clip_line(name: str, rows: list[dict[str, Any]]) -> str:
    found = [row["psnr_db"] for row in rows]
    return f"{name:<24}{sum(found) / len(found):6.2f} dB, {min(found):6.2f} worst"


def keep_row(report: dict[str, Any], row: dict[str, Any], path: Path) -> None:
    report["rows"].append(row)
    write_json(path, report)
    told = {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}
    print("  ".join(f"{key} {x}" for key, x in told.items() if key != "options"), flush=True)


if __name__ == "__main__":
    main()
