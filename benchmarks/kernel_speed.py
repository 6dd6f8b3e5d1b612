"""Every sparse method on every kernel that can run it, in turn with the best dense attention.

    python benchmarks/kernel_speed.py --device cpu
    python benchmarks/kernel_speed.py --device cuda
    python benchmarks/kernel_speed.py --docs          # the results as a page, docs/performance.md

A kernel that fails parity is not timed. See README.md for the columns.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import dense
import torch
from clock import Taken, turns
from memory import peak_memory
from parity import DTYPES, brief, call, check_parity, draw, planned, shrink, step
from torch import Tensor

from gen_accel import BlockMixture, Neighborhood, Piecewise, Radial, SparseLinear, VideoShape
from gen_accel.attention_processors import METHODS
from gen_accel.kernels import KERNELS, facts_of, flex, preference, unsupported
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment
from gen_accel.plan import Plan

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
PAGE = ROOT.parent / "docs" / "performance.md"


class Case(NamedTuple):
    """What is timed, on one sample.

    Args:
        video: its tokens.
        heads: of the model.
    """

    video: VideoShape
    heads: int
    method: Any


class How(NamedTuple):
    """How it is timed.

    Args:
        dtype: a name in DTYPES.
        dim: of a head.
        direction: "forward", or "both" with the backward pass.
        kernels: by name; None for the one that "auto" takes.
        rounds: see `clock.turns`.
    """

    device: torch.device
    dtype: str
    dim: int
    direction: str
    rounds: int
    kernels: Sequence[str] | None = None
    seed: int = 0


WAN, HUNYUAN = VideoShape(21, 30, 52), VideoShape(30, 48, 80)

# The call that README shows, then published shapes at published densities, the most telling ones
# first. A method that is not here is timed at its defaults, on the first shape.
GOALS: tuple[tuple[str, dict[str, Any], VideoShape, int], ...] = (
    ("piecewise", {"critical": 0.2}, WAN, 12),
    ("neighborhood", {"window": (18, 24, 24), "stride": (16, 8, 8)}, HUNYUAN, 24),
    ("radial", {}, WAN, 12),
    ("radial", {}, HUNYUAN, 24),
    ("sparse_linear", {"critical": 0.05}, WAN, 12),
    ("piecewise", {"critical": 0.1, "block_q": 128}, WAN, 12),
    ("block_mixture", {"partition": "3d", "routing": "block"}, WAN, 12),
    ("block_mixture", {"partition": "3d", "routing": "token"}, WAN, 12),
)
CUDA_REST = (
    Case(HUNYUAN, 24, Neighborhood((18, 24, 24))),
    Case(WAN, 12, Radial("code-2025-11", decay_factor=0.2)),
    Case(WAN, 12, SparseLinear(critical=0.05, linear_over="all")),
    Case(WAN, 12, SparseLinear(critical=0.05, linear_over="marginal")),
    *(
        Case(video, 12, BlockMixture(partition=partition, routing=routing))
        for video in (WAN, VideoShape(24, 36, 64))
        for partition in ("1d", "2d", "3d")
        for routing in ("token", "block")
        if (video, partition) != (WAN, "3d")
    ),
)
# The longer clips that the methods are for: minutes each, so they come last.
LONG_CASES = (
    Case(VideoShape(81, 30, 52), 12, Radial()),
    Case(VideoShape(21, 45, 80), 40, Radial()),
    Case(VideoShape(81, 45, 80), 40, Radial()),
    Case(VideoShape(120, 48, 80), 24, Radial()),
)

# 4k to 16k tokens on 12 x 12 frames, at a density of about 0.1 and at the methods' defaults; of
# radial attention also with whole frames as tiles, which processors that multiply tiles ask for.
CPU_CASES = (
    Case(VideoShape(28, 12, 12), 2, Radial()),
    Case(VideoShape(28, 12, 12), 2, SparseLinear(critical=0.1)),
    Case(VideoShape(57, 12, 12), 2, Radial()),
    Case(VideoShape(57, 12, 12), 2, Radial(decay_factor=0.15)),
    Case(
        VideoShape(57, 12, 12), 2, Radial(decay_factor=0.1, block=432, tile_frames=3, tile_side=12)
    ),
    Case(VideoShape(57, 12, 12), 2, Neighborhood((-1, 4, 4))),
    Case(VideoShape(57, 12, 12), 2, SparseLinear(critical=0.1)),
    Case(VideoShape(57, 12, 12), 2, SparseLinear(critical=0.1, block_q=64)),
    Case(VideoShape(57, 12, 12), 2, Piecewise(0.1)),
    Case(VideoShape(57, 12, 12), 2, Piecewise(0.1, block_q=128)),
    Case(VideoShape(57, 12, 12), 2, Piecewise(0.1, centre="key", score="mean")),
    Case(VideoShape(57, 12, 12), 2, BlockMixture(partition="1d")),
    Case(VideoShape(57, 12, 12), 2, BlockMixture(partition="2d")),
    Case(VideoShape(57, 12, 12), 2, BlockMixture(partition="3d")),
    Case(VideoShape(57, 12, 12), 2, BlockMixture(partition="3d", routing="block")),
    Case(VideoShape(114, 12, 12), 2, Radial()),
    Case(VideoShape(114, 12, 12), 2, Radial(decay_factor=0.65)),
    Case(
        VideoShape(114, 12, 12),
        2,
        Radial(decay_factor=0.3, block=864, tile_frames=6, tile_side=12),
    ),
    Case(VideoShape(114, 12, 12), 2, Neighborhood((-1, 4, 4))),
    Case(VideoShape(114, 12, 12), 2, SparseLinear(critical=0.1)),
    Case(VideoShape(114, 12, 12), 2, Piecewise(0.1)),
    Case(VideoShape(114, 12, 12), 2, Piecewise(0.1, block_q=128)),
    Case(VideoShape(114, 12, 12), 2, BlockMixture(partition="3d")),
    Case(VideoShape(114, 12, 12), 2, BlockMixture(partition="3d", routing="block")),
    Case(VideoShape(11, 30, 52), 2, Neighborhood((-1, 10, 17))),
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
    parser.add_argument("--rounds", type=int, help="default: 5; on a GPU up to 10 of short calls")
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
    rounds = args.rounds or (10 if on_gpu else 5)

    report = environment(args.device) | {"rounds": rounds, "seed": args.seed, "rows": []}
    slug = "_".join(report["device"].split()) if on_gpu else "cpu"
    path = RESULTS / f"{args.name or slug}.json"
    print(f"{report['device']}, {report['threads']} threads, torch {report['torch']}")
    print(HEADER)
    cases = (*goals(), *CUDA_REST, *LONG_CASES) if on_gpu else CPU_CASES
    for case, dtype, direction in itertools.product(
        cases, args.dtypes, args.directions or ("forward", "both")
    ):
        known = not args.methods or type(case.method).__name__ in args.methods
        if not known or not args.least_tokens <= case.video.tokens <= args.most_tokens:
            continue
        dim = 128 if on_gpu else 64
        how = How(args.device, dtype, dim, direction, rounds, args.kernels, args.seed)
        for row in rows(case, how):
            report["rows"].append(row)
            write_json(path, report)
            print(line(row), flush=True)
    print(f"written to {path}")
    if any("refused" in row for row in report["rows"]):
        sys.exit("some kernels were refused")


def goals() -> list[Case]:
    """`GOALS`, and every other method that is one by itself: `reuse` is what it wraps."""
    known = "dense", "reuse", *(goal[0] for goal in GOALS)
    others = [name for name in METHODS if name not in known]
    rest = [(name, {}, WAN, 12) for name in others]
    return [
        Case(video, heads, METHODS[name](**options))
        for name, options, video, heads in (*GOALS, *rest)
        if name in METHODS
    ]


def rows(case: Case, how: How) -> Iterator[dict]:
    """One row a kernel, dense attention and all of them taking turns. The time of a method whose
    pattern depends on q and k includes choosing it."""
    video, _, method = case
    inputs = drawn(case, how)
    plan = planned(video, method, inputs)
    backward = how.direction == "both"
    dense_name, baseline = dense.best(inputs, backward)
    calls, refused, compiled = {"dense": step(baseline.run, inputs, backward)}, {}, {}
    kernels = how.kernels or [chosen_by_auto(inputs, plan)]
    for kernel in kernels:
        try:
            check(case, how, kernel)
            before = len(flex.compile_seconds)
            calls[kernel] = step(call(video, method, kernel, inputs[0]), inputs, backward)
            calls[kernel]()
            compiled[kernel] = sum(flex.compile_seconds[before:])
        except ValueError as error:
            calls.pop(kernel, None)
            refused[kernel] = str(error)
    chosen = {}
    if method.is_dynamic:
        calls["selection"] = partial(planned, video, method, inputs)
        with peak_memory(how.device) as chosen:
            calls["selection"]()
    with baseline.active():
        taken = turns(calls, rounds=how.rounds, device=how.device)
    head = described(case, how, plan)
    for kernel in kernels:
        if kernel in refused:
            yield {**head, "kernel": kernel, "refused": refused[kernel]}
            continue
        with peak_memory(how.device) as used:
            calls[kernel]()
        yield {
            **head,
            "kernel": kernel,
            "dense_kernel": dense_name,
            **compared(taken, kernel, plan, how.device),
            "selection_mb": chosen.get("mb"),
            "peak_mb": used.get("mb"),
            "compile_s": compiled[kernel],
        }


def drawn(case: Case, how: How) -> list[Tensor]:
    size = {"heads": case.heads, "dim": how.dim, "dtype": DTYPES[how.dtype]}
    return draw(case.video, case.method, **size, device=how.device, seed=how.seed)


def check(case: Case, how: How, kernel: str) -> None:
    """Hold the kernel to the reference, on a smaller grid of the same kind and two heads.

    Raises:
        ValueError: it errs too much, or cannot run that.
    """
    few = Case(shrink(case.video, case.method), min(case.heads, 2), case.method)
    check_parity(few.video, case.method, kernel, drawn(few, how), how.direction == "both")


def described(case: Case, how: How, plan: Plan) -> dict[str, Any]:
    """The head of a row."""
    return {
        "video": str(case.video),
        "tokens": case.video.tokens,
        "heads": case.heads,
        "dim": how.dim,
        "dtype": how.dtype,
        "direction": how.direction,
        "method": brief(case.method),
        "density": plan.density,
        "computed_density": plan.computed_density,
    }


def compared(
    taken: dict[str, Taken], kernel: str, plan: Plan, device: torch.device
) -> dict[str, Any]:
    """A kernel beside dense attention: whole calls, and on a GPU the kernels alone."""
    ours, theirs = taken[kernel], taken["dense"]
    speedup = theirs.ms / ours.ms
    found = {
        "dense_ms": theirs.ms,
        "ms": ours.ms,
        "speedup": speedup,
        "share_of_ideal": speedup * plan.density,
        "kernel_efficiency": speedup * plan.computed_density,
        "selection_ms": taken["selection"].ms if "selection" in taken else None,
    }
    if device.type == "cuda":
        alone = theirs.kernel_ms / ours.kernel_ms
        found |= {
            "dense_kernel_ms": theirs.kernel_ms,
            "kernel_ms": ours.kernel_ms,
            "kernel_speedup": alone,
            "kernel_share_of_ideal": alone * plan.density,
            "rounds": len(ours.whole),
        }
    return found


def chosen_by_auto(inputs: list[Tensor], plan: Plan) -> str:
    """The first in the order of preference that takes these inputs."""
    facts = facts_of(*inputs, plan)
    for kernel in preference(facts):
        if not unsupported(kernel, facts):
            return kernel
    raise ValueError(f"no kernel takes {plan}")


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
        report = _as_report(json.loads(path.read_text()))
        rows = [
            row
            for row in report.get("rows", ())
            if {"dense_kernel", "share_of_ideal"} <= row.keys()
        ]
        if not rows:
            continue
        threads = f"{report['threads']} threads, " if report["threads"] else ""
        measured |= {row["dense_kernel"] for row in rows}
        parts.append(
            f"## {report['device']}, {path.stem}\n\n{threads}"
            f"torch {report['torch']}, medians of {report['rounds']} rounds, "
            f"[results/{path.name}](../benchmarks/results/{path.name}).\n\n" + _table(rows)
        )
    if measured <= {"SDPA"}:  # on a GPU it is named with its backend
        parts.append(UNMEASURED)
    # What benchmarks/pipeline.py wrote stays.
    _, mark, rest = PAGE.read_text(encoding="utf-8").partition("\n## A whole step\n")
    PAGE.write_text("\n\n".join(parts) + "\n" + mark + rest, encoding="utf-8")
    print(PAGE)


def _as_report(report: dict) -> dict:
    """What gpu.py wrote, in the form of what this file writes; of two lines of a name the later
    one, which is the tuned one."""
    if "lines" not in report:
        return report
    known = {line["name"]: line.get("result", {}) for line in report["lines"]}
    head, made_on = {"threads": None, "rounds": "up to 10"}, report["made_on"]
    rows = [] if made_on["dry_run"] else [*known.values()]
    return head | {"device": made_on["card"], "torch": made_on["torch"], "rows": rows}


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

Made by `python benchmarks/kernel_speed.py --docs` from what the same script measured: sparse and
dense attention in turn in one process, parity with the reference before anything is timed. The
time of a method whose pattern depends on q and k includes choosing it; how long that takes alone,
and the memory for it, stand beside it. Density is the share of token pairs that are kept; the
ideal speed-up is 1 / density, and the share of it that was reached is speed-up x density. A share
above 1 means that the products over gathered blocks run faster than dense attention does."""

UNMEASURED = """\
## GPUs

Not measured yet: [GPUs](gpu.md) has the one command that does it, `make gpu`. The Triton kernels
have been held to the reference under Triton's interpreter and compiled for five architectures
(`python tools/compile_matrix.py`), and have not run on a GPU."""


if __name__ == "__main__":
    main()
