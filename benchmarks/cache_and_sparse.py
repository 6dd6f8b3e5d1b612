"""A step cache and sparse attention on the demo model, each alone and both. See README.md.

    python benchmarks/cache_and_sparse.py           # takes turns, some minutes
    python benchmarks/cache_and_sparse.py --docs    # its results as the table of the docs

All runs of a round start from the same noise and prompt. Dense attention, cache-dit alone, sparse
attention alone and both take turns, so that what disturbs the machine disturbs all of them. Beside
the clock on the wall the processor's seconds are counted, which depend less on other processes.
"""

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cache_dit
import numpy as np
import torch
from pages import machine, right, weights_of, write_between_marks
from study import captured

from gen_accel import Schedule, attach
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.measure import write_json
from gen_accel.measure.machine import ExternalLoad, environment, version
from gen_accel.measure.quality import psnr

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "cache_and_sparse.md"
BRANCHES = 2  # of guidance: calls of the transformer in a step
FEW = 2  # steps of a run that only warms up


class Setting(NamedTuple):
    """Accelerations that a run has on the model.

    Args:
        threshold: of cache-dit, above which a step is computed; None for no cache.
        sparse: whether the method is attached.
    """

    name: str
    threshold: float | None = None
    sparse: bool = False


class Run(NamedTuple):
    """One generation.

    Args:
        video: (F, H, W, 3) uint8.
        skipped: calls of the transformer in which the cache took the place of its last block.
        density: of the sparse calls; None without any.
    """

    seconds: float
    cpu_seconds: float
    video: np.ndarray
    skipped: int
    density: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--frames", type=int, default=129)
    parser.add_argument("--steps", type=int, default=captured.STEPS)
    parser.add_argument("--dense-steps", type=int, default=4, help="also the cache's warm-up")
    parser.add_argument("--method", default="piecewise")
    parser.add_argument("--set", nargs="*", default=["critical=0.2"], metavar="FIELD=VALUE")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.08, 0.16])
    parser.add_argument("--rounds", type=int, default=3, help="each has a prompt of its own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="cache_and_sparse", help="of the JSON file in results/")
    parser.add_argument("--docs", action="store_true", help=f"write the table of {PAGE.name}")
    args = parser.parse_args()
    path = RESULTS / f"{args.name}.json"
    if args.docs:
        report = json.loads(path.read_text(encoding="utf-8"))
        write_between_marks(PAGE, table(report, args.name))
        return
    torch.set_num_threads(args.threads)
    write_json(path, measure(args))
    print(f"written to {path}")


def settings(thresholds: list[float]) -> list[Setting]:
    cached = [Setting(f"cache-dit, {x:g}", x) for x in thresholds]
    both = [Setting(f"both, {x:g}", x, True) for x in thresholds]
    return [Setting("dense"), *cached, Setting("sparse", sparse=True), *both]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    pipe = captured.pipeline()
    method = method_from(args.method, args.set)
    schedule = Schedule(dense_steps=args.dense_steps)
    warmup = sum(schedule.why_step(i, args.steps) is not None for i in range(args.steps))
    chosen = settings(args.thresholds)
    runs: dict[str, list[Run]] = {one.name: [] for one in chosen}
    busy = []
    for sparse in (False, True):  # libraries load and plans are made before the clock starts
        with put_on(pipe, Setting("", sparse=sparse), method, schedule, 0, FEW) as handle:
            generate(pipe, 0, args.frames, FEW, handle)
    for number in range(args.rounds):
        load = ExternalLoad()
        for one in chosen:
            with put_on(pipe, one, method, schedule, warmup, args.steps) as handle:
                runs[one.name].append(generate(pipe, number, args.frames, args.steps, handle))
        busy.append(load.busy())
        print(f"round {number + 1} of {args.rounds}: {busy[-1] or 'the machine was quiet'}")
    report = environment() | {"cache_dit": version("cache-dit"), "arguments": vars(args)}
    report |= {
        "weights": weights_of(),
        "method": str(method),
        "schedule": str(schedule),
        "warmup": warmup,
        "busy": busy,
    }
    calls = BRANCHES * args.steps
    report["rows"] = [row(one, runs, calls) for one in chosen]
    for found in report["rows"]:
        print(json.dumps(found))
    return report


@contextmanager
def put_on(
    pipe: Any, one: Setting, method: Any, schedule: Schedule, warmup: int, steps: int
) -> Iterator[Any]:
    """The handle of `attach`, or None; both come off at the end."""
    with ExitStack() as stack:
        handle = None
        if one.sparse:
            handle = stack.enter_context(attach(pipe, method, schedule=schedule))
        if one.threshold is not None:
            config = cache_dit.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                residual_diff_threshold=one.threshold,
                max_warmup_steps=warmup,
                num_inference_steps=steps,
            )
            cache_dit.enable_cache(pipe, cache_config=config)
            stack.callback(cache_dit.disable_cache, pipe)
        yield handle


def generate(pipe: Any, prompt: int, frames: int, steps: int, handle: Any) -> Run:
    """One clip; the clock stands still while it is decoded."""
    last = 0

    def count(*_: Any) -> None:
        nonlocal last
        last += 1

    hook = pipe.transformer.blocks[-1].attn1.to_q.register_forward_pre_hook(count)
    given = captured.arguments(prompt, frames) | {"num_inference_steps": steps}
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    latents = pipe(**given, output_type="latent").frames
    taken = time.perf_counter() - wall, time.process_time() - cpu
    hook.remove()
    density = None if handle is None else handle.summary().density
    return Run(*taken, decoded(pipe, latents), BRANCHES * steps - last, density)


@torch.no_grad()
def decoded(pipe: Any, latents: torch.Tensor) -> np.ndarray:
    """Decode latents (1, C, f, h, w) of the pipeline to (F, H, W, 3) uint8."""
    config = pipe.vae.config
    mean, std = (
        torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std)
    )
    video = pipe.vae.decode(latents * std + mean, return_dict=False)[0]
    shown = pipe.video_processor.postprocess_video(video, output_type="np")[0]
    return (shown * 255).round().astype(np.uint8)


def row(one: Setting, runs: dict[str, list[Run]], calls: int) -> dict[str, Any]:
    """Figures of a setting; ratios are to the dense run of the same round."""
    own, dense = runs[one.name], runs["dense"]
    pairs = list(zip(own, dense, strict=True))
    wall = [other.seconds / mine.seconds for mine, other in pairs]
    cpu = [other.cpu_seconds / mine.cpu_seconds for mine, other in pairs]
    near = [psnr(mine.video, other.video) for mine, other in pairs]
    return {
        **one._asdict(),
        "seconds": statistics.median(run.seconds for run in own),
        "cpu_seconds": statistics.median(run.cpu_seconds for run in own),
        "speedup": statistics.median(wall),
        "speedups": wall,
        "cpu_speedup": statistics.median(cpu),
        "cpu_speedups": cpu,
        "psnr_db": pooled(near),
        "psnr_db_lowest": pooled([min(near)]),
        "density": own[0].density,
        "skipped": statistics.mean(run.skipped for run in own) / calls,
        "shown": [captured.shown(run.video, prompt) for prompt, run in enumerate(own)],
    }


def pooled(decibels: list[float]) -> float | None:
    """PSNR of the mean squared error; None where all clips are the dense ones, bit for bit."""
    error = statistics.mean(10 ** (-x / 10) for x in decibels)
    return -10 * math.log10(error) if error else None


def table(report: dict[str, Any], name: str) -> list[str]:
    """Return the lines of the page on a result file of that name."""
    given, busy = report["arguments"], sum(one is not None for one in report["busy"])
    rounds = len(report["busy"])
    heads = ["", "speed-up, processor time", "speed-up, clock", "PSNR to dense, dB", "lowest"]
    heads += ["density", "calls cached"]
    heads += ["right clips"] if "shown" in report["rows"][0] else []
    lines = [
        "",
        f"The embedded model at {given['frames']} frames and {given['steps']} steps, with "
        f"`{given['method']}` and {', '.join(f'`{x}`' for x in given['set'])}. The first",
        f"{report['warmup']} steps are dense and not cached. cache-dit {report['cache_dit']}, "
        f"{machine(report)}. Rounds, with a prompt each:",
        f"{rounds}; other processes were busy during {busy}. Figures are medians of the rounds. "
        f"[Result file](../benchmarks/results/{name}.json).",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for row in report["rows"]:
        cells = [row["name"], spread(row, "cpu_speedup"), spread(row, "speedup")]
        near = row["psnr_db"], row["psnr_db_lowest"]
        cells += ["same clip" if x is None else f"{x:.1f}" for x in near]
        cells.append("1" if row["density"] is None else f"{row['density']:.3f}")
        cells.append(f"{row['skipped']:.0%}")
        cells += [right(row["shown"])] if "shown" in row else []
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def spread(row: dict[str, Any], name: str) -> str:
    """Median, and of several rounds the least and most."""
    if row["name"] == "dense":
        return "1"
    each = row[f"{name}s"]
    least_and_most = f" ({min(each):.2f} to {max(each):.2f})" if len(each) > 1 else ""
    return f"{row[name]:.2f}{least_and_most}"


if __name__ == "__main__":
    main()
