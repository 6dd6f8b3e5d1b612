"""Every sparse method on every kernel that can run it, in turn with the best dense attention.

    python benchmarks/kernels.py --device cpu
    python benchmarks/kernels.py --device cuda
    python benchmarks/kernels.py --docs          # the results as a page, docs/performance.md

A kernel that fails parity is not timed. See README.md for the columns.
"""

import argparse
import ctypes
import gc
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from parity import DTYPES, brief, call, check_parity, draw, shrink, step
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gen_accel import BlockMixture, Neighborhood, Radial, SparseLinear, VideoShape
from gen_accel.kernels import KERNELS, facts_of, flex, preference, unsupported
from gen_accel.measure import write_json
from gen_accel.measure.environment import environment
from gen_accel.measure.timing import interleaved
from gen_accel.method import parts_of, plan_of
from gen_accel.plan import Plan

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
PAGE = ROOT.parent / "docs" / "performance.md"

# Published shapes at published densities, and the longer clips that they are for.
CUDA_CASES = (
    (VideoShape(21, 30, 52), 12, Radial()),
    (VideoShape(81, 30, 52), 12, Radial()),
    (VideoShape(21, 45, 80), 40, Radial()),
    (VideoShape(81, 45, 80), 40, Radial()),
    (VideoShape(30, 48, 80), 24, Radial()),
    (VideoShape(120, 48, 80), 24, Radial()),
    (VideoShape(21, 30, 52), 12, Radial("code-2025-11", decay_factor=0.2)),
    (VideoShape(30, 48, 80), 24, Neighborhood((18, 24, 24), stride=(16, 8, 8))),
    (VideoShape(30, 48, 80), 24, Neighborhood((18, 24, 24))),
    (VideoShape(21, 30, 52), 12, SparseLinear(critical=0.05)),
    (VideoShape(21, 30, 52), 12, SparseLinear(critical=0.05, linear_over="all")),
    (VideoShape(21, 30, 52), 12, SparseLinear(critical=0.05, linear_over="marginal")),
    *(
        (video, 12, BlockMixture(partition=partition, routing=routing))
        for video in (VideoShape(21, 30, 52), VideoShape(24, 36, 64))
        for partition in ("1d", "2d", "3d")
        for routing in ("token", "block")
    ),
)

# 4k to 16k tokens on 12 x 12 frames, at a density of about 0.1 and at the methods' defaults; of
# radial attention also with whole frames as tiles, which processors that multiply tiles ask for.
CPU_CASES = (
    (VideoShape(28, 12, 12), 2, Radial()),
    (VideoShape(28, 12, 12), 2, SparseLinear(critical=0.1)),
    (VideoShape(57, 12, 12), 2, Radial()),
    (VideoShape(57, 12, 12), 2, Radial(decay_factor=0.15)),
    (VideoShape(57, 12, 12), 2, Radial(decay_factor=0.1, block=432, tile_frames=3, tile_side=12)),
    (VideoShape(57, 12, 12), 2, Neighborhood((-1, 4, 4))),
    (VideoShape(57, 12, 12), 2, SparseLinear(critical=0.1)),
    (VideoShape(57, 12, 12), 2, SparseLinear(critical=0.1, block_q=128)),
    (VideoShape(57, 12, 12), 2, BlockMixture(partition="1d")),
    (VideoShape(57, 12, 12), 2, BlockMixture(partition="2d")),
    (VideoShape(57, 12, 12), 2, BlockMixture(partition="3d")),
    (VideoShape(57, 12, 12), 2, BlockMixture(partition="3d", routing="block")),
    (VideoShape(114, 12, 12), 2, Radial()),
    (VideoShape(114, 12, 12), 2, Radial(decay_factor=0.65)),
    (VideoShape(114, 12, 12), 2, Radial(decay_factor=0.3, block=864, tile_frames=6, tile_side=12)),
    (VideoShape(114, 12, 12), 2, Neighborhood((-1, 4, 4))),
    (VideoShape(114, 12, 12), 2, SparseLinear(critical=0.1, block_q=128)),
    (VideoShape(114, 12, 12), 2, BlockMixture(partition="3d")),
    (VideoShape(114, 12, 12), 2, BlockMixture(partition="3d", routing="block")),
    (VideoShape(11, 30, 52), 2, Neighborhood((-1, 10, 17))),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--methods", nargs="+", help="class names, such as Radial")
    parser.add_argument("--least-tokens", type=int, default=0)
    parser.add_argument("--most-tokens", type=int, default=10**9)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, help="default: what auto takes")
    parser.add_argument("--directions", nargs="+", choices=("forward", "both"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--name", help="of the JSON file in results/ (default: the device)")
    parser.add_argument("--docs", action="store_true", help=f"write {PAGE.name} from the results")
    args = parser.parse_args()
    if args.docs:
        write_page()
        return
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    on_gpu = args.device.type != "cpu"
    args.dtypes = args.dtypes or (["bf16"] if on_gpu else ["fp32", "bf16"])

    report = environment(args.device) | {"rounds": args.rounds, "seed": args.seed, "rows": []}
    slug = "_".join(report["device"].split()) if on_gpu else "cpu"
    path = RESULTS / f"{args.name or slug}.json"
    print(f"{report['device']}, {report['threads']} threads, torch {report['torch']}")
    print(HEADER)
    cases = CUDA_CASES if on_gpu else CPU_CASES
    for (video, heads, method), dtype, direction in itertools.product(
        cases, args.dtypes, args.directions or ("forward", "both")
    ):
        known = not args.methods or type(method).__name__ in args.methods
        if known and args.least_tokens <= video.tokens <= args.most_tokens:
            for row in rows(args, video, heads, method, dtype, direction):
                report["rows"].append(row)
                write_json(path, report)
                print(line(row), flush=True)
    print(f"written to {path}")
    if any("refused" in row for row in report["rows"]):
        sys.exit("some kernels were refused")


def rows(
    args: argparse.Namespace,
    video: VideoShape,
    heads: int,
    method: Any,
    dtype: str,
    direction: str,
) -> Iterator[dict]:
    """One row a kernel. The time of a method whose pattern depends on q and k includes it."""
    dim, backward = (128 if args.device.type != "cpu" else 64), direction == "both"
    options = {"heads": heads, "dim": dim, "dtype": DTYPES[dtype], "device": args.device}
    inputs = draw(video, method, **options, seed=args.seed)
    small = shrink(video, method)
    dynamic = parts_of(method).plan_for is not None
    plan = (
        method.plan_for(*inputs[:2], video=video)
        if dynamic
        else plan_of(method, video, args.device)
    )
    head = {
        "video": str(video),
        "tokens": video.tokens,
        "heads": heads,
        "dim": dim,
        "dtype": dtype,
        "direction": direction,
        "method": brief(method),
        "density": plan.density,
        "computed_density": plan.computed_density,
    }
    dense = best_dense(inputs, backward, args.device)
    calls, refused, compiled = {"dense": dense[1]}, {}, {}
    kernels = args.kernels or [chosen_by_auto(inputs, plan)]
    for kernel in kernels:
        try:
            few = draw(small, method, **options | {"heads": min(heads, 2)}, seed=args.seed)
            check_parity(small, method, kernel, few, backward)
            before = len(flex.compile_seconds)
            calls[kernel] = step(call(video, method, kernel, inputs[0]), inputs, backward)
            calls[kernel]()
            compiled[kernel] = sum(flex.compile_seconds[before:])
        except ValueError as error:
            calls.pop(kernel, None)
            refused[kernel] = str(error)
    chosen = {}
    if dynamic:
        calls["selection"] = lambda: method.plan_for(*inputs[:2], video=video)
        with peak_memory(args.device) as chosen:
            calls["selection"]()
    turns = interleaved(calls, rounds=args.rounds, device=args.device)
    ms = {name: 1e3 * statistics.median(values) for name, values in turns.items()}
    for kernel in kernels:
        if kernel in refused:
            yield {**head, "kernel": kernel, "refused": refused[kernel]}
            continue
        with peak_memory(args.device) as used:
            calls[kernel]()
        speedup = ms["dense"] / ms[kernel]
        yield {
            **head,
            "kernel": kernel,
            "dense_kernel": dense[0],
            "dense_ms": ms["dense"],
            "ms": ms[kernel],
            "speedup": speedup,
            "share_of_ideal": speedup * plan.density,
            "kernel_efficiency": speedup * plan.computed_density,
            "selection_ms": ms.get("selection"),
            "selection_mb": chosen.get("mb"),
            "peak_mb": used.get("mb"),
            "compile_s": compiled[kernel],
        }


def chosen_by_auto(inputs: list[Tensor], plan: Plan) -> str:
    """The first in the order of preference that takes these inputs."""
    facts = facts_of(*inputs, plan)
    for kernel in preference(facts):
        if not unsupported(kernel, facts):
            return kernel
    raise ValueError(f"no kernel takes {plan}")


def best_dense(
    inputs: list[Tensor], backward: bool, device: torch.device
) -> tuple[str, Callable[[], Any]]:
    """The fastest dense attention that torch has here, and its name."""
    plain = step(F.scaled_dot_product_attention, inputs, backward)
    if device.type == "cpu":
        return "SDPA", plain
    found = {}
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):

        def run(q: Tensor, k: Tensor, v: Tensor, backend: str = name) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v)

        found[name] = step(run, inputs, backward)
        try:
            found[name]()
        except RuntimeError:  # this build or dtype has no such kernel
            del found[name]
    if not found:
        return "SDPA", plain
    seconds = interleaved(found, rounds=3, device=device)
    best = min(found, key=lambda name: statistics.median(seconds[name]))
    return f"SDPA {best}", found[best]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """MB that one call needed beyond what was in use before it; empty where none can tell."""
    used: dict[str, float] = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield used
        used["mb"] = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        return
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        yield used
        return
    with suppress(OSError, AttributeError):  # without glibc, memory kept for reuse is not seen
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    clear.write_text("5")  # the highest mark of resident memory starts anew
    before = _status("VmRSS")
    yield used
    used["mb"] = max(0.0, (_status("VmHWM") - before) * 1.024e-3)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(next(x for x in text.splitlines() if x.startswith(field)).split()[1])


HEADER = (
    f"{'video':<14}{'method':<52}{'dtype':>6}{'direction':>10}{'kernel':>8}{'density':>9}"
    f"{'dense ms':>10}{'ms':>9}{'speedup':>9}{'share':>7}{'select':>8}{'MB':>7}"
)


def line(row: dict) -> str:
    head = f"{row['video']:<14}{row['method']:<52}{row['dtype']:>6}{row['direction']:>10}"
    head += f"{row['kernel']:>8}{row['density']:>9.3f}"
    if "refused" in row:
        return f"{head}  refused: {row['refused']}"
    select = "" if row["selection_ms"] is None else f"{row['selection_ms']:.1f}"
    memory = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
    return (
        f"{head}{row['dense_ms']:>10.1f}{row['ms']:>9.1f}{row['speedup']:>9.2f}"
        f"{row['share_of_ideal']:>7.2f}{select:>8}{memory:>7}"
    )


def write_page() -> None:
    """All result files that this benchmark wrote, as tables."""
    parts = [PREFACE]
    measured = set()
    for path in sorted(RESULTS.glob("*.json")):
        report = json.loads(path.read_text())
        rows = [
            row
            for row in report.get("rows", ())
            if {"dense_kernel", "share_of_ideal"} <= row.keys()
        ]
        if not rows:
            continue
        measured |= {row["dense_kernel"] for row in rows}
        parts.append(
            f"## {report['device']}, {path.stem}\n\n{report['threads']} threads, "
            f"torch {report['torch']}, medians of {report['rounds']} rounds, "
            f"[results/{path.name}](../benchmarks/results/{path.name}).\n\n" + _table(rows)
        )
    if measured <= {"SDPA"}:  # on a GPU it is named with its backend
        parts.append(UNMEASURED)
    # What benchmarks/pipeline.py wrote stays.
    _, mark, rest = PAGE.read_text(encoding="utf-8").partition("\n## A whole step\n")
    PAGE.write_text("\n\n".join(parts) + "\n" + mark + rest, encoding="utf-8")
    print(PAGE)


def _table(rows: list[dict]) -> str:
    titles = (
        "tokens | method | dtype | direction | kernel | density | dense, ms | sparse, ms | "
        "speed-up | share of ideal | choosing, ms and MB | peak, MB"
    )
    lines = [f"| {titles} |", "|" + "---|" * (titles.count("|") + 1)]
    for row in rows:
        chosen = "" if row["selection_ms"] is None else f"{row['selection_ms']:.1f}"
        if row["selection_mb"] is not None:
            chosen += f", {row['selection_mb']:.0f}"
        direction = "forward" if row["direction"] == "forward" else "forward, backward"
        peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        cells = (
            f"{row['tokens']:,}",
            f"`{row['method']}`",
            row["dtype"],
            direction,
            row["kernel"],
            f"{row['density']:.3f}",
            f"{row['dense_ms']:.1f}",
            f"{row['ms']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['share_of_ideal']:.2f}",
            chosen,
            peak,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


PREFACE = """\
# Performance

Made by `python benchmarks/kernels.py --docs` from what the same script measured: sparse and dense
attention in turn in one process, parity with the reference before anything is timed. The time of a
method whose pattern depends on q and k includes choosing it; how long that takes alone, and the
memory for it, stand beside it. Density is the share of token pairs that are kept; the ideal
speed-up is 1 / density, and the share of it that was reached is speed-up x density. A share above
1 means that the products over gathered blocks run faster than dense attention does."""

UNMEASURED = """\
## GPUs

Not measured. `python benchmarks/kernels.py --device cuda` is ready; the Triton kernels have been
held to the reference under Triton's interpreter and compiled for five architectures
(`python -m gen_accel.kernels.triton.compile_matrix`), and have not run on a GPU."""


if __name__ == "__main__":
    main()
