"""SkyReels-V2, text to video and image to video, with and without diffusion forcing.

Tokens are those of Wan. Diffusion forcing gives each frame a timestep of its own; in causal blocks
(`num_frame_per_block` above 1) it also hides later frames by a mask, and sparse attention refuses
the call.
"""

from typing import Any

from torch import Tensor

from gen_accel.attention_processors.families import Preset, split_tokens, wan

MODELS = "SkyReels-V2"
CLASSES = ("SkyReelsV2Transformer3DModel",)
ATTENTION_CALL = wan.ATTENTION_CALL
ORDER = wan.ORDER
KIND = "video"
FPS = 24
TEMPORAL_FACTOR = wan.TEMPORAL_FACTOR
SPATIAL_FACTOR = wan.SPATIAL_FACTOR
PRESETS = {
    "SkyReels-V2-T2V-14B": Preset(
        "Skywork/SkyReels-V2-T2V-14B-720P-Diffusers",
        14.3,
        {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    ),
}
TEXT_TOKENS = wan.TEXT_TOKENS
LORA_TARGETS = wan.LORA_TARGETS
AUTOENCODER = wan.AUTOENCODER
GUIDANCE = wan.GUIDANCE

layers = wan.layers
inputs = wan.inputs
self_attentions = wan.self_attentions
image_attentions = wan.image_attentions
video_shape = wan.video_shape


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
