"""Mochi 1.

Video and text attend jointly, video first, in a call of its own for each sample, which leaves the
padding of its text out.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    ImageAttention,
    ImageBranch,
    Preset,
    SelfAttention,
    image_sites,
    in_patches,
    tap_joint_attention,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.seam import Call
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

MODELS = "Mochi 1"
CLASSES = ("MochiTransformer3DModel",)
ATTENTION_CALL = "F.scaled_dot_product_attention"
ORDER = "video, text"
KIND = "video"
FPS = 30
LEAST_STEPS = 2  # its schedule divides by the steps less 1
TIMESTEPS_RISE = True
GUIDANCE = "batched"
TEMPORAL_FACTOR = 6  # frames in a latent frame, all but the first
SPATIAL_FACTOR = 8
PRESETS = {"mochi-1-preview": Preset("genmo/mochi-1-preview", 10.0)}
TEXT_TOKENS = 256

# Layers by the end of their names, inside the blocks. The last block has no text output, and no
# to_add_out.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    "feed_forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"pooler\.to_kv$": "text + one",
            r"caption_proj": "text",
            r"time|norm": "one",
            r"add_[qkv]_proj|to_add_out|ff_context": "text",
        },
        {r"pooler\.to_q$": ("one", "text + one")},
        beside="text",
    )


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    blocks: Any = transformer.transformer_blocks
    return [
        SelfAttention(f"transformer_blocks.{layer}", block.attn1, layer, heads, dim, _of_sample)
        for layer, block in enumerate(blocks)
    ]


def _of_sample(tokens: Tokens, call: Call) -> Tokens:
    """Tokens with the text of this call, whose padding was left out."""
    video = tokens.video
    return Tokens(VideoShape(*video.grid, text=call.k.shape[1] - video.video_tokens))


def image_attentions(transformer: Any) -> list[ImageAttention]:
    blocks = range(len(transformer.transformer_blocks))
    names = [f"transformer_blocks.{i}.attn1" for i in blocks]
    sites = image_sites(transformer, names, norm="norm_k")
    return [site._replace(by_sample=True) for site in sites]


def tap_image(transformer: Any, site: ImageAttention, add: ImageBranch) -> Callable[[], None]:
    return tap_joint_attention(transformer, site, ATTENTION_CALL, add)


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents, and the text with its padding; ValueError
    where patches leave a rest."""
    side = transformer.config.patch_size
    grid = in_patches(hidden_states.shape[2:], (1, side, side))
    return VideoShape(*grid, text=encoder_hidden_states.shape[1])


def timestep(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,), which rises from step to step."""
    return timestep
