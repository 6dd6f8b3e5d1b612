"""CogVideoX: text before the video in one attention."""

from functools import cache, partial
from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from support import wan
from support.tiny import Case, Training
from support.tiny.wan import noise
from torch import Tensor
from transformers import T5Config, T5EncoderModel

CHANNELS = 4
TEXT, TEXT_WIDTH = 9, 8
HEAD_DIM = 16


def transformer(kind: type = CogVideoXTransformer3DModel, **config: Any) -> Any:
    torch.manual_seed(0)
    tiny: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": HEAD_DIM,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": 8,
        "text_embed_dim": TEXT_WIDTH,
        "num_layers": 2,
        "sample_width": 14,
        "sample_height": 10,
        "sample_frames": 9,
        "max_text_seq_length": TEXT,
    }
    return kind(**(tiny | config)).eval()


# Image to video has the image as further channels; version 1.5 patches of two latent frames.
ROTARY = {"use_rotary_positional_embeddings": True, "in_channels": 2 * CHANNELS}
LATER = ROTARY | {"patch_size_t": 2, "ofs_embed_dim": 8, "patch_bias": False}


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
        "hidden_states": noise(batch, frames, CHANNELS, 2 * height, 2 * width),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH, seed=3),
        "timestep": torch.full((batch,), time),
    }


def rotary_inputs(
    frames: int, height: int, width: int, *, joined: int = 1, **options: Any
) -> dict[str, Any]:
    """
    Args:
        joined: latent frames in a patch.
    """
    given = inputs(joined * frames, height, width, **options)
    image = noise(*given["hidden_states"].shape, seed=4)
    given["hidden_states"] = torch.cat([given["hidden_states"], image], 2)
    given["image_rotary_emb"] = get_3d_rotary_pos_embed(
        HEAD_DIM, ((0, 0), (height, width)), (height, width), frames
    )
    if joined > 1:
        given["ofs"] = torch.full((len(image),), 2.0)
    return given


def poke(given: dict[str, Any], frame: int, row: int, column: int, *, joined: int = 1) -> None:
    frames = slice(joined * frame, joined * (frame + 1))
    rows, columns = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
    given["hidden_states"][0, frames, :, rows, columns] += 1


@cache
def autoencoder() -> AutoencoderKLCogVideoX:
    torch.manual_seed(2)
    return AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
    ).eval()


@cache
def text_encoder() -> T5EncoderModel:
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=64, d_model=TEXT_WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    return T5EncoderModel(config).eval()


def pipeline(model: Any, kind: type = CogVideoXImageToVideoPipeline, **schedule: Any) -> Any:
    pipe: Any = kind(
        tokenizer=new_tokenizer(),
        text_encoder=text_encoder(),
        vae=autoencoder(),
        transformer=model,
        scheduler=CogVideoXDDIMScheduler(**schedule),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, **options: Any) -> Tensor:
    given = {} if isinstance(pipe, CogVideoXPipeline) else {"image": wan.picture(0)}
    made = pipe(
        prompt="a red square moves right",
        height=wan.HEIGHT,
        width=wan.WIDTH,
        num_frames=wan.FRAMES,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=TEXT,
        output_type="latent",
        **(given | options),
    )
    return made.frames


CASES = [
    Case(
        "cogvideox",
        transformer,
        inputs,
        poke,
        pipeline=lambda: pipeline(transformer(), CogVideoXPipeline),
        generate=generate,
    ),
    Case(
        "cogvideox_image",
        partial(transformer, **ROTARY),
        rotary_inputs,
        poke,
        pipeline=lambda: pipeline(transformer(**ROTARY, use_learned_positional_embeddings=True)),
        generate=generate,
    ),
    Case(
        "cogvideox_1_5_image",
        partial(transformer, **LATER),
        partial(rotary_inputs, joined=2),
        partial(poke, joined=2),
        pipeline=lambda: pipeline(transformer(**LATER)),
        generate=generate,
    ),
]

# As the published schedulers.
PUBLISHED = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def training(name: str, frames: int, shift: float, **config: Any) -> Training:
    rules = ("riflex", "position_interpolation") if config else ()
    return Training(
        name,
        lambda: pipeline(
            transformer(max_text_seq_length=16, **config),
            CogVideoXPipeline,
            snr_shift_scale=shift,
            **PUBLISHED,
        ),
        (frames, 32, 48),
        {"guidance_scale": 1.0, "max_sequence_length": 16},
        lay=lambda latents: latents.transpose(1, 2),
        rules=rules,
    )


ROTARY_TEXT = ROTARY | {"in_channels": CHANNELS}
TRAINING = [
    training("cogvideox_2b", 9, 3.0),
    training("cogvideox_5b", 9, 1.0, **ROTARY_TEXT),
    training("cogvideox_1_5", 13, 1.0, **ROTARY_TEXT, patch_size_t=2, patch_bias=False),
]
