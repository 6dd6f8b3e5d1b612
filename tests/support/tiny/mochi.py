"""Mochi: video and text in one attention, each sample in a call of its own."""

from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import (
    AutoencoderKLMochi,
    FlowMatchEulerDiscreteScheduler,
    MochiPipeline,
    MochiTransformer3DModel,
)
from support import wan
from support.tiny import Case, Training
from support.tiny.cogvideox import TEXT_WIDTH, text_encoder
from support.tiny.wan import noise, poke
from torch import Tensor

CHANNELS, TEXT = 12, 9
LENGTHS = (7, 3)


def transformer() -> Any:
    torch.manual_seed(0)
    return MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=CHANNELS,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=8,
        max_sequence_length=TEXT,
    ).eval()


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: tuple[int, ...] | None = None,
    time: float = 700.0,
) -> dict[str, Tensor]:
    lengths = (TEXT,) * batch if lengths is None else lengths
    return {
        "hidden_states": noise(batch, CHANNELS, frames, 2 * height, 2 * width),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH, seed=3),
        "timestep": torch.full((batch,), 1000 - time),
        "encoder_attention_mask": torch.arange(TEXT) < torch.tensor(lengths)[:, None],
    }


def padding(given: dict[str, Any], lengths: tuple[int, int]) -> None:
    for row, length in enumerate(lengths):
        given["encoder_hidden_states"][row, length:] += 1


def pipeline() -> Any:
    torch.manual_seed(2)
    autoencoder = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    pipe = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=autoencoder.eval(),
        text_encoder=text_encoder(),
        tokenizer=new_tokenizer(),
        transformer=transformer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any) -> Tensor:
    """With guidance, both prompts in one call: the negative one is shorter."""
    made = pipe(
        prompt="a red square moves right",
        height=wan.HEIGHT,
        width=wan.WIDTH,
        num_frames=13,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=TEXT,
        output_type="latent",
    )
    return made.frames


CASES = [
    Case(
        "mochi",
        transformer,
        inputs,
        poke,
        lengths=LENGTHS,
        padding=padding,
        pipeline=pipeline,
        generate=generate,
    )
]


def training() -> Any:
    """With frequencies and statistics, and the empty prompt zeroed, as of the published model."""
    pipe = pipeline()
    model = pipe.transformer
    with torch.no_grad():
        model.pos_frequencies.copy_(noise(*model.pos_frequencies.shape))
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    return pipe


TRAINING = [
    Training(
        "mochi",
        training,
        (13, 32, 48),
        {"guidance_scale": 1.0, "max_sequence_length": 16},
        level=lambda timestep: 1 - timestep.double() / 1000,
        said=lambda predicted: -predicted,
        rules=("position_interpolation",),
    )
]
