"""Block maps of SpargeAttn."""

from collections.abc import Iterator

import torch
from support.golden.deviation import Arrays, Deviation, Format, bits, by_id, wrong_blocks
from torch import Tensor

from gen_accel.attention_processors.methods.blocks import layout_of
from gen_accel.attention_processors.methods.scores import Scores, of_mass, self_similarity
from gen_accel.video import VideoShape


def check(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """Blocks that are alike, and the map, without short blocks: of a short one the
    original is never sure."""
    q, k = (torch.from_numpy(arrays[f"{name}{case['id']}"]).float() for name in "qk")
    if case["smooth_k"]:
        k = k - k.mean(2, keepdim=True)
    blocks = case["block_q"], case["block_k"]
    layout = layout_of(VideoShape(1, 1, case["N"]), q.device, *blocks, "raster")
    whole = [case["N"] // block for block in blocks]
    alike = []
    for name, x, block, count in zip("qk", (q, k), blocks, whole, strict=True):
        similarity = self_similarity(x, layout.slots, block)[..., :count]
        alike.append(similarity > case["similarity"])
        want = torch.from_numpy(arrays[f"alike_{name}{case['id']}"])[..., :count]
        wrong = (alike[-1] != want).sum().item()
        yield Deviation(f"blocks of {name} wrongly alike", wrong, 0)

    scores = Scores(q, k, layout, scale=q.shape[-1] ** -0.5).of(slice(None))
    scores = scores[:, :, : whole[0], : whole[1]].masked_fill(~alike[1][:, :, None], -torch.inf)
    keep = _kept(case, scores.softmax(-1)) | ~alike[0][..., None] | ~alike[1][:, :, None]
    if case["sink"]:
        keep[..., 0] = True
    want = bits(arrays[f"map{case['id']}"], case["shape"])
    yield wrong_blocks(keep, want[:, :, : whole[0], : whole[1]])


def _kept(case: dict, shares: Tensor) -> Tensor:
    """Blocks kept by its rules: the entry that crosses is left out, a count is of all blocks."""
    order = shares.argsort(-1, descending=True)
    if "topk" in case:
        counts = torch.full_like(shares[..., :1], int(case["topk"] * case["shape"][3]))
    else:
        counts = of_mass(shares, case["cdf"]).sum(-1, keepdim=True) - 1
    best = torch.arange(shares.shape[-1]) < counts.clamp_min(1)
    return torch.zeros_like(shares, dtype=torch.bool).scatter(-1, order, best)


KEYS = {"N", "block_q", "block_k", "similarity", "smooth_k", "sink", "shape"}
ARRAYS = ("q", "k", "map", "alike_q", "alike_k")
FORMAT = Format("sparge", frozenset(KEYS), by_id(*ARRAYS), check)
