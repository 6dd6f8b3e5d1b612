"""Lengths of video, in pixel frames, latent frames and frames after patchify."""

from typing import Any


def temporal_patch(transformer: Any) -> int:
    """Latent frames in one token. A UNet has no patches."""
    patch = transformer.config.get("patch_size", 1)
    return transformer.config.get("patch_size_t") or 1 if isinstance(patch, int) else patch[0]


def latent_frames(name: str, frames: int, factor: int, patch: int = 1) -> int:
    """Pixel frames to latent frames after patchify.

    Args:
        name: of the argument, for the error.
        factor, patch: `temporal_factor` and `temporal_patch` of the target.

    Raises ValueError for a number that makes no whole latent frames, naming the nearest.
    """
    step, first = factor * patch, (patch - 1) * factor + 1
    if frames < first or (frames - first) % step:
        below = first + max(0, frames - first) // step * step
        near = f"{below} and {below + step}" if frames > first else str(first)
        raise ValueError(
            f"{name} must be {first} or a multiple of {step} more, got {frames}; nearest: {near}"
        )
    return (frames - first) // step + 1
