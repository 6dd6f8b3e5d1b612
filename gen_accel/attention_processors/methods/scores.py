"""Scores by which query blocks choose key blocks."""

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from gen_accel.attention_processors.methods.blocks import Layout
from gen_accel.kernels.pooling import block_means
from gen_accel.kernels.spread import block_spread
from gen_accel.plan import pack

Score = Literal["spread", "loss", "mean", "norm"]
Deviation = Literal["diag", "exact"]

AT_ONCE = 1 << 23  # pairs of blocks: heads are scored in groups that fit, at least one
SLOPES = 1 << 24  # numbers in the slopes of blocks that are made at once
EPSILON = 1e-5  # added to the norm of a slope, as in PISA's code


class Scores:
    """Scores of the key blocks that a layout ranks, for each query block, fp32.

    With the mean query m_i of a query block and the mean key k_j of a key block:
        "spread": ln sum_t exp(scale m_i . k_t) over the tokens t of block j.
        "loss": "spread" plus ln sqrt(sum_t |v_t - v_j|^2 / n_j), v_j the mean of the n_j values.
        "mean": scale m_i . k_j. "norm": "mean" plus ln ||sum_t (k_t - k_j)^T v_t||.

    Made and read under `torch.no_grad`, with autocast off.

    Args:
        q, k, v: (B, H, N, D); v is read for "loss" and "norm" alone. Without v, "loss" takes the
            values to vary equally in all blocks, and "norm" raises.
        scale: factor of the products of queries and keys.
        kernel: the name of the kernel for attention, which decides what runs here.
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
        kernel: str = "auto",
    ) -> None:
        self.k, self.layout, self.kind, self.scale, self.kernel = k, layout, kind, scale, kernel
        self.query = block_means(q, layout.slots, layout.slots.block_q, kernel)
        self.norms = None
        if kind == "norm":
            if v is None:
                raise ValueError("score 'norm' looks at the values too, got no v")
            self.norms = _slope_norms(k, v, layout)
        elif kind == "loss" and v is not None:
            self.norms = _value_deviations(v, layout, kernel)

    @property
    def by_all_keys(self) -> bool:
        """Whether a score looks at every key of a block, not at their mean alone."""
        return self.kind in ("spread", "loss")

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
        query, layout = self.query[:, some], self.layout
        if self.by_all_keys:
            slots = layout.slots
            known = {"scale": self.scale, "kernel": self.kernel}
            scores = layout.of_ranked(block_spread(query, self.k[:, some], slots, **known), 3)
        else:
            if self.scale != 1:
                query = query * self.scale
            scores = query @ self._ranked_keys[:, some].transpose(-1, -2)
        return scores if self.norms is None else scores + self.norms[:, some, None]

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
        return (self.query * self._mean_key).sum(-1) * self.scale

    def variance(self, scores: Tensor, some: slice, how: Deviation) -> Tensor:
        """Variance (B, h, Kq, 1) of each row's scores over the key blocks. "exact" is their own;
        "diag" is the variance of scale m_i . k_j with the channels of k_j taken as
        uncorrelated."""
        if how == "exact":
            return scores.var(-1, correction=0, keepdim=True)
        by_channel = self._ranked_keys[:, some].var(2, correction=0)
        return self.query[:, some].square() @ by_channel[..., None] * self.scale**2

    @cached_property
    def _keys(self) -> tuple[Tensor, Tensor]:
        slots = self.layout.slots
        key = block_means(self.k, slots, slots.block_k, self.kernel)
        mean = key.mean(2, keepdim=True)
        # Subtracting the mean shifts all scores of a row alike, and keeps precision.
        return mean, self.layout.of_ranked(key - mean, 2)

    @property
    def _mean_key(self) -> Tensor:
        return self._keys[0]

    @property
    def _ranked_keys(self) -> Tensor:
        return self._keys[1]


def _value_deviations(v: Tensor, layout: Layout, kernel: str) -> Tensor:
    """ln sqrt(mean |v_t - v_j|^2) of the ranked blocks, (B, H, R), in fp32.

    From sums of squares: where values are equal up to rounding, this is a 1000th of their size.
    """
    slots = layout.slots
    mean = block_means(v, slots, slots.block_k, kernel)
    wide = torch.promote_types(v.dtype, torch.float32)
    squares = torch.linalg.vector_norm(v, dim=-1, keepdim=True, dtype=wide).square()
    square = block_means(squares, slots, slots.block_k, "gather")[..., 0]
    apart = (square - mean.square().sum(-1)).maximum(1e-6 * square)
    return layout.of_ranked(apart.clamp_min(torch.finfo(apart.dtype).tiny).log() / 2, 2)


def _slope_norms(k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """ln (||sum_t (k_t - k_j)^T v_t|| + 1e-5) of the ranked blocks, (B, H, R), in fp32."""
    slots = layout.slots
    real = slots.real.view(-1, slots.block_k, 1)
    keys, values = (pack(x, slots).float().unflatten(2, (-1, slots.block_k)) for x in (k, v))
    keys, values = (layout.of_ranked(x * real, 2) for x in (keys, values))
    real = layout.of_ranked(real, 0)
    mean = keys.sum(3, keepdim=True) / real.sum(1, keepdim=True)
    keys = ((keys - mean) * real).flatten(0, 2).mT
    step = max(1, SLOPES // k.shape[3] ** 2)
    parts = zip(keys.split(step), values.flatten(0, 2).split(step), strict=True)
    norms = torch.cat([(key @ value).flatten(1).norm(dim=1) for key, value in parts])
    return (norms + EPSILON).log().view(*k.shape[:2], -1)
