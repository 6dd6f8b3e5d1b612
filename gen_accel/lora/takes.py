"""Parts of a clip that are trained on: where they begin, and how long they are."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

How = Literal["start", "middle", "all", "random"]
Scenes = Literal["off", "cut"]


class Chunk(NamedTuple):
    """A part of a clip, in frames at the rate that clips are resampled to."""

    begin: int
    frames: int


@dataclass(frozen=True)
class Take:
    """Which chunks are taken of a clip, or of each of its scenes.

    A chunk is as long as the longest length that fits.

    Args:
        how: "start", "middle": one chunk; "all": chunks one after the other, the last ones
            shorter; "random": chunks at places that the hash of the clip decides, which may
            overlap.
        chunks: number of random chunks.
        scenes: "cut": no chunk crosses a cut; "off": cuts are not looked for.
    """

    how: How = "start"
    chunks: int = 1
    scenes: Scenes = "off"

    def __post_init__(self) -> None:
        for name, kind in (("how", How), ("scenes", Scenes)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.chunks < 1:
            raise ValueError(f"chunks must be at least 1, got {self.chunks}")

    @property
    def reads_all(self) -> bool:
        """Whether all frames of a clip must be decoded to choose its chunks."""
        return self.how != "start" or self.scenes == "cut"

    def of(
        self, digest: str, scenes: Sequence[tuple[int, int]], lengths: Sequence[int]
    ) -> list[Chunk]:
        """Choose the chunks of a clip.

        Args:
            digest: hash of the clip.
            scenes: first frame and the frame after the last one of each.
            lengths: in frames, ascending.
        """
        found: list[Chunk] = []
        for begin, end in scenes:
            fitting = [length for length in lengths if length <= end - begin]
            if not fitting:
                continue
            longest, spare = fitting[-1], end - begin - fitting[-1]
            match self.how:
                case "start":
                    found.append(Chunk(begin, longest))
                case "middle":
                    found.append(Chunk(begin + spare // 2, longest))
                case "all":
                    found += _one_after_another(begin, end, fitting)
                case "random":
                    places = {_place(digest, begin, k, spare) for k in range(self.chunks)}
                    found += [Chunk(begin + place, longest) for place in sorted(places)]
        return found


def scenes_of(frames: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Split a clip at its cuts, each the first frame of a scene."""
    edges = [0, *(cut for cut in cuts if 0 < cut < frames), frames]
    return [(begin, end) for begin, end in pairwise(edges) if end > begin]


def _one_after_another(begin: int, end: int, lengths: Sequence[int]) -> list[Chunk]:
    found = []
    for length in reversed(lengths):
        while end - begin >= length:
            found.append(Chunk(begin, length))
            begin += length
    return found


def _place(digest: str, begin: int, number: int, spare: int) -> int:
    """Draw a place from 0 to `spare`."""
    drawn = hashlib.sha256(f"{digest} {begin} {number}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") % (spare + 1)
