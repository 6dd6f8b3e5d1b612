"""FramePack: a section of video after its history, in patches of three sizes, and before text."""

from typing import Any

import torch
from diffusers import (
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
)
from support import hunyuan, wan
from support.tiny import Case
from support.tiny.hunyuan_video import inputs as hunyuan_inputs
from support.tiny.hunyuan_video import padding, poke
from support.tiny.wan import noise
from torch import Tensor
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

IMAGE, IMAGE_WIDTH = 4, 10
FAR, NEAR = 16, 2  # latent frames of the history, beside the given image and the nearest frame


def transformer() -> Any:
    torch.manual_seed(0)
    return HunyuanVideoFramepackTransformer3DModel(
        in_channels=hunyuan.CHANNELS,
        out_channels=hunyuan.CHANNELS,
        num_attention_heads=hunyuan.HEADS,
        attention_head_dim=hunyuan.HEAD_DIM,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=hunyuan.TEXT_WIDTH,
        pooled_projection_dim=hunyuan.POOLED_WIDTH,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=IMAGE_WIDTH,
        has_clean_x_embedder=True,
    ).eval()


def inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    """As in a section that comes before all that was made so far."""
    given = hunyuan_inputs(frames, height, width, **options)
    batch, channels, _, *sides = given["hidden_states"].shape
    nearest = 1 + frames
    return given | {
        "image_embeds": noise(batch, IMAGE, IMAGE_WIDTH, seed=3),
        "indices_latents": torch.arange(1, nearest),
        "latents_clean": noise(batch, channels, 2, *sides, seed=4),
        "indices_latents_clean": torch.tensor([0, nearest]),
        "latents_history_2x": noise(batch, channels, NEAR, *sides, seed=5),
        "indices_latents_history_2x": nearest + 1 + torch.arange(NEAR),
        "latents_history_4x": noise(batch, channels, FAR, *sides, seed=6),
        "indices_latents_history_4x": nearest + 1 + NEAR + torch.arange(FAR),
    }


def row(given: dict[str, Any], number: int) -> dict[str, Any]:
    """Places in time are those of all samples."""
    own = slice(number, number + 1)
    return {name: x if name.startswith("indices") else x[own] for name, x in given.items()}


def pipeline() -> Any:
    torch.manual_seed(4)
    vision = SiglipVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    like = hunyuan.pipeline(transformer=transformer())
    size = {"height": 32, "width": 32}
    pipe: Any = HunyuanVideoFramepackPipeline(
        **like.components,
        image_encoder=SiglipVisionModel(vision).eval(),
        feature_extractor=SiglipImageProcessor(size=size),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any) -> Tensor:
    """The second of two sections of three latent frames, with a call for the negative prompt."""
    made = hunyuan.generate(
        pipe,
        image=wan.picture(0),
        num_frames=17,
        latent_window_size=3,
        negative_prompt="a blue square",
        true_cfg_scale=4.0,
    )
    return made[-1]


CASES = [
    Case(
        "framepack",
        transformer,
        inputs,
        poke,
        grids=((3, 9, 11), (2, 5, 7)),
        lengths=hunyuan.LENGTHS,
        padding=padding,
        row=row,
        pipeline=pipeline,
        generate=generate,
    )
]
