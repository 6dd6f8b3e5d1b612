"""Token grid of one video, the only geometry that the rest of the package sees; and how many
latents there are of so many frames."""

from dataclasses import dataclass, field
from numbers import Integral
from typing import NamedTuple

from gen_accel.parsing import shown


@dataclass(frozen=True)
class VideoShape:
    """Grid of one video, in tokens after patchify, not in pixels or latents.

    Tokens come frame by frame, row by row, column by column, then `text` tokens. A model that
    puts its text first is reordered in its family's file and nowhere else.

    Args:
        parts: lengths of the parts of the text, in the order of its tokens, such as words and
            sound. (): one part. Methods that were trained so cut each part into blocks by itself.
    """

    frames: int
    height: int
    width: int
    text: int = 0
    parts: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for size in (*self.grid, self.text):
            # The sizes of a graph may be symbols of torch, which this module does not import.
            whole = isinstance(size, Integral) or type(size).__name__ == "SymInt"
            if not whole or isinstance(size, bool):
                raise ValueError(f"video sizes must be whole numbers, got {shown(size)}")
        if min(self.frames, self.height, self.width) < 1 or self.text < 0:
            raise ValueError(f"video sizes must be at least 1 and text at least 0, got {self}")
        if self.parts and (min(self.parts) < 1 or sum(self.parts) != self.text):
            raise ValueError(f"parts must add up to {self.text} text tokens, got {self.parts}")

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def video_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        return self.video_tokens + self.text

    def __str__(self) -> str:
        text = f" + {self.text} text" if self.text else ""
        return f"{self.frames} x {self.height} x {self.width}{text}"


class Coding(NamedTuple):
    """How many latents an autoencoder makes of a video: a + c n frames are b + l n latents.

    Args:
        frames, latents: c and l, of a chunk.
        first, base: a and b, of the shortest video.
    """

    frames: int
    latents: int = 1
    first: int = 1
    base: int = 1

    def codes(self, frames: int) -> bool:
        """Whether a video of so many frames leaves no rest."""
        return frames >= self.first and not (frames - self.first) % self.frames

    def latents_of(self, frames: int) -> int:
        """Latents of a video that leaves no rest."""
        return (frames - self.first) // self.frames * self.latents + self.base

    def frames_of(self, latents: int) -> int:
        """Frames of a video of whole chunks with at least so many latents."""
        return -(-(latents - self.base) // self.latents) * self.frames + self.first

    def spans(self, frames: int) -> list[int]:
        """Frames that each latent of a video is of; the first one of a chunk is of one frame."""
        chunks = (frames - self.first) // self.frames
        if self.latents == 1:
            return [self.first] * self.base + [self.frames] * chunks
        whole = [1] + [(self.frames - 1) // (self.latents - 1)] * (self.latents - 1)
        return whole * chunks + whole[: self.base]

    @property
    def rule(self) -> str:
        """The numbers of frames that leave no rest, in words."""
        return f"{self.frames} n + {self.first}"
