"""AnimateDiff: frames as samples of the batch, and motion modules between them."""

from typing import Any

import torch
from diffusers import AnimateDiffPipeline, UNetMotionModel
from support.image_adapters import CROSS, arguments, pipeline
from support.image_models import noise
from support.tiny import Case
from support.tiny.stable_diffusion import CHANNELS, still
from torch import Tensor

FRAMES = 3  # of what the pipeline makes


def unet() -> Any:
    torch.manual_seed(0)
    return still(
        UNetMotionModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            cross_attention_dim=CROSS,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            norm_num_groups=4,
        )
    )


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: None = None,
    time: float = 700.0,
) -> dict[str, Tensor]:
    return {
        "sample": noise(batch, CHANNELS, frames, height, width),
        "timestep": torch.tensor(time),
        "encoder_hidden_states": noise(batch, 5, CROSS, seed=2).repeat_interleave(frames, 0),
    }


def poke(given: dict[str, Tensor], frame: int, row: int, column: int) -> None:
    given["sample"][0, :, frame, row, column] += 3


def row(given: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    frames = given["sample"].shape[2]
    texts = given["encoder_hidden_states"].unflatten(0, (-1, frames))
    own = {"sample": given["sample"][number : number + 1], "encoder_hidden_states": texts[number]}
    return given | own


def animated() -> Any:
    parts = pipeline("sd")
    pipe = AnimateDiffPipeline(
        parts.vae,
        parts.text_encoder,
        parts.tokenizer,
        unet(),
        None,  # the adapter is in the UNet
        parts.scheduler,
        feature_extractor=parts.feature_extractor,
        image_encoder=parts.image_encoder,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def animate(pipe: Any) -> Tensor:
    given = arguments("sd", size=(24, 32))
    given["latents"] = noise(1, CHANNELS, FRAMES, 12, 16)
    return pipe(**given, num_frames=FRAMES).frames


CASES = [
    Case(
        "animatediff",
        unet,
        inputs,
        poke,
        grids=((3, 9, 11), (2, 5, 7)),
        row=row,
        local=False,
        pipeline=animated,
        generate=animate,
    )
]
