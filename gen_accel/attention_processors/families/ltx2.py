"""LTX-2, video with sound.

Tokens of the video's self-attention are the video's, in raster order, and then the tokens of key
frames and reference videos, of any size. Self-attention of the sound, and cross-attention between
video, sound and text, are left as they are. Image prompts are added to the cross-attention of the
video and its references to the text. A mask between the video and its references, which LTX-2's
pipeline has for strengths below 1, is refused.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    ImageAttention,
    Preset,
    SelfAttention,
    ltx,
    outside_graphs,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.video import VideoShape

MODELS = "LTX-2"
CLASSES = ("LTX2VideoTransformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video, with key frames and other videos after it where they condition it"
KIND = "video"
LATENT_AXES = "tokens first"
GUIDANCE = ltx.GUIDANCE
TEMPORAL_FACTOR = ltx.TEMPORAL_FACTOR
SPATIAL_FACTOR = 32
PRESETS = {"LTX-2": Preset("Lightricks/LTX-2", 18.9)}
TEXT_TOKENS = 1024

# Layers by the end of their names, inside the blocks: the video's alone.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": tuple(
        f"{attention}.{name}"
        for attention in ("attn1", "attn2")
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    ),
    "feed_forward": ltx.LORA_TARGETS["feed_forward"],
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"time_embed|^av_cross_attn|^prompt_adaln": "one",
            r"caption_projection|attn2\.to_[kv]$": "text",
            r"video_to_audio_attn\.to_[kv]$": "video",
            r"audio_to_video_attn\.to_[kv]$": "sound",
            r"audio_to_video_attn": "video",
            r"audio": "sound",
        },
        {
            r"\.attn2\.to_q$": ("video", "text"),
            r"audio_attn2\.to_q$": ("sound", "text"),
            r"audio_attn1\.to_q$": ("sound", "sound"),
            r"audio_to_video_attn\.to_q$": ("video", "sound"),
            r"video_to_audio_attn\.to_q$": ("sound", "video"),
        },
        uncounted="the sound, and what conditions the video",
    )


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    return ltx.self_attentions(transformer)


def image_attentions(transformer: Any) -> list[ImageAttention]:
    return ltx.image_attentions(transformer)


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    timestep: Tensor,
    audio_timestep: Tensor | None = None,
    sigma: Tensor | None = None,
    audio_sigma: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    audio_encoder_attention_mask: Tensor | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float = 24.0,
    audio_num_frames: int | None = None,
    video_coords: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """Grid from the sizes that the pipeline passes, else from its coordinates.

    Reading coordinates waits for the device.

    Raises:
        ValueError: it passes neither."""
    if num_frames is not None and height is not None and width is not None:
        grid = num_frames, height, width
    elif video_coords is not None:
        grid = _grid_in(video_coords)
    else:
        raise ValueError(
            f"num_frames, height and width, or video_coords, must be given to "
            f"{type(transformer).__name__}, got {(num_frames, height, width)}: without them the "
            "grid of its tokens is unknown"
        )
    frames, rows, columns = grid
    return VideoShape(*grid, text=hidden_states.shape[1] - frames * rows * columns)


@outside_graphs
def _grid_in(video_coords: Tensor) -> tuple[int, int, int]:
    """Grid of the video, whose tokens come first. It lasts as long as each frame begins where the
    one before ends. Waits for the device.

    Args:
        video_coords: (B, 3, N, 2), where each token begins and ends in time, rows and columns.
    """
    (times, rows, _), (ends, _, _) = video_coords[0].unbind(-1)
    same_time = times == times[0]
    same_row = same_time & (rows == rows[0])
    onwards = F.pad(rows.diff() >= 0, (1, 0), value=True)
    width = int(same_row.cumprod(0).sum())
    tokens = int((same_time & onwards).cumprod(0).sum())
    starts, ends = times[::tokens].tolist(), ends[::tokens].tolist()
    frames = 1
    while frames < len(times) // tokens and starts[frames] == ends[frames - 1]:
        frames += 1
    return frames, tokens // width, width


def no_frames(
    transformer: Any, *args: Any, video_keyframes_mask: Tensor | None = None, **kwargs: Any
) -> str | None:
    """Reason why frames are not known: cross-attention has the queries of further frames too."""
    if video_keyframes_mask is not None:
        return "LTX-2's pipelines of distilled models run tile after tile"
    if video_shape(transformer, *args, **kwargs).text:
        return "LTX-2 is given key frames or videos beside the one that it makes"
    return None


no_context_parallel = ltx.no_context_parallel


def timestep(
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,), or (B, tokens) where some frames are given (image to video)."""
    return timestep
