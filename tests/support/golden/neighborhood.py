"""Outputs of neighborhood attention."""

from collections.abc import Iterator

import torch
from support.golden.deviation import KERNELS, Arrays, Deviation, Format, both_sides, by_id
from torch import Tensor

from gen_accel.attention_processors import Neighborhood
from gen_accel.functional import attention
from gen_accel.kernels import reference
from gen_accel.video import VideoShape


def check(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """Outputs of every kernel and the log-sum-exp."""
    grid = tuple(case["grid"])
    q, k, v, want = (torch.from_numpy(arrays[f"{name}{case['id']}"]) for name in "qkvo")
    want_lse = torch.from_numpy(arrays[f"lse{case['id']}"])
    if q.shape[1:-2] != grid or want_lse.shape != q.shape[:-1]:
        raise ValueError(f"q must be (B, *{grid}, heads, dim), got {tuple(q.shape)}")
    # (B, *grid, H, D) -> (B, H, N, D)
    q, k, v, want = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v, want))
    want_lse = want_lse.flatten(1, -2).transpose(1, 2)

    missing = 3 - len(grid)
    video = VideoShape(*(1,) * missing, *grid)
    method = Neighborhood(
        window=(1,) * missing + tuple(case["window"]),
        stride=(1,) * missing + tuple(case["stride"]),
        dilation=(1,) * missing + tuple(case["dilation"]),
        is_causal=(False,) * missing + tuple(case["is_causal"]),
    )
    plan, scale = method.plan(video), q.shape[-1] ** -0.5

    def ours(dtype: torch.dtype, kernel: str) -> Tensor:
        inputs = (x.to(dtype) for x in (q, k, v))
        return attention(*inputs, video=video, method=method, kernel=kernel)

    def lse(dtype: torch.dtype) -> Tensor:
        return reference.logsumexp(q.to(dtype), k.to(dtype), plan, scale=scale)

    exact = ours(torch.float64, "reference")
    yield from both_sides({k: ours(torch.float32, k) for k in KERNELS}, want, exact)
    sums, exact_sums = {"reference": lse(torch.float32)}, lse(torch.float64)
    yield from both_sides(sums, want_lse, exact_sums, " in logsumexp")


KEYS = {"grid", "window", "stride", "dilation", "is_causal"}
FORMAT = Format("neighborhood", frozenset(KEYS), by_id("q", "k", "v", "o", "lse"), check)
