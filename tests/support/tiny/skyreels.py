"""SkyReels-V2: Wan with timesteps for each frame."""

from typing import Any

from diffusers import (
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
)
from support import wan
from support.tiny import Case, Training
from support.tiny.wan import inputs, poke


def transformer(**config: Any) -> Any:
    return wan.transformer(kind=SkyReelsV2Transformer3DModel, **config)


def forced_inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    """Of diffusion forcing, with the first frame done already."""
    given = inputs(frames, height, width, **options)
    times = given["timestep"][:, None].repeat(1, frames)
    times[:, 0] = 0
    return given | {"timestep": times, "enable_diffusion_forcing": True}


CASES = [
    Case(
        "skyreels",
        transformer,
        inputs,
        poke,
        pipeline=lambda: wan.pipeline(SkyReelsV2Pipeline, transformer=transformer()),
        generate=wan.generate,
    ),
    Case(
        "skyreels_diffusion_forcing",
        transformer,
        forced_inputs,
        poke,
        pipeline=lambda: wan.pipeline(
            SkyReelsV2DiffusionForcingPipeline, transformer=transformer()
        ),
        generate=wan.generate,
    ),
]

TRAINING = [
    Training(
        "skyreels",
        lambda: wan.pipeline(SkyReelsV2Pipeline, transformer=transformer()),
        (9, 32, 48),
        {"guidance_scale": 1.0, "max_sequence_length": 16},
        near=0.01,  # the scheduler's timesteps are whole
    ),
]
