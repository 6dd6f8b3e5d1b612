"""What a pattern and a residual of an earlier step are worth on the demo model. See README.md.

Of one prompt, first branch of guidance, mean over some layers: how far the heaviest blocks of the
last dense step are those of later steps, what share of the mass that any choice could keep they
keep there, and the relative L2 error of attention by them; beside them the choice by the means of
the step itself. Each with what is left out dropped or pooled around the mean query, and with the
residual of the dense step or without.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor

from gen_accel import Dense, Plan, Reuse, SparseLinear, VideoShape, attach, demo
from gen_accel.kernels import run
from gen_accel.kernels.mass import block_mass
from gen_accel.measure import write_json
from gen_accel.measure.environment import environment
from gen_accel.plan import Rest

RESULTS = Path(__file__).parent / "results"
PROMPT = "a yellow triangle moves left slowly"
TEXT = 16  # tokens, enough for the demo model's captions


class Capture:
    """Dense attention that keeps the q, k and v of some steps, by step and layer."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps
        self.kept: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        self.video: Any = None
        self.clock: Callable[[], tuple[int, int]] = lambda: (0, 0)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: Callable
    ) -> Tensor:
        step, passes = self.clock()
        if step in self.steps and passes == 1:
            self.video = video
            self.kept[step].append((q, k, v))
        return kernel(q, k, v, Dense().plan(video, q.device))

    def plan(self, video: VideoShape, device: torch.device) -> Plan:
        return Dense().plan(video, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=129)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learned", type=int, default=3, help="the last dense step")
    parser.add_argument("--used", type=int, nargs="+", default=[4, 8, 12, 19])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--critical", type=float, default=0.1)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--name", default="reuse", help="of the JSON file in results/")
    args = parser.parse_args()

    captured = capture(args)
    kept = captured.kept
    report: dict[str, Any] = environment() | vars(args) | {"rows": []}
    inner = SparseLinear(args.critical, block_q=args.block, block_k=args.block)
    for step in args.used:
        per_layer = [
            compared(inner, kept[args.learned][layer], kept[step][layer], captured.video)
            for layer in args.layers
        ]
        mean = {key: sum(one[key] for one in per_layer) / len(per_layer) for key in per_layer[0]}
        report["rows"].append({"step": step, **mean})
        print(step, "  ".join(f"{key} {value:.3f}" for key, value in mean.items()), flush=True)
        write_json(RESULTS / f"{args.name}.json", report)


def capture(args: argparse.Namespace) -> Capture:
    pipe: Any = WanPipeline.from_pretrained(demo.path(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    method = Capture((args.learned, *args.used))
    with attach(pipe, method) as handle:
        method.clock = lambda: (handle.clock.step, handle.passing.passes.get(handle.clock.step, 0))
        pipe(
            args.prompt,
            height=96,
            width=96,
            num_frames=args.frames,
            num_inference_steps=args.steps,
            guidance_scale=3.0,
            max_sequence_length=TEXT,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    return method


@torch.no_grad()
def compared(
    inner: SparseLinear, before: tuple[Tensor, ...], now: tuple[Tensor, ...], video: VideoShape
) -> dict[str, float]:
    """One layer: what it learned from q, k and v `before`, used on those of `now`."""
    q, k, v = now
    scale = q.shape[-1] ** -0.5

    def kernel(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        return run(q, k, v, plan, scale=scale)

    reuse = Reuse(inner, residual=False)
    old, best = (reuse.pattern(x[0], x[1], video, scale) for x in (before, now))
    assert old is not None
    assert best is not None
    own = inner.plan_for(q, k, video=video)
    mass = block_mass(q, k, best, scale=scale)
    rows = slice(0, video.video_tokens // best.block_q)  # those that choose
    dense, dense_before = (kernel(x[0], x[1], x[2], Dense().plan(video)) for x in (now, before))

    def overlap(plan: Plan) -> float:
        both = (plan.keep & best.keep)[:, :, rows].sum()
        return (both / best.keep[:, :, rows].sum()).item()

    def kept(plan: Plan) -> float:
        held = [(mass * keep)[:, :, rows].sum() for keep in (plan.keep, best.keep)]
        return (held[0] / held[1]).item()

    def error(out: Tensor) -> float:
        return ((out - dense).norm() / dense.norm()).item()

    found = {"overlap": overlap(old), "mass": kept(old)}
    found |= {"overlap of means": overlap(own), "mass of means": kept(own)}
    for rest, name in ((None, "dropped"), (Rest("query"), "pooled")):
        for plan, choice in ((old, "pattern"), (own, "means"), (best, "best")):
            whole = replace(plan.keeping(plan.keep, dynamic=False), rest=rest)
            out = kernel(q, k, v, whole)
            found[f"{choice}, {name}"] = error(out)
            if choice == "pattern":
                residual = dense_before - kernel(before[0], before[1], before[2], whole)
                found[f"{choice}, {name}, residual"] = error(out + residual)
    return found


if __name__ == "__main__":
    main()
