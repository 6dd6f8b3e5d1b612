"""The model to train."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Model(NamedTuple):
    """The model to train and the numbers that its training needs.

    Args:
        pipe: None where no videos are sampled.
        frames: maps a number of pixel frames to the number of latent frames.
        trained_frames: pixel frames that the model was trained on; None if unknown.
        shift: shift of the noise levels.
        boundary: noise level at which a model of two experts switches between them.
        transformer_2: the expert for low noise, where both train; `transformer` is for high noise.
        condition: "text", or "first_frame" where the model is shown each clip's first frame.
        prompts: the validation prompts as `pipe` takes them encoded; None for the text.
        schedule: config of the pipeline's scheduler; None for the published one.
    """

    transformer: Any
    pipe: Any | None
    frames: Callable[[int], int]
    trained_frames: int | None
    shift: float
    boundary: float | None = None
    condition: str = "text"
    schedule: Mapping[str, Any] | None = None
    prompts: tuple[dict[str, Any], ...] | None = None
    transformer_2: Any | None = None
