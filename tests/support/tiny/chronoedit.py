"""ChronoEdit: Wan's image to video, with two frames left in the end."""

from typing import Any

from diffusers import ChronoEditPipeline, ChronoEditTransformer3DModel
from support import wan
from support.tiny import Case
from support.tiny.wan import CONDITION, TEXT, image_inputs, poke, with_encoder
from torch import Tensor


def transformer() -> Any:
    return wan.transformer(
        kind=ChronoEditTransformer3DModel,
        in_channels=wan.CHANNELS + CONDITION,
        image_dim=wan.IMAGE_WIDTH,
        added_kv_proj_dim=wan.HEADS * wan.HEAD_DIM,
    )


def generate(pipe: Any) -> Tensor:
    """One step on the whole video, and one on its first and last latent alone."""
    reasoning = {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 1}
    image = {"image": wan.picture(0), "max_sequence_length": TEXT}
    return wan.generate(pipe, **image, **reasoning)


CASES = [
    Case(
        "chronoedit",
        transformer,
        image_inputs,
        poke,
        grids=((5, 9, 11), (2, 5, 7)),
        pipeline=lambda: with_encoder(ChronoEditPipeline, transformer()),
        generate=generate,
    )
]
