"""Helios: a chunk of video after its history, in patches of three sizes."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    HeliosPipeline,
    HeliosPyramidPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
)
from support import wan
from support.tiny import Case
from support.tiny.wan import inputs as wan_inputs
from support.tiny.wan import noise, poke
from torch import Tensor

HISTORY = {"long": 8, "mid": 2, "short": 2}  # latent frames, the first one of all with the short


def transformer(**config: Any) -> Any:
    torch.manual_seed(0)
    tiny = {
        "num_attention_heads": wan.HEADS,
        "attention_head_dim": wan.HEAD_DIM,
        "in_channels": wan.CHANNELS,
        "out_channels": wan.CHANNELS,
        "text_dim": wan.TEXT_WIDTH,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": wan.LAYERS,
        "rope_dim": (8, 4, 4),
    }
    return HeliosTransformer3DModel(**(tiny | config)).eval()


def inputs(
    frames: int, height: int, width: int, *, scale: int = 1, **options: Any
) -> dict[str, Tensor]:
    """
    Args:
        scale: of the history, against the chunk.
    """
    given = wan_inputs(frames, height, width, **options)
    batch = len(given["hidden_states"])
    start = sum(HISTORY.values())
    places = {
        "long": torch.arange(1, 9),
        "mid": torch.arange(9, 11),
        "short": torch.tensor([0, 11]),
    }
    given["indices_hidden_states"] = torch.arange(start, start + frames).repeat(batch, 1)
    for number, (name, length) in enumerate(HISTORY.items()):
        sizes = batch, wan.CHANNELS, length, 2 * height * scale, 2 * width * scale
        given[f"latents_history_{name}"] = noise(*sizes, seed=3 + number)
        given[f"indices_latents_history_{name}"] = places[name].repeat(batch, 1)
    return given


def pipeline() -> Any:
    scheduler = HeliosScheduler(stages=1)
    return wan.pipeline(HeliosPipeline, transformer=transformer(), scheduler=scheduler)


def pyramid() -> Any:
    model = transformer(is_amplify_history=True)
    # At its default of 1/3 the noise has a singular covariance, whose Cholesky factor may fail.
    scheduler = HeliosScheduler(stages=2, stage_range=[0, 0.5, 1], gamma=0.3)
    return wan.pipeline(HeliosPyramidPipeline, transformer=model, scheduler=scheduler)


def generate(pipe: Any) -> Tensor:
    """Two chunks of three latent frames, so that the second has a history."""
    if isinstance(pipe, HeliosPyramidPipeline):
        steps: dict[str, Any] = {"pyramid_num_inference_steps_list": [2, 2]}
    else:
        steps = {"num_inference_steps": 2}
    made = pipe(
        prompt="a red square moves right",
        height=128,
        width=192,
        num_frames=18,
        history_sizes=[HISTORY["long"], HISTORY["mid"], HISTORY["short"] - 1],
        num_latent_frames_per_chunk=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=16,
        output_type="latent",
        **steps,
    )
    return made.frames


# In the last, the history sees the text too.
CASES = [
    Case("helios", transformer, inputs, poke, pipeline=pipeline, generate=generate),
    Case(
        "helios_pyramid",
        partial(transformer, is_amplify_history=True),
        partial(inputs, scale=2),
        poke,
        pipeline=pyramid,
        generate=generate,
    ),
    Case("helios_without_history", transformer, wan_inputs, poke),
    Case("helios_telling", partial(transformer, guidance_cross_attn=False), inputs, poke),
]
