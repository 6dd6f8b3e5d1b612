"""Wan: video alone in self-attention."""

from functools import partial
from typing import Any

import torch
from support import wan
from support.tiny import Case, Training
from torch import Tensor

CONDITION = wan.CHANNELS + 4  # channels of image to video beside the noisy latents
TEXT = 512  # the processors take all beyond for the image


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: None = None,
    time: float = 700.0,
) -> dict[str, Tensor]:
    return wan.inputs(frames, 2 * height, 2 * width, batch=batch, time=time)


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    given["hidden_states"][0, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def control_inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Tensor]:
    given = inputs(frames, height, width, **options)
    batch = len(given["hidden_states"])
    return given | {"control_hidden_states": noise(batch, 96, frames, 2 * height, 2 * width)}


def image_inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Tensor]:
    """Of image to video with the features of an image encoder."""
    given = inputs(frames, height, width, **options)
    batch, _, *sizes = given["hidden_states"].shape
    condition = noise(batch, CONDITION, *sizes)
    return given | {
        "hidden_states": torch.cat([given["hidden_states"], condition], 1),
        "encoder_hidden_states": noise(batch, TEXT, wan.TEXT_WIDTH, seed=3),
        "encoder_hidden_states_image": noise(batch, 5, wan.IMAGE_WIDTH, seed=4),
    }


def token_inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Tensor]:
    """Of image to video with the image as the first frame, which is not noisy."""
    given = inputs(frames, height, width, **options)
    times = given["timestep"][:, None].repeat(1, frames * height * width)
    times[:, : height * width] = 0
    return given | {"timestep": times}


def with_encoder(kind: type, transformer: Any) -> Any:
    """A pipeline of `kind` with an image encoder."""
    parts = wan.PIPELINES["image with encoder"]()
    return wan.pipeline(
        kind,
        transformer=transformer,
        image_encoder=parts.image_encoder,
        image_processor=parts.image_processor,
    )


CASES = [
    Case("wan", wan.transformer, inputs, poke, pipeline=wan.pipeline, generate=wan.generate),
    Case(
        "wan_vace",
        lambda: wan.PIPELINES["control"]().transformer,
        control_inputs,
        poke,
        pipeline=wan.PIPELINES["control"],
        generate=partial(wan.generate, reference_images=[wan.picture(0), wan.picture(1)]),
    ),
    Case(
        "wan_image",
        lambda: wan.PIPELINES["image with encoder"]().transformer,
        image_inputs,
        poke,
        pipeline=wan.PIPELINES["image with encoder"],
        generate=wan.generate,
    ),
    Case(
        "wan_token_timesteps",
        wan.transformer,
        token_inputs,
        poke,
        pipeline=wan.PIPELINES["token timesteps, image"],
        generate=wan.generate,
    ),
]

TRAINING = [
    Training(
        "wan",
        wan.pipeline,
        (9, 32, 48),
        {"guidance_scale": 1.0, "max_sequence_length": 16},
        near=0.01,  # the scheduler's timesteps are whole
    )
]
