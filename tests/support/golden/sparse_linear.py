"""Outputs and gradients of sparse-linear attention."""

from collections.abc import Iterator

import torch
from support.golden.deviation import KERNELS, Arrays, Deviation, Format, both_sides, by_id
from torch import Tensor

from gen_accel.attention_processors import SparseLinear
from gen_accel.functional import attention
from gen_accel.video import VideoShape

ARRAYS = ("q", "k", "v", "do", "W", "b", "o", "dq", "dk", "dv")


def check(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """Output and gradients of every kernel, with the projection of the case."""
    tensors = {x: torch.from_numpy(arrays[f"{x}{case['id']}"]) for x in ARRAYS}
    q, W, b = (tensors[x] for x in ("q", "W", "b"))
    method = SparseLinear(
        critical=case["topk"],
        linear_over="all",
        feature_map=case["feature_map"],
        block_q=case["block_q"],
        block_k=case["block_k"],
        tile="raster",
    )
    video = VideoShape(1, 1, q.shape[2])

    def ours(dtype: torch.dtype, kernel: str) -> dict[str, Tensor]:
        branch = method.branch(q.shape[1], q.shape[3])
        branch.load_state_dict({"proj.weight": W, "proj.bias": b})
        leaves = [tensors[x].to(dtype, copy=True).requires_grad_() for x in "qkv"]
        options = {"video": video, "method": method, "kernel": kernel}
        o = attention(*leaves, **options, branch=branch.to(dtype))
        gradients = torch.autograd.grad(o, leaves, tensors["do"].to(dtype))
        return dict(zip(("o", "dq", "dk", "dv"), (o.detach(), *gradients), strict=True))

    exact = ours(torch.float64, "reference")
    results = {kernel: ours(torch.float32, kernel) for kernel in KERNELS}
    for name, one in exact.items():
        of_kernels = {kernel: result[name] for kernel, result in results.items()}
        yield from both_sides(of_kernels, tensors[name], one, f" in {name}")


KEYS = {"topk", "feature_map", "block_q", "block_k"}
FORMAT = Format("sparse linear", frozenset(KEYS), by_id(*ARRAYS), check)
