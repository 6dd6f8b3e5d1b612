"""Block mixture: each query picks the chunks of the video whose mean key suits it best.

References:
    Wu et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", 2025,
    https://arxiv.org/abs/2506.23858; public code KwaiVGI/VMoBA at 4da72ff, whose outputs the
    golden cases hold; after Lu et al., "MoBA", 2025, https://arxiv.org/abs/2502.13189.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gen_accel.attention_processors.methods.stand_in import smooth_qk
from gen_accel.kernels import selection
from gen_accel.kernels.pooling import block_means, block_sums
from gen_accel.kernels.runner import name_of
from gen_accel.plan import Plan, Route, Slots, plan_of_call, slots_of, widest
from gen_accel.video import VideoShape

Partition = Literal["cycle", "1d", "2d", "3d"]
Select = Literal["threshold", "topk"]
Scope = Literal["query_head", "head_global", "overall", "block"]
Routing = Literal["token", "block"]
Box = tuple[int, int, int]

CYCLE = ("1d", "2d", "3d")
SCOPES_OVER_HEADS = ("overall", "block")  # what a head picks depends on the other heads
SORTED = 1 << 16  # entries of a scope up to which they are sorted: as many as there are bins
# Scores that are picked from at once, at some 60 bytes each: 1 GB.
AT_ONCE = 1 << 24


@dataclass(frozen=True)
class BlockMixture:
    """Attention to the chunks whose mean key fits the query, partitioned anew from layer to layer.

    Layer l cuts the video into spans of frames, into columns of rows x columns through all frames,
    or into boxes, by l mod 3. A query scores a chunk by its product with the mean of the chunk's
    keys. It always sees its own chunk, and those that `select` takes from the scores of a `scope`.
    Text tokens see all and are seen by all.

    Selection:
        "threshold": scores are scaled to [0, 1] within the scope, and the best are taken until
            they and the own chunks hold `threshold` of the scope's sum; at least one is.
        "topk": as many of the best as give each query `topk` chunks, the own one included: of
            each query ("query_head"), or on average of a head's ("head_global") or of all
            ("overall").

    Scopes: all chunks of one query of one head ("query_head"), all queries and chunks of one head
    ("head_global"), all of one sample ("overall"), all queries and heads for one chunk ("block").

    Unlike the public code: where nothing but the own chunk is taken, a query sees its own chunk,
    not everything; a threshold that is never reached takes all of its scope; a threshold of 1 is
    dense attention. Chunks at the border may be smaller; scores that are equal go together; and
    batches do not share a scope.

    Args:
        partition: "cycle", or one for all layers.
        chunk_1d: frames of a chunk in tokens; chunk_2d: rows and columns; chunk_3d: frames, rows
            and columns. Without one, it is chosen for a number of chunks.
        chunks: that number for 1d, 2d and 3d. The paper's for 93 frames of 576 x 1024.
        select, scope: see above. The paper's, for trained models; for others it takes
            select="topk" and scope="query_head".
        threshold: share of a scope's sum, in (0, 1].
        topk: chunks for 1d, 2d and 3d; more than there are means all.
        routing: whether each "token" picks, or a whole query "block" by its mean query, which is
            less exact and cheaper.
        block: most tokens in a query and in a key block of the kernels.
    """

    partition: Partition = "cycle"
    chunk_1d: int | None = None
    chunk_2d: tuple[int, int] | None = None
    chunk_3d: Box | None = None
    chunks: Box = (8, 48, 72)
    select: Select = "threshold"
    scope: Scope = "head_global"
    threshold: float = 0.25
    topk: Box = (2, 10, 18)
    routing: Routing = "token"
    block: int = 64

    def __post_init__(self) -> None:
        for name, options in (
            ("partition", Partition),
            ("select", Select),
            ("scope", Scope),
            ("routing", Routing),
        ):
            if getattr(self, name) not in get_args(options):
                raise ValueError(
                    f"{name} must be one of {get_args(options)}, got {getattr(self, name)!r}"
                )
        for name in ("chunk_2d", "chunk_3d", "chunks", "topk"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, length in (("chunk_1d", 1), ("chunk_2d", 2), ("chunk_3d", 3)):
            chunk = getattr(self, name)
            sides = (chunk,) if name == "chunk_1d" else chunk
            if chunk is not None and not _are_sizes(sides, length):
                raise ValueError(f"{name} must hold {length} positive sizes, got {chunk}")
        for name in ("chunks", "topk"):
            counts = getattr(self, name)
            if not _are_sizes(counts, 3):
                raise ValueError(f"{name} must be at least 1 for each of {CYCLE}, got {counts}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")
        if self.select == "topk" and self.scope == "block":
            raise ValueError("scope 'block' is for select='threshold' alone, got select='topk'")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")

    @property
    def needs_all_heads(self) -> str:
        if self.scope not in SCOPES_OVER_HEADS:
            return ""
        return (
            f"scope={self.scope!r}, in which all heads pick together, while each process holds "
            "some: use 'head_global' or 'query_head'"
        )

    def for_layer(self, layer: int) -> "BlockMixture":
        """The method of one layer, counted from 0: of the cycle, its own partition."""
        if self.partition != "cycle":
            return self
        return replace(self, partition=CYCLE[layer % 3])

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: Callable
    ) -> Tensor:
        layout = self.layout(video, q.device)
        return kernel(q, k, v, self._routed(q, k, layout, name_of(kernel)))

    def layout(self, video: VideoShape, device: torch.device) -> "Layout":
        method = self.for_layer(0)
        return _layout(
            CYCLE.index(method.partition), _box(method, video), self.block, video, str(device)
        )

    def plan_for(self, q: Tensor, k: Tensor, *, video: VideoShape, kernel: str = "auto") -> Plan:
        """What q and k, (B, H, N, D), pick. No gradient, and nothing waits for the device."""
        return self._routed(q, k, self.layout(video, q.device), kernel)

    def plan(self, video: VideoShape, device: torch.device | str = "cpu") -> Plan:
        """What smooth random q and k pick, for pictures and estimates: data decides."""
        return _example(self, video).to(torch.device(device))

    def block_mask(self, video: VideoShape) -> Tensor:
        """(Kq, Kk) bool, key blocks that some token of each query block sees, as in `plan`."""
        return self.plan(video).keep[0, 0]

    def density(self, video: VideoShape) -> float:
        """Share of token pairs that is kept in `plan`, the mean of the three partitions if they
        cycle, in [0, 1]; 1 - density is the sparsity."""
        layers = range(3 if self.partition == "cycle" else 1)
        return sum(self.for_layer(i).plan(video).density for i in layers) / len(layers)

    @torch.no_grad()
    def _routed(self, q: Tensor, k: Tensor, layout: "Layout", kernel: str) -> Plan:
        with torch.autocast(q.device.type, enabled=False):  # scores are fp32, whatever q and k are
            return self._picked(q, k, layout, kernel)

    def _picked(self, q: Tensor, k: Tensor, layout: "Layout", kernel: str) -> Plan:
        slots, own = layout.slots, layout.chunk.view(-1, layout.slots.block_k)[:, 0]
        means = _chunk_means(k, layout, kernel)
        if self.routing == "block":
            rows = block_means(q, slots, slots.block_q, kernel)
            order = torch.arange(len(own), device=q.device)
            picks = self._picks(rows, order, own, means, 1, layout, kernel)[0]
            return plan_of_call(slots, picks[..., own])
        given = q, slots.slots, layout.chunk, means, slots.block_q, layout
        picks, touched = self._picks(*given, kernel)
        return plan_of_call(slots, touched[..., own], Route(picks, own, slots.block_k))

    def _picks(
        self,
        q: Tensor,
        order: Tensor,
        home: Tensor,
        means: Tensor,
        block: int,
        layout: "Layout",
        kernel: str,
    ) -> tuple[Tensor, Tensor]:
        """What rows pick of chunks and, last, of the text.

        Args:
            q: (B, H, N, D).
            order: (R,), the row of each place; -1 for padding, which may get anything.
            home: (R,), the own chunk; from C on that of text, which sees all.
            means: (B, H, C, D).
            block: places in a block.

        Returns:
            (B, H, R, C + 1) bool, and (B, H, R / block, C + 1), what any row of a block picks.
        """
        C = means.shape[2]
        topk = min(self.topk[layout.partition], C)
        dense = self.threshold == 1 if self.select == "threshold" else topk == C
        if not dense:
            few = topk if self.select == "topk" else 0
            by = {"scope": self.scope, "topk": few, "threshold": self.threshold}
            found = selection.picks(q, order, home, means, block, **by, kernel=kernel)
            if found is not None:
                return found
        real = order >= 0
        in_place = self.routing == "block" or layout.slots.is_raster
        rows = q if in_place else q.index_select(2, order.clamp_min(0))
        scores = rows.float() @ means.transpose(-1, -2)  # (B, H, R, C)
        at_home = home[:, None] == torch.arange(C, device=q.device)
        free = home >= C
        if dense:
            picks = torch.ones_like(scores, dtype=torch.bool)
        else:
            picks = _pick(self, scores, at_home, real & ~free, topk)
        picks = picks | at_home | free[:, None]
        picks = torch.cat([picks, torch.ones_like(picks[..., :1])], -1)  # the text, seen by all
        return picks, (picks & real[:, None]).unflatten(2, (-1, block)).any(3)


def _are_sizes(value: object, length: int) -> bool:
    """Whether it is a tuple of so many whole numbers from 1 on."""
    if not isinstance(value, tuple) or len(value) != length:
        return False
    return all(isinstance(size, int) and size >= 1 for size in value)


class Layout(NamedTuple):
    """slots: chunk by chunk. chunk: (S,), the chunk of each slot, C for the text's. sizes: (C,),
    tokens in each chunk. partition: 0, 1 or 2."""

    slots: Slots
    chunk: Tensor
    sizes: Tensor
    partition: int


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # made while sampling, it must serve training too
def _layout(partition: int, box: Box, most: int, video: VideoShape, device: str) -> Layout:
    counts = [-(-size // side) for size, side in zip(video.grid, box, strict=True)]
    axes = [torch.arange(size) // side for size, side in zip(video.grid, box, strict=True)]
    f, h, w = torch.meshgrid(*axes, indexing="ij")
    of_token = ((f * counts[1] + h) * counts[2] + w).flatten()
    C = math.prod(counts)
    sizes = torch.bincount(of_token, minlength=C)
    largest = int(sizes.max())
    block = -(-largest // -(-largest // most))
    if device != "cpu":
        block = 1 << (block - 1).bit_length()  # tiles of GPU kernels are powers of two

    room = torch.cat([sizes, torch.tensor([video.text])])
    room = -(-room // block) * block
    chunk = torch.repeat_interleave(torch.arange(C + 1), room)
    slots = torch.full((int(room.sum()),), -1)
    starts = room.cumsum(0) - room
    order = torch.argsort(of_token, stable=True)
    inside = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[of_token[order]]
    slots[starts[of_token[order]] + inside] = order
    slots[starts[C] : starts[C] + video.text] = torch.arange(video.video_tokens, video.tokens)

    laid = slots_of(slots.to(device), block, block)
    return Layout(laid, chunk.to(device), sizes.to(device), partition)


def _box(method: BlockMixture, video: VideoShape) -> Box:
    """(frames, rows, columns) of a chunk, at most the grid."""
    F, H, W = video.grid
    i = CYCLE.index(method.partition)
    given = (method.chunk_1d, method.chunk_2d, method.chunk_3d)[i]
    if given is None:
        free = [(F, 1, 1), (1, H, W), (F, H, W)][i]
        whole = [(1, H, W), (F, 1, 1), (1, 1, 1)][i]
        return _even_box(method.chunks[i], free, whole)
    sides = given if isinstance(given, tuple) else (given,)
    box = [(*sides, H, W), (F, *sides), sides][i]
    frames, rows, columns = (min(n, size) for n, size in zip(box, video.grid, strict=True))
    return frames, rows, columns


def _even_box(target: int, free: Box, whole: Box) -> Box:
    """The box that cuts the `free` axes into about `target` boxes; of several, one that leaves no
    rest, and then the most even."""
    options = [sorted({-(-size // parts) for parts in range(1, size + 1)}) for size in free]

    def badness(box: Sequence[int]) -> tuple[float, bool, float]:
        count = math.prod(-(-size // side) for size, side in zip(free, box, strict=True))
        ragged = any(size % side for size, side in zip(free, box, strict=True))
        sides = [side for side, size in zip(box, free, strict=True) if size > 1] or [1]
        return abs(math.log(count / target)), ragged, max(sides) / min(sides)

    best = min(product(*options), key=badness)
    frames, rows, columns = (side * size for side, size in zip(best, whole, strict=True))
    return frames, rows, columns


def _chunk_means(k: Tensor, layout: Layout, kernel: str) -> Tensor:
    """(B, H, C, D) fp32 of k (B, H, N, D)."""
    B, H, _, D = k.shape
    block, C = layout.slots.block_k, len(layout.sizes)
    sums = block_sums(k, layout.slots, block, kernel)
    totals = sums.new_zeros(B, H, C + 1, D)
    totals.index_add_(2, layout.chunk.view(-1, block)[:, 0], sums)
    return totals[:, :, :C] / layout.sizes[:, None]


def _pick(
    method: BlockMixture, scores: Tensor, at_home: Tensor, counted: Tensor, topk: int
) -> Tensor:
    """(B, H, rows, C) bool from scores of that shape.

    Args:
        at_home: (rows, C), the own chunk of each row.
        counted: (rows,), rows that hold a query of the video; the others may get anything.
        topk: chunks of a query; not all.
    """
    B, H, R, C = scores.shape
    wide = widest(scores.device)
    if method.scope in ("query_head", "head_global") and H > 1 and scores.numel() > AT_ONCE:
        heads = scores.split(1, 1)  # no scope spans two of them
        return torch.cat([_pick(method, x, at_home, counted, topk) for x in heads], 1)
    # Scopes as rows of their own.
    forth = {
        "query_head": lambda x: x.reshape(B, H * R, C),
        "head_global": lambda x: x.reshape(B, H, R * C),
        "overall": lambda x: x.reshape(B, 1, H * R * C),
        "block": lambda x: x.permute(0, 3, 1, 2).reshape(B, C, H * R),
    }[method.scope]
    valid = counted[:, None].expand(R, C)
    if method.scope == "query_head":  # each row is its own scope, so none disturbs another
        valid = torch.ones_like(valid)
    scores, valid, at_home = (forth(x.expand(B, H, R, C)) for x in (scores, valid, at_home))
    if method.select == "topk":
        keys = _ordered(scores).masked_fill(at_home, _TOP).masked_fill(~valid, _BOTTOM)
        queries = counted.sum() * (H if method.scope == "overall" else 1)
        if method.scope == "query_head":
            queries = torch.ones_like(queries)
        need = (topk * queries).to(wide)
        cut = _least_taken(keys, valid.to(wide), need.expand(keys.shape[:2]))
    else:
        low = scores.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
        high = scores.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
        weight = ((scores - low) / (high - low)).nan_to_num(1.0) * valid  # 1 where all are equal
        total = weight.sum(-1, dtype=wide)
        need = method.threshold * total - (weight * at_home).sum(-1, dtype=wide)
        others = valid & ~at_home
        keys = _ordered(weight).masked_fill(~others, _BOTTOM)
        cut = _least_taken(keys, weight.to(wide) * others, need.clamp_min(0))
        cut = torch.minimum(cut, keys.amax(-1))  # at least one
    picks = keys >= cut[..., None]
    if method.scope == "block":
        return picks.view(B, C, H, R).permute(0, 2, 3, 1)
    return picks.view(B, H, R, C)


_TOP, _BOTTOM = 2**31 - 1, -(2**31)


def _ordered(x: Tensor) -> Tensor:
    """int32 that sort as the fp32 `x` do."""
    bits = x.contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & _TOP)


def _least_taken(keys: Tensor, mass: Tensor, need: Tensor) -> Tensor:
    """The greatest key such that the entries from it upwards hold `need`; the lowest int32 where
    all together do not, and any above the last where nothing is needed.

    Short rows are sorted. In long ones the mass is counted by the upper half of the keys, then
    within the decisive half by the lower: two passes, where sorting takes dozens.

    Args:
        keys, mass: (..., n).
        need: (...), and so is the result.
    """
    if keys.shape[-1] <= SORTED:
        ordered, index = keys.sort(dim=-1, descending=True)
        reached = mass.gather(-1, index).cumsum(-1) >= need[..., None]
        first = reached.int().argmax(-1, keepdim=True)
        cut = ordered.gather(-1, first)[..., 0]
        return cut.masked_fill(~reached[..., -1], _BOTTOM)
    high, low = (keys >> 16) + (1 << 15), keys & 0xFFFF
    upper, above, found = _decisive_bin(high, mass, need)
    inside = mass * (high == upper[..., None])
    lower, _, _ = _decisive_bin(low, inside, need - above)
    cut = ((upper - (1 << 15)) << 16) | lower
    return cut.int().masked_fill(~found, _BOTTOM)


def _decisive_bin(bins: Tensor, mass: Tensor, need: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The highest of 2^16 bins from which upwards `need` is held, the mass above it, and whether
    there is one."""
    count = mass.new_zeros(*bins.shape[:-1], 1 << 16)
    count.scatter_add_(-1, bins.long(), mass)
    held = count.flip(-1).cumsum(-1)
    reached = held >= need[..., None]
    first = reached.int().argmax(-1, keepdim=True)
    above = held.gather(-1, (first - 1).clamp_min(0)).masked_fill(first == 0, 0.0)
    return ((1 << 16) - 1 - first)[..., 0], above[..., 0], reached[..., -1]


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _example(method: BlockMixture, video: VideoShape) -> Plan:
    return method.plan_for(*smooth_qk(video), video=video)
