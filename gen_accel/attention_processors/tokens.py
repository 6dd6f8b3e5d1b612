"""The order of the tokens in an attention call, and the order that methods want.

Methods take the grid first, in raster order, and then all other tokens, called text, which see and
are seen by all. Models put them in other orders, and hide the padding of texts by masks. This file
alone converts between the two.
"""

from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.video import VideoShape

# Most that an additive mask adds to the scores of hidden keys.
HIDDEN = -1e3


class Tokens(NamedTuple):
    """Place of the grid among the tokens of an attention call.

    Args:
        video: the grid, with all other tokens counted as its text.
        before: number of other tokens before the grid.
        past: number of the grid's first frames that are keys alone, from a cache. Where there are
            some, all that is beside the grid is keys alone too.
        causal: frames of a block, if each sees itself and the blocks before it alone; 0: all see
            all.
    """

    video: VideoShape
    before: int = 0
    past: int = 0
    causal: int = 0

    @property
    def first(self) -> int:
        """Place of the first query, where some tokens have none."""
        return self.before + self.past * self.video.height * self.video.width

    def complete(self, q: Tensor) -> Tensor:
        """Pad q to (B, N, H, D), where only the grid without its past, or that and the tokens
        after it, have queries. The past gets the queries of the first frame after it, so that
        blocks which hold both have queries alike, and all other places get zeros."""
        others = self.video.tokens - q.shape[1]
        if self.past:
            q = torch.cat([*[q[:, : self.video.height * self.video.width]] * self.past, q], 1)
        return F.pad(q, (0, 0, 0, 0, self.before, others - self.first)) if others else q

    def asked(self, device: torch.device) -> Tensor:
        """(N,) bool, which tokens have queries, the grid's first and then all others."""
        asked = torch.zeros(self.video.tokens, dtype=torch.bool, device=device)
        asked[self.first - self.before : self.video.video_tokens] = True
        return asked


class Samples(NamedTuple):
    """Samples of a batch whose texts are equally long.

    Args:
        rows: their places in the batch.
        video: the grid with their text, the padding left out.
        whole: whether they are all of it.
        before: how many tokens of the text come before the grid.
        order: (b, n) int64, the places of their tokens, the grid's first. None where the text is
            the grid's last tokens, or has no padding.
    """

    rows: Sequence[int]
    video: VideoShape
    whole: bool
    before: int = 0
    order: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """Select these samples' tokens: (B, N, H, D) to (b, H, n, D)."""
        own = x if self.whole else x[[*self.rows]]
        if self.order is not None:
            sample = torch.arange(len(own), device=x.device)[:, None]
            own = own[sample, self.order]
        elif self.before:
            own = _moved(own, self.before, self.video.video_tokens)
        else:
            own = own[:, : self.video.tokens]
        return own.transpose(1, 2)

    def back(self, out: Tensor, tokens: int) -> Tensor:
        """Put (b, H, n, D) back as (b, `tokens`, H, D), with zeros for the padding."""
        out = out.transpose(1, 2)
        if self.order is not None:
            sample = torch.arange(len(out), device=out.device)[:, None]
            empty = out.new_zeros(len(out), tokens, *out.shape[2:])
            return empty.index_put((sample, self.order), out)
        if self.before:
            return _moved(out, self.video.video_tokens, self.before)
        padding = tokens - out.shape[1]
        return F.pad(out, (0, 0, 0, 0, 0, padding)) if padding else out


def _moved(x: Tensor, first: int, second: int) -> Tensor:
    """(B, N, H, D) with the first `first` tokens behind the next `second`."""
    middle = first + second
    return torch.cat([x[:, first:middle], x[:, :first], x[:, middle:]], 1)


def by_text(
    tokens: Tokens, batch: int, seen: Sequence[Sequence[int]] | None, device: torch.device
) -> list[Samples]:
    """Group the samples of a batch by equally long texts.

    Args:
        seen: for each sample the tokens beside the grid that are not padding, counted from 0 and
            rising; None without padding.
    """
    video, before = tokens.video, tokens.before
    if seen is None or all(len(places) == video.text for places in seen):
        return [Samples(range(batch), video, True, before)]
    groups = []
    kinds = [(len(places), _left(video.parts, places)) for places in seen]
    for length, parts in sorted({*kinds}):
        rows = [row for row, kind in enumerate(kinds) if kind == (length, parts)]
        own = [tuple(seen[row]) for row in rows]
        short = VideoShape(*video.grid, length, parts)
        order = None
        if before or any(places != tuple(range(length)) for places in own):
            order = _order(tokens, (*own,), device)
        whole = len(rows) == batch
        groups.append(Samples(rows, short, whole, before, order))
    return groups


def together(groups: Sequence[Samples], outs: Sequence[Tensor]) -> Tensor:
    """Join outputs (b, ...) of the groups of `by_text` to one of the batch, (B, ...)."""
    if len(groups) == 1:
        return outs[0]
    order = [row for some in groups for row in some.rows]
    return torch.cat([*outs])[[order.index(row) for row in range(len(order))]]


def _left(parts: tuple[int, ...], places: Sequence[int]) -> tuple[int, ...]:
    """Lengths of the parts of a text of which some places are left."""
    ends = [*accumulate(parts)]
    counts = Counter(bisect(ends, place) for place in places if parts)
    return tuple(count for _, count in sorted(counts.items()))


@lru_cache(maxsize=16)  # all layers of a pass ask for the same
@torch.inference_mode(False)
def _order(tokens: Tokens, seen: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """(b, n) int64, the places of the grid and of the tokens seen beside it, of each sample."""
    video, before = tokens.video, tokens.before
    grid = torch.arange(before, before + video.video_tokens, device=device)
    others = torch.tensor(seen, device=device, dtype=grid.dtype)
    others = torch.where(others < before, others, others + video.video_tokens)
    return torch.cat([grid.expand(len(seen), -1), others], 1)


def seen_text(mask: Tensor, q: Tensor, tokens: Tokens) -> tuple[tuple[int, ...], ...] | None:
    """Return which tokens beside the grid a mask leaves each sample. None for a mask that hides
    some of the grid, or that differs between queries or heads. Waits for the device.

    Args:
        mask: as attention calls take it, (B or 1, H or 1, N or 1, N) or short of some of the first
            axes: bool, True where a key is seen, or floats that are added to the scores.
        q: (B, N, H, D)
    """
    B, N = q.shape[:2]
    if mask.dtype != torch.bool:
        if not ((mask == 0) | (mask <= HIDDEN)).all():
            return None
        mask = mask == 0
    if mask.ndim == 3:
        mask = mask[:, None]
    elif mask.ndim == 2:
        mask = mask[:, None, None]
    if mask.ndim != 4 or mask.shape[0] not in (1, B) or mask.shape[3] != N:
        return None
    if mask.shape[2] not in (1, N) or not (mask == mask[:, :1]).all():
        return None
    rows = mask[:, 0]
    seen = rows.any(1)
    # Rows of hidden tokens may differ: no output of theirs is used.
    agree = (rows == seen[:, None]).all(2) | (~seen if rows.shape[1] == N else False)
    start, end = tokens.before, tokens.before + tokens.video.video_tokens
    if not (agree.all() and seen[:, start:end].all()):
        return None
    others = torch.cat([seen[:, :start], seen[:, end:]], 1).expand(B, -1).tolist()
    return tuple(tuple(i for i, is_seen in enumerate(row) if is_seen) for row in others)
