"""Cosmos 1, Predict2, Predict2.5 and Transfer2.5.

Tokens are the video's alone, in raster order; text is seen by cross-attention, and so is the image
of models with a second processor for it. The controlnet of Transfer2.5 is a model of its own, and
keeps the attention that it has.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gen_accel.attention_processors.families import (
    ImageAttention,
    Preset,
    SelfAttention,
    image_sites,
    in_patches,
    in_stacks,
    unguided,
    wan,
)
from gen_accel.attention_processors.families.given import FIRST_FRAME, in_place, pixels_of
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.families.rotary import OtherRotary, set_rotary, stock_rotary
from gen_accel.plan import widest
from gen_accel.video import VideoShape

MODELS = "Cosmos 1, Predict2, Predict2.5 and Transfer2.5"
CLASSES = ("CosmosTransformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video"
KIND = "video"
GUIDANCE = "sequential"
FPS = 16  # of Predict2 and Predict2.5
TAKES_FPS = True
_FIRST_FPS, _FIRST_FRAMES, _FIRST_FACTOR = 30, 121, 8  # of Cosmos 1
TRAINED_FRAMES = 93  # of the videos that Predict2 and Predict2.5 were trained on
TEMPORAL_FACTOR = 4  # frames in a latent frame, all but the first
SPATIAL_FACTOR = 8
CAUSAL_VAE = wan.CAUSAL_VAE  # the same autoencoder
_ROTARY_BASE = 10_000.0  # of all models; no configuration holds it
_LEARNT = "learnable"  # extra_pos_embed_type of Cosmos 1, and by default
_GIVEN_LEVEL = 1e-4  # that the pipelines tell of frames that are given
_SMALL = 16  # channels of the tiny model
TINY = {
    "in_channels": _SMALL,
    "out_channels": _SMALL,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "mlp_ratio": 2.0,
    "text_embed_dim": 8,
    "adaln_lora_dim": 8,
    "max_size": (64, 32, 32),
    "concat_padding_mask": False,
    "extra_pos_embed_type": None,
}
PRESETS = {
    "Cosmos-Predict2-2B-Video2World": Preset(
        "nvidia/Cosmos-Predict2-2B-Video2World",
        1.96,
        {
            "in_channels": 17,
            "num_attention_heads": 16,
            "rope_scale": (1.0, 3.0, 3.0),
            "extra_pos_embed_type": None,
        },
    ),
    "Cosmos-1.0-Diffusion-7B": Preset(
        "nvidia/Cosmos-1.0-Diffusion-7B-Text2World", 7.24, temporal=8
    ),
}
TEXT_TOKENS = 512

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"time|norm": "one",
            r"[kv]_img|img_context": "image",
            r"crossattn_proj|attn2\.to_[kv]$": "text",
        },
        {
            r"attn2\.to_q$": ("video", "text"),
            r"attn2\.q_img$": ("video", "image"),
        },
        uncounted="the image, controls, and timesteps of single frames",
    )


def self_attentions(transformer: Any) -> list[SelfAttention]:
    config = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    return in_stacks(transformer, ("transformer_blocks",), heads, dim, attention="attn1")


def image_attentions(transformer: Any) -> list[ImageAttention]:
    names = [f"transformer_blocks.{i}.attn2" for i in range(len(transformer.transformer_blocks))]
    return image_sites(transformer, names, norm="norm_k")


def video_shape(transformer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents; ValueError where patches leave a rest."""
    return VideoShape(*in_patches(hidden_states.shape[2:], transformer.config.patch_size))


def no_frames(
    transformer: Any, *args: Any, block_controlnet_hidden_states: Any = None, **kwargs: Any
) -> str | None:
    if block_controlnet_hidden_states is None:
        return None
    return "Cosmos Transfer2.5 makes a video chunk after chunk"


def timestep(hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(B,), or (B, 1, frames, 1, 1) where frames that are given have their own. From Predict2 on
    a function of the scheduler's sigma, in [0, 1]."""
    return timestep


def fps(transformer: Any) -> int:
    return _FIRST_FPS if _is_first(transformer.config) else FPS


def trained_frames(transformer: Any) -> int:
    return _FIRST_FRAMES if _is_first(transformer.config) else TRAINED_FRAMES


def temporal_factor(transformer: Any) -> int:
    return _FIRST_FACTOR if _is_first(transformer.config) else TEMPORAL_FACTOR


def _is_first(config: Any) -> bool:
    """Whether this is Cosmos 1, which alone learnt positions beside its rotary ones."""
    return config.extra_pos_embed_type == _LEARNT


def _takes_frames(config: Any) -> bool:
    """Whether there is a channel for the mask of given frames, beside the noisy latents."""
    return config.in_channels > config.out_channels


def _given_fps(config: Any) -> int | None:
    """The frame rate that the pipelines pass unless told otherwise; None to Predict2.5, and to
    Predict2 for single images."""
    if _is_first(config):
        return _FIRST_FPS
    if config.use_crossattn_projection or not _takes_frames(config):
        return None
    return FPS


def latent_channels(config: Any) -> int:
    return config.out_channels


def no_training(pipeline: str | None, config: Mapping[str, Any]) -> str | None:
    if config.get("extra_pos_embed_type", _LEARNT) == _LEARNT:
        return "Cosmos 1 is preconditioned by the scales of EDM: take Predict2 or Predict2.5"
    if config.get("controlnet_block_every_n") is not None:
        return "Transfer2.5 is controlled by a second model: take Predict2 or Predict2.5"
    if config.get("concat_padding_mask", True) and find_spec("torchvision") is None:
        return "diffusers scales its padding mask by torchvision: pip install torchvision"
    return None


@torch.no_grad()
def encode_video(pipe: Any, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents of zero mean and unit variance a channel, as the transformer takes them; see
    `wan.encode_video`. The pipelines' `sigma_data` is 1."""
    return wan.encode_video(pipe, video, generator)


decode_video = wan.decode_video


@torch.no_grad()
def encode_prompt(
    pipe: Any, prompts: list[str], max_tokens: int | None = None
) -> dict[str, Tensor]:
    """Encode B prompts into the arguments that `predict` passes to the transformer, a row each.

    The text encoder of Predict2.5 gives all its layers side by side, 200 kB a token.

    Args:
        max_tokens: the pipelines' `max_sequence_length`; longer prompts are cut, shorter ones
            padded: with zeros in Predict2, with the encoding of padding in Predict2.5.

    Returns:
        encoder_hidden_states (B, max_tokens, D), in the text encoder's dtype.
    """
    states, _ = unguided(pipe, prompts, TEXT_TOKENS if max_tokens is None else max_tokens)
    return {"encoder_hidden_states": states}


def tiny_conditions(config: Any, tokens: int) -> dict[str, Tensor]:
    width = config.text_embed_dim
    if config.use_crossattn_projection:
        width = config.crossattn_proj_in_channels
    return {"encoder_hidden_states": torch.zeros(tokens, width)}


def given_latents(transformer: Any) -> int:
    return 1 if _takes_frames(transformer.config) else 0


@torch.no_grad()
def first_frame(pipe: Any, transformer: Any, image: Any, frames: int) -> dict[str, Tensor]:
    """Latents of the first frame alone, (C, 1, h, w): the autoencoder is causal."""
    return {FIRST_FRAME: wan.encode_video(pipe, pixels_of(pipe, image))[0]}


def tiny_from_frame(config: Any) -> dict[str, Any]:
    return {"in_channels": _SMALL + 1}


def predict(
    transformer: Any, noisy: Tensor, sigma: Tensor, conditions: dict[str, Tensor]
) -> Tensor:
    """The velocity, noise - clean, of `noisy` = (1 - sigma) clean + sigma noise.

    Predict2.5 takes these latents and levels as they are. The pipelines of Predict2 step through
    x = clean + s noise by the scales of EDM, which come to the same. With t = s / (1 + s) they
    call the network on

        c_in x = (1 - t) x = (1 - t) clean + t noise

    at time t, and take c_skip x + c_out F = (1 - t) x - t F of its output F for the clean latents.
    So F = ((1 - t) clean + t noise - clean) / t = noise - clean, at sigma = t. A level s drawn
    log-normal, as these models were trained, is a level t drawn logit-normal: logit t = ln s.

    Args:
        noisy: (B, C, f, h, w) latents.
        sigma: (B,) in [0, 1].
        conditions: from `encode_prompt` and `first_frame`, and `fps` (B,) of the clips, all alike,
            which Predict2 places the frames by, and the others do not. A first frame takes the
            place of the first latent, whose velocity has no meaning then.
    """
    config, rest = transformer.config, dict(conditions)
    more: dict[str, Any] = {}
    clips = rest.pop("fps", None)
    if (rate := _given_fps(config)) is not None:
        more["fps"] = rate if clips is None else clips[0]
    times = sigma
    if _takes_frames(config):
        times = sigma[:, None].repeat(1, noisy.shape[2])
        if FIRST_FRAME in rest:
            noisy, times, rest = in_place(noisy, sigma, rest)
        is_given = (times == 0)[:, None, :, None, None]
        times = torch.where(is_given, _given_time(config), times[:, None, :, None, None])
        more["condition_mask"] = is_given.to(noisy.dtype).expand(-1, -1, -1, *noisy.shape[3:])
    if config.concat_padding_mask:
        side = (n * SPATIAL_FACTOR for n in noisy.shape[3:])
        more["padding_mask"] = noisy.new_zeros(1, 1, *side)
    return transformer(noisy, timestep=times, **rest, **more, return_dict=False)[0]


def _given_time(config: Any) -> float:
    """Time of given frames: in Predict2.5 their level, in Predict2 t of it as `s`."""
    level = torch.tensor(_GIVEN_LEVEL)
    return (level if config.use_crossattn_projection else level / (level + 1)).item()


def longest(transformer: Any) -> int:
    """The latent frames after patchify that it has positions for: rotary ones as many as the
    longest of all its axes, and learnt ones, in Cosmos 1, on the time axis."""
    config = transformer.config
    sizes = [n // side for n, side in zip(config.max_size, config.patch_size, strict=True)]
    return sizes[0] if _is_first(config) else max(sizes)


def temporal_frequencies(transformer: Any) -> Tensor:
    """(pairs,) float64: the angle of each rotary pair of the time axis per latent frame, in rad,
    at the frame rate that the pipelines pass. Always the model's own, also after
    `set_temporal_frequencies`.

    Raises:
        ValueError: Cosmos 1, which also has learnt positions.
    """
    config = transformer.config
    if _is_first(config):
        raise ValueError(
            "Cosmos 1 has learnt positions beside its rotary ones: a rule on rotary frequencies "
            "would leave them behind"
        )
    dim = _temporal_dim(config)
    base = _ROTARY_BASE * config.rope_scale[0] ** (dim / (dim - 2))
    exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return _positions_a_frame(transformer, _given_fps(config)) * base**-exponent


def set_temporal_frequencies(transformer: Any, freqs: Tensor | None) -> None:
    """Give the rotary table of this model's time axis other frequencies.

    Args:
        freqs: (pairs,) in rad per latent frame after patchify, at the frame rate that the
            pipelines pass. None: the model's own table, bit for bit as it was.
    """
    usual = _positions_a_frame(transformer, _given_fps(transformer.config))
    set_rotary(
        transformer,
        freqs,
        (_temporal_dim(transformer.config) // 2,),
        lambda stock, freqs: _TemporalRotary(stock, freqs.double().cpu() / usual),
    )


def _temporal_dim(config: Any) -> int:
    dim = config.attention_head_dim
    return dim - 4 * (dim // 6)


def _positions_a_frame(transformer: Any, rate: float | None) -> float:
    """Return how many positions a latent frame lies after the one before, at this frame rate."""
    return 1.0 if rate is None else stock_rotary(transformer).base_fps / rate


class _TemporalRotary(OtherRotary):
    """The model's rotary table with other frequencies on the time axis.

    Args:
        freqs: (pairs,) in rad a position, held as numbers, so that `.to()` does not round them.
    """

    def __init__(self, stock: Any, freqs: Tensor) -> None:
        super().__init__(stock)
        self.freqs = tuple(freqs.tolist())

    def forward(self, hidden_states: Tensor, fps: float | None = None) -> tuple[Tensor, Tensor]:
        """(tokens, head dim) each of cosines and sines, the pairs in halves."""
        stock: Any = self.stock
        cos, sin = stock(hidden_states, fps=fps)
        frames, pairs = hidden_states.shape[2] // stock.patch_size[0], len(self.freqs)
        real: Any = {"dtype": widest(cos.device), "device": cos.device}
        place = torch.arange(frames, **real) * (1.0 if fps is None else stock.base_fps / fps)
        place = place.repeat_interleave(len(cos) // frames)
        angles = torch.outer(place, torch.tensor(self.freqs, **real))
        for first in (0, cos.shape[1] // 2):
            cos[:, first : first + pairs] = angles.cos()
            sin[:, first : first + pairs] = angles.sin()
        return cos, sin
