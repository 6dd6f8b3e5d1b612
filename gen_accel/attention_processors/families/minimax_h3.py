"""MiniMax-H3, video with sound from text, key frames and references.

One attention runs over one packed sequence: text, key frames or references, sound, and last the
video in raster order, all else before it. The refiner of the text, which attends over the text
alone, is left as it is.
"""

from typing import Any

from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    SelfAttention,
    in_stacks,
    outside_graphs,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.video import VideoShape

MODELS = "MiniMax-H3"
CLASSES = ("MiniMaxH3Transformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "text, key frames or references, sound, video"
KIND = "video"
TIMESTEPS_RISE = True

LEAST_STEPS = 2  # its scheduler takes no fewer
# Layers by the end of their names, inside the blocks: the refiner has the same names.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"time|adaln|norm": "one",
            r"context_embedder|refiner": "text",
            r"audio_proj_in": "sound",
            r"^proj_in": "video",
        },
        {
            r"refiner_blocks.*attn\.to_q$": ("text", "text"),
        },
        beside="text + sound",
        default="video + text + sound",
        uncounted="the sound, and key frames or references",
    )


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    return in_stacks(transformer, ("transformer_blocks",), heads, dim)


@outside_graphs
def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    timestep_indices: Tensor,
    token_tags: Tensor,
    position_ids: Tensor,
    video_indices: Tensor,
    audio_indices: Tensor,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of the video, which comes after the sound, read from the positions of its tokens.
    Waits for the device."""
    start = int(audio_indices.max()) + 1
    times, rows, _ = position_ids[start:].unbind(1)
    in_frame = times == times[0]
    in_row = in_frame & (rows == rows[0])
    frame, width = int(in_frame.sum()), int(in_row.sum())
    return VideoShape(len(times) // frame, frame // width, width, text=start)


def before(transformer: Any, *args: Any, **kwargs: Any) -> int:
    """Number of all tokens but the video's."""
    return video_shape(transformer, *args, **kwargs).text


def timestep(
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    timestep_indices: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(1,), read at the last token, which is the video's. It rises from 0 to 1, where the video is
    clean."""
    return timestep[timestep_indices[-1:]]
