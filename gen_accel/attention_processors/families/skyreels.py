"""SkyReels-V2, text to video and image to video, with and without diffusion forcing.

Tokens are those of Wan. Diffusion forcing gives each frame a timestep of its own; in causal blocks
(`num_frame_per_block` above 1) it also hides later frames by a mask, and sparse attention refuses
the call.
"""

from typing import Any

import torch
from torch import Tensor

from gen_accel.attention_processors.families import Preset, split_tokens, wan
from gen_accel.video import VideoShape

MODELS = "SkyReels-V2"
CLASSES = ("SkyReelsV2Transformer3DModel",)
ATTENTION_CALL = wan.ATTENTION_CALL
ORDER = wan.ORDER
KIND = "video"
FPS = 24
TAKES_FPS = True
_SLOW = 16  # frames a second that `fps_embedding` tells from all others, which count as 24
# Of the 540P models, and of the pipelines. The 720P models, whose configs are the same, were
# trained on 121.
TRAINED_FRAMES = 97
TEMPORAL_FACTOR = wan.TEMPORAL_FACTOR
SPATIAL_FACTOR = wan.SPATIAL_FACTOR
PRESETS = {
    "SkyReels-V2-T2V-14B": Preset(
        "Skywork/SkyReels-V2-T2V-14B-720P-Diffusers",
        14.3,
        {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    ),
    "SkyReels-V2-DF-1.3B": Preset(
        "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers",
        1.44,
        {
            "num_attention_heads": 12,
            "num_layers": 30,
            "ffn_dim": 8960,
            "inject_sample_info": True,
        },
    ),
}
TEXT_TOKENS = wan.TEXT_TOKENS
LORA_TARGETS = wan.LORA_TARGETS
CAUSAL_VAE = wan.CAUSAL_VAE
AUTOENCODER = wan.AUTOENCODER
TINY = wan.TINY
GUIDANCE = wan.GUIDANCE

layers = wan.layers
self_attentions = wan.self_attentions
image_attentions = wan.image_attentions
video_shape = wan.video_shape
encode_video = wan.encode_video
decode_video = wan.decode_video
encode_prompt = wan.encode_prompt
tiny_conditions = wan.tiny_conditions
longest = wan.longest
temporal_frequencies = wan.temporal_frequencies
set_temporal_frequencies = wan.set_temporal_frequencies


def inputs(transformer: Any, video: VideoShape, text: int, batch: int) -> dict[str, Any]:
    given = wan.inputs(transformer, video, text, batch)
    return given | {"fps": [1] * batch} if transformer.config.inject_sample_info else given


def predict(
    transformer: Any, noisy: Tensor, sigma: Tensor, conditions: dict[str, Tensor]
) -> Tensor:
    """The velocity, noise - clean, of `noisy` = (1 - sigma) clean + sigma noise.

    All frames have one noise level. For models of diffusion forcing this is their synchronous
    mode (`ar_step=0`), in which the pipelines run unless told otherwise; the forward pass with the
    level written out for each frame gives the same up to rounding.

    Args:
        noisy: (B, C, f, h, w) latents.
        sigma: (B,) in [0, 1].
        conditions: from `encode_prompt`, and `fps` (B,) of the clips, by default
            FPS, for the models that are told whether it is 16.
    """
    told: dict[str, Any] = dict(conditions)
    fps = told.pop("fps", torch.full_like(sigma, FPS))
    if transformer.config.inject_sample_info:
        told["fps"] = (fps != _SLOW).long().tolist()
    return wan.predict(transformer, noisy, sigma, told)


def no_frames(
    transformer: Any, *args: Any, enable_diffusion_forcing: bool = False, **kwargs: Any
) -> str | None:
    if not enable_diffusion_forcing:
        return None
    return "SkyReels-V2 makes a long video in parts where it runs with diffusion forcing"


def context_parallel(transformer: Any) -> dict[str, Any]:
    """Plan for diffusion forcing, where each token has a timestep of its own, (B, 6, N, width) in
    the blocks. The code after `norm_out` is not in a module, so that no input can be split there.
    """
    from diffusers.models._modeling_parallel import ContextParallelInput

    split = split_tokens()
    return {
        "rope": wan._split_rotary(),
        "blocks.0": {"hidden_states": split["tokens"]},
        "blocks.*": {"temb": ContextParallelInput(split_dim=2, expected_dims=4)},
        "norm_out": split["gathered"],
    }


def timestep(hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(B,), or (B, frames) in diffusion forcing."""
    return timestep
