"""Residuals of DiTFastAttn, from step to step."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from support.golden.deviation import Arrays, Deviation, Format, by_id
from torch import Tensor

from gen_accel import Plan, Reuse, VideoShape
from gen_accel.kernels import Runner, run
from gen_accel.method import Method
from gen_accel.plan import Windows, raster_slots

WEIGHTS = tuple(f"{kind}_{name}" for name in "qkvo" for kind in "wb")
ARRAYS = ("x", "o", *WEIGHTS)


@dataclass(frozen=True)
class Raster(Method):
    """A window over the tokens in their order: so many before and after; negative: all."""

    before: int
    after: int

    def plan(self, video: VideoShape, device: torch.device) -> Plan:
        slots = raster_slots(video, 16)
        place, N = torch.arange(len(slots)), video.tokens
        first = place - (N if self.before < 0 else self.before)
        last = place + (N if self.after < 0 else self.after)
        seen = last.clamp_max(N - 1) - first.clamp_min(0) + 1
        axes = (x[None].int() for x in (first, last, place))
        rule = Windows(*axes, torch.zeros(len(slots), dtype=torch.bool), seen)
        keep = rule.touched(slots >= 0, 16, 16)[None, None]
        return Plan(slots, keep, 16, 16, rule).to(device)


def check(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """DiTFastAttn's outputs, step by step. The halves of a batch, which are the branches of its
    guidance, have a memory each. A habit of the original is followed here alone: where one half
    is computed for both and the residual is of both, it takes that of the first."""
    x, want, *weights = (
        torch.from_numpy(arrays[f"{name}{case['id']}"]).float() for name in ARRAYS
    )
    (w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o) = weights
    steps, B, N, _ = x.shape
    video, method = VideoShape(1, 1, N), Reuse(Raster(*case["window"]))
    scale = case["D"] ** -0.5
    kernel = Runner(lambda q, k, v, plan: run(q, k, v, plan, scale=scale), "auto", scale)
    halves = [slice(0, B)] if B == 1 else [slice(0, B // 2), slice(B // 2, B)]
    shared = halves[0] if case["cond_first"] else halves[-1]
    memories, apart, out = [method.step_state() for _ in halves], False, torch.empty(0)

    def heads(one: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (one @ weight.T + bias).unflatten(-1, (case["H"], -1)).transpose(1, 2)

    for step in range(steps):
        name, share = case["methods"][step], "cfg_attn_share" in case["methods"][step]
        if name != "output_share":
            made = []
            for half in [shared] if share else halves:
                q, k, v = (
                    heads(x[step, half], *both) for both in ((w_q, b_q), (w_k, b_k), (w_v, b_v))
                )
                number = halves.index(half)
                if name.startswith("full_attn"):
                    o = F.scaled_dot_product_attention(q, k, v)
                    if case["keeps_residual"][step]:
                        memories[number].learn(q, k, v, o, video=video, kernel=kernel, first=None)
                        apart = not share
                else:
                    memory = memories[0 if share and apart else number]
                    o = method(q, k, v, video=video, kernel=kernel, state=memory)
                made.append(o.transpose(1, 2).flatten(2) @ w_o.T + b_o)
            out = torch.cat(made * (len(halves) if share else 1))
        error = (out - want[step]).abs().max().item()
        yield Deviation(f"error at step {step}", error, 1e-5)


KEYS = {"window", "cond_first", "methods", "keeps_residual"}
FORMAT = Format("residual", frozenset(KEYS), by_id(*ARRAYS), check)
