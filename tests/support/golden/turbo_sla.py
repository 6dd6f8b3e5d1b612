"""Choices of LightX2V's dynamic sparse attention, by which Turbo-SLA was trained."""

from collections.abc import Iterator

import torch
from support.golden.deviation import Arrays, Deviation, Format, bits, wrong_blocks

from gen_accel.attention_processors import SparseLinear
from gen_accel.video import VideoShape


def names(case: dict) -> list[str]:
    return [f"{name}_{case['id']}" for name in ("q", "k", "keep")]


def check(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """The blocks that the recipe keeps, bit for bit."""
    q, k = (torch.from_numpy(arrays[name]).float() for name in names(case)[:2])
    blocks = case["block_q"], case["block_k"]
    method = SparseLinear(case["topk_ratio"], block_q=blocks[0], block_k=blocks[1], tile="raster")
    keep = method.plan_for(q, k, video=VideoShape(1, 1, q.shape[2])).keep
    want = bits(arrays[f"keep_{case['id']}"], case["shape"])
    # Ours ends on a whole block of both sizes, theirs on the last that holds a token.
    yield wrong_blocks(keep[..., : want.shape[2], : want.shape[3]], want)
    beyond = keep[..., : want.shape[2], want.shape[3] :].sum().item()
    yield Deviation("blocks beyond the last token", beyond, 0)


KEYS = {"topk_ratio", "block_q", "block_k", "shape"}
FORMAT = Format("sparse linear, Turbo-SLA", frozenset(KEYS), names, check)
