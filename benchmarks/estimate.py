"""Estimated seconds and memory of a transformer's forward pass against measured ones, on a CPU.

    python benchmarks/estimate.py
    python benchmarks/estimate.py --only wan --rounds 2 --out outputs/estimate.json

Models of diffusers' own classes with random weights, at half the width of the published ones and
of a few layers, run once densely and once by Radial, each kind in a process of its own and on one
thread. Seconds are processor time of the process, the least of a few rounds, so that other
processes on the machine count as little as they can; rates are measured in the same process,
before and after. Memory is the highest mark of resident memory less the mark before the call,
after a warm-up at a small size. glibc is told to give freed memory back at once; by itself it
keeps freed tensors below 32 MB, which models of this size consist of.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from memory import peak_memory
from pages import write_table

from gen_accel import Radial, VideoShape, attach
from gen_accel.io import write_json
from gen_accel.measure.cost.estimate import estimate
from gen_accel.measure.cost.model import Subject, subject_of
from gen_accel.measure.cost.rates import measure_rates
from gen_accel.measure.cost.work import Work, step_work
from gen_accel.measure.machine import ExternalLoad, check_same_machine, environment

RESULTS = Path(__file__).parent / "results" / "estimate.json"
PAGE = Path(__file__).parent.parent / "docs" / "estimate.md"
MARK = "estimate"
# glibc gives back what is freed of blocks above this size.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CLIPS = ((9, 256, 416), (17, 256, 416), (25, 256, 416))  # frames, height, width
MODELS: dict[str, dict[str, Any]] = {
    "wan": {
        "_class_name": "WanTransformer3DModel",
        **{"patch_size": (1, 2, 2), "num_attention_heads": 20, "attention_head_dim": 128},
        **{"ffn_dim": 6912, "num_layers": 1},
    },
    "hunyuan_video": {
        "_class_name": "HunyuanVideoTransformer3DModel",
        **{"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 1},
        **{"num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 2},
    },
    "ltx": {
        "_class_name": "LTXVideoTransformer3DModel",
        **{"num_attention_heads": 16, "attention_head_dim": 64, "cross_attention_dim": 1024},
        **{"num_layers": 3, "patch_size": 1},
    },
}


def measure(kind: str, clip: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Estimate and measure one model at one size, in this process."""
    import diffusers

    device, dtype, clock = torch.device("cpu"), torch.float32, time.process_time
    config = MODELS[kind]
    subject = subject_of(config)
    frames = subject.frames(-(-clip[0] // 4))  # as many latents for every model
    side = subject.spatial * subject.patch[1] // 16  # as many tokens for every model
    height, width = side * clip[1], side * clip[2]
    grid = subject.grid(height, width, frames)
    work = step_work(subject, grid, 1)
    assert work is not None
    model: Any = getattr(diffusers, str(config["_class_name"]))
    torch.manual_seed(0)
    model = model.from_config({k: v for k, v in config.items() if k != "_class_name"}).eval()

    def given(video: VideoShape) -> dict[str, Any]:
        filled = subject.family.inputs(model, video, subject.text or 0, 1)
        return {
            name: torch.randn_like(value)
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 2
            else value
            for name, value in filled.items()
        }

    inputs, small = given(grid), given(VideoShape(2, 4, 4))
    load, rates = ExternalLoad(), [measure_rates(device, dtype, subject.head_dim, clock)]
    found = estimate(
        config, Radial(), height=height, width=width, num_frames=frames, remeasure=True
    )
    dense, memory = _timed(model, inputs, small, rounds, clock)
    with attach(model, Radial()):
        sparse, sparse_memory = _timed(model, inputs, small, rounds, clock)
    rates.append(measure_rates(device, dtype, subject.head_dim, clock))
    best = {name: max(one[name] for one in rates) for name in rates[0]}
    saved = subject.flops(grid).attention * (1 - found.computed_density / found.efficiency)
    thinned = replace(work, attention=work.attention - saved)
    copies = max(work.peak, work.at_attention + 4 * _row(subject, grid, dtype))
    return {
        "model": kind,
        "frames": frames,
        "height": height,
        "width": width,
        "tokens": grid.tokens,
        "parameters": sum(value.numel() for value in model.parameters()),
        "rates": best,
        "density": found.density,
        "efficiency": found.efficiency,
        "seconds": _against(_seconds(work, best), dense),
        "sparse_seconds": _against(_seconds(thinned, best), sparse),
        "memory_mb": _against(work.peak / 1e6, memory),
        "sparse_memory_mb": _against(copies / 1e6, sparse_memory),
        "busy": load.busy(),
    }


def _timed(
    model: Any, inputs: dict[str, Any], small: dict[str, Any], rounds: int, clock: Any
) -> tuple[float, float]:
    """Least seconds of a call, and the most MB that one needed."""
    with torch.no_grad():
        model(**small, return_dict=False)
        with peak_memory(torch.device("cpu")) as used:
            model(**inputs, return_dict=False)
        seconds = []
        for _ in range(rounds):
            start = clock()
            model(**inputs, return_dict=False)
            seconds.append(clock() - start)
    return min(seconds), used.get("mb", float("nan"))


def _seconds(work: Work, rates: dict[str, float]) -> float:
    return (
        work.products / rates["products"]
        + work.attention / rates["attention"]
        + work.moved / rates["moved"]
    )


def _against(estimated: float, measured: float) -> dict[str, float]:
    return {
        "estimated": estimated,
        "measured": measured,
        "error": estimated / measured - 1,
    }


def _row(subject: Subject, grid: VideoShape, dtype: torch.dtype) -> int:
    """Bytes of one tensor of all tokens."""
    width = max(site.heads * site.dim for site in subject.sites)
    return subject.whole(grid).tokens * width * dtype.itemsize


def table(results: dict[str, Any]) -> str:
    """Results as Markdown; the errors are estimate / measurement - 1."""
    head = ("model", "tokens", "dense, s", "sparse, s", "dense, MB", "sparse, MB")
    rows = [head, ("---", *["---:"] * 5)]
    for row in results["rows"]:
        cells = [
            f"{row[name]['estimated']:.{digits}f} of {row[name]['measured']:.{digits}f} "
            f"({row[name]['error']:+.0%})"
            for name, digits in (
                ("seconds", 2),
                ("sparse_seconds", 2),
                ("memory_mb", 0),
                ("sparse_memory_mb", 0),
            )
        ]
        rows.append((row["model"], f"{row['tokens']:,}", *cells))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    busy = sum(row["busy"] is not None for row in results["rows"])
    machine = f"{results['environment']['device']}, torch {results['environment']['torch']}"
    return "\n".join(
        [
            "Estimated of measured, and the error:",
            "",
            *lines,
            "",
            f"{machine}; others were busy during {busy} of {len(results['rows'])} rows.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=MODELS, help="one of the models")
    parser.add_argument("--clips", type=int, default=1, help="how many sizes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        kind, number = args.cell
        torch.set_num_threads(1)
        write_json(args.out, measure(kind, CLIPS[int(number)], args.rounds))
        return
    rows, here = [], environment() | {"threads": 1}
    for kind in [args.only] if args.only else MODELS:
        for number in range(args.clips):
            rows.append(_in_a_process(kind, number, args.rounds))
            row = rows[-1]
            print(
                f"{kind}, {row['tokens']} tokens: seconds {row['seconds']['error']:+.1%}, sparse "
                f"{row['sparse_seconds']['error']:+.1%}, memory {row['memory_mb']['error']:+.1%}, "
                f"sparse {row['sparse_memory_mb']['error']:+.1%}",
                flush=True,
            )
    if args.only and args.out.exists():  # the rows of the other models stay
        held = json.loads(args.out.read_text())
        check_same_machine(held["environment"], here, str(args.out))
        rows = [row for row in held["rows"] if row["model"] != args.only] + rows
    results = {"environment": here, "rows": rows}
    write_json(args.out, results)
    print(args.out, table(results), sep="\n\n")
    if args.out == RESULTS:
        write_table(PAGE, MARK, table(results))


def _in_a_process(kind: str, number: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        cell = ["--cell", kind, str(number), "--rounds", str(rounds), "--out", str(out)]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        cache = {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))}
        env = os.environ | ENVIRONMENT | threads | cache
        subprocess.run([sys.executable, __file__, *cell], env=env, check=True)
        return json.loads(out.read_text())


if __name__ == "__main__":
    main()
