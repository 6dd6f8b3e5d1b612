"""Mochi 1.

Video and text attend jointly, video first, in a call of its own for each sample, which leaves the
padding of its text out. Time runs from noise to video, and so does the velocity. Rotary
frequencies are learned, others for each head.
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
    decoded,
    encoded,
    image_sites,
    in_patches,
    standardised,
    tap_joint_attention,
    unguided,
    unstandardised,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.families.rotary import OtherRotary, set_rotary
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
TRAINED_FRAMES = 163  # of the videos that the published model was trained on
HEADS_ALIKE = False
TEMPORAL_FACTOR = 6  # frames in a latent frame, all but the first
SPATIAL_FACTOR = 8
PRESETS = {"mochi-1-preview": Preset("genmo/mochi-1-preview", 10.0)}
TEXT_TOKENS = 256
CAUSAL_VAE = True  # the first latents of a long clip are the latents of its beginning
_SMALL = 16  # channels of the tiny model
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "pooled_projection_dim": 16,
    "in_channels": _SMALL,
    "text_embed_dim": 8,
    "time_embed_dim": 8,
}

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


@torch.no_grad()
def encode_video(pipe: Any, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents of zero mean and unit variance a channel, as the transformer takes them."""
    latents, config = encoded(pipe, video, generator), pipe.vae.config
    if config.latents_mean is not None and config.latents_std is not None:
        latents = standardised(latents, config.latents_mean, config.latents_std)
    return latents * config.scaling_factor


def decode_video(pipe: Any, latents: Tensor) -> Tensor:
    """Pixels of latents of zero mean and unit variance a channel."""
    config, latents = pipe.vae.config, latents / pipe.vae.config.scaling_factor
    if config.latents_mean is not None and config.latents_std is not None:
        latents = unstandardised(latents, config.latents_mean, config.latents_std)
    return decoded(pipe, latents)


@torch.no_grad()
def encode_prompt(
    pipe: Any, prompts: list[str], max_tokens: int | None = None
) -> dict[str, Tensor]:
    """Encode B prompts into the arguments that `predict` passes to the transformer, a row each.

    Args:
        max_tokens: the pipelines' `max_sequence_length`; longer prompts are cut, shorter ones
            padded.

    Returns:
        encoder_hidden_states (B, max_tokens, D), in the text encoder's dtype, and
        encoder_attention_mask (B, max_tokens) bool, False for padding, and everywhere for the
        empty prompt where the pipeline zeroes it.
    """
    tokens = TEXT_TOKENS if max_tokens is None else max_tokens
    # One at a time: an empty prompt at the end makes the pipeline zero all of a call.
    each = [unguided(pipe, [prompt], tokens)[:2] for prompt in prompts]
    states, masks = zip(*each, strict=True)
    return {
        "encoder_hidden_states": torch.cat(states),
        "encoder_attention_mask": torch.cat(masks),
    }


def tiny_conditions(config: Any, tokens: int) -> dict[str, Tensor]:
    return {
        "encoder_hidden_states": torch.zeros(tokens, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(tokens, dtype=torch.bool),
    }


def predict(
    transformer: Any, noisy: Tensor, sigma: Tensor, conditions: dict[str, Tensor]
) -> Tensor:
    """The velocity, noise - clean, of `noisy` = (1 - sigma) clean + sigma noise.

    Args:
        noisy: (B, C, f, h, w) latents.
        sigma: (B,) in [0, 1].
        conditions: from `encode_prompt`.
    """
    time = (1 - sigma) * 1000
    return -transformer(noisy, timestep=time, **conditions, return_dict=False)[0]


def temporal_frequencies(transformer: Any) -> Tensor:
    """(heads, pairs) float64: the angle of each rotary pair per latent frame, in rad. Always the
    model's own, also after `set_temporal_frequencies`."""
    return transformer.pos_frequencies[0].detach().double().cpu()


def set_temporal_frequencies(transformer: Any, freqs: Tensor | None) -> None:
    """Give the rotary table of this model's time axis other frequencies.

    Args:
        freqs: (heads, pairs) in rad per latent frame. None: the model's own, bit for bit.
    """
    set_rotary(transformer, freqs, transformer.pos_frequencies.shape[1:], _TemporalRotary)


class _TemporalRotary(OtherRotary):
    """The model's rotary table with other frequencies on the time axis.

    Args:
        freqs: (heads, pairs), held as numbers, so that `.to()` does not round them.
    """

    def __init__(self, stock: nn.Module, freqs: Tensor) -> None:
        super().__init__(stock)
        self.freqs = tuple(tuple(row) for row in freqs.tolist())

    def forward(self, pos_frequencies: Tensor, *sizes: Any, **like: Any) -> tuple[Tensor, Tensor]:
        """(tokens, heads, pairs) each of cosines and sines."""
        freqs = pos_frequencies.float()  # as the table is made
        made = torch.tensor([self.freqs], dtype=freqs.dtype, device=freqs.device)
        return self.stock(torch.cat([made, freqs[1:]]), *sizes, **like)
