"""How time grows with tokens, what attaching costs, and how long plans take. See README.md.

Kernels beside dense attention are in kernel_speed.py.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from kernel_speed import HEADER, Case, How, line, rows
from parity import DTYPES, brief, draw

from gen_accel import Dense, Neighborhood, Radial, VideoShape, attach
from gen_accel import kernels as backends
from gen_accel.kernels import lists
from gen_accel.kernels.self_check import check_rows
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment, interleaved
from gen_accel.memory import PLAN_CACHE

RESULTS = Path(__file__).parent / "results"

OVERHEAD_VIDEO = VideoShape(29, 12, 12)

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
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--scaling", action="store_true", help="time against tokens, and the slope")
    mode.add_argument(
        "--overhead", action="store_true", help="what attach(Dense()) and a self-check cost"
    )
    mode.add_argument("--plan", action="store_true", help="seconds to build plans")
    parser.add_argument("--least-tokens", type=int, default=0)
    parser.add_argument("--most-tokens", type=int, default=33_000)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--kernels", nargs="+", choices=backends.KERNELS, default=["gather"])
    parser.add_argument("--heads", type=int, default=2)
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
    name = next(name for name in modes if getattr(args, name))
    report = environment(args.device) | {
        "rounds": args.rounds,
        "seed": args.seed,
        "rows": [],
    }
    print(f"{report['device']}, {report['threads']} threads, torch {report['torch']}")
    path = RESULTS / f"{args.name or name}.json"

    def save(row: dict) -> None:
        report["rows"].append(row)
        write_json(path, report)

    modes[name](args, save)
    print(f"written to {path}")
    if any("refused" in row for row in report["rows"]):
        sys.exit("some kernels were refused")


def scaling(args: argparse.Namespace, save: Callable[[dict], None]) -> None:
    """Radial attention on 12 x 12 frames, more and more of them."""
    videos = [VideoShape(frames, 12, 12) for frames in (28, 57, 114, 228)]
    videos = [v for v in videos if args.least_tokens <= v.tokens <= args.most_tokens]
    print(HEADER)
    for dtype in args.dtypes:
        timed = [
            row
            for video in videos
            for row in rows(Case(video, args.heads, Radial()), how(args, dtype))
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


def how(args: argparse.Namespace, dtype: str) -> How:
    dim = 64 if args.device.type == "cpu" else 128
    return How(args.device, dtype, dim, "forward", args.rounds, args.kernels, args.seed)


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
    noise = (
        torch.randn(1, 16, *OVERHEAD_VIDEO.grid),
        torch.tensor([500.0]),
        torch.randn(1, 512, 64),
    )
    inputs = [x.to(args.device) for x in noise]
    with attach(attached, Dense()):
        if not torch.equal(stock(*inputs).sample, attached(*inputs).sample):
            raise ValueError("Dense() changes the model's answer")
        calls = {"stock": partial(stock, *inputs), "attached": partial(attached, *inputs)}
        seconds = interleaved(calls, rounds=args.rounds, device=args.device)
    row = {
        "tokens": OVERHEAD_VIDEO.tokens,
        "stock_ms": 1e3 * statistics.median(seconds["stock"]),
        "attached_ms": 1e3 * statistics.median(seconds["attached"]),
        "ratio": statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)),
    }
    print(
        f"{row['stock_ms']:.1f} ms stock, {row['attached_ms']:.1f} ms with Dense() attached, "
        f"median ratio {row['ratio']:.3f}"
    )
    save(row | self_check(args, 2 * row["stock_ms"]))


def self_check(args: argparse.Namespace, step_ms: float) -> dict:
    """What holding some rows to the reference costs, once, against a step with guidance."""
    method = Radial()
    size = {"heads": 2, "dim": 64, "dtype": torch.float32, "device": args.device}
    q, k, v = draw(OVERHEAD_VIDEO, method, **size, seed=args.seed)
    plan, scale = method.plan(OVERHEAD_VIDEO, args.device), 64**-0.5
    out = backends.run(q, k, v, plan, scale=scale)
    check = partial(check_rows, q, k, v, plan, out, scale=scale, kernel="auto")
    seconds = interleaved({"check": check}, rounds=args.rounds, device=args.device)
    ms = 1e3 * statistics.median(seconds["check"])
    print(f"{ms:.1f} ms for one self-check, {ms / step_ms:.4f} of a step with guidance")
    return {"self_check_ms": ms, "self_check_share_of_a_step": ms / step_ms}


def plan(args: argparse.Namespace, save: Callable[[dict], None]) -> None:
    """Seconds to build a plan, and to turn it into the lists that a kernel reads."""
    for (name, video), method in itertools.product(PLANS.items(), PLAN_METHODS):
        built, prepared = [], []
        for _ in range(args.rounds):
            PLAN_CACHE.forget()
            start = time.perf_counter()
            made = method.plan(video)
            built.append(time.perf_counter() - start)
            start = time.perf_counter()
            lists.prepare(made)
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


if __name__ == "__main__":
    main()
