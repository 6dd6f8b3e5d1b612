"""Sparse attention against dense attention, in turn on one device. See README.md."""

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

from gen_accel import Dense, Neighborhood, Radial, VideoShape, attach, attention, kernels
from gen_accel.kernels import flex
from gen_accel.measure import write_json
from gen_accel.measure.environment import environment
from gen_accel.measure.timing import interleaved

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARITY_TOKENS = 2048  # the reference holds a matrix of tokens x tokens in fp64

# Two radial plans, at a density of about 0.1 and of 0.2 to 0.3, and windows of about 0.1. Short
# clips of large frames do not get below 0.1: a frame sees itself and its neighbours in full.
CASES = (
    (VideoShape(28, 12, 12), Radial(decay_factor=0.05, sink=False)),
    (VideoShape(28, 12, 12), Radial(decay_factor=0.65)),
    (VideoShape(28, 12, 12), Neighborhood((-1, 4, 4))),
    (VideoShape(57, 12, 12), Radial(decay_factor=0.15)),
    (VideoShape(57, 12, 12), Radial(decay_factor=1.5)),
    (VideoShape(57, 12, 12), Neighborhood((-1, 4, 4))),
    (VideoShape(114, 12, 12), Radial(decay_factor=0.65)),
    (VideoShape(114, 12, 12), Radial(decay_factor=3.0)),
    (VideoShape(114, 12, 12), Neighborhood((-1, 4, 4))),
    (VideoShape(228, 12, 12), Radial(decay_factor=1.5)),
    (VideoShape(228, 12, 12), Radial(decay_factor=6.0)),
    (VideoShape(228, 12, 12), Neighborhood((-1, 4, 4))),
    (VideoShape(11, 30, 52), Radial(decay_factor=0.05, sink=False)),
    (VideoShape(11, 30, 52), Neighborhood((-1, 10, 17))),
    (VideoShape(21, 30, 52), Radial(decay_factor=0.05, sink=False)),
    (VideoShape(21, 30, 52), Radial(decay_factor=0.3)),
    (VideoShape(21, 30, 52), Neighborhood((-1, 10, 17))),
    (VideoShape(9, 45, 80), Radial(decay_factor=0.05, sink=False)),
    (VideoShape(9, 45, 80), Neighborhood((-1, 15, 27))),
)

PLANS = {
    "demo, 129 frames": VideoShape(33, 12, 12),
    "demo, 257 frames": VideoShape(65, 12, 12),
    "Wan 2.1, 480 x 832, 81 frames": VideoShape(21, 30, 52),
    "Wan 2.1, 720 x 1280, 81 frames": VideoShape(21, 45, 80),
    "Wan 2.2 TI2V-5B, 704 x 1280, 121 frames": VideoShape(31, 22, 40),
    "HunyuanVideo, 720 x 1280, 129 frames": VideoShape(33, 45, 80, text=256),
    "HunyuanVideo, 768 x 1280, 117 frames": VideoShape(30, 48, 80, text=256),
}
PLAN_METHODS = (
    Radial(),
    Radial("paper"),
    Radial("code-2025-11"),
    Neighborhood((-1, 8, 8)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--scaling", action="store_true", help="time against tokens, and the slope")
    mode.add_argument("--overhead", action="store_true", help="what attach(Dense()) costs a step")
    mode.add_argument("--plan", action="store_true", help="seconds to build plans")
    parser.add_argument("--least-tokens", type=int, default=0)
    parser.add_argument("--most-tokens", type=int, default=33_000)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--kernels", nargs="+", choices=kernels.KERNELS, default=["gather", "flex"]
    )
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(best))
    parser.add_argument("--name", help="of the JSON file in results/ (default: the mode)")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    modes = {"scaling": scaling, "overhead": overhead, "plan": plan}
    name = next((name for name in modes if getattr(args, name)), "attention")
    report = environment(args.device) | {
        "heads": args.heads,
        "dim": args.dim,
        "rounds": args.rounds,
        "seed": args.seed,
        "rows": [],
    }
    print(f"{report['device']}, {report['threads']} threads, torch {report['torch']}")
    path = RESULTS / f"{args.name or name}.json"

    def save(row: dict) -> None:
        report["rows"].append(row)
        write_json(path, report)

    modes.get(name, compare)(args, save)
    print(f"written to {path}")
    if any("refused" in row for row in report["rows"]):
        sys.exit("some kernels were refused")


def compare(args: argparse.Namespace, save: Callable[[dict], None]) -> None:
    """Kernels beside dense SDPA, A B C A B C, one line a kernel."""
    columns = "density computed dtype kernel dense_ms ms speedup efficiency kernel_eff compile_s"
    print(f"{'video':<14}{'method':<38}" + "".join(f"{c:>11}" for c in columns.split()))
    for (video, method), dtype in itertools.product(CASES, args.dtypes):
        if not args.least_tokens <= video.tokens <= args.most_tokens:
            continue
        for row in rows(args, video, method, DTYPES[dtype]):
            row["dtype"] = dtype
            save(row)
            print(line(row), flush=True)


def rows(
    args: argparse.Namespace, video: VideoShape, method: Any, dtype: torch.dtype
) -> list[dict]:
    """One row a kernel. A kernel that is refused or fails parity is not timed."""
    plan = method.plan(video, args.device)
    head = {
        "video": str(video),
        "tokens": video.tokens,
        "method": brief(method),
        "density": plan.density,
        "computed_density": plan.computed_density,
        "backward": args.backward,
    }
    refused, compiled = {}, {}
    inputs = draw(args, video, dtype)
    calls = {"dense": step(F.scaled_dot_product_attention, inputs, args.backward)}
    for kernel in args.kernels:
        run = sparse(video, method, kernel)
        try:
            check_parity(args, shrink(video, method), method, kernel, dtype)
            before = len(flex.compile_seconds)
            calls[kernel] = step(run, inputs, args.backward)
            calls[kernel]()
            compiled[kernel] = sum(flex.compile_seconds[before:])
        except ValueError as error:
            calls.pop(kernel, None)
            refused[kernel] = str(error)
    turns = interleaved(calls, rounds=args.rounds, device=args.device)
    seconds = {name: statistics.median(values) for name, values in turns.items()}
    found = []
    for kernel in args.kernels:
        if kernel in refused:
            found.append({**head, "kernel": kernel, "refused": refused[kernel]})
            continue
        speedup = seconds["dense"] / seconds[kernel]
        found.append(
            {
                **head,
                "kernel": kernel,
                "dense_ms": 1e3 * seconds["dense"],
                "ms": 1e3 * seconds[kernel],
                "ideal_ms": 1e3 * seconds["dense"] * plan.density,
                "speedup": speedup,
                "efficiency": speedup * plan.density,
                "kernel_efficiency": speedup * plan.computed_density,
                "compile_s": compiled[kernel],
            }
        )
    return found


def line(row: dict) -> str:
    head = f"{row['video']:<14}{row['method']:<38}{row['density']:>11.3f}"
    head += f"{row['computed_density']:>11.3f}{row['dtype']:>11}{row['kernel']:>11}"
    if "refused" in row:
        return f"{head}  refused: {row['refused']}"
    ratios = ("speedup", "efficiency", "kernel_efficiency", "compile_s")
    return (
        head
        + "".join(f"{row[name]:>11.1f}" for name in ("dense_ms", "ms"))
        + "".join(f"{row[name]:>11.2f}" for name in ratios)
    )


def scaling(args: argparse.Namespace, save: Callable[[dict], None]) -> None:
    """Radial attention on 12 x 12 frames, more and more of them."""
    videos = [VideoShape(frames, 12, 12) for frames in (28, 57, 114, 228)]
    videos = [v for v in videos if args.least_tokens <= v.tokens <= args.most_tokens]
    for dtype in args.dtypes:
        timed = [
            {**row, "dtype": dtype}
            for video in videos
            for row in rows(args, video, Radial(), DTYPES[dtype])
        ]
        for row in timed:
            save(row)
            print(line(row), flush=True)
        for kernel in args.kernels:
            points = [row for row in timed if row["kernel"] == kernel and "refused" not in row]
            if len(points) < 2:
                continue
            x = np.log([row["tokens"] for row in points])
            slopes = {
                name: np.polyfit(x, np.log([row[key] for row in points]), 1)[0]
                for name, key in (("slope", "ms"), ("dense_slope", "dense_ms"))
            }
            save({"kernel": kernel, "dtype": dtype, **slopes})
            print(
                f"{kernel}, {dtype}: time ~ tokens^{slopes['slope']:.2f}, "
                f"dense ~ tokens^{slopes['dense_slope']:.2f}"
            )


@torch.no_grad()
def overhead(args: argparse.Namespace, save: Callable[[dict], None]) -> None:
    """A transformer of the demo's size in fp32, as it is and with Dense() attached."""
    torch.manual_seed(args.seed)
    stock = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=64,
        text_dim=64,
        freq_dim=128,
        ffn_dim=512,
        num_layers=6,
        rope_max_seq_len=256,
    ).to(args.device)
    attached = deepcopy(stock)
    noise = torch.randn(1, 16, 29, 12, 12), torch.tensor([500.0]), torch.randn(1, 512, 64)
    inputs = [x.to(args.device) for x in noise]
    with attach(attached, Dense()):
        if not torch.equal(stock(*inputs).sample, attached(*inputs).sample):
            raise ValueError("Dense() changes the model's answer")
        calls = {"stock": partial(stock, *inputs), "attached": partial(attached, *inputs)}
        seconds = interleaved(calls, rounds=args.rounds, device=args.device)
    row = {
        "tokens": 29 * 12 * 12,
        "stock_ms": 1e3 * statistics.median(seconds["stock"]),
        "attached_ms": 1e3 * statistics.median(seconds["attached"]),
        "ratio": statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)),
    }
    save(row)
    print(
        f"{row['stock_ms']:.1f} ms stock, {row['attached_ms']:.1f} ms with Dense() attached, "
        f"median ratio {row['ratio']:.3f}"
    )


def plan(args: argparse.Namespace, save: Callable[[dict], None]) -> None:
    """Seconds to build a plan, and to turn it into the lists that a kernel reads."""
    for (name, video), method in itertools.product(PLANS.items(), PLAN_METHODS):
        built, prepared = [], []
        for _ in range(args.rounds):
            sys.modules[type(method).__module__]._plan.cache_clear()
            start = time.perf_counter()
            made = method.plan(video)
            built.append(time.perf_counter() - start)
            start = time.perf_counter()
            kernels.prepare(made, torch.device("cpu"), "gather")
            prepared.append(time.perf_counter() - start)
        row = {
            "name": name,
            "video": str(video),
            "tokens": video.tokens,
            "method": brief(method),
            "density": made.density,
            "computed_density": made.computed_density,
            "plan_ms": 1e3 * statistics.median(built),
            "prepare_ms": 1e3 * statistics.median(prepared),
        }
        save(row)
        print(
            f"{name:<42}{row['method']:<34}density {row['density']:.3f}  "
            f"plan {row['plan_ms']:8.1f} ms  lists {row['prepare_ms']:8.1f} ms",
            flush=True,
        )


def draw(args: argparse.Namespace, video: VideoShape, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v, (1, H, N, D)."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = (1, args.heads, video.tokens, args.dim)
    return [torch.randn(shape, generator=generator).to(args.device, dtype) for _ in range(3)]


def sparse(video: VideoShape, method: Any, kernel: str) -> Callable[..., Tensor]:
    return lambda q, k, v: attention(q, k, v, video=video, method=method, kernel=kernel)


def step(run: Callable[..., Tensor], inputs: list[Tensor], backward: bool) -> Callable[[], Any]:
    """A call that gives the output and, with `backward`, the gradients of q, k and v."""
    if not backward:
        return torch.no_grad()(lambda: [run(*inputs)])
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    weight = torch.linspace(-1, 1, leaves[0].numel(), dtype=torch.float64)
    weight = weight.view(leaves[0].shape).to(leaves[0])

    def both() -> list[Tensor]:
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, weight)]

    return both


def check_parity(
    args: argparse.Namespace, video: VideoShape, method: Any, kernel: str, dtype: torch.dtype
) -> None:
    """Raises ValueError where a kernel errs more than twice as much as the reference in its dtype.

    Error is the largest distance from the reference in fp64; one spacing of floats is allowed.
    """
    inputs = draw(args, video, dtype)
    reference = sparse(video, method, "reference")
    exact = step(reference, [x.double() for x in inputs], args.backward)()
    low = step(reference, inputs, args.backward)()
    actual = step(sparse(video, method, kernel), inputs, args.backward)()
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    for name, x, y, z in zip(names, actual, low, exact, strict=False):
        error = (x.double() - z).abs().max().item()
        spacing = torch.finfo(dtype).eps * z.abs().max().item()
        budget = 2 * ((y.double() - z).abs().max().item() + spacing)
        if not error <= budget:
            raise ValueError(
                f"{kernel} fails parity at {video}: {name} errs by {error:.2e}, "
                f"allowed are {budget:.2e}"
            )


def shrink(video: VideoShape, method: Any) -> VideoShape:
    """Halve the longest side that the method lets be halved, until a reference is cheap."""
    while video.tokens > PARITY_TOKENS:
        halves = [
            VideoShape(*(-(-n // 2) if i == axis else n for i, n in enumerate(video.grid)))
            for axis in sorted(range(3), key=lambda axis: -video.grid[axis])
        ]
        smaller = next((half for half in halves if half != video and fits(half, method)), None)
        if smaller is None:
            break
        video = smaller
    return video


def fits(video: VideoShape, method: Any) -> bool:
    """A window, for one, may not be larger than its axis."""
    try:
        method.plan(video)
    except ValueError:
        return False
    return True


def brief(method: Any) -> str:
    """A method's repr without the options left at their defaults."""
    options = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    default = {f.name: f.default for f in dataclasses.fields(method)}
    changed = [f"{name}={value}" for name, value in options.items() if value != default[name]]
    return f"{type(method).__name__}({', '.join(changed)})"


if __name__ == "__main__":
    main()
