"""The model that a training is about."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Model(NamedTuple):
    """What is trained, wherever it came from.

    Args:
        pipe: None where nothing is to be sampled.
        frames: latent frames of a clip of so many frames.
        trained_frames: pixel frames, None where nobody knows.
        shift: of the noise levels.
        boundary: the noise level at which a model with two experts changes to the other.
    """

    transformer: Any
    pipe: Any | None
    frames: Callable[[int], int]
    trained_frames: int | None
    shift: float
    boundary: float | None = None
