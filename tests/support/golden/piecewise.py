"""Masks and outputs of PISA."""

from collections.abc import Iterator

import torch
from support.golden.deviation import (
    KERNELS,
    Arrays,
    Deviation,
    Format,
    bits,
    both_sides,
    by_id,
    wrong_blocks,
)
from torch import Tensor

from gen_accel.attention_processors import Piecewise
from gen_accel.functional import attention
from gen_accel.video import VideoShape


def check(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """The blocks that are chosen, and outputs of every kernel."""
    q, k, v, want = (torch.from_numpy(arrays[f"{name}{case['id']}"]) for name in "qkvo")
    method = Piecewise(
        critical=case["density"],
        score="norm" if case["use_bias"] else "mean",
        centre="key",
        order="first",
        tile="raster",
        block_q=case["block"],
        block_k=case["block"],
    )
    video = VideoShape(1, 1, case["N"])
    keep = method.plan_for(q.float(), k.float(), v.float(), video=video).keep
    shape = (*q.shape[:2], case["blocks"], case["blocks"])
    yield wrong_blocks(keep, bits(arrays[f"keep{case['id']}"], shape))

    def ours(dtype: torch.dtype, kernel: str) -> Tensor:
        inputs = (x.to(dtype) for x in (q, k, v))
        return attention(*inputs, video=video, method=method, kernel=kernel)

    exact = ours(torch.float64, "reference")
    yield from both_sides({k: ours(torch.float32, k) for k in KERNELS}, want, exact)


KEYS = {"N", "block", "blocks", "density", "use_bias"}
FORMAT = Format("piecewise", frozenset(KEYS), by_id("q", "k", "v", "o", "keep"), check)
