"""EasyAnimate 5.1: text, image and video to video, and with a control video.

Text and video attend jointly, text first, with projections of their own in the first blocks and
with the same ones in others, where there are some. The padding of the text is not masked. Images
and control videos are further channels of the latents.
"""

from typing import Any

from torch import Tensor, nn

from gen_accel.attention_processors.families import Preset, SelfAttention, cogvideox, in_patches
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.video import VideoShape

MODELS = "EasyAnimate 5.1"
CLASSES = ("EasyAnimateTransformer3DModel",)
ATTENTION_CALL = "F.scaled_dot_product_attention"
ORDER = "text, video"
KIND = "video"
FPS = 8
TEMPORAL_FACTOR = 4  # frames in a latent frame, all but the first
SPATIAL_FACTOR = 8
PRESETS = {
    "EasyAnimateV5.1-12b": Preset(
        "alibaba-pai/EasyAnimateV5.1-12b-zh",
        11.8,
        {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    ),
}
TEXT_TOKENS = 256

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    "feed_forward": ("ff.net.0.proj", "ff.net.2", "txt_ff.net.0.proj", "txt_ff.net.2"),
}


def layers(transformer: Any) -> Layers:
    """Layers; blocks after the first ones have the same projections for text and video."""
    config = transformer.config
    shared = range(config.mmdit_layers, config.num_layers)
    blocks = "|".join(map(str, shared)) or "(?!)"
    return Layers(
        {
            r"time|norm": "one",
            r"text_proj|add_[qkv]_proj|to_add_out|txt_ff": "text",
            rf"^transformer_blocks\.({blocks})\.(attn1\.to_[qkv]$|ff\.)": "video + text",
        },
        {},
        beside="text",
    )


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    return cogvideox.self_attentions(transformer)


def video_shape(
    transformer: Any, hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any
) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents, and the text; ValueError where patches
    leave a rest."""
    side = transformer.config.patch_size
    grid = in_patches(hidden_states.shape[2:], (1, side, side))
    return VideoShape(*grid, text=before(transformer, hidden_states, timestep, *args, **kwargs))


def before(
    transformer: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    timestep_cond: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_hidden_states_t5: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Number of text tokens, from both encoders where there are two."""
    texts = (encoder_hidden_states, encoder_hidden_states_t5)
    return sum(text.shape[1] for text in texts if text is not None)


def timestep(hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(B,)"""
    return timestep
