"""Layouts of tokens in blocks, options of a pooled rest, and stand-ins for q and k.

Boxes of tokens pad every grid that they do not divide. `full_tiles`, for the kernels of GPUs, are
full on any grid: each but the last of a frame holds a power of two of tokens. They are boxes with
ragged ends.
"""

import math
from itertools import product
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from gen_accel.memory import plan_cached
from gen_accel.method import Box
from gen_accel.parsing import shown
from gen_accel.plan import Centre, Rest, RestOrder, Slots, raster_slots, slots_of, tile_slots
from gen_accel.video import VideoShape

if TYPE_CHECKING:
    from gen_accel.kernels.rest_cost import Orders

Tile = Literal["auto", "raster"] | Box
# One tile for all layers, or a box for each; layers past the last box take the last.
Tiles = Tile | tuple[Box, ...]


class Always(NamedTuple):
    """Keys and queries, beside text, that are exact whatever their scores.

    Args:
        band: key blocks up to so many blocks from the query block, in the order of slots; 0 is its
            own alone. None: none.
        sink: the first frames, or (first token, tokens), whose keys all queries see.
        sink_queries: whether the queries of the sink see all, too.
    """

    band: int | None = None
    sink: int | tuple[int, int] = 0
    sink_queries: bool = False


NOTHING = Always()
MOST_TOKENS = 1 << 20  # in a block; more would take terabytes to lay out


class Layout(NamedTuple):
    """Layout of a grid.

    Args:
        ranked: the numbers of the key blocks that have scores: blocks with video tokens alone.
        is_ranked: (Kk,) bool, which key blocks these are.
        is_first: whether they are the first blocks, from 0 on without a gap.
        always: (Kq, Kk) bool, pairs that are exact whatever the scores; `entries` of them.
        video_rows: the query blocks that choose: blocks without text.
        kinds: (Kq, Kk) uint8: 1 for pairs in `always`, and 2 for ranked and 4 for full key blocks.
        before: (Kq, 2) int32: of all query blocks before each, the pairs in `always`, and how
            many choose.
        rows: (Kq,) bool, the choosing query blocks that hold a token; `held_rows` of them.
        occupied: (Kk,) bool, key blocks that hold a token; `has_empty` if not all do.
    """

    slots: Slots
    ranked: Tensor
    is_ranked: Tensor
    is_first: bool
    always: Tensor
    entries: int
    video_rows: int
    kinds: Tensor
    before: Tensor
    rows: Tensor
    held_rows: int
    occupied: Tensor
    has_empty: bool

    def of_ranked(self, x: Tensor, dim: int) -> Tensor:
        """Select the ranked key blocks from `x` along `dim`."""
        if self.is_first:
            return x.narrow(dim, 0, len(self.ranked))
        return x.index_select(dim, self.ranked)

    def numbers(self, places: Tensor) -> Tensor:
        """Return the numbers of the key blocks at `places` among the ranked ones."""
        return places if self.is_first else self.ranked[places]

    def add(self, keep: Tensor, more: Tensor) -> None:
        """Keep `more`, (B, H, Kq, R) bool of the ranked blocks, in `keep`, (B, H, Kq, Kk)."""
        if self.is_first:
            keep[..., : len(self.ranked)] |= more
        else:
            keep.index_copy_(-1, self.ranked, keep.index_select(-1, self.ranked) | more)

    def count(self, share: float) -> int:
        """Number of blocks in `share` of the ranked key blocks, at least one."""
        blocks = len(self.ranked)
        return min(max(1, int(share * blocks)), blocks)


@plan_cached
@torch.inference_mode(False)  # made while sampling, it must serve training too
def layout_of(
    video: VideoShape,
    device: torch.device,
    block_q: int,
    block_k: int,
    tile: Tile = "auto",
    always: Always = NOTHING,
    larger: bool = False,
    by_parts: bool = False,
) -> Layout:
    """Lay out a grid in blocks that are boxes, or runs of tokens, with text in blocks of its own.

    Args:
        block_q, block_k: slots in a query and in a key block.
        tile: "auto" is `even_tile`. "raster" is runs of tokens, in which the last of the video and
            the first of the text may share a block. A box is the smaller block, which then holds
            as many slots; the larger block keeps its ratio to the smaller one.
        larger: whether a given box may be larger than the grid, with slots that stay empty.
        by_parts: whether each part of the text lies in blocks of its own; not in raster order.

    ValueError for a box larger than the grid, or a sink beyond the last token.
    """
    if tile == "raster":
        slots = raster_slots(video, math.lcm(block_q, block_k))
    else:
        small = min(block_q, block_k)
        in_a_row = max(block_q, block_k) // small
        if tile == "auto":
            tile = even_tile(video, small, in_a_row)
        elif not larger and any(a > b for a, b in zip(tile, video.grid, strict=True)):
            raise ValueError(
                f"tile {tile} is larger than the grid {video.grid} of the video; each is frames, "
                "rows and columns in tokens"
            )
        block_q, block_k = (block // small * math.prod(tile) for block in (block_q, block_k))
        slots = tile_slots(video, (tile[0] * in_a_row, *tile[1:]), by_parts=by_parts)
    laid = slots_of(slots.to(device), block_q, block_k)
    text = laid.slots >= video.video_tokens
    text_q, text_k = (text.view(-1, block).any(-1) for block in (block_q, block_k))
    held_q, occupied = (laid.real.view(-1, block).any(-1) for block in (block_q, block_k))
    is_ranked = occupied & ~text_k
    ranked = is_ranked.nonzero()[:, 0]
    is_first = bool((ranked == torch.arange(len(ranked), device=ranked.device)).all())
    kept = (text_k | text_q[:, None] | _kept(always, laid, video)) & occupied
    rows = held_q & ~text_q
    own = torch.stack([kept.sum(1), ~text_q], 1)
    before = (own.cumsum(0) - own).int()
    kinds = kept.byte() + (2 * is_ranked.byte() + 4 * laid.full_keys.byte())
    facts = int(kept.sum()), int((~text_q).sum()), kinds, before, rows, int(rows.sum())
    has_empty = not bool(occupied.all())
    return Layout(laid, ranked, is_ranked, is_first, kept, *facts, occupied, has_empty)


def boxes_of(tile: Tiles) -> tuple[Box, ...]:
    """Return the given boxes: one for all layers, one for each, or none."""
    if isinstance(tile, str) or not tile:
        return ()
    return tile if isinstance(tile[0], tuple) else (tile,)  # pyright: ignore[reportReturnType]


def tile_of(tile: Tiles, layer: int) -> Tile:
    """Tile of one layer, counted from 0."""
    boxes = boxes_of(tile)
    return boxes[min(layer, len(boxes) - 1)] if boxes else tile  # pyright: ignore[reportReturnType]


def check_blocks(block_q: int, block_k: int, tile: Tiles) -> None:
    """Raise ValueError for sizes that do not go together, or a tile other than a box."""
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if not 1 <= size <= MOST_TOKENS:
            most = f"from 1 to {MOST_TOKENS}"
            raise ValueError(f"{name} must be a whole number {most}, got {shown(size)}")
    large, small = max(block_q, block_k), min(block_q, block_k)
    if tile != "raster" and large % small:
        raise ValueError(
            "in tiles one of block_q and block_k must be a multiple of the other, got "
            f"{block_q} and {block_k}; or lay tokens in 'raster' order"
        )
    given = [side for box in boxes_of(tile) for side in box]
    if not isinstance(tile, str) and not (given and min(given) >= 1):
        raise ValueError(
            "tile must be 'auto', 'raster', positive (frames, rows, columns) or one such box for "
            f"each layer, got {shown(tile)}"
        )


def check_always(always: Always) -> None:
    """Raise ValueError for a band or a sink out of range."""
    band, sink, sink_queries = always
    if band is not None and band < 0:
        raise ValueError(f"band must be None or key blocks from 0 on, got {shown(band)}")
    if isinstance(sink, int):
        if sink < 0:
            raise ValueError(f"sink must count frames from 0 on, got {sink}")
    elif sink[0] < 0 or sink[1] < 1:
        raise ValueError(f"sink must be frames, or (first token, tokens), got {shown(sink)}")
    if sink_queries and sink == 0:
        raise ValueError("sink_queries is for a sink, got sink=0")


def _kept(always: Always, laid: Slots, video: VideoShape) -> Tensor:
    """Mask (Kq, Kk) bool of the pairs that are always exact, or a tensor that broadcasts to it."""
    device, blocks = laid.slots.device, (laid.block_q, laid.block_k)
    if isinstance(always.sink, int):
        first, tokens = 0, min(always.sink, video.frames) * video.height * video.width
    else:
        first, tokens = always.sink
    if first + tokens > video.tokens:
        raise ValueError(
            f"sink must lie within the {video.tokens} tokens of {video}, got {always.sink}"
        )
    in_sink = (laid.slots >= first) & (laid.slots < first + tokens)
    sink_q, sink_k = (in_sink.view(-1, block).any(-1) for block in blocks)
    kept = sink_k | sink_q[:, None] if always.sink_queries else sink_k[None]
    if always.band is None:
        return kept
    Kq, Kk = (len(laid.slots) // block for block in blocks)
    query, key = (torch.arange(count, device=device) for count in (Kq, Kk))
    low = query * laid.block_q // laid.block_k - always.band
    high = ((query + 1) * laid.block_q - 1) // laid.block_k + always.band
    return kept | (low[:, None] <= key) & (key <= high[:, None])


def even_tile(video: VideoShape, tokens: int, in_a_row: int = 1) -> Box:
    """Return the box of `tokens` tokens that pads the grid least when `in_a_row` of them lie in a
    row along the frames. Of equal boxes, the most even. In a small grid it may stick out."""
    divisors = [n for n in range(1, tokens + 1) if tokens % n == 0]

    def badness(box: Box) -> tuple[float, float]:
        sides = (box[0] * in_a_row, *box[1:])
        both = zip(video.grid, sides, strict=True)
        padded = math.prod(-(-size // side) * side for size, side in both)
        return padded, max(box) / min(box)

    sides = product(divisors, divisors, divisors)
    return min((box for box in sides if math.prod(box) == tokens), key=badness)


# Least key block, if a frame has as many tokens: the length of the kernels' tiles of keys.
LEAST = 64


class FullTiles(NamedTuple):
    """A layout of T tiles a frame, in `counts` tiles for each band of rows.

    Args:
        slots: (S,) int64 as of a plan: the tiles of the video and the text, each padded to whole
            query blocks.
        frame, tile: (frames x T,) int64, the frame and tile of each key block of the video. Except
            at the end of a band, one of them changes from block to block, by one.
        block_q, block_k: slots in a query block, which is some key blocks in a row, and in a tile.
    """

    slots: Tensor
    counts: list[int]
    frame: Tensor
    tile: Tensor
    block_q: int
    block_k: int


def tokens_of_tile(video: VideoShape, most: int) -> int:
    """Number of tokens in a tile: the power of two that `most` allows, or a frame in whole kernel
    tiles if this is less."""
    frame = video.height * video.width
    least = 1 << (min(frame, LEAST) - 1).bit_length()
    return min(1 << most.bit_length() - 1, -(-frame // least) * least)


def full_tiles(video: VideoShape, tokens: int, in_a_row: int) -> FullTiles:
    """Lay out a video in tiles of so many tokens, as `tokens_of_tile` gives them, of which
    `in_a_row` at one place of neighbouring frames make a query block."""
    size = video.height * video.width
    T, block_q = -(-size // tokens), in_a_row * tokens
    # Bands of rows, so that tiles are as even-sided as may be.
    bands = max(1, min(T, video.height, round((T * video.height / video.width) ** 0.5)))
    counts = [T * (i + 1) // bands - T * i // bands for i in range(bands)]
    # Frames run forth and back from tile to tile.
    frame = torch.arange(video.frames).expand(T, -1).clone()
    frame[1::2] = frame[1::2].flip(1)
    frame, tile = frame.flatten(), torch.arange(T).repeat_interleave(video.frames)

    # A band holds the next tokens of the raster, and a tile the next of its band, by columns.
    place = torch.arange(size)
    band = torch.bucketize(place, torch.tensor(counts).cumsum(0) * tokens, right=True)
    row, column = place // video.width, place % video.width
    order = ((band * video.width + column) * video.height + row).argsort()
    held = _padded(order, T * tokens).view(-1, tokens)[tile]
    held = torch.where(held < 0, -1, held + (frame * size)[:, None])
    text = torch.arange(video.video_tokens, video.tokens)
    parts = [_padded(x, block_q) for x in (held.flatten(), text)]
    return FullTiles(torch.cat(parts), counts, frame, tile, block_q, tokens)


def _padded(tokens: Tensor, multiple: int) -> Tensor:
    return torch.cat([tokens, tokens.new_full((-len(tokens) % multiple,), -1)])


Pool = Literal["means"]
Around = Literal["query", "key", "auto"]
Order = RestOrder | Literal["auto"]


def rest_of(
    rest: Pool | None,
    centre: Centre = "query",
    order: Order = "auto",
    *,
    flat: bool = False,
    tokens: int | None = None,
) -> Rest | None:
    """Build the `Rest` of a plan from a method's options `rest`, `centre` and `order`; ValueError
    for an unknown value, an order that the centre does not have, or options without a rest.

    Args:
        flat: blocks are runs of tokens, or lie within a frame. Their queries are too far from
            their mean for the second order, which "auto" otherwise is around queries.
        tokens: number of tokens of the video, which come first; see `Rest`.
    """
    made = Rest(centre, order_around(centre, order, flat=flat), tokens)
    if rest not in (None, "means"):
        raise ValueError(f"rest must be None or 'means', got {shown(rest)}")
    if rest is None and (centre, order) != ("query", "auto"):
        raise ValueError(
            f"centre and order are for rest='means', got centre={centre!r} and order={order!r} "
            "with rest=None"
        )
    return None if rest is None else made


def order_around(centre: Centre, order: Order, *, flat: bool) -> RestOrder:
    """Resolve the order "auto"; other orders are returned as they are."""
    if order != "auto":
        return order
    if centre == "key":
        return "zeroth"
    return "first" if flat else "second"


def orders_around(order: Order, *, flat: bool) -> "Orders":
    """Resolve an order around each centre."""
    from gen_accel.kernels.rest_cost import Orders

    return Orders(order_around("query", order, flat=flat), order_around("key", order, flat=flat))


def centre_of_call(
    centre: Around, orders: "Orders", q: Tensor, slots: Slots, entries: int | None
) -> Centre:
    """Resolve the centre of a call, without waiting for the device. On GPUs "auto" is the faster
    one for the same quality, by a model of products and bytes; elsewhere it is "query".

    Args:
        orders: the order of the rest around each centre.
        q: (B, H, N, D).
        entries: the most pairs of blocks that a head keeps. None: this depends on scores on the
            device; then "auto" is "query".
    """
    if centre != "auto":
        return centre
    if entries is None or q.device.type != "cuda":
        return "query"
    B, H, N, D = q.shape
    blocks = slots.block_q, slots.block_k
    pairs = (len(slots.slots) // blocks[0]) * (len(slots.slots) // blocks[1])
    from gen_accel.kernels.rest_cost import Problem, centre_of

    problem, density = Problem(B * H, N, D, *blocks), min(entries / pairs, 1.0)
    return centre_of(problem, density, q.device, orders)


# Tokens along an axis in which a feature turns about once, so that near tokens are alike.
REACH = 12.0


def smooth_qk(video: VideoShape, dim: int = 64) -> tuple[Tensor, Tensor]:
    """Return q and k, (1, 1, N, dim) each, the same every time: random waves over the grid, noise
    for the text. Near tokens attend to each other most, as in most heads of video models."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*(torch.arange(float(size)) for size in video.grid), indexing="ij")
    place = torch.stack(axes, -1).flatten(0, 2)
    turns = torch.randn(3, dim, generator=generator) * (2 * torch.pi / REACH)
    phase = torch.rand(dim, generator=generator) * (2 * torch.pi)
    waves = (place @ turns + phase).cos() * 2**0.5
    text = torch.randn(video.text, dim, generator=generator)
    features = torch.cat([waves, text])[None, None]
    noise = torch.randn(2, *features.shape, generator=generator) * 0.5
    return features + noise[0], features + noise[1]
