"""Plan: which key blocks each query block sees, and how tokens are laid out in blocks.

Letters used in names and comments of this package:
    B batch, H heads, N tokens, D head dim, S slots (tokens and padding),
    Kq and Kk query and key blocks, C chunks (groups of key blocks), A axes of a grid.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gen_accel.memory import plan_cached
from gen_accel.parsing import shown
from gen_accel.runs import Runs, WindowBlocks, extremes
from gen_accel.video import VideoShape

PAIRS = 1 << 22  # token pairs that are counted at once


def lasting(function: Callable[[Any], Any]) -> cached_property:
    """Make a cached property whose tensors serve training even if first read while sampling.

    Tensors made under `torch.inference_mode` cannot be saved for a backward pass.
    """
    return cached_property(torch.inference_mode(False)(function))


def widest(device: torch.device) -> torch.dtype:
    """Widest floating dtype of a device: fp64, or fp32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


class Boxes(NamedTuple):
    """Windows of one size over a grid, as a caller states them; see `Neighborhood`.

    Each option is for (frames, rows, columns).

    Args:
        grid: sizes of the axes; its tokens come first, in raster order.
        text: tokens after the grid, which see and are seen by all.
        window: tokens seen along each axis; the size of an axis for all of it.
        stride, dilation, is_causal: as in `Neighborhood`.
    """

    grid: tuple[int, int, int]
    text: int
    window: tuple[int, int, int]
    stride: tuple[int, int, int]
    dilation: tuple[int, int, int]
    is_causal: tuple[bool, bool, bool]


@dataclass(frozen=True, eq=False)
class Windows:
    """Rule on token pairs: a query sees the keys that lie in its window on every axis.

    All tensors run over slots. The rule is data, so that every kernel can evaluate it.

    Args:
        first, last: (A, S) int32, the window of each query, both ends included.
        place: (A, S) int32, where each key lies.
        free: (S,) bool, tokens that see and are seen by all: text. Never mixed with others in
            one block.
        seen: (S,) int64, how many tokens each query sees, so that density needs no enumeration.
        boxes: the same rule as numbers, if known.
    """

    first: Tensor
    last: Tensor
    place: Tensor
    free: Tensor
    seen: Tensor
    boxes: Boxes | None = None

    def check(self, slots: int, key_blocks: int) -> None:
        """Raise ValueError for tensors that are not for this number of slots."""
        A = len(self.first)
        shapes = {"first": (A, slots), "last": (A, slots), "place": (A, slots)}
        shapes |= {"free": (slots,), "seen": (slots,)}
        for name, shape in shapes.items():
            _check_shape(f"{name} of windows", getattr(self, name), shape)

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether slot `query` sees slot `key`: int64 that broadcast, bool of that shape."""
        inside = self.free[query] | self.free[key]
        window = torch.ones_like(inside)
        for first, last, place in zip(self.first, self.last, self.place, strict=True):
            window = window & (first[query] <= place[key]) & (place[key] <= last[query])
        return inside | window

    def whole(self, real: Tensor, block_q: int, block_k: int) -> Tensor:
        """Mask of the pairs of blocks in which every query sees every key, (Kq, Kk) bool."""
        return self.blocks_seen(real, block_q, block_k).mask()

    def touched(self, real: Tensor, block_q: int, block_k: int) -> Tensor:
        """Mask of the pairs of blocks in which some query may see some key, (Kq, Kk) bool."""
        return self.blocks_touched(real, block_q, block_k).mask()

    def blocks_seen(self, real: Tensor, block_q: int, block_k: int) -> WindowBlocks:
        """Bounds of blocks that decide `whole`."""
        low, high = extremes(self.place, real, block_k)
        first, last = extremes(self.first, real, block_q)[1], extremes(self.last, real, block_q)[0]
        return WindowBlocks(first, last, low, high, *self._free_blocks(block_q, block_k))

    def blocks_touched(self, real: Tensor, block_q: int, block_k: int) -> WindowBlocks:
        """Bounds of blocks that decide `touched`."""
        low, high = extremes(self.place, real, block_k)
        first, last = extremes(self.first, real, block_q)[0], extremes(self.last, real, block_q)[1]
        return WindowBlocks(first, last, high, low, *self._free_blocks(block_q, block_k))

    def _free_blocks(self, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
        query, key = (self.free.view(-1, block).any(-1) for block in (block_q, block_k))
        return query, key

    def pairs(self, real: Tensor) -> Tensor:
        """Number of token pairs that are kept, 0-d."""
        return (self.seen * real).sum().to(widest(real.device))

    def pairs_within(self, keep: Tensor, real: Tensor, block_q: int, block_k: int) -> Tensor:
        """Number of kept pairs in the blocks of `keep`, the mean over its patterns. Waits for the
        device: in pairs of blocks that are not seen whole, token pairs are checked one by one."""
        kept = keep.flatten(0, 1)
        whole = kept & self.whole(real, block_q, block_k)
        held_q, held_k = (real.view(-1, block).sum(-1) for block in (block_q, block_k))
        count = (whole.sum(0) * held_q[:, None] * held_k).sum()
        in_q, in_k = (torch.arange(block, device=real.device) for block in (block_q, block_k))
        some = (kept & ~whole).nonzero()[:, 1:]
        for pairs in some.split(max(1, PAIRS // (block_q * block_k))):
            query = (pairs[:, 0, None] * block_q + in_q)[:, :, None]
            key = (pairs[:, 1, None] * block_k + in_k)[:, None]
            count = count + (self.allows(query, key) & real[query] & real[key]).sum()
        return count.to(widest(real.device)) / len(kept)

    def to(self, device: torch.device) -> "Windows":
        return Windows(
            self.first.to(device),
            self.last.to(device),
            self.place.to(device),
            self.free.to(device),
            self.seen.to(device),
            self.boxes,
        )


@dataclass(frozen=True, eq=False)
class Route:
    """Rule on token pairs: each query sees the groups of key blocks that it picked.

    Args:
        picks: (B or 1, H or 1, S, C) bool, whether a query slot sees a group.
        group: (Kk,) int64, the group that each key block belongs to, 0 to C - 1.
        block: slots in a key block.
    """

    picks: Tensor
    group: Tensor
    block: int

    def check(self, slots: int, key_blocks: int) -> None:
        """Raise ValueError for tensors that are not for these slots and key blocks."""
        _check_shape("picks of a route", self.picks, (*self.picks.shape[:2], slots, self.groups))
        _check_shape("group of a route", self.group, (key_blocks,))

    @property
    def groups(self) -> int:
        """Number of groups, C."""
        return self.picks.shape[-1]

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether slot `query` sees slot `key`: int64 that broadcast, bool (B, H, *that shape)."""
        return self.picks[:, :, query, self.group[key // self.block]]

    def whole(self, real: Tensor, block_q: int, block_k: int) -> Tensor:
        """Mask of the pairs of blocks in which every query sees every key, (B, H, Kq, Kk) bool."""
        rows = (self.picks | ~real[:, None]).unflatten(2, (-1, block_q)).all(3)
        return rows[..., self.group]

    def touched(self, real: Tensor, block_q: int, block_k: int) -> Tensor:
        """Mask of the pairs of blocks in which some query may see some key, (B, H, Kq, Kk)
        bool."""
        rows = (self.picks & real[:, None]).unflatten(2, (-1, block_q)).any(3)
        return rows[..., self.group]

    def pairs(self, real: Tensor) -> Tensor:
        """Number of token pairs that are kept, 0-d, the mean over samples and heads."""
        held = real.view(-1, self.block).sum(-1)
        sizes = torch.zeros(self.picks.shape[3], dtype=held.dtype, device=held.device)
        sizes.index_add_(0, self.group, held)
        picked = (self.picks & real[:, None]).sum(2)
        return (picked * sizes).sum(-1).to(widest(real.device)).mean()

    def pairs_within(self, keep: Tensor, real: Tensor, block_q: int, block_k: int) -> Tensor:
        """Number of kept pairs in the blocks of `keep`, 0-d, the mean over samples and heads."""
        picked = (self.picks & real[:, None]).unflatten(2, (-1, block_q)).sum(3)
        held = real.view(-1, block_k).sum(-1)
        return (picked[..., self.group] * held * keep).sum((2, 3)).to(widest(real.device)).mean()

    def to(self, device: torch.device) -> "Route":
        return Route(self.picks.to(device), self.group.to(device), self.block)


Centre = Literal["query", "key"]
RestOrder = Literal["zeroth", "first", "second"]
# Orders that are available for one centre only.
ORDERS: dict[RestOrder, Centre] = {"second": "query"}

# Factor of the second order; the expansion has 1/2. A little less came nearer to dense
# attention in most boxes of the demo model: a sharp softmax grows less than its variance says.
CURVATURE = 0.4
# Bound on the second order. Where it would add more, queries are too far from their mean for an
# expansion around it. On the demo model the bound changes next to nothing in the boxes that err
# least, and removes most of the harm in runs of tokens, for which methods ask for no second order.
MOST_GAINED = 2.5


@dataclass(frozen=True)
class Rest:
    """Key blocks that a query block does not keep, each pooled to one key and one value.

    They take part in the softmax of the kept keys. With n_j tokens in block j:

        "key"    query t weighs block j by exp(scale q_t . kmean_j + ln n_j), with value vmean_j
        "query"  by exp(l_ij + scale (q_t - qmean_i) . k_ij), with value v_ij, where p_ij is the
                 softmax over block j of the scores of the mean query of t's block i, l_ij their
                 logarithm of summed exponentials, k_ij = sum p_ij k and v_ij = sum p_ij v

    The first is exact where the keys of a block are equal, the second where they are or where
    the queries of a block are.

    In first order the values of a block change with the query, by one slope for a head: the output
    gains r_t scale (x_t H) / N. r_t is what query t weighs the rest by, and H = sum_t
    (k_t - kmean)^T v_t over all keys. x_t is the query's offset: q_t around keys, as in
    PISA, and q_t - qmean_i around queries.

    "query" has a second order as well, for the weights: the logarithm of what query t of block
    i weighs block j by gains CURVATURE a_t s_ij, at most MOST_GAINED (from which on its gradient
    is 0), with

        s_ij = sum_d w_d var_ijd
        a_t = scale^2 sum_d u_d (q_td - qmean_id)^2 / sum_d w_d u_d

    where var_ij is the variance of block j's keys under p_ij, channel by channel. w and u are
    mean squares of a head, of its queries and of its keys, both off the means of their blocks,
    over the blocks of the first `tokens` tokens. This stands for the next term of the logarithm's
    expansion around the mean query: scale^2 / 2 times the variance of (q_t - qmean_i) . k under
    p_ij. Only its diagonal is kept, as a product of one number a query and one number a pair of
    blocks.

    Args:
        centre: "key" or "query", the mean to pool around; see above.
        order: each order includes the ones before it; "second" is for `centre="query"`.
        tokens: number of tokens, from the first on, whose mean squares the second order takes: of
            a video without its text, whose keys are outliers. None: all.

    References:
        "key" is the rest of PISA (https://arxiv.org/abs/2602.01077) and of Sol-Attn
        (https://arxiv.org/abs/2607.24027); the first order around keys is from PISA. Everything
        else is our own.
    """

    centre: Centre = "query"
    order: RestOrder = "zeroth"
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name, options in (("centre", Centre), ("order", RestOrder)):
            if getattr(self, name) not in get_args(options):
                raise ValueError(
                    f"{name} must be one of {get_args(options)}, got {shown(getattr(self, name))}"
                )
        for order, centre in ORDERS.items():
            if self.order == order and self.centre != centre:
                raise ValueError(
                    f"order={order!r} is for centre={centre!r}, got centre={self.centre!r}"
                )


# Tensors and scale of a call, and facts of it that wait for the rest.
NO_FACTS: tuple[tuple[Any, Any, Any], float, Any] = (None, None, None), 0.0, None


# Not frozen, but never changed: for a frozen dataclass that is made in its graph, torch.compile
# would read the fields alone.
@dataclass(eq=False)
class Plan:
    """Block-sparse attention pattern, which every method makes and every kernel runs.

    Args:
        slots: (S,) int64, the token held by each slot; -1 marks padding, which is never seen.
        keep: (B or 1, H or 1, Kq, Kk) bool, which key blocks each query block sees. Given as
            `Runs`, the mask is made on first access.
        block_q, block_k: slots in a query and in a key block; both divide S.
        partial: the rule on token pairs inside the kept blocks, if any.
        dynamic: made from the q and k of one call, so that nothing is worth compiling for it and
            nothing may wait for the device.
        gain: (B or 1, H or 1, Kq, Kk) floats in (0, 1] that dampen the scores of a pair of blocks:
            a scaled product s becomes min(s, gain s). None if all are 1.
        trimmed: `keep` leaves out blocks in which `partial` would see pairs.
        entries: upper bound on the pairs of blocks that one pattern of `keep` holds, if known
            without looking. The lists of a dynamic plan have this length.
        rest: how the blocks that are not kept come back, pooled; None if they are dropped. For
            plans of whole blocks, without a gain.
        listed: the kept blocks of each query block, as `rows` and `row_counts` of `TritonLists`,
            where the choice listed them.

    Raises:
        ValueError: shapes that do not belong together, or slots that do not hold each token
            once. Slots on the CPU are checked here, others when their numbers are first read.
    """

    slots: Tensor
    keep: Tensor  # or Runs: what is read is a tensor
    block_q: int
    block_k: int
    partial: Windows | Route | None = None
    dynamic: bool = False
    gain: Tensor | None = None
    trimmed: bool = False
    entries: int | None = None
    rest: Rest | None = None
    listed: tuple[Tensor, Tensor] | None = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor:
            """Make `keep` of a plan of runs. Waits for the device."""
            if name != "keep":
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self.keep = torch.inference_mode(False)(self.runs.mask)()
            return self.keep

    def __post_init__(self) -> None:
        self._check()
        self.patterns = self.keep.shape[:2]
        self._prepared: dict[Hashable, Any] = {}
        self._facts = NO_FACTS
        self.runs = self.keep if isinstance(self.keep, Runs) else None
        if self.runs is not None:
            del self.keep

    def _check(self) -> None:
        S = self.slots.numel()
        if self.slots.shape != (S,) or self.slots.dtype != torch.int64 or not S:
            raise ValueError(
                f"slots must be (S,) int64, got {tuple(self.slots.shape)} {self.slots.dtype}"
            )
        if min(self.block_q, self.block_k) < 1:
            raise ValueError(
                f"block_q and block_k must be at least 1, got {self.block_q} and {self.block_k}"
            )
        blocks = (S // self.block_q, S // self.block_k)
        if S % self.block_q or S % self.block_k or self.keep.shape[2:] != blocks:
            raise ValueError(
                f"keep must be (B, H, S / block_q, S / block_k) for S={S}, "
                f"block_q={self.block_q}, block_k={self.block_k}, got {tuple(self.keep.shape)}"
            )
        if isinstance(self.keep, Tensor) and (
            self.keep.ndim != 4 or self.keep.dtype != torch.bool
        ):
            raise ValueError(f"keep must be bool in four dimensions, got {self.keep.dtype}")
        if self.gain is not None and self.gain.shape[2:] != blocks:
            raise ValueError(
                f"gain must be (B, H, {blocks[0]}, {blocks[1]}) like keep, got "
                f"{tuple(self.gain.shape)}"
            )
        if self.partial is not None:
            self.partial.check(S, blocks[1])
        is_plain = type(self.slots) is Tensor and self.slots.device.type == "cpu"
        if is_plain and not self.dynamic and not torch.compiler.is_compiling():
            _tokens_of(self.slots)
        if self.rest is not None and self.partial is not None:
            raise ValueError(
                "a rest is for plans of whole blocks: a block that a rule on token pairs keeps in "
                f"part cannot be pooled, got {type(self.partial).__name__}"
            )
        if self.rest is not None and self.gain is not None:
            raise ValueError(
                "a plan with a rest takes no gain on scores: use rest=None, or no technique that "
                "dampens scores"
            )

    @property
    def blocks(self) -> Any:
        """`keep` as it was given: a tensor or `Runs`."""
        return self.keep if self.runs is None else self.runs

    def prepared(self, kind: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` returned on the first call for `kind`, such as lists. The result
        lives as long as the plan, and serves training even if made while sampling."""
        if kind not in self._prepared:
            with torch.inference_mode(False):
                self._prepared[kind] = make()
        return self._prepared[kind]

    def hand_on(self, q: Tensor, k: Tensor, v: Tensor, scale: float, facts: Any) -> None:
        """Hold facts of a call that the choice of its blocks leaves for the rest."""
        self._facts = (q, k, v), scale, facts

    def taken_facts(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
        """Return what was handed on for the same tensors and scale, else None. The plan holds it
        no longer."""
        (tensors, own, facts), self._facts = self._facts, NO_FACTS
        same = all(x is y for x, y in zip(tensors, (q, k, v), strict=True))
        return facts if same and own == scale else None

    @property
    def kept(self) -> "Plan":
        """Plan without the rest: the kept blocks alone."""
        return self if self.rest is None else self._kept  # a plan that held itself would linger

    @lasting
    def _kept(self) -> "Plan":
        return _known(replace(self, keep=self.blocks, rest=None), self)

    def of_heads(self, some: slice) -> "Plan":
        """Plan of whole blocks for some heads of a call."""
        assert self.partial is None
        assert self.gain is None
        if self.patterns[1] == 1:
            return self
        listed = self.listed and (self.listed[0][:, some], self.listed[1][:, some])
        return _known(replace(self, keep=self.keep[:, some], listed=listed), self)

    @lasting
    def tokens(self) -> int:
        """Number of tokens, N. Synchronises the device the first time."""
        return _tokens_of(self.slots)

    @lasting
    def real(self) -> Tensor:
        """Mask of the slots that hold a token, (S,) bool."""
        return self.slots >= 0

    @lasting
    def places(self) -> Tensor:
        """Slot of each token, (N,) int64."""
        return torch.argsort(self.slots)[self.slots.numel() - self.tokens :]

    @lasting
    def slots_int32(self) -> Tensor:
        """`slots` in int32, for kernels."""
        return self.slots.int()

    @lasting
    def full_keys(self) -> Tensor:
        """Mask of the key blocks without padding, (Kk,) bool."""
        return self.real.view(-1, self.block_k).all(-1)

    @lasting
    def is_padded(self) -> bool:
        """Whether some slots hold no token. Synchronises the device the first time."""
        return self.tokens < len(self.slots)

    @lasting
    def is_raster(self) -> bool:
        """Whether every slot holds the token of its own number: nothing to reorder or to pad."""
        return bool((self.slots == torch.arange(len(self.slots), device=self.slots.device)).all())

    @lasting
    def held(self) -> tuple[Tensor, Tensor]:
        """Number of tokens and of slots in each query block and key block, (Kq, 2) and (Kk, 2)
        fp32."""
        made = []
        for block in (self.block_q, self.block_k):
            tokens = self.real.view(-1, block).sum(-1)
            made.append(torch.stack([tokens, torch.full_like(tokens, block)], 1).float())
        return made[0], made[1]

    def counted_blocks(self) -> tuple[Tensor, Tensor]:
        """Blocks whose tokens the second order of the rest takes, 1 or 0 each: (Kq,) and (Kk,)
        fp32."""
        made = []
        for block, held in zip((self.block_q, self.block_k), self.held, strict=True):
            counts = held[:, 0].clamp(max=1)
            if self.rest is not None and self.rest.tokens not in (None, self.tokens):
                counts = counts * (self.slots.view(-1, block) < self.rest.tokens).all(-1)
            made.append(counts)
        return made[0], made[1]

    @property
    def whole(self) -> Tensor:
        """`keep` without the blocks in which a pair is padded or excluded by `partial`."""
        if self.dynamic:
            return self._whole_blocks()
        return self.prepared("whole", self._whole_blocks)

    def _whole_blocks(self) -> Tensor:
        if self.partial is None and not self.is_padded:
            return self.keep
        return self.keep & self.maskless()

    def maskless(self) -> Tensor:
        """Bool like `keep`, or (Kk,): pairs of blocks in which no pair of tokens is padded or
        excluded by `partial`, kept or not."""
        if self.partial is None:
            return self.full_keys
        blocks = self.block_q, self.block_k
        if self.dynamic or isinstance(self.partial, Route):
            whole = self.partial.whole(self.real, *blocks)
        else:
            whole = self.partial.blocks_seen(self.real, *blocks).rows(slice(None))
        return whole & self.full_keys if self.is_padded else whole

    def keep_of(self, sample: int, head: int, blocks: Tensor) -> Tensor:
        """Mask of the key blocks that some query blocks see in one sample and head, (n, Kk) bool.

        Args:
            blocks: (n,) int64, numbers of the query blocks.
        """
        if self.runs is not None:
            return self.runs.rows(blocks)
        pattern = self.keep[sample if self.patterns[0] > 1 else 0]
        return pattern[head if self.patterns[1] > 1 else 0][blocks]

    def slices(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield the kept pairs of a plan of runs, some query blocks at a time: the slice of query
        blocks, and (P,) each, in ascending order, the query block counted from the first of the
        slice, the key block, and whether the pair is in `whole`. Waits for the device."""
        assert self.runs is not None
        assert not isinstance(self.partial, Route)
        seen = None
        if self.partial is not None:
            seen = self.partial.blocks_seen(self.real, self.block_q, self.block_k)
        for rows in self.runs.slices():
            row, column = self.runs.pairs(rows)
            whole = self.full_keys[column]
            if seen is not None:
                whole &= seen.rows(rows)[row, column]
            yield rows, row, column, whole

    @lasting
    def leaves_out_picks(self) -> bool:
        """Whether a query picked a group whose blocks are not all kept. Waits for the device.

        Plans that methods make never do; plans made by hand may keep anything.
        """
        assert isinstance(self.partial, Route)
        picked = self.partial.touched(self.real, self.block_q, self.block_k)
        return not torch.equal((self.keep & picked).expand(picked.shape), picked)

    @lasting
    def density(self) -> float:
        """Share of the N x N token pairs that are kept, in [0, 1]. Synchronises the device."""
        return self.densities()[0].item()

    @lasting
    def computed_density(self) -> float:
        """Share of the N x N token pairs that a block kernel computes, padding included, plus the
        cost of the rest in such pairs. Synchronises the device."""
        return self.densities()[1].item()

    def densities(self) -> tuple[Tensor, Tensor]:
        """`density` and `computed_density`, 0-d, without waiting for the device."""
        partial, pairs, wide = self.partial, float(self.tokens) ** 2, widest(self.slots.device)
        if self.runs is not None:
            computed = (self.runs.counts.sum() * (self.block_q * self.block_k)).to(wide)
        else:
            computed = self._pairs(torch.ones_like(self.slots, dtype=wide))
        if partial is None:
            kept = self._pairs(self.real.to(wide))
        elif self.trimmed:
            kept = partial.pairs_within(self.keep, self.real, self.block_q, self.block_k)
        else:
            kept = partial.pairs(self.real)
        return kept / pairs, (computed + self._pooled_pairs()) / pairs

    def _pooled_pairs(self) -> Tensor | float:
        """Cost of the rest, in token pairs of two products each: a pooled key is a pair with
        every query of a block that leaves it out, and pooling a block of keys around a mean query
        takes three products a key."""
        if self.rest is None:
            return 0.0
        cost = self.block_q + (1.5 * self.block_k if self.rest.centre == "query" else 0.0)
        if self.runs is not None:
            left_out = math.prod(self.runs.shape) - self.runs.counts.sum()
            return cost * left_out.to(widest(self.slots.device))
        return cost * (~self.keep).flatten(0, 1).sum((1, 2)).to(widest(self.slots.device)).mean()

    def _pairs(self, weight: Tensor) -> Tensor:
        query, key = (weight.view(-1, block).sum(-1) for block in (self.block_q, self.block_k))
        if self.runs is not None:
            return (self.runs.sums(key.long()) * query.long()).sum().to(weight.dtype)
        rows = torch.stack([row.to(key.dtype) @ key for row in self.keep.flatten(0, 1)])
        return (rows @ query).mean()

    def to(self, device: torch.device) -> "Plan":
        if self.slots.device == torch.device(device):
            return self
        return replace(
            self,
            slots=self.slots.to(device),
            keep=self.blocks.to(device),
            partial=None if self.partial is None else self.partial.to(device),
            gain=None if self.gain is None else self.gain.to(device),
            listed=self.listed and (self.listed[0].to(device), self.listed[1].to(device)),
        )

    def changed(
        self,
        *,
        keep: Tensor | None = None,
        partial: Windows | Route | None = None,
        gain: Tensor | None = None,
    ) -> "Plan":
        """Copy the plan in the same layout, with the given parts in place of its own; a gain
        multiplies its own. Waits for the device where this plan does not know its tokens yet."""
        trimmed = self.trimmed or (keep is not None and self.partial is not None)
        if gain is None:
            gain = self.gain
        elif self.gain is not None:
            gain = gain * self.gain
        plan = replace(
            self,
            keep=self.blocks if keep is None else keep,
            partial=partial or self.partial,
            gain=gain,
            trimmed=trimmed,
            entries=self.entries if keep is None else None,
            listed=self.listed if keep is None and partial is None else None,
        )
        return _known(plan, self)

    def keeping(self, keep: Tensor, *, dynamic: bool) -> "Plan":
        """Make a plan in the same layout, with the same rest, gain and windows; of whole blocks
        where this one has a route.

        Args:
            dynamic: whether `keep` was made from the q and k of one call, and serves that call
                alone.
        """
        windows = None if isinstance(self.partial, Route) else self.partial
        plan = Plan(
            self.slots,
            keep,
            self.block_q,
            self.block_k,
            windows,
            dynamic,
            self.gain,
            trimmed=windows is not None,
            rest=self.rest,
        )
        return _known(plan, self)

    @property
    def can_join(self) -> bool:
        """Whether it may be joined with plans for other heads: whole blocks, held as a mask."""
        return self.runs is None and self.partial is None and self.gain is None

    def lies_as(self, other: "Plan") -> bool:
        """Whether another plan has the same slots, held by the same tensor, blocks and rest."""
        blocks = (self.block_q, self.block_k) == (other.block_q, other.block_k)
        return blocks and self.rest == other.rest and self.slots is other.slots

    def keeping_all(self) -> "Plan":
        """Plan in the same layout that keeps every block; of a static plan made once."""
        if self.dynamic:
            return self._keeping_all()
        return self.prepared("keeping all", self._keeping_all)

    def _keeping_all(self) -> "Plan":
        return self.keeping(torch.ones_like(self.keep[:1, :1]), dynamic=self.dynamic)


@lru_cache(maxsize=4096)
@torch.inference_mode(False)
def numbers_on(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Whole numbers as int64 on a device, which are sent there once."""
    return torch.tensor(numbers, device=device)


def joined(plans: Sequence[tuple[Sequence[int], Plan]], heads: int) -> Plan:
    """Plan of several heads, from plans of some of them that share a layout, see `lies_as`. From
    static plans it is made once.

    Args:
        plans: each with the heads that it is for; together all heads, each once.
        heads: H.
    """
    parts = tuple((tuple(some), plan) for some, plan in plans)
    if any(plan.dynamic for _, plan in parts):
        return _joined(parts, heads)
    return _joined_once(parts, heads)


def _joined(plans: tuple[tuple[tuple[int, ...], Plan], ...], heads: int) -> Plan:
    samples = max(plan.patterns[0] for _, plan in plans)
    first = plans[0][1]
    keep = first.keep.new_empty(samples, heads, *first.keep.shape[2:])
    for some, plan in plans:
        own = plan.keep.expand(samples, len(some), -1, -1)
        keep.index_copy_(1, numbers_on(some, keep.device), own)
    dynamic = any(plan.dynamic for _, plan in plans)
    bounds = [keep.shape[2] * keep.shape[3] if p.entries is None else p.entries for _, p in plans]
    plan = Plan(first.slots, keep, first.block_q, first.block_k, dynamic=dynamic, rest=first.rest)
    plan.entries = max(bounds)
    return _known(plan, first)


_joined_once = plan_cached(torch.inference_mode(False)(_joined))


class Slots(NamedTuple):
    """Part of a plan that the grid decides, shared by plans that are made call by call.

    Without a plan around them these are constants of a graph of torch.compile.
    """

    slots: Tensor
    real: Tensor
    places: Tensor
    tokens: int
    is_padded: bool
    is_raster: bool
    held: tuple[Tensor, Tensor]
    slots_int32: Tensor
    full_keys: Tensor
    block_q: int
    block_k: int


def count_tokens(slots: Tensor) -> int:
    """Count the tokens of slots, (S,) int64. Waits for the device.

    Raises:
        ValueError: slots do not hold each token from 0 on once, and -1 elsewhere; a token in no
            slot would get no output.
    """
    S, (low, high) = len(slots), slots.aminmax()
    held = slots.new_zeros(S + 1, dtype=torch.bool)
    held.index_fill_(0, slots.clamp(-1, S - 1) + 1, True)
    facts = torch.stack([low, high, (slots >= 0).sum(), held[1:].sum()])
    least, most, real, different = facts.tolist()  # waits once
    if least < -1 or most < 0 or not most + 1 == real == different:
        raise ValueError(
            "slots must hold each token once, from 0 on, and -1 for padding: they hold numbers "
            f"from {least} to {most}, {real} tokens, of which {different} differ"
        )
    return real


# N of slots, by identity, since many plans share them.
_counted: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _tokens_of(slots: Tensor) -> int:
    """Count the tokens of slots once, by `count_tokens`."""
    if torch.compiler.is_compiling() or type(slots) is not Tensor:
        return count_tokens(slots)
    if slots not in _counted:
        _counted[slots] = count_tokens(slots)
    return _counted[slots]


def slots_of(slots: Tensor, block_q: int, block_k: int) -> Slots:
    """Make `Slots` of a grid. Waits for the device; plans made of the result do not."""
    keep = slots.new_zeros(1, 1, len(slots) // block_q, len(slots) // block_k, dtype=torch.bool)
    plan = Plan(slots, keep, block_q, block_k)
    facts = plan.real, plan.places, plan.tokens, plan.is_padded, plan.is_raster, plan.held
    return Slots(slots, *facts, plan.slots_int32, plan.full_keys, block_q, block_k)


def plan_of_call(
    slots: Slots,
    keep: Tensor,
    partial: Route | None = None,
    entries: int | None = None,
    rest: Rest | None = None,
    listed: tuple[Tensor, Tensor] | None = None,
) -> Plan:
    """Plan of one call, for keep (B or 1, H or 1, Kq, Kk) from its q and k. With a route, `keep`
    holds all blocks of the picked groups."""
    plan = Plan(
        slots.slots,
        keep,
        slots.block_q,
        slots.block_k,
        partial,
        dynamic=True,
        entries=entries,
        rest=rest,
        listed=listed,
    )
    plan.leaves_out_picks = False
    return _known(plan, slots)


def _known(plan: Plan, slots: Plan | Slots) -> Plan:
    """Copy to `plan` the facts about slots that another plan has computed already."""
    plan.real, plan.places = slots.real, slots.places
    plan.tokens, plan.is_padded, plan.is_raster = slots.tokens, slots.is_padded, slots.is_raster
    plan.held, plan.slots_int32, plan.full_keys = slots.held, slots.slots_int32, slots.full_keys
    return plan


def pack(x: Tensor, plan: Plan | Slots) -> Tensor:
    """Token order to slot order, (B, H, N, D) to (B, H, S, D). Padding repeats token 0."""
    return x if plan.is_raster else x.index_select(2, plan.slots.clamp_min(0))


def unpack(x: Tensor, plan: Plan | Slots) -> Tensor:
    """Slot order back to token order, (B, H, S, D) to (B, H, N, D)."""
    return x if plan.is_raster else x.index_select(2, plan.places)


def raster_slots(video: VideoShape, multiple: int) -> Tensor:
    """Slots in the order of the tokens, padded to a multiple of `multiple`."""
    slots = torch.full((-(-video.tokens // multiple) * multiple,), -1)
    slots[: video.tokens] = torch.arange(video.tokens)
    return slots


def tile_slots(
    video: VideoShape,
    tile: tuple[int, int, int],
    *,
    by_parts: bool = False,
) -> Tensor:
    """Slots of a video cut into boxes of (frames, rows, columns), text in blocks of its own.

    Boxes come in raster order, and so do the tokens of a box: splitting a box along its frames
    gives contiguous smaller blocks. Boxes that stick out of the grid are padded.

    Args:
        by_parts: whether no block of text holds tokens of two parts of it.
    """
    counts = [-(-size // step) for size, step in zip(video.grid, tile, strict=True)]
    padded = torch.full([n * t for n, t in zip(counts, tile, strict=True)], -1)
    tokens = torch.arange(video.video_tokens).view(video.grid)
    padded[: video.frames, : video.height, : video.width] = tokens
    boxes = padded.view(counts[0], tile[0], counts[1], tile[1], counts[2], tile[2])
    block = math.prod(tile)
    laid = [boxes.permute(0, 2, 4, 1, 3, 5).reshape(-1)]
    parts = (by_parts and video.parts) or (video.text,)
    for part in torch.arange(video.video_tokens, video.tokens).split(parts):
        laid.append(F.pad(part, (0, -len(part) % block), value=-1))
    return torch.cat(laid)


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
