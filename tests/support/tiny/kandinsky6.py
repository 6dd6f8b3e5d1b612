"""Kandinsky 6: video beside its sound, alone in self-attention or before an image."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
)
from support import hunyuan, wan
from support.tiny import Case
from support.tiny.kandinsky5 import poke
from support.tiny.wan import noise
from torch import Tensor

CHANNELS, SOUND_CHANNELS = 4, 3
TEXT, TEXT_WIDTH, POOLED_WIDTH, SOUND = 9, 8, 6, 5


def transformer() -> Any:
    """Of the published models' variant."""
    torch.manual_seed(0)
    return Kandinsky6Transformer3DModel(
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=POOLED_WIDTH,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        in_audio_dim=SOUND_CHANNELS,
        out_audio_dim=SOUND_CHANNELS,
        model_dim_a=16,
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
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
        "hidden_states": noise(batch, frames, 2 * height, 2 * width, 2 * CHANNELS + 1),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH, seed=3),
        "pooled_projections": noise(batch, POOLED_WIDTH, seed=4),
        "timestep": torch.full((batch,), time),
        "audio_hidden_states": noise(batch, SOUND, SOUND_CHANNELS, seed=5),
        "encoder_attention_mask": torch.arange(TEXT) < torch.tensor([[TEXT], [3]])[:batch],
    }


def image_inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    """Without sound, and with an image after the video."""
    given = inputs(frames + 1, height, width, **options)
    times = torch.cat([torch.arange(frames), torch.tensor([0])])
    kinds = torch.zeros(len(given["hidden_states"]), frames + 1, dtype=torch.int64)
    kinds[:, -1] = 1
    return given | {
        "audio_hidden_states": None,
        "visual_rope_pos": (times, torch.arange(height), torch.arange(width)),
        "visual_token_type_ids": kinds,
    }


def pipeline() -> Any:
    """Without what makes embeddings of a prompt, and sound of latents."""
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    others: dict[str, Any] = dict.fromkeys(names)
    pipe: Any = Kandinsky6TI2VAPipeline(
        transformer=transformer(),
        vae=hunyuan.autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        **others,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, **options: Any) -> Tensor:
    made = pipe(
        prompt_embeds=noise(1, TEXT, TEXT_WIDTH, seed=5),
        pooled_prompt_embeds=noise(1, POOLED_WIDTH, seed=6),
        negative_prompt_embeds=noise(1, TEXT, TEXT_WIDTH, seed=7),
        negative_pooled_prompt_embeds=noise(1, POOLED_WIDTH, seed=8),
        height=wan.HEIGHT,
        width=wan.WIDTH,
        num_frames=wan.FRAMES,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        sample_audio=False,
        output_type="latent",
        **options,
    )
    return made.frames


CASES = [
    Case("kandinsky6", transformer, inputs, poke, pipeline=pipeline, generate=generate),
    Case(
        "kandinsky6_image",
        transformer,
        image_inputs,
        poke,
        pipeline=pipeline,
        generate=partial(generate, image=wan.picture(0)),
    ),
]
