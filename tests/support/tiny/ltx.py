"""LTX-Video: a row of tokens, alone in self-attention or beside frames that it is to follow."""

from functools import cache, partial
from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from support import wan
from support.tiny import Case, Training
from support.tiny.cogvideox import TEXT_WIDTH, text_encoder
from support.tiny.wan import noise
from torch import Tensor

CHANNELS, TEXT = 8, 9
FRAMES, HEIGHT, WIDTH = 17, 160, 224  # pixels; in tokens 3 x 5 x 7


def transformer() -> Any:
    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
    ).eval()


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: None = None,
    time: float = 700.0,
) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, frames * height * width, CHANNELS),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH, seed=3),
        "timestep": torch.full((batch,), time),
        "encoder_attention_mask": torch.arange(TEXT) < torch.tensor([[TEXT], [3]])[:batch],
        **{"num_frames": frames, "height": height, "width": width},
    }


def poke(given: dict[str, Any], frame: int, row: int, column: int, *, first: int = 0) -> None:
    """
    Args:
        first: frames before those of the video.
    """
    if "video_coords" in given:
        _, rows, columns = given["video_coords"][0].reshape(3, given["hidden_states"].shape[1], -1)
        height, width = len(rows[:, 0].unique()), len(columns[:, 0].unique())
    else:
        height, width = given["height"], given["width"]
    given["hidden_states"][0, ((first + frame) * height + row) * width + column] += 1


def placed_inputs(
    frames: int, height: int, width: int, *, first: int = 0, last: int = 0, **options: Any
) -> dict[str, Any]:
    """With the time and place of each token instead of the grid, and timesteps of their own.

    Args:
        first, last: frames to follow, before and after those of the video.
    """
    given = inputs(first + frames + last, height, width, **options)
    batch = len(given["hidden_states"])
    starts = torch.cat([8.0 * torch.arange(1, first + 1), starts_of(frames), starts_of(last)])
    sides = (32.0 * torch.arange(side) for side in (height, width))
    places = torch.meshgrid(starts / 25, *sides, indexing="ij")
    coordinates = torch.stack([place.flatten() for place in places])
    del given["num_frames"], given["height"], given["width"]
    times = given["timestep"][:, None].repeat(1, given["hidden_states"].shape[1])
    times[:, : first * height * width] = 0
    return given | {"video_coords": coordinates.repeat(batch, 1, 1), "timestep": times}


def starts_of(latents: int) -> Tensor:
    """Of latent frames, in frames: the first is of one frame, the others of 8."""
    return (8.0 * torch.arange(latents) - 7).clamp(min=0)


@cache
def autoencoder() -> AutoencoderKLLTXVideo:
    torch.manual_seed(2)
    return AutoencoderKLLTXVideo(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    ).eval()


def pipeline(kind: type) -> Any:
    pipe: Any = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=new_tokenizer(),
        transformer=transformer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any) -> Tensor:
    given: dict[str, Any] = {}
    if isinstance(pipe, LTXImageToVideoPipeline):
        given["image"] = wan.picture(0)
    if isinstance(pipe, LTXConditionPipeline):
        given["conditions"] = [
            LTXVideoCondition(image=wan.picture(0), frame_index=0),
            LTXVideoCondition(image=wan.picture(1), frame_index=8),
        ]
    made = pipe(
        prompt="a red square moves right",
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=TEXT,
        output_type="latent",
        **given,
    )
    return made.frames


CASES = [
    Case(
        "ltx",
        transformer,
        inputs,
        poke,
        pipeline=partial(pipeline, LTXPipeline),
        generate=generate,
    ),
    Case(
        "ltx_image",
        transformer,
        placed_inputs,
        poke,
        pipeline=partial(pipeline, LTXImageToVideoPipeline),
        generate=generate,
    ),
    Case(
        "ltx_conditions",
        transformer,
        partial(placed_inputs, first=2),
        partial(poke, first=2),
        pipeline=partial(pipeline, LTXConditionPipeline),
        generate=generate,
    ),
    Case("ltx_window", transformer, partial(placed_inputs, last=2), poke),
]


def packed(latents: Tensor) -> Tensor:
    return latents.flatten(2).transpose(1, 2)


TRAINING = [
    Training(
        "ltx",
        partial(pipeline, LTXPipeline),
        (17, 64, 96),
        {"guidance_scale": 1.0, "max_sequence_length": 16},
        lay=packed,
        rate="frame_rate",
        rules=("position_interpolation",),
    )
]
