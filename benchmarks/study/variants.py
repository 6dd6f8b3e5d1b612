"""Choice of blocks x rest x tile x query block x density, each as a method that can be attached.

What the package has is taken from there. The oracle's choice and the mixed rest are made here:
they are for comparison.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gen_accel import VideoShape
from gen_accel.attention_processors.methods.blocks import Layout, layout_of
from gen_accel.attention_processors.methods.piecewise import FLOOR
from gen_accel.attention_processors.methods.scores import Scores
from gen_accel.kernels import rest as pooled_rest
from gen_accel.kernels import run_lse
from gen_accel.kernels.choosing import block_mass
from gen_accel.method import Method, RunPlan
from gen_accel.plan import Plan, Rest, pack, plan_of_call, unpack

Choice = Literal["mean", "spread", "loss", "threshold", "reuse", "oracle"]
Pooling = Literal["none", "key", "key + slope", "mixed", "query", "query + slope", "second order"]
RESTS: dict[str, Rest | None] = {
    "none": None,
    "key": Rest("key"),
    "key + slope": Rest("key", "first"),
    "query": Rest("query"),
    "query + slope": Rest("query", "first"),
    "second order": Rest("query", "second"),
}


@dataclass(frozen=True)
class Variant(Method):
    """One cell of the ablation.

    Args:
        choice: by the product of "mean" query and mean key, by the "spread" of a block under the
            mean query, by that and the deviation of its values ("loss"), by Sol-Attn's "threshold"
            on the first, or by the true mass, "oracle".
            "reuse" is the oracle's of an earlier step, see `keep`.
        rest: "mixed" weighs blocks by their mean keys, and takes values under the softmax of the
            mean query.
        tile: a box of tokens, or "raster".
        share: of the key blocks; with "threshold", what `tau` comes to.
    """

    choice: Choice = "loss"
    rest: Pooling = "second order"
    tile: tuple[int, int, int] | Literal["raster"] = (4, 4, 4)
    block_q: int = 64
    share: float = 0.2
    tau: float = 1.0

    def __post_init__(self) -> None:
        assert self.choice in get_args(Choice), self.choice
        assert self.rest in get_args(Pooling), self.rest

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: RunPlan
    ) -> Tensor:
        layout = self.layout(video)
        scores = self.scores(q, k, v, layout)
        return self.attend(q, k, v, self.plan_by(scores, layout), kernel)

    def plan(self, video: VideoShape, device: torch.device) -> Plan:
        """All of it: what the package asks a plan for is of no use here."""
        layout = self.layout(video)
        return plan_of_call(layout.slots, torch.ones_like(layout.always)[None, None])

    def layout(self, video: VideoShape) -> Layout:
        return layout_of(video, torch.device("cpu"), self.block_q, 64, self.tile)

    @torch.no_grad()
    def scores(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """(B, H, Kq, R) fp32, by which the key blocks are ranked that have no text."""
        scale = q.shape[3] ** -0.5
        if self.choice in ("oracle", "reuse"):
            return layout.of_ranked(block_mass(q, k, layout.slots, scale=scale), 3)
        kind = self.choice if self.choice in ("spread", "loss") else "mean"
        return Scores(q, k, layout, v=v, kind=kind, scale=scale).of(slice(None))

    @torch.no_grad()
    def plan_by(self, scores: Tensor, layout: Layout) -> Plan:
        return plan_of_call(layout.slots, self.keep(scores, layout), rest=RESTS.get(self.rest))

    def keep(self, scores: Tensor, layout: Layout) -> Tensor:
        """(B, H, Kq, Kk) bool.

        Args:
            scores: of this step, or of an earlier one, whose pattern is used again.
        """
        if self.choice == "threshold":
            more = scores > self.threshold(scores)
        else:
            best = scores.topk(layout.count(self.share), -1).indices
            more = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        keep = layout.always.expand(*scores.shape[:3], -1).clone()
        layout.add(keep, more)
        return keep

    def threshold(self, scores: Tensor) -> Tensor:
        """(B, H, Kq, 1), Sol-Attn's "exact": mean and deviation of the scores of a row."""
        spread = scores.var(-1, keepdim=True, correction=0)
        return scores.mean(-1, keepdim=True) + self.tau * (spread + FLOOR).sqrt()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, kernel: RunPlan) -> Tensor:
        if self.rest != "mixed":
            return kernel(q, k, v, plan)
        scale = q.shape[3] ** -0.5
        return mixed(*run_lse(q, k, v, plan, scale=scale), q, k, v, plan)


def mixed(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Attention over the kept keys, with blocks of the rest that weigh what their mean keys do and
    have the values that their block's mean query sees."""
    scale, real = q.shape[3] ** -0.5, plan.real.view(-1, plan.block_k)
    key, _ = pooled_rest.means(pack(k, plan), pack(v, plan), plan)
    queries = pack(q, plan).unflatten(2, (-1, plan.block_q))
    held = plan.real.view(-1, plan.block_q, 1)
    query = (queries * held).sum(3) / held.sum(1).clamp_min(1)
    score = (query @ pack(k, plan).mT * scale).unflatten(3, (-1, plan.block_k))
    weight = score.masked_fill(~real, torch.finfo(score.dtype).min).softmax(-1).transpose(2, 3)
    value = (weight @ pack(v, plan).unflatten(2, (-1, plan.block_k))).transpose(2, 3)
    scores = queries @ key.mT[:, :, None] * scale + real.sum(1).log()
    rows = (pack(x, plan).unflatten(2, (-1, plan.block_q)) for x in (out, lse[..., None]))
    kept, total = rows
    left_out = (~plan.keep & (real.sum(1) > 0))[:, :, :, None]
    made, _ = pooled_rest.merged(kept, total[..., 0], scores, value, left_out)
    return unpack(made.flatten(2, 3), plan)
