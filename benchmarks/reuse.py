"""Worth of a pattern and a residual of an earlier step on the demo model. See README.md.

Of one prompt, first branch of guidance, mean over some layers: how far the heaviest blocks of the
last dense step are those of later steps, what share of the mass that any choice could keep they
keep there, and the relative L2 error of attention by them; beside them the choice by the means of
the step itself. Each with what is left out dropped or pooled around the mean query, and with the
residual of the dense step or without.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pages import weights_of
from study import captured
from study.captured import Captured
from study.errors import relative_error
from torch import Tensor

from gen_accel import Plan, Reuse, SparseLinear, VideoShape
from gen_accel.kernels import run
from gen_accel.kernels.choosing import block_mass
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment
from gen_accel.plan import Rest

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=129)
    parser.add_argument("--learned", type=int, default=3, help="the last dense step")
    parser.add_argument("--used", type=int, nargs="+", default=[4, 8, 12, 19])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--critical", type=float, default=0.1)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=0, help="its number in study.captured")
    parser.add_argument("--name", default="reuse", help="of the JSON file in results/")
    args = parser.parse_args()

    steps = (args.learned, *args.used)
    video = captured.grid(args.frames)
    calls = captured.capture(captured.pipeline(), [args.prompt], steps, args.frames)
    kept = {(call.step, call.layer): call for call in calls}
    report: dict[str, Any] = environment() | vars(args) | {"rows": []}
    report |= {"weights": weights_of(), "prompt": captured.PROMPTS[args.prompt]}
    inner = SparseLinear(args.critical, block_q=args.block, block_k=args.block)
    for step in args.used:
        per_layer = [
            compared(inner, kept[args.learned, layer], kept[step, layer], video)
            for layer in args.layers
        ]
        mean = {key: sum(one[key] for one in per_layer) / len(per_layer) for key in per_layer[0]}
        report["rows"].append({"step": step, **mean})
        print(step, "  ".join(f"{key} {value:.3f}" for key, value in mean.items()), flush=True)
        write_json(RESULTS / f"{args.name}.json", report)


@torch.no_grad()
def compared(
    inner: SparseLinear, before: Captured, now: Captured, video: VideoShape
) -> dict[str, float]:
    """One layer: what it learned of the call `before`, used in the call `now`."""
    scale = now.q.shape[-1] ** -0.5

    def kernel(call: Captured, plan: Plan) -> Tensor:
        return run(call.q, call.k, call.v, plan, scale=scale)

    reuse = Reuse(inner, residual=False)
    old, best = (reuse.pattern(x.q, x.k, video, scale) for x in (before, now))
    assert old is not None
    assert best is not None
    own = inner.plan_for(now.q, now.k, video=video)
    mass = block_mass(now.q, now.k, best, scale=scale)
    rows = slice(0, video.video_tokens // best.block_q)  # those that choose

    def overlap(plan: Plan) -> float:
        both = (plan.keep & best.keep)[:, :, rows].sum()
        return (both / best.keep[:, :, rows].sum()).item()

    def kept(plan: Plan) -> float:
        held = [(mass * keep)[:, :, rows].sum() for keep in (plan.keep, best.keep)]
        return (held[0] / held[1]).item()

    found = {"overlap": overlap(old), "mass": kept(old)}
    found |= {"overlap of means": overlap(own), "mass of means": kept(own)}
    for rest, name in ((None, "dropped"), (Rest("query"), "pooled")):
        for plan, choice in ((old, "pattern"), (own, "means"), (best, "best")):
            whole = replace(plan.keeping(plan.keep, dynamic=False), rest=rest)
            out = kernel(now, whole)
            found[f"{choice}, {name}"] = relative_error(out, now.dense)
            if choice == "pattern":
                both = out + before.dense - kernel(before, whole)
                found[f"{choice}, {name}, residual"] = relative_error(both, now.dense)
    return found


if __name__ == "__main__":
    main()
