"""Allegro: video alone in self-attention, its rotary embedding made by the pipeline."""

from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    DDIMScheduler,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from support import wan
from support.image_models import noise
from support.tiny import Case
from torch import Tensor

CHANNELS, HEADS, HEAD_DIM = 4, 2, 24


def transformer() -> Any:
    torch.manual_seed(0)
    return AllegroTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        cross_attention_dim=HEADS * HEAD_DIM,
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
) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, CHANNELS, frames, 2 * height, 2 * width),
        "encoder_hidden_states": noise(batch, 5, wan.TEXT_WIDTH, seed=2),
        "timestep": torch.full((batch,), time),
        "image_rotary_emb": rotary(frames, height, width),
    }


def rotary(frames: int, height: int, width: int) -> tuple[tuple, tuple]:
    """As the pipeline makes it."""
    *freqs, t, h, w = get_3d_rotary_pos_embed_allegro(
        HEAD_DIM, ((0, 0), (height, width)), (height, width), frames, (2.2, 2.0, 2.0)
    )
    places = torch.cartesian_prod(t.long(), h.long(), w.long())
    return tuple(freqs), tuple(places.T[:, None])


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    given["hidden_states"][0, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1


def autoencoder() -> AutoencoderKLAllegro:
    return AutoencoderKLAllegro(block_out_channels=(2, 2, 2, 2), norm_num_groups=2).eval()


def pipeline() -> AllegroPipeline:
    parts = new_tokenizer(), wan.text_encoder(), autoencoder(), transformer()
    pipe = AllegroPipeline(*parts, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: AllegroPipeline) -> Tensor:
    made: Any = pipe(
        prompt="a red square moves right",
        height=wan.HEIGHT,
        width=wan.WIDTH,
        num_frames=12,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=16,
        clean_caption=False,
        output_type="latent",
    )
    return made.frames


CASES = [Case("allegro", transformer, inputs, poke, pipeline=pipeline, generate=generate)]
