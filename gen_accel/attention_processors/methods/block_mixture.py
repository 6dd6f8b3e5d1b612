"""Block mixture: each query picks the chunks of the video whose mean key suits it best.

References:
    Wu et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", 2025,
    https://arxiv.org/abs/2506.23858; public code KwaiVGI/VMoBA at 4da72ff, whose outputs the
    golden cases hold; after Lu et al., "MoBA", 2025, https://arxiv.org/abs/2502.13189.

Picking is the definition in torch, which the C++ code must match. Weights are added up in bins as
whole units, so that threads that add to one bin may come in any order: picks are the same from run
to run. Nothing waits for the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gen_accel.attention_processors.methods.blocks import Pool, rest_of, smooth_qk
from gen_accel.kernels import choosing
from gen_accel.kernels.base import name_of
from gen_accel.memory import plan_cached
from gen_accel.method import Box, Method, RunPlan, plan_once
from gen_accel.parsing import Count, Share, check_options
from gen_accel.plan import Centre, Plan, Route, Slots, plan_of_call, slots_of, widest
from gen_accel.video import VideoShape

Select = Literal["threshold", "topk"]
Scope = Literal["query_head", "head_global", "overall", "block"]
Partition = Literal["cycle", "1d", "2d", "3d"]
Routing = Literal["auto", "token", "block"]
Sizes = tuple[Count, Count, Count]

CYCLE = ("1d", "2d", "3d")
SCOPES_OVER_HEADS = ("overall", "block")  # what a head picks depends on the other heads
SORTED = 1 << 16  # entries of a scope up to which they are sorted: as many as there are bins
# Scores handled at once: about 1.3 GB, at some 40 bytes each, or at 5 where a kernel counts in
# place.
AT_ONCE = 1 << 25
AT_ONCE_IN_PLACE = 1 << 28
UNITS = 1 << 30  # in a weight of 1; as many entries of a scope as an int64 has room for besides


@dataclass(frozen=True)
class BlockMixture(Method):
    """Attention to the chunks whose mean key fits the query; layers differ in their partition.

    Layer l cuts the video into spans of frames, into columns of rows x columns through all frames,
    or into boxes, by l mod 3. A query scores a chunk by its product with the mean of the chunk's
    keys. It always sees its own chunk, and the chunks that `select` takes from the scores of a
    `scope`. Text tokens see all and are seen by all.

    Selection:
        "threshold": scores are scaled to [0, 1] within the scope, and the best are taken until
            they and the own chunks hold `threshold` of the scope's sum; at least one is.
        "topk": as many of the best as give each query `topk` chunks, its own included. By scope:
            for each query ("query_head"), or on average over a head ("head_global") or over all
            ("overall").

    Scopes: all chunks of one query of one head ("query_head"), all queries and chunks of one head
    ("head_global"), all of one sample ("overall"), all queries and heads for one chunk ("block").

    Unlike the public code: where nothing but the own chunk is taken, a query sees its own chunk,
    not everything; a threshold that is never reached takes all of its scope; a threshold of 1 is
    dense attention. Chunks at the border may be smaller; scores that are equal go together; and
    batches do not share a scope.

    Args:
        partition: "cycle", or one for all layers.
        chunk_1d: frames of a chunk in tokens. Without one, it is chosen for a number of chunks, as
            are the other two.
        chunk_2d: rows and columns of a chunk in tokens.
        chunk_3d: frames, rows and columns of a chunk in tokens.
        chunks: number of chunks for 1d, 2d and 3d. The paper's for 93 frames of 576 x 1024.
        select: how chunks are taken, by their share of the scores ("threshold") or by their number
            ("topk"); see above. The paper's for trained models. For others it uses "topk".
        scope: what the scores of a chunk are compared with; see above. The paper's for trained
            models. For others it uses "query_head".
        threshold: share of a scope's sum, in (0, 1].
        topk: chunks for 1d, 2d and 3d; more than there are means all.
        routing: whether each "token" picks, or a whole query "block" by its mean query, which is
            less exact and cheaper. "auto" is "block" on GPUs, whose kernels compute what any query
            of a block picked, and "token" on the CPU.
        block: most tokens in a query and in a key block of the kernels. Without, 128 on GPUs,
            whose tiles are so long, and 64 on the CPU.
        rest, centre: "means" adds the chunks that are not picked to the softmax, pooled block by
            block around the mean "query" of each query block or the mean "key" of each key block:
            see `gen_accel.plan.Rest`. For routing="block".
    """

    partition: Partition = "cycle"
    chunk_1d: Count | None = None
    chunk_2d: tuple[Count, Count] | None = None
    chunk_3d: Sizes | None = None
    chunks: Sizes = (8, 48, 72)
    select: Select = "threshold"
    scope: Scope = "head_global"
    threshold: Share = 0.25
    topk: Sizes = (2, 10, 18)
    routing: Routing = "auto"
    block: Count | None = None
    rest: Pool | None = None
    centre: Centre = "query"

    def __post_init__(self) -> None:
        check_options(self)
        if self.select == "topk" and self.scope == "block":
            raise ValueError("scope 'block' is for select='threshold' alone, got select='topk'")
        if rest_of(self.rest, self.centre) is not None and self.routing != "block":
            raise ValueError(
                "rest='means' is for routing='block': where each token picks, a block may be kept "
                f"in part, and cannot be pooled; got routing={self.routing!r}"
            )

    @property
    def needs_all_heads(self) -> str:
        if self.scope not in SCOPES_OVER_HEADS:
            return ""
        return (
            f"scope={self.scope!r}, in which all heads pick together, while each process holds "
            "some: use 'head_global' or 'query_head'"
        )

    def for_layer(self, layer: int) -> "BlockMixture":
        """Return the method of one layer, counted from 0, with that layer's partition of the
        cycle."""
        if self.partition != "cycle":
            return self
        return replace(self, partition=CYCLE[layer % 3])

    def for_device(self, device: torch.device) -> "BlockMixture":
        """Return the method with the routing and block length that it uses on a device."""
        routing, block = self._on(device)
        return replace(self, routing=routing, block=block)

    def _on(self, device: torch.device) -> tuple[Routing, int]:
        """Routing and block length on a device."""
        on_cpu = device.type == "cpu"
        routing = self.routing
        if routing == "auto":
            routing = "token" if on_cpu else "block"
        return routing, self.block or (64 if on_cpu else 128)

    @classmethod
    def candidates(
        cls, video: VideoShape, *, tile: object = None, profile: str = ""
    ) -> Sequence["BlockMixture"]:
        best = cls("3d", chunks=(8, 48, 24), select="topk", scope="query_head")
        return [replace(best, topk=(2, 10, count)) for count in (1, 3, 8)]

    @classmethod
    def keeping(cls, share: float, video: VideoShape) -> "BlockMixture":
        one, two, three = (max(1, round(share * count)) for count in cls.chunks)
        return cls(select="topk", scope="query_head", topk=(one, two, three))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: RunPlan
    ) -> Tensor:
        return kernel(q, k, v, self.plan_for(q, k, video=video, kernel=name_of(kernel)))

    def layout(self, video: VideoShape, device: torch.device) -> "ChunkLayout":
        method = self.for_layer(0)
        cut = CYCLE.index(method.partition), _box(method, video)
        return _layout(*cut, self._on(device)[1], video, device)

    @torch.no_grad()
    def plan_for(
        self,
        q: Tensor,
        k: Tensor,
        *,
        video: VideoShape,
        scale: float | None = None,
        kernel: str = "auto",
    ) -> Plan:
        """Plan of the chunks that q and k, (B, H, N, D), pick, at any scale of their products. No
        gradient, and nothing waits for the device."""
        with torch.autocast(q.device.type, enabled=False):  # scores are fp32, whatever q and k are
            layout = self.layout(video, q.device)
            slots, of_block = layout.slots, layout.of_block
            means = _chunk_means(k, layout, kernel)
            if self._on(q.device)[0] == "token":
                picks, touched = self._picks(
                    q, layout.tokens, means, slots.block_q, layout, kernel
                )
                route = Route(picks, of_block, slots.block_k)
                return plan_of_call(slots, touched[..., of_block], route)
            # No block is without tokens.
            rows = choosing.block_sums(q, slots, slots.block_q, kernel) / slots.held[0][:, :1]
            picks = self._picks(rows, layout.blocks, means, 1, layout, kernel)[0]
            rest = rest_of(self.rest, self.centre, tokens=video.video_tokens)
            return plan_of_call(slots, picks[..., of_block], rest=rest)

    @plan_once
    def plan(self, video: VideoShape, device: torch.device) -> Plan:
        """Plan of the chunks that smooth random q and k pick, for pictures and estimates: the real
        plan depends on the data."""
        method = self.for_device(device)
        return method.plan_for(*smooth_qk(video), video=video).to(device)

    def density(self, video: VideoShape) -> float:
        """Share of token pairs that is kept in `plan`, the mean of the three partitions if they
        cycle, in [0, 1]; 1 - density is the sparsity."""
        layers = range(3 if self.partition == "cycle" else 1)
        return sum(self.for_layer(i).plan(video).density for i in layers) / len(layers)

    def _picks(
        self,
        q: Tensor,
        rows: "PickingRows",
        means: Tensor,
        block: int,
        layout: "ChunkLayout",
        kernel: str,
    ) -> tuple[Tensor, Tensor]:
        """Picks of each row, (B, H, R, C + 1) with text last, and of any of `block` rows."""
        B, H, C, _ = means.shape
        topk = min(self.topk[layout.partition], C)
        dense = self.threshold == 1 if self.select == "threshold" else topk == C
        few = topk if self.select == "topk" else 0
        if not dense:
            by = {"scope": self.scope, "topk": few, "threshold": self.threshold}
            places = rows.places, rows.home, means, block
            found = choosing.picks(q, *places, **by, kernel=kernel)
            if found is not None:
                return found
        shape = B, H, rows.last + 1, C + 1
        picks = torch.ones(shape, dtype=torch.bool, device=q.device)  # by text, and of it
        if not dense:
            at_home = rows.home_of_row[:, None] == layout.chunks
            rule = PickRule(self.scope, few, self.threshold)
            videos = len(at_home)
            pick(q[:, :, :videos], means, at_home, rule, picks[:, :, :videos, :C], kernel)
        if rows.row is not None:
            picks[:, :, -1] = False
            picks = picks.index_select(2, rows.row)
        return picks, picks if block == 1 else picks.unflatten(2, (-1, block)).any(3)


class PickingRows(NamedTuple):
    """Rows that pick chunks: tokens in their order, or means of blocks, the video's first.

    Args:
        places: (R,), the row of each place; -1 for padding.
        home: (R,), the own chunk; C for text. home_of_row: the same of the video's rows.
        row: (R,), the row of each place. The row after the video's stands for all text, and the
            last one for padding. None where each place has a row, and there is no padding.
    """

    places: Tensor
    home: Tensor
    home_of_row: Tensor
    row: Tensor | None
    last: int


class ChunkLayout(NamedTuple):
    """Cut of a video into C chunks, text last.

    Args:
        chunk: (S,), the chunk of each slot, C for the text's; of_block: (K,), of each block.
        chunks, sizes: (C,), their numbers, and the tokens in each.
        members: (C * most,), the blocks of each chunk, the last again if there are fewer.
        held: (C * most, 1) fp32, 0 for such repeats and 1 else; None if there are none.
        tokens, blocks: the rows that pick, by token and by block.
        partition: 0, 1 or 2.
    """

    slots: Slots
    chunk: Tensor
    of_block: Tensor
    chunks: Tensor
    sizes: Tensor
    members: Tensor
    held: Tensor | None
    tokens: PickingRows
    blocks: PickingRows
    partition: int


@plan_cached
@torch.inference_mode(False)  # made while sampling, it must serve training too
def _layout(
    partition: int, box: Box, most: int, video: VideoShape, device: torch.device
) -> ChunkLayout:
    counts = [-(-size // side) for size, side in zip(video.grid, box, strict=True)]
    axes = [torch.arange(size) // side for size, side in zip(video.grid, box, strict=True)]
    f, h, w = torch.meshgrid(*axes, indexing="ij")
    of_token = ((f * counts[1] + h) * counts[2] + w).flatten()
    C = math.prod(counts)
    sizes = torch.bincount(of_token, minlength=C)
    largest = int(sizes.max())
    block = -(-largest // -(-largest // most))
    if device.type != "cpu":
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

    of_block, blocks = chunk[::block], room[:C] // block
    nth = torch.arange(int(blocks.max()))
    held = (nth < blocks[:, None]).float().view(-1, 1)
    first = blocks.cumsum(0) - blocks
    members = (first[:, None] + nth.minimum(blocks[:, None] - 1)).flatten()
    row = slots.masked_fill(slots >= video.video_tokens, video.video_tokens)
    row = row.masked_fill(slots < 0, video.video_tokens + 1)
    home, number = of_block[of_block < C], torch.arange(len(of_block))

    def at(x: Tensor) -> Tensor:
        return x.to(device)

    return ChunkLayout(
        slots=slots_of(at(slots), block, block),
        chunk=at(chunk),
        of_block=at(of_block),
        chunks=at(torch.arange(C)),
        sizes=at(sizes),
        members=at(members),
        held=None if held.all() else at(held),
        tokens=PickingRows(at(slots), at(chunk), at(of_token), at(row), video.video_tokens + 1),
        blocks=PickingRows(at(number), at(of_block), at(home), None, len(of_block) - 1),
        partition=partition,
    )


def _box(method: BlockMixture, video: VideoShape) -> Box:
    """(frames, rows, columns) of a chunk, at most the grid: as given, or the box that cuts the
    axes of the partition into about as many chunks as asked, if possible without a rest, and most
    even."""
    i = CYCLE.index(method.partition)
    axes = [(0,), (1, 2), (0, 1, 2)][i]
    sizes = [video.grid[axis] for axis in axes]
    given, target = (method.chunk_1d, method.chunk_2d, method.chunk_3d)[i], method.chunks[i]

    def badness(box: Sequence[int]) -> tuple[float, bool, float]:
        count = math.prod(-(-size // side) for size, side in zip(sizes, box, strict=True))
        ragged = any(size % side for size, side in zip(sizes, box, strict=True))
        sides = [side for side, size in zip(box, sizes, strict=True) if size > 1] or [1]
        return abs(math.log(count / target)), ragged, max(sides) / min(sides)

    if given is None:
        options = [sorted({-(-size // n) for n in range(1, size + 1)}) for size in sizes]
        sides = min(product(*options), key=badness)
    else:
        sides = given if isinstance(given, tuple) else (given,)
    box = [*video.grid]
    for axis, side in zip(axes, sides, strict=True):
        box[axis] = min(side, box[axis])
    return box[0], box[1], box[2]


def _chunk_means(k: Tensor, layout: ChunkLayout, kernel: str) -> Tensor:
    """Mean keys (B, H, C, D) fp32 of k (B, H, N, D), the same from run to run."""
    slots = layout.slots
    sums = choosing.block_sums(k, slots, slots.block_k, kernel)
    C = len(layout.sizes)
    if layout.held is None:
        of_chunk = sums[:, :, : len(layout.members)]
    else:
        of_chunk = sums.index_select(2, layout.members) * layout.held
    return of_chunk.unflatten(2, (C, -1)).sum(3) / layout.sizes[:, None]


class PickRule(NamedTuple):
    """Rule by which rows pick: `topk` chunks each, fewer than there are, or, if it is 0, the best
    that hold a `threshold`, below 1, of the scope's weights."""

    scope: Scope
    topk: int
    threshold: float


def pick(
    rows: Tensor,
    means: Tensor,
    at_home: Tensor,
    rule: PickRule,
    out: Tensor,
    kernel: str = "auto",
) -> None:
    """Write the picks of rows by their products with the chunks' means. A row's own chunk is
    always picked.

    Args:
        rows: (B, H, R, D), queries or their means, each of which counts.
        means: (B, H, C, D) fp32.
        at_home: (R, C) bool, the own chunk of each row.
        out: (B, H, R, C) bool, of any strides.
        kernel: name of the kernel for attention.
    """
    B, H, R, C = out.shape
    size = C if rule.scope == "query_head" else H * R if rule.scope == "block" else R * C
    in_place = size > SORTED and choosing.cuts_in_place(means, kernel)
    most = AT_ONCE_IN_PLACE if in_place else AT_ONCE
    heads = H if rule.scope in SCOPES_OVER_HEADS else max(1, most // (B * R * C))
    by = _by_topk if rule.topk else _by
    parts = zip(*(x.split(heads, 1) for x in (rows, means, out)), strict=True)
    for some, of_chunks, found in parts:
        scores = some.float() @ of_chunks.transpose(-1, -2)
        keys, slack = by(scores, at_home, rule)
        of_scope = _together(keys, rule.scope)
        if in_place:
            cut = choosing.least_taken(of_scope, slack, not rule.topk)
        elif rule.topk:
            cut = least_taken(of_scope, torch.ones_like(of_scope, dtype=torch.int64), slack)
        else:
            cut = least_taken(of_scope, of_scope.view(torch.float32).long(), slack, keys_from=0)
        if not rule.topk:
            cut = torch.minimum(cut, of_scope.amax(-1))  # at least one
        torch.ge(keys, _apart(cut[..., None], keys, rule.scope), out=found)
    out |= at_home


def _by(scores: Tensor, at_home: Tensor, rule: PickRule) -> tuple[Tensor, Tensor]:
    """Sort keys, the bits of weights in the place of scores, and what each scope leaves out."""
    low, high = _together(scores, rule.scope).aminmax(dim=-1, keepdim=True)
    low, high = (_apart(x, scores, rule.scope) for x in (low, high))
    weight = scores.sub_(low).div_(high - low).nan_to_num_(1.0)  # 1 where all scores are equal
    weight *= UNITS  # exactly
    total = _together(weight, rule.scope).sum(-1, dtype=widest(scores.device))
    slack = (total - rule.threshold * total).long()
    weight.masked_fill_(at_home, 0.0)
    return weight.view(torch.int32), slack  # ordered like the floats, as none is negative


def _by_topk(scores: Tensor, at_home: Tensor, rule: PickRule) -> tuple[Tensor, Tensor]:
    _, H, R, C = scores.shape
    keys = ordered(scores).masked_fill_(at_home, 0x7FFFFFFF)  # own chunks come first
    rows = {"query_head": 1, "head_global": R, "overall": H * R}[rule.scope]
    shape = _together(keys, rule.scope).shape[:-1]
    return keys, keys.new_full(shape, rows * (C - rule.topk), dtype=torch.int64)


def _together(x: Tensor, scope: Scope) -> Tensor:
    """View (B, H, R, C) as scopes by entries."""
    if scope == "query_head":
        return x
    if scope == "block":
        return x.permute(0, 3, 1, 2).flatten(2)
    return x.flatten(1 if scope == "overall" else 2)


def _apart(x: Tensor, scores: Tensor, scope: Scope) -> Tensor:
    """Expand a number of each scope, (..., 1), to broadcast with (B, H, R, C)."""
    B, H, R, C = scores.shape
    shape = {
        "query_head": (B, H, R, 1),
        "head_global": (B, H, 1, 1),
        "overall": (B, 1, 1, 1),
        "block": (B, 1, 1, C),
    }[scope]
    return x.view(shape)


def ordered(x: Tensor) -> Tensor:
    """Return int32 that sort like the fp32 `x`."""
    bits = x.contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def least_taken(keys: Tensor, mass: Tensor, slack: Tensor, keys_from: int = -(2**31)) -> Tensor:
    """Return the greatest key below which no more than `slack` of the mass lies, (...) int64; one
    above all keys if all together hold no more.

    Short rows are sorted. In long ones the mass is counted by the upper half of the keys, then
    within the decisive half by the lower: two passes, where sorting takes dozens.

    Args:
        keys: (..., n) int32, from `keys_from` on.
        mass: (..., n) int64, not negative.
        slack: (...) int64, not negative.
    """
    if keys.shape[-1] <= SORTED:
        in_order, index = keys.sort(dim=-1)
        held = mass.gather(-1, index).cumsum(-1)
        first = torch.searchsorted(held, slack[..., None], right=True)[..., 0]
        past = first == keys.shape[-1]
        first = first.clamp_max(keys.shape[-1] - 1)
        cut = in_order.gather(-1, first[..., None])[..., 0].long()
        return cut.masked_fill(past, 1 << 31)
    rank = keys.long()
    rank = rank - keys_from if keys_from else rank
    high = rank >> 16
    below = _below(high, mass)
    upper = _last_within(below, slack)
    mass = mass.masked_fill(high != upper, 0)
    slack = slack[..., None] - below.gather(-1, upper)
    rank &= 0xFFFF
    lower = _last_within(_below(rank, mass), slack[..., 0])
    cut = torch.add(lower, upper, alpha=1 << 16)[..., 0]
    return cut + keys_from if keys_from else cut


def _below(bins: Tensor, mass: Tensor) -> Tensor:
    """Return (..., 2^16 + 1): the mass in the bins below each of 2^16, and in all."""
    count = mass.new_zeros(*bins.shape[:-1], (1 << 16) + 1)
    count[..., 1:].scatter_add_(-1, bins, mass)
    return count.cumsum(-1)


def _last_within(below: Tensor, slack: Tensor) -> Tensor:
    """Return (..., 1): the last bin below which no more than `slack` lies."""
    return torch.searchsorted(below, slack[..., None], right=True) - 1
