"""CogVideoX 1.0 and 1.5: text, image and video to video, and with a control video.

Text and video attend jointly, text first, with the same projections. The padding of the text is
not masked. Images and control videos are further channels of the latents. Models are trained by
v-prediction (Salimans and Ho, 2022, https://arxiv.org/abs/2202.00512) at 1000 noise levels, the
last of which is noise alone. The pipelines pass the rotary table to the transformer.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    ImageAttention,
    ImageBranch,
    Preset,
    SelfAttention,
    decoded,
    encoded,
    image_sites,
    in_patches,
    tap_joint_attention,
    unguided,
)
from gen_accel.attention_processors.families.given import FIRST_FRAME, pixels_of
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.lengths import vae_factor
from gen_accel.plan import widest
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
TRAINED_FRAMES = 49  # of the videos that version 1.0 was trained on
# Version 1.5 was trained on 161, which its pipelines fill up to the patches that 165 have.
_TRAINED_FRAMES_15 = 165
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
# Its convolutions look back only, but its group norms average over several frames.
CAUSAL_VAE = False
PREDICTS = "v"
_TIMES = 1000  # noise levels
# Entries of the published schedulers that differ from their class; the SNR shift of 2B is 3.
_PUBLISHED = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
}
_ROTARY_BASE = 10_000.0  # of all published models; no configuration holds it
_OFS = 2.0  # as the pipelines give it
_SMALL = 16  # channels of the tiny model
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": _SMALL,
    "out_channels": _SMALL,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "use_rotary_positional_embeddings": True,
}

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


def trained_frames(transformer: Any) -> int:
    """Number of frames of the videos that it was trained on, see `fps`."""
    return TRAINED_FRAMES if transformer.config.patch_size_t is None else _TRAINED_FRAMES_15


@torch.no_grad()
def encode_video(pipe: Any, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents scaled as the transformer takes them."""
    return encoded(pipe, video, generator) * pipe.vae.config.scaling_factor


def decode_video(pipe: Any, latents: Tensor) -> Tensor:
    """Pixels of latents scaled as the transformer takes them. Of an even number of latents the
    autoencoder makes three frames too many, which stand before the first."""
    pixels = decoded(pipe, latents / pipe.vae.config.scaling_factor)
    step = vae_factor(pipe, "temporal") or 1
    return pixels[:, :, -(step * (latents.shape[2] - 1) + 1) :]


def latent_channels(config: Any) -> int:
    return config.out_channels if _takes_frames(config) else config.in_channels


@torch.no_grad()
def first_frame(pipe: Any, transformer: Any, image: Any, frames: int) -> dict[str, Tensor]:
    """Latents of the first frame alone, (C, 1, h, w): the mode, where the pipeline draws. Some
    models were trained with a scale that divides."""
    latents, config = encoded(pipe, pixels_of(pipe, image), None), pipe.vae.config
    scale = config.scaling_factor
    return {FIRST_FRAME: (latents * (1 / scale if config.invert_scale_latents else scale))[0]}


def _takes_frames(config: Any) -> bool:
    """Whether there are channels for the first frame, beside the noisy latents."""
    return config.in_channels > (config.out_channels or config.in_channels)


def tiny_from_frame(config: Mapping[str, Any]) -> dict[str, Any]:
    tiny: dict[str, Any] = {"in_channels": 2 * _SMALL}
    return tiny if config.get("ofs_embed_dim") is None else tiny | {"ofs_embed_dim": 8}


@torch.no_grad()
def encode_prompt(
    pipe: Any, prompts: list[str], max_tokens: int | None = None
) -> dict[str, Tensor]:
    """Encode B prompts into the arguments that `predict` passes to the transformer, a row each.

    Args:
        max_tokens: the pipelines' `max_sequence_length`; longer prompts are cut, shorter ones
            padded.

    Returns:
        encoder_hidden_states (B, max_tokens, D), in the text encoder's dtype.
    """
    states, _ = unguided(pipe, prompts, TEXT_TOKENS if max_tokens is None else max_tokens)
    return {"encoder_hidden_states": states}


def tiny_conditions(config: Any, tokens: int) -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.zeros(tokens, config.text_embed_dim)}


def scales(schedule: Mapping[str, Any], sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The scheduler's square roots of alpha and 1 - alpha at the nearest of its 1000 timesteps,
    to which noise levels are proportional.

    Raises ValueError for a scheduler that is not one of CogVideoX's, or predicts something else.
    """
    known = {name: schedule[name] for name in _SCHEDULE if name in schedule} or _PUBLISHED
    predicted = known.get("prediction_type", "epsilon")
    if predicted != "v_prediction" or known.get("num_train_timesteps", _TIMES) != _TIMES:
        raise ValueError(
            f"CogVideoX trains by v_prediction at {_TIMES} timesteps, and the scheduler has "
            f"prediction_type {predicted!r} at {known.get('num_train_timesteps', _TIMES)}: load "
            "the scheduler that was published with the model"
        )
    alphas = _alphas(tuple(sorted(known.items()))).to(sigma.device)[_times(sigma)]
    return alphas.sqrt().to(sigma.dtype), (1 - alphas).sqrt().to(sigma.dtype)


# Entries of a scheduler's config that its noise levels depend on.
_SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"),
    *("rescale_betas_zero_snr", "snr_shift_scale"),
)


@lru_cache
def _alphas(known: tuple[tuple[str, Any], ...]) -> Tensor:
    """(1000,) float64 of a scheduler's config."""
    from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(**dict(known)).alphas_cumprod.double()


def _times(sigma: Tensor) -> Tensor:
    """Timesteps (B,) int64 of noise levels."""
    return (sigma * _TIMES).round().long().clamp(max=_TIMES - 1)


def predict(
    transformer: Any, noisy: Tensor, sigma: Tensor, conditions: dict[str, Tensor]
) -> Tensor:
    """Predict v = a noise - s clean of `noisy` = a clean + s noise, with a and s of `scales`.

    Args:
        noisy: (B, C, f, h, w) latents of whole patches.
        sigma: (B,) in [0, 1].
        conditions: from `encode_prompt` and `first_frame`.

    Raises ValueError for a text of another length than the model has positions for.
    """
    config = transformer.config
    tokens, given = conditions["encoder_hidden_states"].shape[1], {}
    if config.use_rotary_positional_embeddings:
        given["image_rotary_emb"] = _rotary(transformer, noisy)
    elif tokens != config.max_text_seq_length:
        raise ValueError(
            f"max_tokens must be {config.max_text_seq_length}, for as many this model has "
            f"positions, got {tokens}: leave it out"
        )
    if config.ofs_embed_dim is not None:
        given["ofs"] = noisy.new_full((1,), _OFS)
    told = dict(conditions)
    if FIRST_FRAME in told:
        frame = told.pop(FIRST_FRAME).to(noisy.dtype)
        beside = noisy.new_zeros(len(noisy), frame.shape[1], *noisy.shape[2:])
        beside[:, :, :1] = frame
        noisy = torch.cat([noisy, beside], 1)
    said = transformer(
        noisy.transpose(1, 2), timestep=_times(sigma), **told, **given, return_dict=False
    )
    return said[0].transpose(1, 2)


def _rotary(transformer: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """The table that the pipelines pass for latents (B, C, f, h, w)."""
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline

    pipe: Any = SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=1)
    frames, height, width = latents.shape[2:]
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipe, height, width, frames, latents.device
    )


def longest(transformer: Any) -> int | None:
    """The latent frames after patchify that it has learned positions for. Other models compute
    theirs for any length."""
    config = transformer.config
    if not config.use_learned_positional_embeddings:
        return None
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    return frames // (config.patch_size_t or 1)


def temporal_frequencies(transformer: Any) -> Tensor:
    """(pairs,) float64: the angle of each rotary pair of the time axis per latent frame after
    patchify, in rad.

    Raises ValueError for a model without rotary positions.
    """
    config = transformer.config
    if not config.use_rotary_positional_embeddings:
        raise ValueError(
            "this CogVideoX adds a table of sines to its tokens, and has no rotary frequencies "
            "to change: take window_noise or continuation, or a 5B model"
        )
    dim = config.attention_head_dim // 4
    return _ROTARY_BASE ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def with_temporal_frequencies(
    transformer: Any,
    freqs: Tensor,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    timestep_cond: Tensor | None = None,
    ofs: Tensor | None = None,
    image_rotary_emb: Any = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Put other frequencies into the time axis of the rotary table that the pipeline gave.

    Args:
        freqs: (pairs,) in rad per latent frame after patchify.
    """
    cos, sin = image_rotary_emb
    frames = hidden_states.shape[1] // (transformer.config.patch_size_t or 1)
    real: Any = {"dtype": widest(cos.device), "device": cos.device}
    frame = torch.arange(frames, **real).repeat_interleave(len(cos) // frames)
    angles = torch.outer(frame, freqs.to(**real)).repeat_interleave(2, 1)
    rest = angles.shape[1]
    return kwargs | {
        "hidden_states": hidden_states,
        "encoder_hidden_states": encoder_hidden_states,
        "timestep": timestep,
        "timestep_cond": timestep_cond,
        "ofs": ofs,
        "image_rotary_emb": (
            torch.cat([angles.cos().to(cos.dtype), cos[:, rest:]], 1),
            torch.cat([angles.sin().to(sin.dtype), sin[:, rest:]], 1),
        ),
    }
