"""Seconds and peak memory of plans of 0.9 and 3.5 million tokens, each in a process of its own.

A plan is made and prepared for the CPU kernel, which reads lists of the blocks that it keeps.
"""

import argparse
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from gen_accel import Neighborhood, Radial, VideoShape
from gen_accel.attention_processors.methods.neighborhood import plan_for_device
from gen_accel.attention_processors.methods.radial import gpu_plan
from gen_accel.kernels import lists
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment
from gen_accel.plan import Plan

PATH = Path(__file__).parent / "results" / "plan_large.json"
VIDEOS = VideoShape(61, 90, 160), VideoShape(241, 90, 160)
SMALL = VideoShape(5, 32, 32)
WINDOW = Neighborhood((-1, 24, 24))
PLANS: dict[str, Callable[[VideoShape], Plan]] = {
    "Radial()": Radial().plan,
    "Radial(), blocks of a GPU": partial(gpu_plan, Radial()),
    "Radial(rule=paper)": Radial("paper").plan,
    "Radial(rule=code-2025-11)": Radial("code-2025-11").plan,
    "Neighborhood(window=(-1, 24, 24))": WINDOW.plan,
    "Neighborhood(window=(-1, 24, 24)), blocks of a GPU": partial(
        plan_for_device, WINDOW, gpu=True
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    report: dict[str, Any] = environment(torch.device("cpu"))
    report |= {"threads": args.threads, "rows": []}
    for video, name in product(VIDEOS, PLANS):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            row = fresh.submit(measured, name, video, args.threads).result()
        report["rows"].append({"video": str(video), "tokens": video.tokens, "method": name} | row)
        write_json(PATH, report)
        print(
            f"{video.tokens:>8} tokens  {name:<52}processor {row['plan_cpu_s']:5.2f} s plan "
            f"{row['density_cpu_s']:5.2f} s density {row['prepare_cpu_s']:5.2f} s lists   "
            f"{row['plan_mb']:4.0f} MB, with lists {row['peak_mb']:4.0f} MB",
            flush=True,
        )
    print(f"written to {PATH}")


def measured(name: str, video: VideoShape, threads: int) -> dict[str, Any]:
    """Seconds of each part, by the clock and of the processor; and the peak of resident memory,
    in MB beyond what a small plan has left."""
    torch.set_num_threads(threads)
    small = PLANS[name](SMALL)
    _ = small.density, lists.kept_blocks(small)
    row: dict[str, Any] = {}
    before, last = peak(), (time.perf_counter(), time.process_time())

    def lap(part: str) -> None:
        nonlocal last
        now = time.perf_counter(), time.process_time()
        row[f"{part}_s"], row[f"{part}_cpu_s"] = (b - a for a, b in zip(last, now, strict=True))
        last = now

    plan = PLANS[name](video)
    lap("plan")
    row["plan_mb"] = peak() - before
    row |= {"density": plan.density, "computed_density": plan.computed_density}
    lap("density")
    lists.blocks_of_runs(plan, torch.int32)
    lap("prepare")
    row["peak_mb"] = peak() - before
    row["has_mask"] = "keep" in vars(plan)
    return row


def peak() -> float:
    """MB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3


if __name__ == "__main__":
    main()
