"""Latte: blocks over the tokens of a frame, and others over time."""

from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel
from support import wan
from support.image_adapters import pipeline as image_pipeline
from support.image_models import noise
from support.tiny import Case
from torch import Tensor

CHANNELS, HEADS, HEAD_DIM = 4, 2, 16
FRAMES = 3  # as many as it has positions for, and no fewer


def transformer() -> Any:
    torch.manual_seed(0)
    return LatteTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,  # the variance too, which the pipeline leaves out
        num_layers=2,
        cross_attention_dim=HEADS * HEAD_DIM,
        attention_bias=True,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=wan.TEXT_WIDTH,
        video_length=FRAMES,
    ).eval()


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
        "hidden_states": noise(batch, CHANNELS, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), time),
        "encoder_hidden_states": noise(batch, 5, wan.TEXT_WIDTH, seed=2),
    }


def poke(given: dict[str, Tensor], frame: int, row: int, column: int) -> None:
    given["hidden_states"][0, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1


def pipeline() -> LattePipeline:
    parts: Any = new_tokenizer(), wan.text_encoder(), image_pipeline("sd").vae, transformer()
    pipe = LattePipeline(*parts, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: LattePipeline) -> Tensor:
    made: Any = pipe(
        prompt="a red square moves right",
        height=24,
        width=40,
        video_length=FRAMES,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
        clean_caption=False,
        output_type="latent",
    )
    return made.frames


CASES = [
    Case(
        "latte",
        transformer,
        inputs,
        poke,
        grids=((FRAMES, 9, 11), (FRAMES, 5, 7)),
        pipeline=pipeline,
        generate=generate,
    )
]
