"""Models that are sparse by themselves: FlexAttention as torch runs it, and on a kernel of ours.

    python benchmarks/own_sparsity.py --name own_sparsity
    python benchmarks/own_sparsity.py --only "AnyFlow, causal" --rounds 5
    python benchmarks/own_sparsity.py --page        the table of docs/own_sparsity.md

The classes are those of diffusers, with two blocks and random weights. The output of each, and its
gradients, are first held at a few tokens to FlexAttention by the lists of its masks, which is what
it is compiled: beside attention in fp64, the largest error may be twice that of the lists in fp32.
What fails is not timed.

Then each way runs in a process whose memory is limited, so that what does not fit says what it
asks for. Compiled FlexAttention and ours take turns in one process. Seconds are of the processor,
on one thread, and of whole calls of the model; memory is what one call needs beyond the model.
"""

import argparse
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.attention.flex_attention as flex
from memory import peak_memory
from pages import machine, read_result, write_between_marks

from gen_accel import attach_own, kernels
from gen_accel.measure import write_json
from gen_accel.measure.machine import ExternalLoad, environment

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "own_sparsity.md"
sys.path.insert(0, str(ROOT / "tests"))  # the models are those that the tests run

from support import own_sparse  # noqa: E402

LEAST = 1e-6  # error that is always allowed, of the largest number
SIZES, DIRECTIONS = ("fits", "large"), ("forward", "both")
BEFORE, COMPILED, OURS = WAYS = ("uncompiled", "compiled", "ours")


class Subject(NamedTuple):
    """A model at a size.

    Args:
        build: function of `own_sparse` that makes it.
        sizes: arguments of `build`: of a call whose matrix of scores fits, and of one whose
            matrix does not.
    """

    build: str
    sizes: tuple[tuple[int, ...], tuple[int, ...]]


SUBJECTS = {
    "AnyFlow, causal": Subject("far", ((32, 32), (64, 128))),
    "Kandinsky 5, NABLA": Subject("nabla_5", ((8, 16), (12, 32))),
    "Kandinsky 6 SR": Subject("nabla_6", ((4, 32, 64), (12, 64, 96))),
    "Qwen-Image 2.1": Subject("qwen", ((64, 64), (160, 160))),
    "Wan-Animate 2": Subject("animate", ((32, 64), (128, 256))),
    "LTX-2's decoder": Subject("decoder", ((2, 4, 4), (4, 8, 8))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=[*SUBJECTS])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=[*DIRECTIONS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=6.0, help="of memory, in GB")
    parser.add_argument("--seconds", type=int, default=240, help="after which a way is given up")
    parser.add_argument("--name", help="of a JSON file in results/, whose other rows stay")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--way", nargs="+", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.page:
        write_between_marks(PAGE, lines())
        return
    torch.set_num_threads(1)
    if args.way:
        print(json.dumps(timed(args.only[0], args.size, args.way, args.backward, args.rounds)))
        return
    report: dict[str, Any] = environment() | {
        "limit_gb": args.limit,
        "rounds": args.rounds,
        "rows": [],
    }
    place = RESULTS / f"{args.name}.json"
    rows = read_result(args.name)["rows"] if args.name and place.exists() else []
    known = {_key(row): row for row in rows}
    for name in args.only:
        check(name)
        for which, direction in itertools.product(args.sizes, args.directions):
            size = SUBJECTS[name].sizes[SIZES.index(which)]
            row = measured(name, size, direction == "both", args)
            print(json.dumps(row), flush=True)
            if args.name and "seconds" in row[OURS]:  # else there is nothing to compare
                known[_key(row)] = row
                report["rows"] = [known[key] for key in sorted(known)]
                write_json(place, report)


def _key(row: dict[str, Any]) -> tuple[int, int, bool]:
    """Order of a row, by model, size and direction."""
    sizes = SUBJECTS[row["model"]].sizes
    return [*SUBJECTS].index(row["model"]), sizes.index((*row["size"],)), row["backward"]


def measured(
    name: str, size: tuple[int, ...], backward: bool, args: argparse.Namespace
) -> dict[str, Any]:
    """One row: each way's seconds and memory, or why it has none."""
    load = ExternalLoad()
    row: dict[str, Any] = {"model": name, "size": size, "backward": backward}
    row |= _in_a_process(name, size, [BEFORE], backward, args)
    both = _in_a_process(name, size, [COMPILED, OURS], backward, args)
    if "seconds" not in both.get(COMPILED, {}) or "seconds" not in both.get(OURS, {}):
        both[OURS] = _in_a_process(name, size, [OURS], backward, args)[OURS]
    return row | both | {"busy": load.busy()}


def _in_a_process(
    name: str, size: tuple[int, ...], ways: list[str], backward: bool, args: argparse.Namespace
) -> dict[str, Any]:
    """Run `timed` in a process of limited memory, and return what it found; an error takes the
    place of a way."""
    command = [sys.executable, __file__, "--only", name, "--rounds", str(args.rounds)]
    command += ["--way", *ways, "--size", *map(str, size)] + ["--backward"] * backward
    most = int(args.limit * 1e9)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            env=env,
            preexec_fn=limit,
            capture_output=True,
            text=True,
            timeout=args.seconds,
        )
    except subprocess.TimeoutExpired:
        return {way: {"refused": f"not done after {args.seconds} s on the clock"} for way in ways}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    return {way: _refusal(done.stderr) for way in ways}


def _refusal(error: str) -> dict[str, Any]:
    """Why a process ended: memory that it asked for at once, or its last line."""
    if found := re.findall(r"you tried to allocate (\d+) bytes", error):
        return {"asks_gb": int(found[-1]) / 1e9}
    if "MemoryError" in error or "bad_alloc" in error:
        return {"refused": "out of memory"}
    last = [line for line in error.splitlines() if line.strip()] or ["no word"]
    return {"refused": last[-1][:200]}


def timed(
    name: str, size: tuple[int, ...], ways: list[str], backward: bool, rounds: int
) -> dict[str, Any]:
    """Seconds and memory of some ways that take turns. A way that raises has its error instead,
    unless it is the only one."""
    case = getattr(own_sparse, SUBJECTS[name].build)(*size)
    found: dict[str, Any] = {way: {"all": []} for way in ways}
    for turn in range(rounds + 1):
        for way in ways:
            if "refused" in found[way]:
                continue
            try:
                with running(case, way) as told, peak_memory(torch.device("cpu")) as used:
                    start = time.process_time()
                    called(case, backward)
                    seconds = time.process_time() - start
            except Exception as error:
                if len(ways) == 1:
                    raise
                found[way] = _refusal(str(error)) | {"refused": _said(error)}
                continue
            if turn:  # the first compiles, and reads the mask
                found[way]["all"].append(seconds)
            found[way] |= told | {f"mb_{'first' if not turn else 'later'}": used.get("mb")}
    for one in found.values():
        if one.get("all"):
            one["seconds"] = statistics.median(one["all"])
    return found


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


def called(case: own_sparse.Case, backward: bool) -> list[torch.Tensor]:
    """The output, and with a backward pass the gradients of the parameters."""
    forget_masks(case)
    if not backward:
        with torch.no_grad():
            return [case.call()]
    out = case.call()
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    held = [x for x in case.model.parameters() if x.requires_grad]
    grads = torch.autograd.grad((out * weight).sum(), held, allow_unused=True)
    return [out.detach(), *(x for x in grads if x is not None)]


def forget_masks(case: own_sparse.Case) -> None:
    """Forget what a model keeps of its masks from call to call."""
    if hasattr(case.model, "block_masks"):
        case.model.block_masks.clear()


@contextmanager
def running(case: own_sparse.Case, way: str) -> Iterator[dict[str, Any]]:
    """Let a model run in one of `WAYS`, and tell what ran."""
    told: dict[str, Any] = {}
    if way != OURS:
        with _replaced(flex, "flex_attention", _compiled() if way == COMPILED else _plain()):
            yield told
        return
    seen: list[tuple[int, int, float]] = []
    run: Callable[..., torch.Tensor] = kernels.run

    def look(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any, **options: Any) -> Any:
        seen.append((q.shape[0] * q.shape[1], q.shape[2], plan.density))
        return run(q, k, v, plan, **options)

    with attach_own(case.model) as own, _replaced(kernels, "run", look):
        yield told
        ran = own.summary()
    rows = sum(count for count, _, _ in seen)
    told["kernels"] = sorted({*re.findall(r"by (\w+)", ran)})
    told["tokens"] = max(tokens for _, tokens, _ in seen)
    told["density"] = sum(count * density for count, _, density in seen) / rows


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    held = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, held)


_KEPT: dict[str, Any] = {}


def _plain() -> Any:
    return _KEPT.setdefault("plain", flex.flex_attention)


def _compiled() -> Any:
    """FlexAttention compiled by itself, as its warning asks for."""
    if "compiled" not in _KEPT:
        _KEPT["compiled"] = torch.compile(_plain(), dynamic=False)
    return _KEPT["compiled"]


class ParityFailed(ValueError):
    """A model errs more on our kernel than it may."""


def check(name: str) -> None:
    """Raise ParityFailed unless a model at a few tokens, its output and gradients, errs at most
    twice as much as by the lists of its masks in fp32."""
    case = getattr(own_sparse, SUBJECTS[name].build)()

    def found(attention: Callable[..., torch.Tensor], ours: bool = False) -> list[torch.Tensor]:
        with (
            _replaced(flex, "flex_attention", attention),
            attach_own(case.model) if ours else nullcontext(),
        ):
            return called(case, True)

    def error(given: list[torch.Tensor]) -> float:
        return max(
            float((one - right).abs().max() / right.abs().max().clamp_min(LEAST))
            for one, right in zip(given, exact, strict=True)
        )

    exact = found(_in_fp64)
    allowed = 2 * error(found(own_sparse.by_lists)) + LEAST
    if (most := error(found(own_sparse.by_lists, ours=True))) > allowed:
        raise ParityFailed(
            f"{name} errs by {most:.2e} of its largest number, {allowed:.2e} may be"
        )


def _in_fp64(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
    wide = (x.double() for x in (query, key, value))
    return own_sparse.by_lists(*wide, **options).to(query.dtype)


# The page


def lines() -> list[str]:
    """Lines of docs/own_sparsity.md between its marks."""
    report = read_result("own_sparsity")
    busy = sum(row["busy"] is not None for row in report["rows"])
    head = (
        f"Whole calls of the real classes with two blocks and random weights, fp32; "
        f"{machine(report)}. Seconds are of the processor, medians, in processes of at most "
        f"{report['limit_gb']:g} GB; others were busy during {busy} of "
        f"{len(report['rows'])} rows. [Result file](../benchmarks/results/own_sparsity.json), by "
        "`benchmarks/own_sparsity.py`."
    )
    table = [
        "| model | tokens | kept | uncompiled | compiled | ours |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        ours = row[OURS]
        what = f"{row['model']}{', and backward' if row['backward'] else ''}"
        cells = [what, f"{ours['tokens']:,}", f"{ours['density']:.2f}"]
        table.append(f"| {' | '.join([*cells, *(_cell(row[way]) for way in WAYS)])} |")
    return ["", head, "", *table, ""]


def _cell(one: dict[str, Any]) -> str:
    if "seconds" in one:
        memory = one.get("mb_later")
        return f"{one['seconds']:.2f} s" + ("" if memory is None else f", {memory:,.0f} MB")
    if "asks_gb" in one:
        return f"asks for {one['asks_gb']:.1f} GB at once"
    return one["refused"].partition(":")[0]  # the kind of an error, without its paths


if __name__ == "__main__":
    main()
