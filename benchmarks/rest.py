"""Cost of the pooled rest of a plan beside the attention over what it keeps.

    python benchmarks/rest.py
    python benchmarks/rest.py --tokens 16384 --dims 128 --directions both

The call over the kept blocks alone, those with the rest around keys and around queries, and the
one with its second order take turns, each at the same plan. A rest that fails parity is not timed.
The ratio is the median over the rounds of what both took in the same round, in seconds of
processor time where that is asked for by `--cpu-time`: other work on the machine hardly counts
there.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from parity import DTYPES, hold, step
from torch import Tensor

from gen_accel import kernels
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment
from gen_accel.plan import Plan, Rest

RESULTS = Path(__file__).parent / "results"
PARITY_TOKENS = 1024
RESTS = {"key": Rest("key"), "query": Rest("query"), "second": Rest("query", "second")}


class Case(NamedTuple):
    """A call that is timed: one sample of random numbers, as many blocks for each query block.

    Args:
        block: slots of a query and of a key block.
        density: share of the blocks that are kept.
    """

    tokens: int
    heads: int
    dim: int
    block: int
    density: float
    dtype: str


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument(
        "--directions", nargs="+", choices=("forward", "both"), default=["forward"]
    )
    parser.add_argument("--kernel", default="native")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true", help="on one thread")
    parser.add_argument("--name", help="of a JSON file in results/")
    args = parser.parse_args()
    threads = 1 if args.cpu_time else args.threads
    if threads is not None:
        torch.set_num_threads(threads)
    report = environment(torch.device("cpu")) | {
        "rounds": args.rounds,
        "seconds": "of processor time" if args.cpu_time else "on the clock",
        "rows": [],
    }
    load = os.getloadavg()[0]
    print(
        f"{report['device']}, {torch.get_num_threads()} threads, load {load:.1f} before it began"
    )
    if load > 1 and not args.cpu_time:
        print("the machine is busy: ask for --cpu-time, or wait")
    print(HEADER)
    for tokens, dim, block, dtype, direction in itertools.product(
        args.tokens, args.dims, args.blocks, args.dtypes, args.directions
    ):
        case = Case(tokens, args.heads, dim, block, args.density, dtype)
        clock = time.thread_time if args.cpu_time else time.perf_counter
        row = measured(case, args.kernel, direction == "both", args.rounds, clock)
        report["rows"].append(row | {"direction": direction, "kernel": args.kernel})
        print(line(case, direction, row), flush=True)
        if args.name:
            write_json(RESULTS / f"{args.name}.json", report)


def measured(
    case: Case, kernel: str, backward: bool, rounds: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """One row: milliseconds of the call without a rest, and how many times as long those with
    one take."""
    for name, rest in RESTS.items():
        check(case, name, rest, kernel, backward)
    inputs = drawn(case)
    plans = {name: planned(case, rest) for name, rest in RESTS.items()}
    plans = {"kept": plans["key"].kept, **plans}
    calls = {name: step(call(plan, kernel), inputs, backward) for name, plan in plans.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, one in calls.items():
            start = clock()
            one()
            if turn:
                taken[name].append(clock() - start)
    kept = taken["kept"]
    row: dict[str, Any] = case._asdict() | {"kept_ms": 1e3 * statistics.median(kept)}
    row["density"] = plans["kept"].density
    for name in RESTS:
        ratios = [ours / theirs for ours, theirs in zip(taken[name], kept, strict=True)]
        row[name] = statistics.median(ratios)
        row[f"{name}_least"] = min(taken[name]) / min(kept)
    return row


def check(case: Case, name: str, rest: Rest, kernel: str, backward: bool) -> None:
    """Raises ParityFailed where the kernel errs more than twice as much as the reference, on fewer
    tokens."""
    few = case._replace(tokens=min(case.tokens, PARITY_TOKENS))
    plan = planned(few, rest)
    who = f"{kernel} with the rest {name!r}"
    hold(who, call(plan, kernel), call(plan, "reference"), drawn(few), backward)


def planned(case: Case, rest: Rest) -> Plan:
    blocks = case.tokens // case.block
    chosen = max(1, round(case.density * blocks))
    g = torch.Generator().manual_seed(0)
    score = torch.rand(1, case.heads, blocks, blocks, generator=g)
    keep = torch.zeros_like(score, dtype=torch.bool)
    keep.scatter_(3, score.topk(chosen, -1).indices, True)
    return Plan(torch.arange(blocks * case.block), keep, case.block, case.block, rest=rest)


def drawn(case: Case) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shape = 1, case.heads, case.tokens // case.block * case.block, case.dim
    return [torch.randn(shape, generator=g).to(DTYPES[case.dtype]) for _ in range(3)]


def call(plan: Plan, kernel: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.run(q, k, v, plan, scale=q.shape[3] ** -0.5, kernel=kernel)

    return run


HEADER = (
    f"{'tokens':>7}{'dim':>5}{'block':>6}{'dtype':>6}{'direction':>10}{'density':>9}"
    f"{'kept ms':>9}{'key':>7}{'query':>7}{'second':>7}   least / least: key, query, second"
)


def line(case: Case, direction: str, row: dict[str, Any]) -> str:
    return (
        f"{case.tokens:>7}{case.dim:>5}{case.block:>6}{case.dtype:>6}{direction:>10}"
        f"{row['density']:>9.3f}{row['kept_ms']:>9.1f}{row['key']:>7.2f}{row['query']:>7.2f}"
        f"{row['second']:>7.2f}   {row['key_least']:.2f}, {row['query_least']:.2f}, "
        f"{row['second_least']:.2f}"
    )


if __name__ == "__main__":
    main()
