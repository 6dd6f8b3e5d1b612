"""Ways of choosing and of approximating that were measured and not built.

Each on captured q, k and v at one density, beside the package's own choice: as short as it can be
said, and not for speed.
"""

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from gen_accel import VideoShape
from gen_accel.attention_processors.methods.blocks import Layout
from gen_accel.kernels import run
from gen_accel.kernels.choosing import block_mass, block_means, block_spread
from gen_accel.plan import Plan, Rest, plan_of_call
from study.captured import Captured
from study.errors import relative_error
from study.variants import Variant

LEVELS, BEAM = 4, 2  # of the hierarchical choice: a side of four blocks, twice as many are opened
BITS = 8  # of the hash


def rows(calls: Sequence[Captured], video: VideoShape, density: float) -> list[dict[str, Any]]:
    """Error of each way with the rest dropped and around mean queries."""
    variant = Variant(share=density)
    layout = variant.layout(video)
    found = []
    for name, scores in CHOICES.items():
        row: dict[str, Any] = {"way": name}
        for title, rest in (("dropped", None), ("query", Rest("query", "second"))):
            errors = [_error(call, _plan(scores, call, layout, density, rest)) for call in calls]
            row[title] = mean(errors)
        found.append(row)
    for name, attend in WHOLE.items():
        errors = [relative_error(attend(x.q, x.k, x.v, layout, density), x.dense) for x in calls]
        found.append({"way": name, "whole": mean(errors)})
    return found


def _plan(
    scores: Callable, call: Captured, layout: Layout, density: float, rest: Rest | None
) -> Plan:
    ranked = scores(call.q, call.k, layout, density)
    best = ranked.topk(layout.count(density), -1).indices
    keep = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best, True)
    return plan_of_call(layout.slots, keep, rest=rest)


def _error(call: Captured, plan: Plan) -> float:
    out = run(call.q, call.k, call.v, plan, scale=call.q.shape[3] ** -0.5)
    return relative_error(out, call.dense)


def spread(q: Tensor, k: Tensor, layout: Layout, density: float) -> Tensor:
    """The score "spread" of `Piecewise`."""
    query = block_means(q, layout.slots, layout.slots.block_q)
    return block_spread(query, k, layout.slots, scale=q.shape[3] ** -0.5)


def ceiling(q: Tensor, k: Tensor, layout: Layout, density: float) -> Tensor:
    """The true mass of each block: what a learned gate (SeerAttention) is trained to guess."""
    return block_mass(q, k, layout.slots, scale=q.shape[3] ** -0.5)


def int4(q: Tensor, k: Tensor, layout: Layout, density: float) -> Tensor:
    """`spread` on queries and keys of four bits, one scale a token (SALE)."""
    return spread(_rounded(q), _rounded(k), layout, density)


def _rounded(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True) / 7
    return (x / step).round() * step


def hierarchical(q: Tensor, k: Tensor, layout: Layout, density: float) -> Tensor:
    """Mean keys of groups of blocks first, those of the blocks of the best groups then (HiP,
    DHSA)."""
    slots = layout.slots
    query, key = block_means(q, slots, slots.block_q), block_means(k, slots, slots.block_k)
    scores = query @ key.mT
    blocks = scores.shape[3]
    of_block = torch.arange(blocks) // LEVELS
    groups = int(of_block[-1]) + 1
    sums = scores.new_zeros(*scores.shape[:3], groups).index_add_(3, of_block, scores)
    opened = min(groups, -(-BEAM * layout.count(density) // LEVELS))
    best = sums.topk(opened, -1).indices
    seen = torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, best, True)
    return scores.masked_fill(~seen[..., of_block], torch.finfo(scores.dtype).min)


def hashed(q: Tensor, k: Tensor, v: Tensor, layout: Layout, density: float) -> Tensor:
    """Queries and keys sorted by a hash of their angles, each run of queries against the run of
    keys at its place (HyperAttention, without its sampled columns)."""
    planes = torch.randn(q.shape[3], BITS, generator=torch.Generator().manual_seed(0))
    powers = 2 ** torch.arange(BITS)
    gray = torch.arange(2**BITS)
    place_of = torch.empty_like(gray)
    place_of[gray ^ (gray >> 1)] = gray.clone()  # neighbours in it differ by one plane
    order_q, order_k = (
        place_of[((x @ planes > 0) * powers).sum(-1)].argsort(stable=True, dim=-1) for x in (q, k)
    )
    runs = max(1, round(1 / density))
    out = torch.empty_like(q)
    for rows_q, rows_k in zip(order_q.chunk(runs, 2), order_k.chunk(runs, 2), strict=True):
        a, b, c = (
            x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[3]))
            for x, at in ((q, rows_q), (k, rows_k), (v, rows_k))
        )
        made = torch.nn.functional.scaled_dot_product_attention(a, b, c)
        out.scatter_(2, rows_q[..., None].expand_as(made), made)
    return out


def agents(q: Tensor, k: Tensor, v: Tensor, layout: Layout, density: float) -> Tensor:
    """Mean queries of the blocks attend to all keys, and all queries to what they saw (Agent
    Attention); it costs 1 / 32 of dense attention, whatever the density."""
    slots = layout.slots
    agent = block_means(q, slots, slots.block_q)[:, :, layout.occupied[: len(layout.rows)]]
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, agent, attend(agent, k, v))


CHOICES: dict[str, Callable[[Tensor, Tensor, Layout, float], Tensor]] = {
    "spread": spread,
    "true mass, the ceiling of a learned gate": ceiling,
    "spread on int4": int4,
    "hierarchical means": hierarchical,
}
WHOLE: dict[str, Callable[[Tensor, Tensor, Tensor, Layout, float], Tensor]] = {
    "sorted by an angular hash": hashed,
    "agent tokens": agents,
}
