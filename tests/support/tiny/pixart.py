"""PixArt: the image alone in self-attention."""

from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from support import wan
from support.image_adapters import pipeline as image_pipeline
from support.image_models import noise
from support.tiny import Case
from torch import Tensor

CHANNELS, HEADS, HEAD_DIM = 4, 2, 16


def transformer() -> Any:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        cross_attention_dim=HEADS * HEAD_DIM,
        sample_size=16,
        caption_channels=wan.TEXT_WIDTH,
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
        "hidden_states": noise(batch, CHANNELS, 2 * height, 2 * width),
        "encoder_hidden_states": noise(batch, 5, wan.TEXT_WIDTH, seed=2),
        "timestep": torch.full((batch,), time),
    }


def poke(given: dict[str, Tensor], frame: int, row: int, column: int) -> None:
    given["hidden_states"][0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1


def pipeline() -> PixArtSigmaPipeline:
    parts: Any = new_tokenizer(), wan.text_encoder(), image_pipeline("sd").vae, transformer()
    pipe = PixArtSigmaPipeline(*parts, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: PixArtSigmaPipeline) -> Tensor:
    made: Any = pipe(
        prompt="a red square moves right",
        height=40,
        width=56,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=16,
        clean_caption=False,
        use_resolution_binning=False,
        output_type="latent",
    )
    return made.images


CASES = [
    Case(
        "pixart",
        transformer,
        inputs,
        poke,
        grids=((1, 9, 11), (1, 5, 7)),
        pipeline=pipeline,
        generate=generate,
    )
]
