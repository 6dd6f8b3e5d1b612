"""Where the video's tokens lie in a model of ComfyUI's."""

from typing import Any

Patch = tuple[int, int, int]  # frames, rows and columns of latents in one token


def patch_of(model: Any) -> Patch | None:
    """Of a diffusion model; None where it does not say. A wrong one makes another number of tokens
    than the model has, which stays dense."""
    size = getattr(model, "patch_size", None)
    if isinstance(size, int):
        return 1, size, size
    return tuple(size) if isinstance(size, tuple | list) and len(size) == 3 else None
