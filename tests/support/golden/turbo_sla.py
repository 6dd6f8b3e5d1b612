"""Choices of LightX2V's dynamic sparse attention, by which Turbo-SLA was trained."""

from collections.abc import Iterator

import torch
from support.golden.deviation import Arrays, Deviation, Format, bits, wrong_blocks

from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.video import VideoShape


def names(case: dict) -> list[str]:
    return [f"{name}_{case['id']}" for name in ("q", "k", "keep")]


def check(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """The blocks that the recipe keeps, bit for bit."""
    q, k = (torch.from_numpy(arrays[name]).float() for name in names(case)[:2])
    options = {"critical": "topk_ratio", "block_q": "block_q", "block_k": "block_k"}
    method = method_from("turbo_sla", [f"{name}={case[key]}" for name, key in options.items()])
    keep = method.plan_for(q, k, video=VideoShape(1, 1, q.shape[2])).keep
    want = bits(arrays[f"keep_{case['id']}"], case["shape"])
    # Ours ends on a whole block of both sizes, theirs on the last that holds a token.
    yield wrong_blocks(keep[..., : want.shape[2], : want.shape[3]], want)
    beyond = keep[..., : want.shape[2], want.shape[3] :].sum().item()
    yield Deviation("blocks beyond the last token", beyond, 0)


KEYS = {"topk_ratio", "block_q", "block_k", "shape"}
FORMAT = Format("piecewise, Turbo-SLA", frozenset(KEYS), names, check)
