"""Budgets: how many of the best key blocks each query block keeps.

References:
    "row" is the usual top-k. "mass" is the rule of Zhang et al., "SpargeAttn: Accurate Sparse
    Attention Accelerating Any Model Inference", 2025, https://arxiv.org/abs/2502.18137, public
    code thu-ml/SpargeAttn at bfd980b (Apache-2.0), and so is `self_similarity`. "head" is the rule
    of Shen et al., "DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance",
    2025, https://arxiv.org/abs/2505.14708, public code shawnricecake/draft-attention at f3c81d5,
    and of Lai et al., "FlexPrefill", 2025, https://arxiv.org/abs/2502.20766. The golden cases hold
    the answers of the first two.

Unlike SpargeAttn, the key block by which the mass is reached is kept, and a short block is judged
by the tokens that it holds. Unlike DraftAttention, each query block keeps one key block at least.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.attention_processors.methods.scores import Scores
from gen_accel.kernels.pooling import block_means
from gen_accel.plan import Slots, numbers_on

By = Literal["row", "mass", "head"]


class Budget(NamedTuple):
    """The options of a method.

    Args:
        critical: share of the key blocks of a "row", or of the pairs of blocks of a "head". A
            tuple has one for each head.
        by: who shares it: each query block keeps as many, or enough to hold `mass` of its
            attention, or a head keeps the best of all its pairs of blocks.
        mass: share of the attention of a mean query, in (0, 1].
        alike: blocks whose tokens are less alike, by `self_similarity`, are kept whole: no mean
            stands for them.
    """

    critical: float | tuple[float, ...]
    by: By = "row"
    mass: float | None = None
    alike: float | None = None


class Chosen(NamedTuple):
    """Budget of query blocks.

    Args:
        keep: (B, H, Kq, Kk) bool.
        skipped: bool like it, the worst key blocks of each row; None where none are asked for.
        entries: the most pairs that one pattern holds, where this is known without reading the
            device.
    """

    keep: Tensor
    skipped: Tensor | None
    entries: int | None


def check_budget(budget: Budget, critical: float) -> None:
    """Raise ValueError for values that are out of range or would be ignored.

    Args:
        critical: the method's default.
    """
    shares = budget.critical if isinstance(budget.critical, tuple) else (budget.critical,)
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"critical must be in (0, 1], got {budget.critical}")
    if budget.by == "mass":
        if budget.mass is None or not 0 < budget.mass <= 1:
            raise ValueError(f"mass must be in (0, 1] for budget='mass', got {budget.mass}")
        if budget.critical != critical:
            raise ValueError(f"budget='mass' takes mass, got critical={budget.critical}")
    elif budget.mass is not None:
        raise ValueError(f"mass is for budget='mass', got budget={budget.by!r}")
    if budget.alike is not None and not (math.isfinite(budget.alike) and budget.alike < 1):
        raise ValueError(f"alike must be None or less than 1, got {budget.alike}")


def chosen(by: Scores, q: Tensor, budget: Budget, worst: int = 0) -> Chosen:
    """Choose key blocks by the scores of q, (B, H, N, D), within a budget, beside the pairs that
    are always kept.

    Args:
        worst: how many of each row to name as skipped.
    """
    layout = by.layout
    B, H, Kq, R = by.shape
    keep = layout.always.expand(B, H, -1, -1).clone()
    skipped = torch.zeros_like(keep) if worst else None
    unlike = None if budget.alike is None else _keep_unlike(keep, by, q, budget.alike)
    shares = budget.critical if isinstance(budget.critical, tuple) else (budget.critical,)
    counts = [layout.count(share) for share in shares]
    count = max(counts)
    in_head = max(1, int(max(shares) * layout.held_rows * R))
    for some in by.groups():
        scores = by.of(some)
        if unlike is not None:
            scores = scores.masked_fill(unlike[:, some, None], -torch.inf)
        if budget.by == "row":
            best = scores.topk(count, sorted=len(shares) > 1).indices
            if len(shares) > 1:
                best = _first_of_each(best, counts[some])
            keep[:, some].scatter_(-1, layout.numbers(best), True)
            if skipped is not None:
                scores.scatter_(-1, best, torch.inf)  # so that no block is both
                rest = scores.topk(worst, largest=False, sorted=False).indices
                skipped[:, some].scatter_(-1, layout.numbers(rest), True)
            del best
        else:
            held = by.shares(scores)
            if budget.by == "mass":
                assert budget.mass is not None
                layout.add(keep[:, some], of_mass(held, budget.mass))
            else:
                layout.add(keep[:, some], of_head(held, layout.rows, in_head))
            del held
        del scores  # free before the next heads' scores
    entries = None
    if unlike is None and budget.by != "mass":
        most = count * layout.video_rows if budget.by == "row" else in_head + Kq
        entries = layout.entries + most
    return Chosen(keep, skipped, entries)


def _first_of_each(best: Tensor, counts: Sequence[int]) -> Tensor:
    """Names of the first so many of each head, (B, h, Kq, C) from best to worst; in the place of
    the others the best again."""
    wanted = numbers_on(tuple(counts), best.device)[:, None, None]
    taken = torch.arange(best.shape[-1], device=best.device) < wanted
    return best.where(taken, best[..., :1])


def of_mass(shares: Tensor, mass: float) -> Tensor:
    """Select the fewest blocks of each row that hold `mass` together, at least one: bool like
    `shares`, (..., R)."""
    held, places = shares.sort(dim=-1, descending=True, stable=True)
    taken = held.cumsum(-1) - held < mass
    taken[..., 0] = True
    return torch.zeros_like(taken).scatter_(-1, places, taken)


def of_head(shares: Tensor, rows: Tensor, count: int) -> Tensor:
    """Select the `count` best of all pairs of a head, and the best of each row: bool like
    `shares`, (B, H, Kq, R).

    Args:
        rows: (Kq,) bool, the query blocks that count.
    """
    best = shares.masked_fill(~rows[:, None], -1.0).flatten(2).topk(count, sorted=False).indices
    taken = torch.zeros_like(shares, dtype=torch.bool)
    taken.flatten(2).scatter_(-1, best, True)
    return taken.scatter_(-1, shares.argmax(-1, keepdim=True), True)


def self_similarity(x: Tensor, slots: Slots, block: int, kernel: str = "auto") -> Tensor:
    """Mean cosine of all pairs of tokens in a block: (B, H, S / block) from x (B, H, N, D)."""
    units = F.normalize(x.float(), dim=-1)
    return block_means(units, slots, block, kernel).square().sum(-1)


def _keep_unlike(keep: Tensor, by: Scores, q: Tensor, alike: float) -> Tensor:
    """Keep the rows and columns of blocks whose tokens are not alike. Return which of the ranked
    key blocks these are, (B, H, R).

    The mean key is subtracted first, as in SpargeAttn: a component of all keys makes none alike.
    """
    layout, slots = by.layout, by.layout.slots
    k = by.k.float()
    k = k - k.mean(2, keepdim=True)
    unlike_q = self_similarity(q, slots, slots.block_q, by.kernel) <= alike
    unlike_k = self_similarity(k, slots, slots.block_k, by.kernel) <= alike
    keep |= (unlike_q[..., None] | unlike_k[:, :, None]) & layout.occupied
    return layout.of_ranked(unlike_k, 2)
