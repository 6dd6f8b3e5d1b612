"""Lengths and sizes of video: in pixels, in latents, and in tokens after patchify."""

from collections.abc import Mapping
from typing import Any

from gen_accel.parsing import fits, shown
from gen_accel.video import Coding

# Attributes of pipelines with the compression of latents, {} for an axis.
FACTORS = "vae_scale_factor_{}", "vae_{}_compression_ratio", "vae_{}_scale_factor"

# Pipelines take heights and widths that this divides, whatever the autoencoder.
PIXELS = 16


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


def nearest(size: int, step: int, least: int) -> list[int]:
    """Return the one or two valid sizes next to an invalid one: `least`, or a multiple of `step`
    above it."""
    below = least + max(0, size - least) // step * step
    return [below] if size < least else [below, below + step]
