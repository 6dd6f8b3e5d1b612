"""Outputs of block mixture."""

from collections.abc import Iterator

import torch
from support.golden.deviation import KERNELS, Arrays, Deviation, Format, both_sides, by_id
from torch import Tensor

from gen_accel.attention_processors import BlockMixture
from gen_accel.functional import attention
from gen_accel.video import VideoShape


def check(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """Outputs of every kernel. A chunk is so many frames, or (rows, columns), or a box."""
    grid, value = tuple(case["grid"]), case["value"]
    # (1, N, H, D) -> (1, H, N, D)
    q, k, v, want = (
        torch.from_numpy(arrays[f"{name}{case['id']}"]).transpose(1, 2) for name in "qkvo"
    )
    chunk = case["chunk"] if isinstance(case["chunk"], list) else [case["chunk"]]
    if any(side != int(side) for side in chunk):
        raise ValueError(f"chunk must be whole frames, rows and columns, got {case['chunk']}")
    sides = tuple(int(side) for side in chunk)
    partition = ("1d", "2d", "3d")[len(sides) - 1]
    amount = {"threshold": value} if case["select_mode"] == "threshold" else {"topk": (value,) * 3}
    method = BlockMixture(
        partition=partition,
        **{f"chunk_{partition}": sides[0] if partition == "1d" else sides},
        select=case["select_mode"],
        scope=case["threshold_type"],
        **amount,
    )

    def ours(dtype: torch.dtype, kernel: str) -> Tensor:
        inputs = (x.to(dtype) for x in (q, k, v))
        return attention(*inputs, video=VideoShape(*grid), method=method, kernel=kernel)

    exact = ours(torch.float64, "reference")
    by_kernel = {k: ours(torch.float32, k) for k in (*KERNELS, "routed")}
    yield from both_sides(by_kernel, want, exact)


KEYS = {"grid", "chunk", "select_mode", "threshold_type", "value"}
FORMAT = Format("block mixture", frozenset(KEYS), by_id("q", "k", "v", "o"), check)
