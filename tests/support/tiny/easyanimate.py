"""EasyAnimate: text before the video in one attention."""

from functools import cache, partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLMagvit,
    EasyAnimateInpaintPipeline,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from support import wan
from support.tiny import Case
from support.tiny.wan import noise, poke
from torch import Tensor

CHANNELS = 4
TEXT, TEXT_WIDTH = 9, 8


def transformer(**config: Any) -> Any:
    """The second of its blocks has the same projections for text and video."""
    torch.manual_seed(0)
    tiny: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "patch_size": 2,
        "num_layers": 2,
        "mmdit_layers": 1,
        "time_embed_dim": 8,
        "text_embed_dim": TEXT_WIDTH,
    }
    return EasyAnimateTransformer3DModel(**(tiny | config)).eval()


# Beside the noisy latents, those of what is known and the mask of it.
KNOWN = CHANNELS + 1
INPAINT = {"in_channels": CHANNELS + KNOWN, "text_embed_dim_t5": TEXT_WIDTH}


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
        "timestep": torch.full((batch,), time),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH, seed=3),
    }


def inpaint_inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    """With the text of a second encoder, too."""
    given = inputs(frames, height, width, **options)
    batch, _, *sizes = given["hidden_states"].shape
    return given | {
        "inpaint_latents": noise(batch, KNOWN, *sizes, seed=4),
        "encoder_hidden_states_t5": noise(batch, 4, TEXT_WIDTH, seed=5),
    }


@cache
def autoencoder() -> AutoencoderKLMagvit:
    torch.manual_seed(2)
    return AutoencoderKLMagvit(
        latent_channels=CHANNELS,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()


def pipeline(model: Any, kind: type = EasyAnimatePipeline) -> Any:
    """Without what makes tokens of text."""
    pipe: Any = kind(
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any) -> Tensor:
    made = pipe(
        prompt_embeds=noise(1, TEXT, TEXT_WIDTH, seed=6),
        prompt_attention_mask=torch.ones(1, TEXT),
        negative_prompt_embeds=noise(1, TEXT, TEXT_WIDTH, seed=7),
        negative_prompt_attention_mask=torch.ones(1, TEXT),
        height=wan.HEIGHT,
        width=wan.WIDTH,
        num_frames=wan.FRAMES,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    )
    return made.frames


CASES = [
    Case(
        "easyanimate",
        transformer,
        inputs,
        poke,
        pipeline=lambda: pipeline(transformer()),
        generate=generate,
    ),
    Case(
        "easyanimate_inpaint",
        partial(transformer, **INPAINT),
        inpaint_inputs,
        poke,
        pipeline=lambda: pipeline(transformer(**INPAINT), EasyAnimateInpaintPipeline),
        generate=generate,
    ),
]
