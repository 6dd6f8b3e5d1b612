"""Motif-Video: video and padded text in one attention, and at the end video twice."""

from functools import cache, partial
from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    MotifVideoImage2VideoPipeline,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
)
from support import wan
from support.tiny import Case
from support.tiny.hunyuan_video import padding
from support.tiny.wan import noise, poke
from torch import Tensor
from transformers import SiglipImageProcessor, T5Gemma2EncoderConfig
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

TEXT, TEXT_WIDTH = 9, 8
IMAGE, IMAGE_WIDTH = 4, 10


def transformer() -> Any:
    torch.manual_seed(0)
    return MotifVideoTransformer3DModel(
        in_channels=2 * wan.CHANNELS + 1,
        out_channels=wan.CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        image_embed_dim=IMAGE_WIDTH,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    ).eval()


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: tuple[int, ...] | None = None,
    time: float = 700.0,
) -> dict[str, Any]:
    lengths = (TEXT,) * batch if lengths is None else lengths
    return {
        "hidden_states": noise(batch, 2 * wan.CHANNELS + 1, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), time),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH, seed=3),
        "encoder_attention_mask": (torch.arange(TEXT) < torch.tensor(lengths)[:, None]).long(),
    }


def image_inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    given = inputs(frames, height, width, **options)
    batch = len(given["hidden_states"])
    return given | {"image_embeds": noise(batch, IMAGE, IMAGE_WIDTH, seed=4)}


@cache
def text_encoder() -> T5Gemma2Encoder:
    """With that of images."""
    torch.manual_seed(3)
    common = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        "vocab_size": 64,
        "hidden_size": TEXT_WIDTH,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "pad_token_id": 0,
        "dropout_rate": 0.0,
        "attention_dropout": 0.0,
    }
    vision = {"hidden_size": IMAGE_WIDTH, "image_size": 32, "patch_size": 16}
    config = T5Gemma2EncoderConfig(
        text_config=common | text, vision_config=common | vision, mm_tokens_per_image=IMAGE
    )
    return T5Gemma2Encoder(config, eoi_token_index=1).eval()


def pipeline(kind: type) -> Any:
    pipe: Any = kind(
        transformer=transformer(),
        vae=wan.autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=new_tokenizer(),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, **options: Any) -> Tensor:
    made = pipe(
        prompt="a red square moves right",
        negative_prompt="a blue square",
        height=wan.HEIGHT,
        width=wan.WIDTH,
        num_frames=wan.FRAMES,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=TEXT,
        output_type="latent",
        **options,
    )
    return made.frames


CASES = [
    Case(
        "motif",
        transformer,
        inputs,
        poke,
        lengths=(7, 3),
        padding=padding,
        pipeline=partial(pipeline, MotifVideoPipeline),
        generate=generate,
    ),
    Case(
        "motif_image",
        transformer,
        image_inputs,
        poke,
        lengths=(7, 3),
        padding=padding,
        pipeline=partial(pipeline, MotifVideoImage2VideoPipeline),
        generate=partial(generate, image=wan.picture(0)),
    ),
]
