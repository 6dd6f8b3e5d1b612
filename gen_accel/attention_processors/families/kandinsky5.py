"""Kandinsky 5, video from text or an image, and images.

Tokens of the self-attention are the video's, in raster order; text is seen by cross-attention. The
attention over the text alone is left as it is. Some of the published models have a sparse
attention of their own (NABLA), for which the tokens are in tiles: it must be off with a method
attached, and for image prompts with masks or scales by frame.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    ImageAttention,
    Preset,
    SelfAttention,
    hunyuan_video,
    image_sites,
    in_patches,
    in_stacks,
)
from gen_accel.attention_processors.families.given import FIRST_FRAME, in_place, pixels_of
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.families.rotary import check_shape
from gen_accel.video import VideoShape

MODELS = "Kandinsky 5"
CLASSES = ("Kandinsky5Transformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video"
KIND = "video"
LATENT_AXES = "fhwc"
GUIDANCE = "sequential"
FPS = 24
TRAINED_FRAMES = 121  # of the 5 s models, and of the pipelines; the 10 s models on 241
TEMPORAL_FACTOR = 4  # frames in a latent frame, all but the first
SPATIAL_FACTOR = 8
CAUSAL_VAE = hunyuan_video.CAUSAL_VAE  # the same autoencoder
DEPTH = "num_visual_blocks"
_SMALL = 16  # channels of the tiny model
TINY = {
    "in_visual_dim": _SMALL,
    "out_visual_dim": _SMALL,
    "in_text_dim": 8,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 32,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "axes_dims": (4, 6, 6),
}
PRESETS = {
    "Kandinsky-5.0-T2V-Lite": Preset(
        "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
        2.0,
        {"model_dim": 1792, "ff_dim": 7168, "num_visual_blocks": 32},
    ),
}
TEXT_TOKENS = 512
ONE_TEXT_LENGTH = True
_PIPELINES = "Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline"
_TEXT = "text_tokens"  # of `encode_prompt`: how long each text is without its padding

# Layers by the end of their names, inside the blocks: other layers are called `out_layer` too.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": tuple(
        f"{attention}.{name}"
        for attention in ("self_attention", "cross_attention")
        for name in ("to_query", "to_key", "to_value", "out_layer")
    ),
    "feed_forward": ("feed_forward.in_layer", "feed_forward.out_layer"),
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"modulation|time|pooled": "one",
            r"^text_|cross_attention\.to_(key|value)": "text",
        },
        {
            r"^text_.*to_query$": ("text", "text"),
            r"cross_attention\.to_query$": ("video", "text"),
        },
    )


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    dim = sum(config.axes_dims)
    heads, stacks = config.model_dim // dim, ("visual_transformer_blocks",)
    return in_stacks(transformer, stacks, heads, dim, attention="self_attention")


def image_attentions(transformer: Any) -> list[ImageAttention]:
    return _cross_attentions(transformer, "cross_attention")


def _cross_attentions(transformer: Any, place: str) -> list[ImageAttention]:
    """
    Args:
        place: of the cross-attention in a block.
    """
    blocks = range(len(transformer.visual_transformer_blocks))
    names = [f"visual_transformer_blocks.{i}.{place}" for i in blocks]
    projections = {"heads": "num_heads", "to_k": "to_key", "to_v": "to_value", "norm": "key_norm"}
    return image_sites(transformer, names, **projections)


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    pooled_projections: Tensor,
    visual_rope_pos: Any,
    text_rope_pos: Tensor,
    scale_factor: Any = None,
    sparse_params: Any = None,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of (B, frames, height, width, C) latents; ValueError where patches leave a rest, or
    with the model's own sparse attention."""
    if sparse_params is not None:
        raise ValueError(
            f"sparse_params must be None for {type(transformer).__name__} where the places of its "
            "tokens count, got those of the model's own sparse attention; before the pipeline, "
            'call pipe.transformer.register_to_config(attention_type="regular")'
        )
    return VideoShape(*in_patches(hidden_states.shape[1:4], transformer.config.patch_size))


def timestep(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,)"""
    return timestep


def latent_channels(config: Any) -> int:
    return config.in_visual_dim


def no_training(pipeline: str | None, config: Mapping[str, Any]) -> str | None:
    if pipeline not in (None, *_PIPELINES):
        return f"{pipeline} makes no videos"
    kind = config.get("attention_type", "regular")
    if kind == "regular":
        return None
    return (
        f"its own sparse attention, attention_type {kind!r}, does not go with a method: set "
        'attention_type to "regular" in the config.json of its transformer'
    )


@torch.no_grad()
def encode_video(pipe: Any, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents scaled as the transformer takes them, with the channels first, unlike there; see
    `hunyuan_video.encode_video`."""
    return hunyuan_video.encode_video(pipe, video, generator)


decode_video = hunyuan_video.decode_video


@torch.no_grad()
def encode_prompt(
    pipe: Any, prompts: list[str], max_tokens: int | None = None
) -> dict[str, Tensor]:
    """Encode B prompts into what `predict` makes the transformer's arguments of, a row each.

    Each prompt is encoded by itself: its length is its own in the pipeline, and neither the text
    encoder nor the transformer has a mask that would hide padding.

    Args:
        max_tokens: the pipelines' `max_sequence_length`, the prompt's template not counted; longer
            prompts are cut, shorter ones filled with zeros, which `predict` cuts off.

    Returns:
        encoder_hidden_states (B, max_tokens, D) and pooled_projections (B, P), in the dtypes of
        their text encoders, and text_tokens (B,) int64, the number of rows that are no filling.
    """
    tokens = TEXT_TOKENS if max_tokens is None else max_tokens
    device = next(pipe.text_encoder.parameters()).device
    states, pooled, lengths = [], [], []
    for prompt in prompts:
        text, clip, _ = pipe.encode_prompt([prompt], max_sequence_length=tokens, device=device)
        lengths.append(text.shape[1])
        states.append(F.pad(text, (0, 0, 0, tokens - text.shape[1])))
        pooled.append(clip)
    return {
        "encoder_hidden_states": torch.cat(states),
        "pooled_projections": torch.cat(pooled),
        _TEXT: torch.tensor(lengths, device=device),
    }


def tiny_conditions(config: Any, tokens: int) -> dict[str, Tensor]:
    return {
        "encoder_hidden_states": torch.zeros(tokens, config.in_text_dim),
        "pooled_projections": torch.zeros(config.in_text_dim2),
        _TEXT: torch.tensor(tokens),
    }


def given_latents(transformer: Any) -> int:
    return 1 if transformer.config.visual_cond else 0


@torch.no_grad()
def first_frame(pipe: Any, transformer: Any, image: Any, frames: int) -> dict[str, Tensor]:
    """Latents of the first frame alone, (C, 1, h, w)."""
    return {FIRST_FRAME: hunyuan_video.encode_video(pipe, pixels_of(pipe, image))[0]}


def tiny_from_frame(config: Any) -> dict[str, Any]:
    return {"visual_cond": True}


def predict(
    transformer: Any, noisy: Tensor, sigma: Tensor, conditions: dict[str, Tensor]
) -> Tensor:
    """The velocity, noise - clean, of `noisy` = (1 - sigma) clean + sigma noise.

    Models with `visual_cond` take further channels, which are zero, and a mask, 1 for frames that
    are given. Waits for the device.

    Args:
        noisy: (B, C, f, h, w) latents.
        sigma: (B,) in [0, 1].
        conditions: from `encode_prompt` and `first_frame`. A first frame takes the place of the
            first latent, whose velocity has no meaning then. The timestep is that of the others.

    Raises:
        ValueError: texts of several lengths.
    """
    config = transformer.config
    lengths = sorted(set(conditions[_TEXT].tolist()))
    if len(lengths) > 1:
        raise ValueError(f"text_tokens must be one number in a batch, got {lengths}")
    is_given = torch.zeros_like(noisy[:, :1])
    if FIRST_FRAME in conditions:
        noisy, times, _ = in_place(noisy, sigma, conditions)
        is_given[:, :, 0] = (times[:, 0] == 0).view(-1, 1, 1, 1)
    latents = noisy
    if config.visual_cond:
        latents = torch.cat([noisy, torch.zeros_like(noisy), is_given], 1)
    grid = in_patches(noisy.shape[2:], config.patch_size)
    velocity = transformer(
        hidden_states=latents.movedim(1, -1),
        encoder_hidden_states=conditions["encoder_hidden_states"][:, : lengths[0]],
        timestep=sigma * 1000,
        pooled_projections=conditions["pooled_projections"],
        visual_rope_pos=[torch.arange(n, device=noisy.device) for n in grid],
        text_rope_pos=torch.arange(lengths[0], device=noisy.device),
        scale_factor=_scales(*(n * SPATIAL_FACTOR for n in noisy.shape[3:])),
    ).sample
    return velocity.movedim(-1, 1)


def _scales(height: int, width: int) -> tuple[float, float, float]:
    """Divisors of the positions in time, rows and columns, as the pipelines have them.

    Args:
        height, width: in pixels.
    """
    side = 2 if all(480 <= n <= 854 for n in (height, width)) else 3.16
    return 1, side, side


def longest(transformer: Any) -> int:
    """The latent frames after patchify that its rotary table has positions for."""
    return transformer.visual_rope_embeddings.max_pos[0]


def temporal_frequencies(transformer: Any) -> Tensor:
    """(pairs,) float64: the angle of each rotary pair of the time axis per latent frame, in rad.
    Always the model's own, also after `set_temporal_frequencies`."""
    rope = transformer.visual_rope_embeddings
    pairs = rope.axes_dims[0] // 2
    return rope.max_period ** -(torch.arange(pairs, dtype=torch.float64) / pairs)


def set_temporal_frequencies(transformer: Any, freqs: Tensor | None) -> None:
    """Write the rotary table of this model's time axis anew, in place.

    Args:
        freqs: (pairs,) in rad per latent frame after patchify. None: the model's own table, bit
            for bit as it was.
    """
    rope = transformer.visual_rope_embeddings
    table = rope.args_0
    if freqs is None:
        if hasattr(rope, "own_temporal"):
            table.copy_(rope.own_temporal)
            del rope.own_temporal
        return
    check_shape(freqs, table.shape[1:])
    if not hasattr(rope, "own_temporal"):
        rope.own_temporal = table.clone()
    positions = torch.arange(len(table), dtype=torch.float64)
    table.copy_(torch.outer(positions, freqs.double().cpu()))
