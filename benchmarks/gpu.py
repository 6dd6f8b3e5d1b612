"""Everything that a GPU can tell of this package, by one command, within a budget of minutes.

    make gpu
    python benchmarks/gpu.py --minutes 20
    python benchmarks/gpu.py --resume           # what the last run had no time for
    python benchmarks/gpu.py --dry-run          # all stages at tiny sizes on the CPU, interpreted

Each line has a cap and is written to results/gpu_CARD.json as soon as it is there. docs/gpu.md
says what the stages are and what to do with the file.
"""

import argparse
import gc
import os
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

RESULTS = Path(__file__).parent / "results"
sys.path.append(str(Path(__file__).parent.parent / "tools"))  # autotune, which a stage runs
MINUTES = 9.0  # of the caps of the stages below; more minutes stretch them


def main() -> int:
    args = parsed(sys.argv[1:])
    print(f"{args.minutes:.3g} minutes from now; loading torch and the kernels", flush=True)
    start = time.monotonic()
    if args.dry_run:  # before anything imports triton, and away from the user's own cache
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="gen_accel_dry_")
    import torch

    if not (args.dry_run or torch.cuda.is_available()):
        print("torch finds no CUDA device; --dry-run walks through all stages on the CPU")
        return 2
    if args.dry_run:
        torch.set_num_threads(1)  # more only get into each other's way at such sizes
    signal.signal(signal.SIGTERM, _stop)
    return measured(args, torch.device("cpu") if args.dry_run else torch.device("cuda", 0), start)


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="default: %(default)g")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where the file ends, after lines that failed once are tried again",
    )
    parser.add_argument("--keep-failed", action="store_true", help="try none of those again")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--out", type=Path, help="default: results/gpu_CARD.json")
    args = parser.parse_args(arguments)
    if not args.minutes > 0:
        parser.error(f"--minutes must be positive, got {args.minutes:g}")
    return args


def measured(args: argparse.Namespace, device: Any, start: float) -> int:
    """All stages; 0 with whatever there is."""
    from gpu_stages import machine
    from gpu_stages.setting import setting
    from ledger import DeviceLost, Ledger

    made_on = machine.made_on(device, dry=args.dry_run)
    path = args.out or place(made_on["card"], dry=args.dry_run)
    left = 60 * args.minutes - (time.monotonic() - start)
    say = partial(print, flush=True)
    named = stages(setting(device, dry=args.dry_run), max(1.0, args.minutes / MINUTES))
    gc.freeze()  # what is imported is no garbage: collections between lines need not look
    ledger = Ledger(
        path,
        made_on,
        left,
        recover=partial(recover, device),
        stuck=lambda: again(path, ledger.left),
        say=say,
    )
    print(f"{made_on['card']}, torch {made_on['torch']}, results in {path}")
    if args.resume:
        print(ledger.take_up(again=not args.keep_failed))
    try:
        ledger.write()
        ledger.run(named)
    except KeyboardInterrupt:
        print("stopped; --resume goes on from here")
    except DeviceLost as error:
        print(f"the device is lost: {error}")
        again(path, ledger.left)
    gc.unfreeze()
    print(ledger.table())
    print(f"results in {path}")
    return 0


def place(card: str, *, dry: bool) -> Path:
    from gpu_stages.machine import slug

    if dry:
        return Path(tempfile.mkdtemp(prefix="gen_accel_dry_")) / "gpu_dry_run.json"
    return RESULTS / f"gpu_{slug(card)}.json"


def stages(at: Any, stretch: float) -> list[Any]:
    """In order of value.

    Args:
        at: a `Setting`.
        stretch: of the caps.
    """
    from gpu_stages import correct, machine, models, rest, speed, suite, where
    from ledger import Stage

    def goals(direction: str, kernels: Any) -> Any:
        every_other = at.dry and direction == "both"  # interpreted, they take the most time
        cases = at.goals()[:: 2 if every_other else 1]
        return lambda: speed.goal_lines(at, direction, cases, kernels)

    # On cards for games, products of 8 bits come first: they gain most there.
    first = sorted(at.timed, key="triton_int8".__ne__)

    def few(direction: str) -> Any:
        cases = at.goals()[: 1 if at.dry else None]
        only = [name for name in at.timed if name == "triton"]
        return lambda: speed.goal_lines(at, direction, cases, only)

    def attached() -> Any:
        yield correct.autocast_step(at)
        yield correct.another_device(at)
        yield from correct.graphs(at)

    def long_clips() -> Any:
        for direction in speed.DIRECTIONS:
            options = {"cap": 150.0, "rounds": 1 if at.dry else 2}
            yield from speed.goal_lines(at, direction, at.long_cases(), at.timed[:1], **options)

    def loaded() -> Any:
        yield machine.clocks("clocks after the goals")

    named = [
        ("environment", 30, partial(machine.lines, at)),
        ("parity", 100, partial(correct.first_parity, at)),
        ("autocast, devices, graphs", 70, attached),
        ("dense", 100, partial(speed.dense_lines, at)),
        ("where the time goes", 40, partial(where.lines, at)),
        ("goals, forward", 110, goals("forward", first)),
        ("goals, both directions", 110, goals("both", at.timed)),
        ("clocks", 15, loaded),
        ("tuning", 180, partial(speed.tune_lines, at)),
        ("goals, tuned, forward", 70, few("forward")),
        ("goals, tuned, both directions", 70, few("both")),
        ("the pooled rest", 120, partial(rest.lines, at)),
        ("a denoising step", 240, partial(models.step_lines, at)),
        ("a training step", 150, partial(models.training_lines, at)),
        ("parity, continued", 150, partial(correct.other_parity, at)),
        ("tests", 400, partial(suite.lines, at)),
        ("long clips", 600, long_clips),
    ]
    return [Stage(name, stretch * cap, lines) for name, cap, lines in named]


def recover(device: Any) -> str:
    """Give back what a line that failed held; why nothing more can run, or empty."""
    import torch

    gc.collect()
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception as error:  # an illegal access stays with the process
        return str(error).splitlines()[0]
    return ""


def again(path: Path, left: float) -> None:
    """Go on in the place of this process, which can do no more, with what is left of the time."""
    print("\nstarting again after that line", flush=True)
    command = [sys.executable, __file__, "--resume", "--keep-failed"]
    command += ["--minutes", f"{max(left, 1) / 60:.3f}", "--out", str(path)]
    os.execv(sys.executable, command)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
