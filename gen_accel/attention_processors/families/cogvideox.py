"""CogVideoX 1.0 and 1.5: text, image and video to video, and with a control video.

Text and video attend jointly, text first, with the same projections. The padding of the text is
not masked. Images and control videos are further channels of the latents.
"""

from collections.abc import Callable
from typing import Any

import torch
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
from gen_accel.video import VideoShape

MODELS = "CogVideoX 1.0 and 1.5"
CLASSES = ("CogVideoXTransformer3DModel",)
ATTENTION_CALL = "F.scaled_dot_product_attention"
ORDER = "text, video"
KIND = "video"
LATENT_AXES = "fchw"
FPS, _FPS_15 = 8, 16  # of version 1.0 and 1.5
GUIDANCE = "batched"
GUIDED = "do_classifier_free_guidance"
TEMPORAL_FACTOR = 4  # frames in a latent frame, all but the first
SPATIAL_FACTOR = 8
_OF_5B = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
PRESETS = {
    "CogVideoX-2b": Preset("THUDM/CogVideoX-2b", 1.7),
    "CogVideoX-5b": Preset("THUDM/CogVideoX-5b", 5.57, _OF_5B),
    "CogVideoX1.5-5b": Preset(
        "THUDM/CogVideoX1.5-5B", 5.57, {**_OF_5B, "patch_size_t": 2, "patch_bias": False}
    ),
}
TEXT_TOKENS = 226

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"time|ofs|norm": "one",
            r"text_proj": "text",
            r"^patch_embed|^proj_out": "video",
        },
        {},
        beside="text",
        default="video + text",
    )


def fps(transformer: Any) -> int:
    """Frames a second. Version 1.5 is recognised by its patches of two latent frames."""
    return FPS if transformer.config.patch_size_t is None else _FPS_15


def inputs(transformer: Any, video: VideoShape, text: int, batch: int) -> dict[str, Any]:
    config, like = transformer.config, {"device": transformer.device, "dtype": transformer.dtype}
    joined, side = config.patch_size_t or 1, config.patch_size
    size = video.frames * joined, config.in_channels, video.height * side, video.width * side
    given: dict[str, Any] = {
        "hidden_states": torch.zeros(batch, *size, **like),
        "timestep": torch.zeros(batch, **like),
        "encoder_hidden_states": torch.zeros(batch, text, config.text_embed_dim, **like),
    }
    if config.use_rotary_positional_embeddings:
        table = torch.zeros(video.video_tokens, config.attention_head_dim, device=like["device"])
        given["image_rotary_emb"] = (table, table)
    if config.ofs_embed_dim is not None:
        given["ofs"] = torch.zeros(batch, **like)
    return given


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
    names = [f"transformer_blocks.{i}.attn1" for i in blocks]
    return image_sites(transformer, names, norm="norm_k")


def tap_image(transformer: Any, site: ImageAttention, add: ImageBranch) -> Callable[[], None]:
    return tap_joint_attention(transformer, site, ATTENTION_CALL, add, text_first=True)


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of (B, frames, C, height, width) latents, and the text; ValueError where patches
    leave a rest."""
    config = transformer.config
    frames, _, height, width = hidden_states.shape[1:]
    # ConsisID's configuration is version 1.0's, before frames were joined.
    patch = getattr(config, "patch_size_t", None) or 1, config.patch_size, config.patch_size
    grid = in_patches((frames, height, width), patch)
    return VideoShape(*grid, text=encoder_hidden_states.shape[1])


def before(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Number of text tokens, which all come first."""
    return encoder_hidden_states.shape[1]


def no_frames(transformer: Any, *args: Any, **kwargs: Any) -> str | None:
    """Reason why frames are not known in version 1.5, which has patches of two latent frames."""
    if transformer.config.patch_size_t is None:
        return None
    return "CogVideoX 1.5 may fill up its latents at the beginning, and does not tell"


def timestep(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,)"""
    return timestep
