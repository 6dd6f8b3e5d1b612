"""Token grid of one video, the only geometry that the rest of the package sees; and its lengths
and sizes in pixels, in latents and in tokens."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

from gen_accel.parsing import fits, shown

# Attributes of pipelines with the compression of latents, {} for an axis.
FACTORS = "vae_scale_factor_{}", "vae_{}_compression_ratio", "vae_{}_scale_factor"

# Pipelines take heights and widths that this divides, whatever the autoencoder.
PIXELS = 16


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


def vae_factor(pipe: object, axis: str) -> int | None:
    """Pixels or frames in one latent; None if the pipeline does not say.

    Args:
        axis: "temporal" or "spatial".
    """
    found = (getattr(pipe, name.format(axis), None) for name in FACTORS)
    return next((factor for factor in found if factor is not None), None)


def patch_of(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Latent frames, rows and columns in one token, from a transformer's config. A UNet has no
    patches. Raises ValueError for a config that holds other than three positive numbers."""
    patch = config.get("patch_size", 1)
    sides = (config.get("patch_size_t") or 1, patch, patch) if isinstance(patch, int) else patch
    if not fits(sides, tuple[int, int, int]) or min(sides) < 1:
        raise ValueError(f"patch_size of a model must be positive numbers, got {shown(patch)}")
    return sides[0], sides[1], sides[2]


def temporal_patch(transformer: Any) -> int:
    """Latent frames in one token."""
    return patch_of(transformer.config)[0]


def latent_frames(name: str, frames: int, factor: int | Coding, patch: int = 1) -> int:
    """Pixel frames to latent frames after patchify.

    Args:
        name: of the argument, for the error.
        factor: `temporal_factor` of the target, or the coding of its autoencoder.
        patch: `temporal_patch` of the target; 1 for a coding with several latents in a chunk.

    Raises ValueError for a number that makes no whole latent frames; the error names the nearest.
    """
    coding = factor if isinstance(factor, Coding) else Coding(factor)
    step, first = coding.frames * patch, coding.first + -coding.base % patch * coding.frames
    if frames < first or (frames - first) % step:
        near = " or ".join(map(str, nearest(frames, step, first)))
        raise ValueError(
            f"{name} must be {first} or a multiple of {step} more, got {frames}; nearest: {near}"
        )
    return coding.latents_of(frames) // patch


def grid_of(
    sizes: Mapping[str, int],
    coding: Coding,
    spatial: int,
    patch: tuple[int, int, int],
    least: int = PIXELS,
) -> VideoShape:
    """Compute the grid of a video's tokens, without text. Patches of frames are filled up.

    Args:
        sizes: number of frames, height and width, by the names that the error gives them.
        spatial: pixels a side in a latent.
        least: divides height and width as well.

    Raises ValueError for sizes that leave a rest, with the nearest that leave none.
    """
    (length, frames), *sides = sizes.items()
    rules = [(length, frames, coding.frames, coding.first)]
    for (name, size), p in zip(sides, patch[1:], strict=True):
        step = math.lcm(least, spatial * p)
        rules.append((name, size, step, step))
    wrong = []
    for name, size, step, first in rules:
        if size < first or (size - first) % step:
            rule = "a multiple" if first % step == 0 else f"{first} more than a multiple"
            near = " or ".join(map(shown, nearest(size, step, first)))
            wrong.append(f"{name} must be {rule} of {step}, got {shown(size)}; nearest: {near}")
    if wrong:
        raise ValueError("; ".join(wrong))
    rows, columns = (n // (spatial * p) for (_, n), p in zip(sides, patch[1:], strict=True))
    return VideoShape(-(-coding.latents_of(frames) // patch[0]), rows, columns)


def nearest(size: int, step: int, least: int) -> list[int]:
    """Return the one or two valid sizes next to an invalid one: `least`, or a multiple of `step`
    above it."""
    below = least + max(0, size - least) // step * step
    return [below] if size < least else [below, below + step]
