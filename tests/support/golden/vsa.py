"""Outputs, gradients and choices of video sparse attention."""

from collections.abc import Iterator

import torch
from support.checks import budget, largest_error
from support.golden.deviation import (
    ACROSS,
    KERNELS,
    Arrays,
    Deviation,
    Format,
    bits,
    wrong_blocks,
)
from torch import Tensor

from gen_accel.attention_processors.methods.vsa import VSA
from gen_accel.functional import attention
from gen_accel.video import VideoShape

INPUTS, GATED = ("q", "k", "v"), ("gate", "dgate")
RESULTS = ("o", "dq", "dk", "dv")


def names(case: dict) -> list[str]:
    wanted = (*INPUTS, "do", *RESULTS, "fine", "keep", *(GATED if case["gate"] else ()))
    return [f"{name}_{case['id']}" for name in wanted]


def check(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """The kept tiles, and outputs and gradients of every kernel."""
    tensors = {name: torch.from_numpy(arrays[name]) for name in names(case) if "keep" not in name}

    def of(name: str) -> Tensor:
        return tensors[f"{name}_{case['id']}"]

    video, blocks = VideoShape(*case["grid"]), case["blocks"]
    # Half a tile less, so that it is rounded up to the tiles of the case.
    share = (case["topk"] - 0.5) / blocks
    method = VSA(share, tuple(case["tile"]), "gated" if case["gate"] else "once")
    alone = VSA(method.critical, method.tile)  # without a gate that is given: the fine part
    q, k = (of(x).float() for x in "qk")
    keep = method.plan_for(q, k, video=video).keep
    packed = arrays[f"keep_{case['id']}"]
    yield wrong_blocks(keep, bits(packed, (*q.shape[:2], blocks, blocks)))

    def ours(dtype: torch.dtype, kernel: str) -> dict[str, Tensor]:
        inputs = [*INPUTS, "gate"] if case["gate"] else [*INPUTS]
        leaves = [of(x).to(dtype, copy=True).requires_grad_() for x in inputs]
        options = {"video": video, "method": method, "kernel": kernel}
        o = attention(*leaves[:3], **options, gate=leaves[3] if case["gate"] else None)
        gradients = torch.autograd.grad(o, leaves, of("do").to(dtype))
        found = dict(zip((f"d{x}" for x in inputs), gradients, strict=True))
        fine = attention(*(x.detach() for x in leaves[:3]), **{**options, "method": alone})
        return {"o": o.detach(), "fine": fine, **found}

    exact = ours(torch.float64, "reference")
    results = {kernel: ours(torch.float32, kernel) for kernel in KERNELS}
    for name, one in exact.items():
        # The golden was computed in fp64, so that its own error is no measure for fp32.
        reference = results["reference"][name]
        error = largest_error(of(name), one)
        yield Deviation(f"error of the golden in {name}", error, budget(reference, one))
        for kernel, result in results.items():
            error, most = largest_error(result[name], one), budget(reference, one, ACROSS)
            yield Deviation(f"error of {kernel} in {name}", error, most)


KEYS = {"topk", "tile", "blocks", "gate"}
FORMAT = Format("VSA", frozenset(KEYS), names, check)
