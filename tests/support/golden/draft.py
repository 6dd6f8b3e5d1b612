"""Pooled maps, choices and outputs of DraftAttention."""

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
    largest_error,
    wrong_blocks,
)
from torch import Tensor

from gen_accel.attention_processors import Piecewise
from gen_accel.attention_processors.methods.scores import Scores
from gen_accel.functional import attention
from gen_accel.video import VideoShape

SHARE = 1e-6  # that a pooled share may err


def check(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """The order of the tokens, the pooled map, the blocks that are kept, and outputs of every
    kernel. Rows to which the original gives no block have one of ours, and are left out."""
    # (N, H, D) -> (1, H, N, D)
    q, k, v, want = (
        torch.from_numpy(arrays[f"{name}{case['id']}"]).transpose(0, 1)[None] for name in "qkvo"
    )
    keep = bits(arrays[f"keep{case['id']}"], case["shape"])
    S, (rows, columns) = keep.shape[-1], case["pool"]
    video = VideoShape(*case["grid"], text=case["text"])
    method = Piecewise(
        # Pairs as many as lie at the percentile or above it; a half, so that none is rounded off.
        critical=min(1.0, (S * S - int(case["sparsity"] * S * S) + 1.5) / (S * S)),
        budget="head",
        score="mean",
        rest=None,
        tile=(1, rows, columns),
    )
    layout = method.layout(video, q.device)
    order = layout.slots.slots[layout.slots.real]
    wrong = (order != torch.from_numpy(arrays[f"order{case['id']}"])).sum().item()
    yield Deviation("tokens out of order", wrong, 0)

    by = Scores(q.float(), k.float(), layout, scale=q.shape[-1] ** -0.5)
    draft = by.shares(by.of(slice(None)))[0, :, :S]
    error = largest_error(draft, torch.from_numpy(arrays[f"draft{case['id']}"]))
    yield Deviation("error of the pooled map", error, SHARE)

    found = method.plan_for(q.float(), k.float(), video=video).keep[0, :, :S, :S]
    some = keep.any(-1)
    yield wrong_blocks(found & some[..., None], keep)
    yield Deviation("rows without one block", (found[~some].sum(-1) != 1).sum().item(), 0)

    def ours(dtype: torch.dtype, kernel: str) -> Tensor:
        inputs = (x.to(dtype) for x in (q, k, v))
        out = attention(*inputs, video=video, method=method, kernel=kernel)
        return out[0, seen]

    seen = torch.ones(q.shape[1:3], dtype=torch.bool)
    seen[:, order[: video.video_tokens]] = some.repeat_interleave(rows * columns, 1)
    exact = ours(torch.float64, "reference")
    yield from both_sides({k: ours(torch.float32, k) for k in KERNELS}, want[0, seen], exact)


KEYS = {"grid", "pool", "text", "sparsity", "shape"}
ARRAYS = ("q", "k", "v", "o", "draft", "keep", "order")
FORMAT = Format("draft", frozenset(KEYS), by_id(*ARRAYS), check)
