"""Radial attention: a token sees less of a frame the further away that frame is.

References:
    Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video
    Generation", 2025, https://arxiv.org/abs/2506.19852; public code mit-han-lab/radial-attention
    at 72788d4 (Apache-2.0), whose block masks the two "code" rules reproduce bit for bit.

Distances between frames are in latent frames. Band b holds the distances d with
floor(log2(max(d, 1))) == b.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor

from gen_accel.attention_processors.methods.blocks import Pool, full_tiles, rest_of, tokens_of_tile
from gen_accel.method import Method, plan_once
from gen_accel.parsing import Count, Positive, check_options
from gen_accel.plan import Centre, Plan, raster_slots, tile_slots
from gen_accel.runs import mask_or_runs, slices_of
from gen_accel.video import VideoShape

Rule = Literal["balanced", "paper", "code-2025-06", "code-2025-11"]

# By default a query tile of the balanced rule spans one frame for every so many in the clip.
TILE_FRAMES = 24


@dataclass(frozen=True)
class Radial(Method):
    """Attention whose density halves with each doubling of the temporal distance.

    Rules:
        "balanced": ours. Frames are cut into tiles of about 8 x 8 tokens (`tile_side`), all as
            even as the frame allows and none with longer sides, and band b keeps
            decay_factor x 2^-b of the tiles of a frame, as a window in rows *and* columns about
            the query's own tile. A band whose share falls below one tile keeps that tile in every
            n-th frame instead. A token always sees its own frame and, with `sink`, the first. No
            tile spans two frames of keys, so the pattern does not depend on how a frame's token
            count relates to the block size, on any shape. On GPUs, whose kernels are fastest with
            full blocks of powers of two, the tiles come from `full_tiles`: equally many tokens
            each, in bands of rows, so that little is padded on any grid.
        "paper": equation 4: a band of s / 2^b raster positions to each side, then every n-th
            frame's diagonal. A block is kept when it holds a kept pair. The paper's decay has no
            factor; ours scales the width.
        "code-2025-06": the public code for Wan until 2025-11-11: half a frame at distance 1.
        "code-2025-11": the public code since: the whole frame at distance 1.

    Args:
        rule: how the pattern is laid out, ours ("balanced"), the paper's or a public code's; see
            above.
        decay_factor: scales the width, in the balanced rule the share, of all bands from b = 1
            (in the code rules from d = 2).
        sink: keep the keys of the first frame for every query. The public code does so for Wan,
            and since 2025-07 no longer for HunyuanVideo.
        block: tokens in a block; for the balanced rule the most in a query block, if no single
            tile holds more.
        anchor_every: keep the keys of every n-th frame for every query, from the first frame on.
            Ours: in all other far frames a query sees only tiles about its own place, which do not
            show where a moving object went. None: no frame but the sink.
        tile_frames: frames that a query tile of the balanced rule spans, if that many fit into a
            block. The tile sees the union of their patterns, which is more, but kernels run larger
            blocks faster. None: one for every 24 in the clip; on GPUs a power of two, at least
            two.
        tile_side: the most rows and columns of a tile of the balanced rule; on GPUs its square is
            the most tokens, cut to a power of two.
        rest, centre: "means" adds the remaining keys to the softmax, pooled around the mean
            "query" of each query block or the mean "key" of each key block: see
            `gen_accel.plan.Rest`. Ours: without it, far frames add nothing else.
    """

    rule: Rule = "balanced"
    decay_factor: Positive = 1.0
    sink: bool = True
    block: Count = 128
    anchor_every: Count | None = None
    tile_frames: Count | None = None
    tile_side: Count = 8
    rest: Pool | None = None
    centre: Centre = "query"

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("tile_frames", "tile_side"):
            if self.rule != "balanced" and getattr(self, name) != getattr(Radial, name):
                raise ValueError(f"{name} is for the balanced rule, got rule={self.rule!r}")
        rest_of(self.rest, self.centre)

    @property
    def thins_by_time(self) -> bool:
        return True

    @classmethod
    def candidates(
        cls, video: VideoShape, *, tile: object = None, profile: str = ""
    ) -> Sequence["Radial"]:
        return [cls(decay_factor=factor) for factor in (0.25, 0.5, 1.0, 2.0)]

    @classmethod
    def keeping(cls, share: float, video: VideoShape) -> "Radial":
        """Return the widest at most as dense as `share`, or the sparsest there is."""
        low, high = -10.0, 10.0  # of log2 decay_factor: beyond, nothing changes on any video
        for _ in range(16):
            middle = (low + high) / 2
            wide = cls(decay_factor=2**middle).density(video) > share
            low, high = (low, middle) if wide else (middle, high)
        return cls(decay_factor=2**low)

    @plan_once
    def plan(self, video: VideoShape, device: torch.device) -> Plan:
        on_cpu = device.type == "cpu"
        if self.rule == "balanced":
            return (_balanced if on_cpu else gpu_plan)(self, video).to(device)
        if not on_cpu:
            return self.plan(video).to(device)
        slots = raster_slots(video, self.block)
        blocks = slots.numel() // self.block
        keep = mask_or_runs(_raster_rows(self, video, blocks), blocks, blocks)
        rest = rest_of(self.rest, self.centre, flat=True)
        return Plan(slots, keep, self.block, self.block, rest=rest)

    def whole_frames(self, frames: int) -> list[int]:
        """List the frames that every query sees whole: the sink and the anchors."""
        return [
            frame
            for frame in range(frames)
            if (self.sink and frame == 0) or (self.anchor_every and frame % self.anchor_every == 0)
        ]


def _raster_rows(method: Radial, video: VideoShape, blocks: int) -> Iterator[Tensor]:
    """Yield the mask in slices of frames of queries. A block of two comes with the later one."""
    s, B = video.height * video.width, method.block
    # The block that holds the first token after the video, and all that follow, see and are seen.
    border = video.video_tokens // B
    fill = _paper if method.rule == "paper" else partial(_code, shrink=cache(_shrink))
    whole = set(method.whole_frames(video.frames))
    keep = torch.zeros(0, blocks, dtype=torch.bool)
    for some in slices_of(video.frames, -(-s // B) * blocks):
        top = some.start * s // B
        done = some.stop == video.frames
        end, stop = _span(some.stop - 1, s, B).stop, some.stop * s // B
        keep = torch.cat(
            [keep, keep.new_zeros((blocks if done else end) - top - len(keep), blocks)]
        )
        for i in range(some.start, some.stop):
            for j in range(video.frames):
                fill(method, s, i, j, j in whole, top, keep)
        keep[:, border:] = True
        if done:
            keep[max(0, border - top) :] = True
        yield keep if done else keep[: stop - top]
        keep = keep[stop - top :]


def _balanced(method: Radial, video: VideoShape) -> Plan:
    # A query tile sees the union of its frames' patterns, so in a short clip it spans few.
    height, width = (
        -(-size // math.ceil(size / method.tile_side)) for size in (video.height, video.width)
    )
    frames = method.tile_frames or video.frames // TILE_FRAMES
    frames = max(1, min(method.block // (height * width), frames, video.frames))
    tile = frames, height, width
    slots = tile_slots(video, tile)
    block_q, block_k = math.prod(tile), height * width
    groups, rows, columns = (-(-n // t) for n, t in zip(video.grid, tile, strict=True))

    # (groups, padded frames): distance of each key frame from the frames of each query tile.
    first = torch.arange(groups)[:, None] * tile[0]
    last = (first + tile[0]).clamp_max(video.frames) - 1
    frame = torch.arange(groups * tile[0])
    distance = torch.maximum(first - frame, frame - last).clamp_min(0)

    window = _windows(method, video, [columns] * rows)
    whole = method.whole_frames(video.frames)

    def rows_of(some: slice) -> Tensor:
        near = window[distance[some].clamp_max(video.frames - 1)]  # (some, frames, tiles, tiles)
        near[:, whole] = True
        # A block of queries is (group, tile), one of keys is (group, tile, frame in the group).
        near = near.unflatten(1, (groups, tile[0])).permute(0, 3, 1, 4, 2)
        return near.reshape(near.shape[0] * near.shape[1], -1)

    some = slices_of(groups, rows * columns * (slots.numel() // block_k))
    return _with_text(method, slots, map(rows_of, some), block_q, block_k)


def gpu_plan(method: Radial, video: VideoShape) -> Plan:
    """Plan of the balanced rule in blocks that suit the kernels of GPUs, made on the CPU. Little
    is padded on any grid, and few blocks need a mask. Of each key frame, a query block sees what
    its own frame nearest to it must see."""
    tokens = tokens_of_tile(video, method.tile_side**2)
    most = method.block // tokens, method.tile_frames or max(2, video.frames // TILE_FRAMES)
    most = max(1, min(*most, -(-video.video_tokens // tokens)))
    in_a_row = 1 << most.bit_length() - 1
    slots, counts, frame, tile, *blocks = full_tiles(video, tokens, in_a_row)

    last = torch.full((-len(tile) % in_a_row,), len(tile) - 1)
    members = torch.cat([torch.arange(len(tile)), last]).view(-1, in_a_row)
    window = _windows(method, video, counts)
    whole, place = method.whole_frames(video.frames), (frame * sum(counts) + tile).numpy()

    def rows_of(some: slice) -> Tensor:
        of_frame = frame[members[some]][:, :, None] - torch.arange(video.frames)
        distance = of_frame.abs().amin(1)
        near = window[distance, tile[members[some, :1]]]  # (some, frames, tiles)
        for i in range(1, in_a_row):
            near |= window[distance, tile[members[some, i : i + 1]]]
        near[:, whole] = True
        # numpy gathers bytes at more than twice torch's rate.
        return torch.from_numpy(near.flatten(1).numpy().take(place, axis=1))

    some = slices_of(len(members), slots.numel() // blocks[1])
    return _with_text(method, slots, map(rows_of, some), *blocks)


def _with_text(
    method: Radial, slots: Tensor, slices: Iterable[Tensor], block_q: int, block_k: int
) -> Plan:
    """Complete a plan from slices of (query blocks, key blocks) of the video by the text's."""
    occupied = (slots >= 0).view(-1, block_k).any(-1)  # frames past the last are padding alone
    size = slots.numel() // block_q, slots.numel() // block_k

    def rows() -> Iterator[Tensor]:
        left = size[0]
        for some in slices:
            left -= len(some)
            keep = occupied.repeat(len(some), 1)
            keep[:, : some.shape[1]] &= some
            yield keep
        if left:
            yield occupied.repeat(left, 1)

    # Blocks within a frame are flat: queries lie far from their mean, too far for a second order.
    rest = rest_of(method.rest, method.centre, flat=True)
    return Plan(slots, mask_or_runs(rows(), *size), block_q, block_k, rest=rest)


def _windows(method: Radial, video: VideoShape, counts: Sequence[int]) -> Tensor:
    """Mask (frames, T, T) bool of the tiles that are seen of a frame at each distance, where
    `counts` gives the tiles in each band of rows."""
    seen = []
    for d in range(video.frames):
        share = 1.0 if d < 2 else min(1.0, method.decay_factor * 0.5 ** (d.bit_length() - 1))
        seen.append(_near_tiles(counts, share, d))
    return torch.stack(seen)


def _near_tiles(counts: Sequence[int], share: float, distance: int) -> Tensor:
    """Mask (T, T) bool: a window of about share x T tiles about each tile of one frame, shifted at
    the border rather than cut, so that every tile sees as many."""
    T, bands = sum(counts), len(counts)
    wanted = share * T
    if wanted < 1:
        every = round(1 / wanted)
        return torch.eye(T, dtype=torch.bool) & (distance % every == 0)
    # A band with one tile more keeps the same share of its width. Where the split is uneven, odd
    # distances favour the other axis.
    sizes = torch.tensor(counts)
    band = torch.arange(bands).repeat_interleave(sizes)
    column = torch.arange(T) - (sizes.cumsum(0) - sizes)[band]
    size = sizes[band]
    columns = size.double()
    if distance % 2 == 0:
        rows = min(bands, max(1, round(share**0.5 * bands)))
        wide = ((wanted / rows) * (columns * bands / T)).round()
    else:
        wide = (share**0.5 * columns).round().clamp_min(1)
        rows = min(bands, max(1, round(wanted / wide[column == 0].mean().item())))
    place = (2 * column + 1)[:, None] * size // (2 * size[:, None])
    extent = wide.long().clamp_min(1).minimum(size)
    near = _window(column, place, extent, size)
    return near & _window(band, band[:, None], rows, bands)


def _window(key: Tensor, place: Tensor, extent: Tensor | int, size: Tensor | int) -> Tensor:
    """Whether `key`, of `size`, is one of `extent` about `place`, shifted inwards at the ends."""
    start = (place - extent // 2).clamp(torch.tensor(0), torch.as_tensor(size - extent))
    return (start <= key) & (key < start + extent)


def _paper(method: Radial, s: int, i: int, j: int, is_whole: bool, top: int, keep: Tensor) -> None:
    """Write what frame i keeps of frame j, of s tokens each, to the mask's rows from `top` on."""
    B, d = method.block, abs(i - j)
    queries, keys = _span(i, s, B), _span(j, s, B)
    target = keep[queries.start - top : queries.stop - top, keys]
    band = max(d, 1).bit_length() - 1
    reach = s * method.decay_factor / 2**band - 1
    if is_whole or band == 0:
        target[:] = True
    elif reach >= 0 or not d % math.ceil(2**band / (s * method.decay_factor)):
        # Positions within the frame that each block holds, and the gap between two blocks.
        low_q, high_q = _inside(queries, i, s, B)
        low_k, high_k = _inside(keys, j, s, B)
        gap = torch.maximum(low_q[:, None] - high_k, low_k - high_q[:, None]).clamp_min(0)
        target |= gap <= max(reach, 0)


def _span(frame: int, s: int, B: int) -> slice:
    """The blocks that hold a token of `frame`."""
    return slice(frame * s // B, ((frame + 1) * s - 1) // B + 1)


def _inside(blocks: slice, frame: int, s: int, B: int) -> tuple[Tensor, Tensor]:
    """First and last position within `frame` that each block holds."""
    start = torch.arange(blocks.start, blocks.stop) * B - frame * s
    return start.clamp_min(0), (start + B - 1).clamp_max(s - 1)


def _code(
    method: Radial,
    s: int,
    i: int,
    j: int,
    is_whole: bool,
    top: int,
    keep: Tensor,
    shrink: Callable[..., Tensor],
) -> None:
    """Write the public code's masks, as `_paper` does. `shrink` is `_shrink` with a cache."""
    B, d = method.block, abs(i - j)
    decay = 2 ** s.bit_length() / 2 ** d.bit_length()
    if is_whole:
        width = float(s)
    elif decay < 128 and d % int(128 / decay):  # the code's threshold, whatever the block
        return
    elif d == 1 and method.rule == "code-2025-06":
        width = float(s // 2)
    else:
        width = float(s) if d < 2 else max(decay * method.decay_factor, float(B))
    blocks = shrink(s, B, math.floor(width), i * s % B, j * s % B)
    row, column = i * s // B - top, j * s // B
    target = keep[row : row + blocks.shape[0], column : column + blocks.shape[1]]
    # The code runs past the end of the mask here, and stops with an error; we cut.
    target |= blocks[: target.shape[0], : target.shape[1]]


def _shrink(s: int, B: int, width: int, row: int, column: int) -> Tensor:
    """Mask of the blocks of a band of `width` positions between two frames that begin at `row` and
    `column`.

    A block is kept when more than 0.6 of the key columns that hold anything hold more than a third
    of the block's rows. Blocks are counted from the offset, so the last part of a frame that
    straddles one block more is lost.
    """
    blocks = torch.arange(-(-s // B)) * B
    first_q, first_k = (blocks - row).clamp_min(0)[:, None], (blocks - column).clamp_min(0)
    last_q = (blocks - row + B).clamp_max(s)[:, None] - 1
    last_k = (blocks - column + B).clamp_max(s) - 1

    def columns(rows: int) -> Tensor:
        """Number of key columns that hold at least so many rows, an interval."""
        low = torch.maximum(first_k, first_q + rows - 1 - width)
        high = torch.minimum(last_k, last_q - rows + 1 + width)
        possible = (last_q - first_q + 1 >= rows) & (2 * width + 1 >= rows)
        return (high - low + 1).clamp_min(0) * possible

    return columns(B // 3 + 1) / (columns(1) + 1e-9) > 0.6
