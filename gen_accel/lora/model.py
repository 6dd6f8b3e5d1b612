"""The model to train, and how its frozen weights are held."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from gen_accel.lora.config import TrainConfig
from gen_accel.pipelines.generation.quantising import store_as

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


class ModelToTrain(NamedTuple):
    """The model to train and the numbers that its training needs.

    Args:
        pipe: None if no videos are sampled.
        frames: maps a number of pixel frames to the number of latent frames.
        trained_frames: pixel frames that the model was trained on; None if unknown.
        shift: shift of the noise levels.
        boundary: noise level at which a model of two experts switches between them.
        condition: "text", or "first_frame" where the model is shown each clip's first frame.
        prompts: the validation prompts as `pipe` takes them encoded; None for the text.
        schedule: config of the pipeline's scheduler; None for the published one.
        sound_shift: shift of the noise levels of sound, if a scheduler of its own has one; None:
            its levels are the video's.
    """

    transformer: "ModelMixin"
    pipe: "DiffusionPipeline | None"
    frames: Callable[[int], int]
    trained_frames: int | None
    shift: float
    boundary: float | None = None
    condition: str = "text"
    schedule: Mapping[str, object] | None = None
    prompts: tuple[dict[str, Tensor], ...] | None = None
    sound_shift: float | None = None


def cast_base(transformer: "ModelMixin", config: TrainConfig) -> None:
    """Store the linear layers of the blocks in another dtype than they compute in, where the
    config's `base` says so.

    Called after the adapter is on the model: what trains is left as it is.
    """
    if config.base is not None and config.casts_base:
        store_as(transformer, config.base, "base")
