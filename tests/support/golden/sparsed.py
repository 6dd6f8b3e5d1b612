"""Patterns of SparseD."""

from collections.abc import Iterator

import torch
from support.golden.deviation import Arrays, Deviation, Format, bits, by_id, wrong_blocks

from gen_accel.kernels.choosing import block_mass, heaviest
from gen_accel.plan import raster_slots, slots_of
from gen_accel.video import VideoShape


def check(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """SparseD's blocks, bit for bit. Where a text is being written, the columns of its answer,
    from block `last` on, are not compared: there they have a softmax and a ranking of their own,
    which a video has no use for."""
    q, k = (torch.from_numpy(arrays[f"{x}{case['id']}"]).float() for x in "qk")
    block, shape = case["block"], tuple(case["shape"])
    slots = slots_of(raster_slots(VideoShape(1, 1, q.shape[2]), block), block, block)
    mass = block_mass(q, k, slots, scale=case["scale"])
    counts = torch.full(shape[:3], int(shape[-1] * case["select"]) + 1)
    keep = heaviest(mass, counts, torch.zeros(shape[2:], dtype=torch.bool))
    want = bits(arrays[f"keep{case['id']}"], shape)
    columns = slice(case["last"] if case["new_generation"] else None)
    yield wrong_blocks(keep[..., columns], want[..., columns])


KEYS = {"select", "block", "new_generation", "last", "scale", "shape"}
FORMAT = Format("sparsed", frozenset(KEYS), by_id("q", "k", "keep"), check)
