"""Scores by which query blocks choose key blocks, and budgets: how many of the best they keep.

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
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.attention_processors.methods.blocks import (
    NOTHING,
    Always,
    Box,
    Layout,
    Tiles,
    boxes_of,
    check_blocks,
    layout_of,
    smooth_qk,
    tile_of,
)
from gen_accel.kernels.base import BlockFacts
from gen_accel.kernels.choosing import (
    block_deviations,
    block_means,
    block_spread,
    select,
    selects,
)
from gen_accel.kernels.rest import pooled_shares
from gen_accel.method import Method, plan_once
from gen_accel.plan import Plan, Rest, Slots, numbers_on, pack, plan_of_call
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from typing_extensions import Self

Score = Literal["spread", "loss", "pooled", "mean", "norm"]
Deviation = Literal["diag", "exact"]
By = Literal["row", "mass", "head"]

AT_ONCE = 1 << 23  # pairs of blocks: heads are scored in groups that fit, at least one
SLOPES = 1 << 24  # numbers in the slopes of blocks that are made at once
EPSILON = 1e-5  # added to the norm of a slope, as in PISA's code


class Scores:
    """Scores of the key blocks that a layout ranks, for each query block, fp32; see `Piecewise`
    for the kinds. Made and read under `torch.no_grad`, with autocast off.

    Args:
        q, k, v: (B, H, N, D); v is read for "loss", "pooled" and "norm" alone. Without v, "loss"
            and "pooled" take the values to vary equally in all blocks, and "norm" raises.
        scale: factor of the products of queries and keys.
        rest: how "pooled" pools keys, around mean queries; "zeroth" order without.
        kernel: the name of the kernel for attention, which decides what runs here.
        facts: of the call, if they are known.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        layout: Layout,
        *,
        v: Tensor | None = None,
        kind: Score = "mean",
        scale: float = 1.0,
        rest: Rest | None = None,
        kernel: str = "auto",
        facts: BlockFacts | None = None,
    ) -> None:
        slots = layout.slots
        self.k, self.layout, self.kind, self.scale, self.kernel = k, layout, kind, scale, kernel
        known = facts is not None
        self.query = facts.query_means if known else block_means(q, slots, slots.block_q, kernel)
        self.q, self.rest, self.norms = q, rest or Rest("query"), None
        if kind == "norm":
            if v is None:
                raise ValueError("score 'norm' looks at the values too, got no v")
            self.norms = _slope_norms(k, v, layout)
        elif kind in ("loss", "pooled") and v is not None:
            self.norms = (
                facts.deviations if known else block_deviations(v, slots, slots.block_k, kernel)
            )

    @property
    def by_all_keys(self) -> bool:
        """Whether a score looks at every key of a block, not at their mean alone."""
        return self.kind in ("spread", "loss", "pooled")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Kq, R): samples, heads, query blocks and ranked key blocks."""
        B, H, Kq, _ = self.query.shape
        return B, H, Kq, len(self.layout.ranked)

    def groups(self) -> list[slice]:
        """Groups of heads whose scores are made at once; none where all blocks hold text, so that
        there is nothing to choose."""
        B, H, Kq, R = self.shape
        if not R:
            return []
        step = max(1, AT_ONCE // max(1, B * Kq * R))
        return [slice(i, i + step) for i in range(0, H, step)]

    def of(self, some: slice) -> Tensor:
        """Scores (B, h, Kq, R) of some heads, each row less a constant: see `left_off`."""
        scores = self.layout.of_ranked(self.of_all(some), 3)
        if self.norms is None:
            return scores
        return scores + self.layout.of_ranked(self.norms[:, some, None], 3)

    def of_all(self, some: slice) -> Tensor:
        """Scores (B, h, Kq, Kk) of some heads without `norms`, (B, H, Kk). What they say of blocks
        that are not ranked has no meaning."""
        query, layout = self.query[:, some], self.layout
        if self.kind == "pooled":
            plan = plan_of_call(layout.slots, layout.always[None, None], rest=self.rest)
            given = self.q[:, some], self.k[:, some], plan
            return pooled_shares(*given, scale=self.scale, kernel=self.kernel).float()
        if self.by_all_keys:
            known = {"scale": self.scale, "kernel": self.kernel}
            return block_spread(query, self.k[:, some], layout.slots, **known)
        if self.scale != 1:
            query = query * self.scale
        return query @ self._keys[1][:, some].transpose(-1, -2)

    def shares(self, scores: Tensor) -> Tensor:
        """Share of a mean query's attention that falls to each key block, from `scores` as `of`
        gives them. Rows sum to 1, or to 0 where all scores are -inf."""
        if self.kind == "mean":
            slots = self.layout.slots
            scores = scores + self.layout.of_ranked(slots.held[1][:, 0], 0).log()
        return scores.softmax(-1).nan_to_num(0.0)

    def left_off(self) -> Tensor:
        """Constant that `of` subtracts from the scores of each row, (B, H, Kq)."""
        if self.by_all_keys:
            return torch.zeros_like(self.query[..., 0])
        return (self.query * self._keys[0]).sum(-1) * self.scale

    def variance(self, scores: Tensor, some: slice, how: Deviation) -> Tensor:
        """Variance (B, h, Kq, 1) of each row's scores over the key blocks: their own ("exact"),
        or, by "diag", of scale m_i . k_j with the channels of k_j taken as uncorrelated."""
        if how == "exact":
            return scores.var(-1, correction=0, keepdim=True)
        keys = self.layout.of_ranked(self._keys[1][:, some], 2)
        by_channel = keys.var(2, correction=0)
        return self.query[:, some].square() @ by_channel[..., None] * self.scale**2

    @cached_property
    def _keys(self) -> tuple[Tensor, Tensor]:
        """The mean key, (B, H, 1, D), and the mean keys of the blocks less it."""
        slots = self.layout.slots
        key = block_means(self.k, slots, slots.block_k, self.kernel)
        mean = key.mean(2, keepdim=True)
        # Subtracting the mean shifts all scores of a row alike, and keeps precision.
        return mean, key - mean


def _slope_norms(k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """ln (||sum_t (k_t - k_j)^T v_t|| + 1e-5) of the blocks, (B, H, Kk), in fp32."""
    slots = layout.slots
    real = slots.real.view(-1, slots.block_k, 1)
    keys, values = (pack(x, slots).float().unflatten(2, (-1, slots.block_k)) for x in (k, v))
    keys, values = keys * real, values * real
    mean = keys.sum(3, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    keys = ((keys - mean) * real).flatten(0, 2).mT
    step = max(1, SLOPES // k.shape[3] ** 2)
    parts = zip(keys.split(step), values.flatten(0, 2).split(step), strict=True)
    norms = torch.cat([(key @ value).flatten(1).norm(dim=1) for key, value in parts])
    return (norms + EPSILON).log().view(*k.shape[:2], -1)


class BlockSelection(Method):
    """Base of methods whose query blocks keep the key blocks that score best. These options are
    fields of the dataclass that derives from it."""

    if TYPE_CHECKING:
        critical: Any
        budget: By
        mass: float | None
        alike: float | None
        tile: Tiles
        block_q: int
        block_k: int

    def check_selection(self) -> None:
        """Raise ValueError for options that are out of range, ignored, or do not go together."""
        if self.budget == "mass":
            if self.mass is None:
                raise ValueError("mass must be in (0, 1] for budget='mass', got None")
            if self.critical != type(self).critical:
                raise ValueError(f"budget='mass' takes mass, got critical={self.critical}")
        elif self.mass is not None:
            raise ValueError(f"mass is for budget='mass', got budget={self.budget!r}")
        if self.alike is not None and not (math.isfinite(self.alike) and self.alike < 1):
            raise ValueError(f"alike must be None or less than 1, got {self.alike}")
        check_blocks(self.block_q, self.block_k, self.tile)

    @property
    def criticals(self) -> tuple[float, ...]:
        """The share of all heads, or one for each head."""
        return (self.critical[-1] if isinstance(self.critical, tuple) else self.critical,)

    @property
    def tile_tokens(self) -> int:
        return min(self.block_q, self.block_k) if self.tile == "auto" else 0

    def tiled(self, tile: Box | tuple[Box, ...]) -> "Self":
        return replace(self, tile=tile)  # pyright: ignore[reportArgumentType]

    def for_layer(self, layer: int) -> "Self":
        tile = tile_of(self.tile, layer)
        return self if tile == self.tile else replace(self, tile=tile)  # pyright: ignore[reportArgumentType]

    @property
    def least_grid(self) -> Box:
        frames, rows, columns = zip(*boxes_of(self.tile), (1, 1, 1), strict=True)
        return max(frames), max(rows), max(columns)

    def layout(self, video: VideoShape, device: torch.device) -> Layout:
        tile = tile_of(self.tile, 0)
        return layout_of(video, device, self.block_q, self.block_k, tile, self.always)

    @property
    def always(self) -> Always:
        """Keys and queries that are exact whatever their scores."""
        return NOTHING

    @plan_once
    def plan(self, video: VideoShape, device: torch.device) -> Plan:
        """Plan of the blocks that smooth random q and k keep, for pictures and estimates."""
        return self.plan_for(*smooth_qk(video), video=video).to(device)


def chosen(
    by: Scores, q: Tensor, options: BlockSelection, worst: int = 0
) -> tuple[Tensor, Tensor | None, int | None, tuple[Tensor, Tensor] | None]:
    """Choose key blocks by the scores of q, (B, H, N, D), within the budget of some options,
    beside the pairs that are always kept.

    Args:
        worst: how many of each row to name as skipped.

    Returns:
        (B, H, Kq, Kk) bool, the blocks that are kept; bool like it, the skipped ones, or None;
        the most pairs that one pattern holds, None if it takes reading the device to know; and
        `listed` of the plan.
    """
    layout = by.layout
    B, H, Kq, R = by.shape
    is_plain = options.budget == "row" and options.alike is None and not worst
    if R and is_plain and selects(by.kernel, by.k, len(layout.is_ranked)):
        return _chosen_and_listed(by, options.criticals)
    keep = layout.always.expand(B, H, -1, -1).clone()
    skipped = torch.zeros_like(keep) if worst else None
    unlike = None if options.alike is None else _keep_unlike(keep, by, q, options.alike)
    shares = options.criticals
    counts = [layout.count(share) for share in shares]
    count = max(counts)
    in_head = max(1, int(max(shares) * layout.held_rows * R))
    for some in by.groups():
        scores = by.of(some)
        if unlike is not None:
            scores = scores.masked_fill(unlike[:, some, None], -torch.inf)
        if options.budget == "row":
            best = scores.topk(count, sorted=len(shares) > 1).indices
            if len(shares) > 1:  # a head names its first so many, then the best again
                wanted = numbers_on(tuple(counts[some]), best.device)[:, None, None]
                best = best.where(torch.arange(count, device=best.device) < wanted, best[..., :1])
            keep[:, some].scatter_(-1, layout.numbers(best), True)
            if skipped is not None:
                scores.scatter_(-1, best, torch.inf)  # so that no block is both
                rest = scores.topk(worst, largest=False, sorted=False).indices
                skipped[:, some].scatter_(-1, layout.numbers(rest), True)
            del best
        else:
            held = by.shares(scores)
            if options.mass is not None:
                layout.add(keep[:, some], of_mass(held, options.mass))
            else:
                layout.add(keep[:, some], of_head(held, layout.rows, in_head))
            del held
        del scores  # free before the next heads' scores
    entries = None
    if unlike is None and options.mass is None:
        most = count * layout.video_rows if options.budget == "row" else in_head + Kq
        entries = layout.entries + most
    return keep, skipped, entries, None


def _chosen_and_listed(
    by: Scores, shares: Sequence[float]
) -> tuple[Tensor, None, int, tuple[Tensor, Tensor]]:
    """Run `chosen` in one pass over the scores, which lists the blocks of each row, too."""
    layout = by.layout
    B, H, Kq, _ = by.shape
    counts = tuple(layout.count(share) for share in shares)
    wanted = numbers_on(counts, by.k.device) if len(counts) > 1 else None
    entries = layout.entries + max(counts) * layout.video_rows
    keep = by.k.new_empty(B, H, Kq, len(layout.is_ranked), dtype=torch.bool)
    index = by.k.new_empty(B, H, entries, dtype=torch.int32)
    numbers = by.k.new_empty(B, H, Kq, 4, dtype=torch.int32)
    for some in by.groups():
        scores = by.of_all(some)
        select(
            scores,
            by.norms,
            layout.kinds,
            layout.before,
            wanted,
            keep,
            index,
            numbers,
            some.start,
            max(counts),
        )
        del scores  # free before the next heads' scores
    return keep, None, entries, (index, numbers)


def of_mass(shares: Tensor, mass: float) -> Tensor:
    """Select the fewest blocks of each row that hold `mass` together, at least one: bool like
    `shares`, (..., R)."""
    held, places = shares.sort(dim=-1, descending=True, stable=True)
    taken = held.cumsum(-1) - held < mass
    taken[..., 0] = True
    return torch.zeros_like(taken).scatter_(-1, places, taken)


def of_head(shares: Tensor, rows: Tensor, count: int) -> Tensor:
    """Select the `count` best of all pairs of a head, and the best of each row, among the query
    blocks `rows`, (Kq,) bool: bool like `shares`, (B, H, Kq, R)."""
    best = shares.masked_fill(~rows[:, None], -1.0).flatten(2).topk(count, sorted=False).indices
    taken = torch.zeros_like(shares, dtype=torch.bool)
    taken.flatten(2).scatter_(-1, best, True)
    return taken.scatter_(-1, shares.argmax(-1, keepdim=True), True)


def self_similarity(x: Tensor, slots: Slots, block: int, kernel: str = "auto") -> Tensor:
    """Mean cosine of all pairs of tokens in a block: (B, H, S / block) from x (B, H, N, D)."""
    units = F.normalize(x.float(), dim=-1)
    return block_means(units, slots, block, kernel).square().sum(-1)


def _keep_unlike(keep: Tensor, by: Scores, q: Tensor, alike: float) -> Tensor:
    """Keep all of blocks whose tokens are not alike; which of the ranked ones are, (B, H, R)."""
    layout, slots = by.layout, by.layout.slots
    k = by.k.float()
    k = k - k.mean(2, keepdim=True)  # as in SpargeAttn
    unlike_q = self_similarity(q, slots, slots.block_q, by.kernel) <= alike
    unlike_k = self_similarity(k, slots, slots.block_k, by.kernel) <= alike
    keep |= (unlike_q[..., None] | unlike_k[:, :, None]) & layout.occupied
    return layout.of_ranked(unlike_k, 2)
