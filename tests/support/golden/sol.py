"""Thresholds, masks and outputs of Sol-Attn."""

import math
from collections.abc import Iterator, Sequence

import torch
from support.golden.deviation import (
    KERNELS,
    Arrays,
    Deviation,
    Format,
    bits,
    both_sides,
    largest_error,
    wrong_blocks,
)
from torch import Tensor

from gen_accel import kernels
from gen_accel.attention_processors import Piecewise
from gen_accel.plan import Plan
from gen_accel.video import VideoShape

THRESHOLD = 1e-5  # of the largest threshold; scores lie further from their own


def names(case: dict) -> Sequence[str]:
    """Several cases share one input."""
    of_input = [f"{letter}_{case['input']}" for letter in "qkv"]
    return [*of_input, *(f"{name}_{case['id']}" for name in ("o", "threshold", "keep"))]


def check(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """Thresholds, the blocks that are exact, and outputs of every kernel."""
    q, k, v, want, threshold = (torch.from_numpy(arrays[name]) for name in names(case)[:-1])
    first, last = case["dense_query_blocks"]
    method, video = _method(case), VideoShape(1, 1, case["tokens"])

    def planned(dtype: torch.dtype) -> Plan:
        plan = method.plan_for(q.to(dtype), k.to(dtype), video=video)
        keep = plan.keep.clone()
        keep[:, :, first:last] = True
        return plan.changed(keep=keep)

    def ours(dtype: torch.dtype, kernel: str) -> Tensor:
        inputs, scale = (x.to(dtype) for x in (q, k, v)), q.shape[-1] ** -0.5
        return kernels.run(*inputs, planned(dtype), scale=scale, kernel=kernel)

    found = method.thresholds(q.float(), k.float(), video=video) / math.log(2)
    most = THRESHOLD * threshold.abs().max().item()
    yield Deviation("error of thresholds", largest_error(found, threshold), most)
    keep = bits(arrays[f"keep_{case['id']}"], case["keep_shape"])
    yield wrong_blocks(planned(torch.float32).keep, keep)
    exact = ours(torch.float64, "reference")
    yield from both_sides({k: ours(torch.float32, k) for k in KERNELS}, want, exact)


def _method(case: dict) -> Piecewise:
    sink = {}
    if case["sink_tokens"]:
        start = case["sink_start"]
        first = case["tokens"] - case["sink_tokens"] if start is None else start
        sink["sink"] = first, case["sink_tokens"]
    return Piecewise(
        select="threshold",
        tau=case["tau"],
        threshold=case["thresh_type"],
        band=1,
        score="mean",
        centre="key",
        tile="raster",
        block_q=case["block"],
        block_k=case["block"],
        **sink,
    )


KEYS = {"input", "tokens", "block", "tau", "thresh_type", "sink_tokens", "dense_query_blocks"}
FORMAT = Format("sol", frozenset(KEYS), names, check)
