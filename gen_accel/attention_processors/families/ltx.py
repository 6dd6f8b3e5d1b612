"""LTX-Video.

Tokens are the video's, in raster order; text is seen by cross-attention. They come as a row, with
the sizes of their grid, or with the time and place of each. In the second case, conditioning
frames may stand before or after the video: whole frames at times of the grid, but no part of it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    ImageAttention,
    Preset,
    SelfAttention,
    image_sites,
    outside_graphs,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

MODELS = "LTX-Video"
CLASSES = ("LTXVideoTransformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video, with other frames before or after it where they condition it"
KIND = "video"
LATENT_AXES = "tokens last"
GUIDANCE = "batched"
TEMPORAL_FACTOR = 8  # frames in a latent frame, all but the first
SPATIAL_FACTOR = 32
PRESETS = {"LTX-Video": Preset("Lightricks/LTX-Video", 1.92)}
TEXT_TOKENS = 128

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"time": "one",
            r"caption_projection|attn2\.to_[kv]$": "text",
        },
        {
            r"attn2\.to_q$": ("video", "text"),
        },
        uncounted="frames that condition the video",
    )


def inputs(transformer: Any, video: VideoShape, text: int, batch: int) -> dict[str, Any]:
    config, like = transformer.config, {"device": transformer.device, "dtype": transformer.dtype}
    width = config.caption_channels
    return {
        "hidden_states": torch.zeros(batch, video.video_tokens, config.in_channels, **like),
        "timestep": torch.zeros(batch, **like),
        "encoder_hidden_states": torch.zeros(batch, text, width, **like),
        "encoder_attention_mask": torch.ones(batch, text, **like),
        "num_frames": video.frames,
        "height": video.height,
        "width": video.width,
    }


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    blocks: Any = transformer.transformer_blocks
    return [
        SelfAttention(f"transformer_blocks.{layer}", block.attn1, layer, heads, dim)
        for layer, block in enumerate(blocks)
    ]


def image_attentions(transformer: Any) -> list[ImageAttention]:
    blocks = range(len(transformer.transformer_blocks))
    names = [f"transformer_blocks.{i}.attn2" for i in blocks]
    return image_sites(transformer, names, norm="norm_k")


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    encoder_attention_mask: Tensor,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rope_interpolation_scale: Any = None,
    video_coords: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """Grid from the coordinates that the pipeline passes, else from its sizes.

    Reading coordinates waits for the device.

    Raises:
        ValueError: it passes neither, or coordinates that form no grid."""
    if video_coords is not None:
        return _in_coordinates(video_coords).video
    if num_frames is None or height is None or width is None:
        raise ValueError(
            f"num_frames, height and width, or video_coords, must be given to "
            f"{type(transformer).__name__}, got {(num_frames, height, width)}: without them the "
            "grid of its tokens is unknown"
        )
    return VideoShape(num_frames, height, width)


def before(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    encoder_attention_mask: Tensor,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rope_interpolation_scale: Any = None,
    video_coords: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Number of tokens of the frames before the video."""
    return 0 if video_coords is None else _in_coordinates(video_coords).before


@outside_graphs
def _in_coordinates(video_coords: Tensor) -> Tokens:
    """Find the video among whole frames of one size. The video begins at time 0, and lasts as long
    as the time rises from frame to frame. Waits for the device.

    Args:
        video_coords: (B, 3, N), time, row and column of each token in any units.
    """
    times, rows, columns = video_coords[0]
    height, width = len(rows.unique()), len(columns.unique())
    starts = times[:: height * width].tolist()
    if len(times) % (height * width) or 0 not in starts:
        raise ValueError(
            "video_coords must be those of whole frames, the first of the video at time 0, got "
            f"{len(times)} tokens of {height} rows and {width} columns from times {starts}"
        )
    first = starts.index(0)
    last = first + 1
    while last < len(starts) and starts[last] > starts[last - 1]:
        last += 1
    others = (len(starts) - (last - first)) * height * width
    return Tokens(VideoShape(last - first, height, width, others), first * height * width)


def no_frames(transformer: Any, *args: Any, **kwargs: Any) -> str | None:
    """Reason why frames are not known: cross-attention has the queries of further frames too."""
    if video_shape(transformer, *args, **kwargs).text:
        return "LTX-Video is given further frames beside those of the video"
    return None


def no_context_parallel(transformer: Any) -> str:
    return "the mask of its text is made for all heads, while a process attends for some"


def timestep(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,), or (B, tokens) where some frames are given (image to video)."""
    return timestep
