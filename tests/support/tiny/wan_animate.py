"""Wan-Animate: Wan with the video of a pose and of a face."""

from typing import Any

import torch
from diffusers import WanAnimatePipeline, WanAnimateTransformer3DModel
from support import wan
from support.tiny import Case
from support.tiny.wan import CONDITION, TEXT, image_inputs, noise, poke, with_encoder
from torch import Tensor

FACE = 8  # pixels of a side


def transformer() -> Any:
    return wan.transformer(
        kind=WanAnimateTransformer3DModel,
        in_channels=wan.CHANNELS + CONDITION,
        latent_channels=wan.CHANNELS,
        image_dim=wan.IMAGE_WIDTH,
        added_kv_proj_dim=wan.HEADS * wan.HEAD_DIM,
        motion_encoder_size=FACE,
        motion_encoder_channel_sizes={"4": 4, "8": 4},
        motion_style_dim=4,
        motion_dim=2,
        motion_encoder_dim=4,
        face_encoder_hidden_dim=4,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Tensor]:
    """All but the first frame have a pose, and pictures of the face."""
    given = image_inputs(frames, height, width, **options)
    batch = len(given["hidden_states"])
    poses = batch, wan.CHANNELS, frames - 1, 2 * height, 2 * width
    faces = batch, 3, 4 * (frames - 2) + 1, FACE, FACE
    return given | {
        "pose_hidden_states": noise(*poses, seed=5),
        "face_pixel_values": noise(*faces, seed=6),
    }


def generate(pipe: Any) -> Tensor:
    """One segment of nine frames."""
    pictures = [wan.picture(i) for i in range(wan.FRAMES)]
    made = pipe(
        image=wan.picture(20),
        pose_video=pictures,
        face_video=[picture.resize((FACE, FACE)) for picture in pictures],
        prompt="a red square moves right",
        height=wan.HEIGHT,
        width=wan.WIDTH,
        segment_frame_length=wan.FRAMES,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=TEXT,
        output_type="latent",
    )
    return made.frames


CASES = [
    Case(
        "wan_animate",
        transformer,
        inputs,
        poke,
        pipeline=lambda: with_encoder(WanAnimatePipeline, transformer()),
        generate=generate,
    )
]
