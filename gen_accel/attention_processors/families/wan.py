"""Wan 2.1 and 2.2, text to video, image to video, and VACE.

Tokens are the video's alone, in raster order; text and image are seen by cross-attention. VACE's
control blocks run over the same grid, of which its reference images are the first frames.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    ImageAttention,
    SelfAttention,
    encoded,
    image_sites,
    in_patches,
)
from gen_accel.video import VideoShape

MODELS = "Wan 2.1 and 2.2, VACE"
CLASSES = ("WanTransformer3DModel", "WanVACETransformer3DModel")
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video"
KIND = "video"
FPS = 16
GUIDANCE = "sequential"
TRAINED_FRAMES = 81  # of the videos that the published models were trained on
# but Wan 2.2 TI2V-5B: `frame_num` in wan/configs/wan_ti2v_5B.py of github.com/Wan-Video/Wan2.2
_TI2V_FRAMES, _TI2V_FPS, _TI2V_CHANNELS = 121, 24, 48
TEMPORAL_FACTOR = 4  # frames in a latent frame, all but the first
_ROTARY_BASE = 10_000.0  # of all published models; it is in no configuration

# By what they end in, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ffn.net.0.proj", "ffn.net.2"),
}
CAUSAL_VAE = True  # the first latents of a long clip are the latents of its beginning
TEXT_TOKENS = 512  # as the pipelines call it; `encode_prompt` on its own has another default


def trained_frames(transformer: Any) -> int:
    """Of the videos that it was trained on. The 5B model of Wan 2.2 takes 24 frames a second, and
    is known by the channels of its latents."""
    return _TI2V_FRAMES if transformer.config.in_channels == _TI2V_CHANNELS else TRAINED_FRAMES


def fps(transformer: Any) -> int:
    return _TI2V_FPS if transformer.config.in_channels == _TI2V_CHANNELS else FPS


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    return [
        SelfAttention(f"{stack}.{layer}", block.attn1, layer, heads, dim)
        for stack in ("blocks", "vace_blocks")
        for layer, block in enumerate(getattr(transformer, stack, ()))
    ]


def image_attentions(transformer: Any) -> list[ImageAttention]:
    """Cross-attention of the blocks; of VACE, not that of the control blocks."""
    names = [f"blocks.{i}.attn2" for i in range(len(transformer.blocks))]
    return image_sites(transformer, names, norm="norm_k")


def video_shape(transformer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents; ValueError where patches leave a rest."""
    return VideoShape(*in_patches(hidden_states.shape[2:], transformer.config.patch_size))


def no_frames(transformer: Any, *args: Any, **kwargs: Any) -> str | None:
    """VACE's reference images come before the video, without telling how many: what is to change
    in them, and the mask of it, is zero, which no encoded video is. Waits for the device."""
    control = kwargs.get("control_hidden_states")
    if control is None or control[:, transformer.config.in_channels :, 0].any():
        return None
    return "VACE puts its reference images before the frames of the video"


def timestep(hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(B,), or (B, tokens) where each token has its own (Wan 2.2 TI2V-5B)."""
    return timestep


@torch.no_grad()
def encode_video(pipe: Any, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents of zero mean and unit variance a channel, as the transformer takes them.

    Args:
        video: (B, 3, F, H, W) in [-1, 1], F = 1 + a multiple of the autoencoder's step.
        generator: draw from the posterior; without one its mode is taken.

    Returns:
        (B, C, f, h, w) float32, on the autoencoder's device.

    Raises:
        ValueError: another number of frames, whose last ones the autoencoder would leave out.
    """
    latents, config = encoded(pipe, video, generator), pipe.vae.config
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return (latents - mean) / std


@torch.no_grad()
def encode_prompt(
    pipe: Any, prompts: list[str], max_tokens: int | None = None
) -> dict[str, Tensor]:
    """What `predict` passes on to the transformer, a row for each of B prompts.

    Args:
        max_tokens: the pipelines' `max_sequence_length`; longer prompts are cut, shorter ones
            filled with zeros, which cross-attention sees.

    Returns:
        encoder_hidden_states (B, max_tokens, D), in the text encoder's dtype.
    """
    if max_tokens is None:
        max_tokens = TEXT_TOKENS
    states, _ = pipe.encode_prompt(
        list(prompts),
        do_classifier_free_guidance=False,
        max_sequence_length=max_tokens,
        device=next(pipe.text_encoder.parameters()).device,
    )
    return {"encoder_hidden_states": states}


def predict(
    transformer: Any, noisy: Tensor, sigma: Tensor, conditions: dict[str, Tensor]
) -> Tensor:
    """The velocity, noise - clean, of `noisy` = (1 - sigma) clean + sigma noise.

    Args:
        noisy: (B, C, f, h, w) latents.
        sigma: (B,) in [0, 1].
        conditions: of `encode_prompt`.
    """
    return transformer(noisy, timestep=sigma * 1000, **conditions, return_dict=False)[0]


def longest(transformer: Any) -> int:
    """The latent frames after patchify that its rotary table has positions for."""
    return transformer.config.rope_max_seq_len


def temporal_frequencies(transformer: Any) -> Tensor:
    """(pairs,) float64: what each rotary pair of the time axis turns by from one latent frame to
    the next, in rad, after `set_temporal_frequencies` too the model's own."""
    dim = _temporal_dim(transformer)
    return 1 / _ROTARY_BASE ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def set_temporal_frequencies(transformer: Any, freqs: Tensor | None) -> None:
    """Write the rotary table of this model's time axis anew, in place.

    Args:
        freqs: (pairs,) in rad per latent frame after patchify. None: the model's own table, bit
            for bit as it was.
    """
    rope, dim = transformer.rope, _temporal_dim(transformer)
    if freqs is None:
        if hasattr(rope, "own_temporal"):
            for table, own in zip(
                (rope.freqs_cos, rope.freqs_sin), rope.own_temporal, strict=True
            ):
                table[:, :dim].copy_(own)
            del rope.own_temporal
        return
    if freqs.shape != (dim // 2,):
        raise ValueError(f"freqs must be of shape ({dim // 2},), got {tuple(freqs.shape)}")
    tables = rope.freqs_cos, rope.freqs_sin
    if not hasattr(rope, "own_temporal"):
        rope.own_temporal = tuple(table[:, :dim].clone() for table in tables)
    positions = torch.arange(len(rope.freqs_cos), dtype=torch.float64)
    angles = torch.outer(positions, freqs.double().cpu()).repeat_interleave(2, dim=1)
    for table, values in zip(tables, (angles.cos(), angles.sin()), strict=True):
        table[:, :dim].copy_(values.float())


def _temporal_dim(transformer: Any) -> int:
    dim = transformer.config.attention_head_dim
    return dim - 4 * (dim // 6)
