"""Cosmos 3.

One sequence of a sample: text, then video in raster order, then sound and actions where there are
some. The processor calls the attention twice. In the first, text sees the text before it: it is
left alone. In the second, all that is generated sees everything, so that there are more keys than
queries.
"""

import math
from typing import Any

from torch import Tensor

from gen_accel.attention_processors.families import SelfAttention, in_stacks
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.video import VideoShape

MODELS = "Cosmos 3"
CLASSES = ("Cosmos3OmniTransformer",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "text, video, sound, actions"
KIND = "video"
TEMPORAL_FACTOR = 4  # frames in a latent frame, all but the first
SPATIAL_FACTOR = 16
# Layers by the end of their names, inside the blocks. Some feed-forwards have a `gate_proj` too.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("to_q", "to_k", "to_v", "to_out"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    "feed_forward": (
        *("mlp.up_proj", "mlp.down_proj"),
        *("mlp_moe_gen.up_proj", "mlp_moe_gen.down_proj"),
    ),
}


def layers(transformer: Any) -> Layers:
    """Layers, in which text attends to itself in a call of its own, and the video to both."""
    names = [f"layers.{i}" for i in range(transformer.config.num_hidden_layers)]
    return Layers(
        {
            r"lm_head|audio|sound|action": "none",
            r"^time|^proj_out": "noisy",
            r"add_[qkv]_proj|to_add_out|mlp_moe_gen|^proj_in": "video",
            r"^layers": "text",
        },
        {r"self_attn\.to_q$": ("text", "text")},
        pairs=dict.fromkeys(names, ("video", "video + text")),
        beside="text",
        uncounted="sound, actions and videos that control the one that is made",
    )


def self_attentions(transformer: Any) -> list[SelfAttention]:
    config = transformer.config
    heads, dim = config.num_attention_heads, config.head_dim
    blocks = in_stacks(transformer, ("layers",), heads, dim, attention="self_attn")
    return [block._replace(call=1) for block in blocks]


def video_shape(
    transformer: Any,
    input_ids: Tensor,
    text_indexes: Tensor,
    position_ids: Tensor,
    und_len: int,
    sequence_length: int,
    vision_tokens: list[Tensor],
    vision_token_shapes: list[tuple[int, int, int]],
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of the generated video: the last one, behind the control videos."""
    video = VideoShape(*vision_token_shapes[-1])
    return VideoShape(*video.grid, text=sequence_length - video.tokens)


def before(
    transformer: Any,
    input_ids: Tensor,
    text_indexes: Tensor,
    position_ids: Tensor,
    und_len: int,
    sequence_length: int,
    vision_tokens: list[Tensor],
    vision_token_shapes: list[tuple[int, int, int]],
    *args: Any,
    **kwargs: Any,
) -> int:
    """Number of tokens of the text and of control videos."""
    return und_len + sum(math.prod(shape) for shape in vision_token_shapes[:-1])


def timestep(
    input_ids: Tensor,
    text_indexes: Tensor,
    position_ids: Tensor,
    und_len: int,
    sequence_length: int,
    vision_tokens: list[Tensor],
    vision_token_shapes: list[tuple[int, int, int]],
    vision_sequence_indexes: Tensor,
    vision_mse_loss_indexes: Tensor,
    vision_timesteps: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(noisy tokens,)"""
    return vision_timesteps
