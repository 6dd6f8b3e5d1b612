"""Blocks for the kernels of GPUs: tiles of a frame that are full on any grid.

Boxes of tokens pad every grid that they do not divide. Each of these tiles but the last of a frame
holds a power of two of tokens. Tiles are boxes with ragged ends.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gen_accel.video import VideoShape

# Least key block, if a frame has as many tokens: the length of the kernels' tiles of keys.
LEAST = 64


class FullTiles(NamedTuple):
    """A layout of T tiles a frame.

    Args:
        slots: (S,) int64 as of a plan: the tiles of the video and the text, each padded to whole
            query blocks.
        counts: how many tiles each band of rows holds, from top to bottom.
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
    tiles where this is less."""
    frame = video.height * video.width
    least = 1 << (min(frame, LEAST) - 1).bit_length()
    return min(1 << most.bit_length() - 1, -(-frame // least) * least)


def full_tiles(video: VideoShape, tokens: int, in_a_row: int) -> FullTiles:
    """Lay out a video.

    Args:
        tokens: result of `tokens_of_tile`.
        in_a_row: tiles in a query block: one place in neighbouring frames.
    """
    counts = _counts(video, tokens)
    T, block_q = sum(counts), in_a_row * tokens
    # Frames run forth and back from tile to tile.
    frame = torch.arange(video.frames).expand(T, -1).clone()
    frame[1::2] = frame[1::2].flip(1)
    frame, tile = frame.flatten(), torch.arange(T).repeat_interleave(video.frames)

    held = _tokens_of_tiles(video, counts, tokens)[tile]
    held = torch.where(held < 0, -1, held + (frame * video.height * video.width)[:, None])
    text = torch.arange(video.video_tokens, video.tokens)
    parts = [_padded(x, block_q) for x in (held.flatten(), text)]
    return FullTiles(torch.cat(parts), counts, frame, tile, block_q, tokens)


def _counts(video: VideoShape, tokens: int) -> list[int]:
    """Tiles in each band of rows, so that tiles are as even-sided as may be."""
    tiles = -(-video.height * video.width // tokens)
    even = round((tiles * video.height / video.width) ** 0.5)
    bands = max(1, min(tiles, video.height, even))
    return [tiles * (i + 1) // bands - tiles * i // bands for i in range(bands)]


def _tokens_of_tiles(video: VideoShape, counts: Sequence[int], tokens: int) -> Tensor:
    """(T, tokens) int64, the tokens of each tile of the first frame, then -1 in the last one.

    A band holds the next tokens of the raster, and a tile the next of its band, column by column.
    """
    place = torch.arange(video.height * video.width)
    ends = torch.tensor(counts).cumsum(0) * tokens
    band = torch.bucketize(place, ends, right=True)
    row, column = place // video.width, place % video.width
    order = ((band * video.width + column) * video.height + row).argsort()
    return _padded(order, sum(counts) * tokens).view(-1, tokens)


def _padded(tokens: Tensor, multiple: int) -> Tensor:
    return torch.cat([tokens, tokens.new_full((-len(tokens) % multiple,), -1)])
