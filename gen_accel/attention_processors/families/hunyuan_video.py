"""HunyuanVideo, text to video and image to video.

Video and text attend jointly, video first in raster order, text after. Texts are padded to one
length; a mask hides the padding from all. Blocks of two streams come first, then those of one, and
layers are counted through both. The token refiner, which attends over the text alone, is left as
it is.
"""

from collections.abc import Callable, Iterator, Mapping
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
    in_stacks,
    split_tokens,
    tap_joint_attention,
)
from gen_accel.attention_processors.families.given import FIRST_FRAME, in_place, pixels_of
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.families.rotary import OtherRotary, set_rotary
from gen_accel.plan import widest
from gen_accel.video import VideoShape

MODELS = "HunyuanVideo"
CLASSES = ("HunyuanVideoTransformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video, text"
KIND = "video"
FPS = 24
GUIDANCE = "sequential"

_BLOCKS = ("transformer_blocks", "single_transformer_blocks")
# Layers by the end of their names, inside the blocks: the token refiner has some of them too.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    "feed_forward": (
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("proj_mlp", "proj_out"),
    ),
}
# Its convolutions look back only, but its group norms average over all frames of a clip.
CAUSAL_VAE = False
TRAINED_FRAMES = 129  # of the videos that the published model was trained on
TEMPORAL_FACTOR = 4  # frames in a latent frame, all but the first
AUTOENCODER = "AutoencoderKLHunyuanVideo"
_SMALL = 16  # channels of the tiny model
TINY = {
    "in_channels": _SMALL,
    "out_channels": _SMALL,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 8,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
SPATIAL_FACTOR = 8
PRESETS = {"HunyuanVideo": Preset("hunyuanvideo-community/HunyuanVideo", 12.8)}
TEXT_TOKENS = 256  # as the pipelines call it
# Scale that guidance-distilled models are trained further at: 1 asks for the data as it is.
_DISTILLED_GUIDANCE = 1.0
# How a first frame is given, and every how many of its tokens the text has, as in the pipeline.
_CONCAT, _REPLACE = "latent_concat", "token_replace"
_INTERLEAVE = {_CONCAT: 2, _REPLACE: 4}
_BLACK = 64  # pixels a side of a black picture, which the text encoder's processor scales


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"time|norm|guidance": "one",
            r"context_embedder": "text",
            r"add_[qkv]_proj|to_add_out|ff_context": "text",
            r"^single_": "video + text",
        },
        {
            r"refiner_blocks.*attn\.to_q$": ("text", "text"),
        },
        beside="text",
    )


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    return in_stacks(transformer, _BLOCKS, heads, dim)


def image_attentions(transformer: Any) -> list[ImageAttention]:
    """All joint attentions, numbered through both stacks."""
    names = [f"{site.name}.attn" for site in self_attentions(transformer)]
    return image_sites(transformer, names, norm="norm_k")


def tap_image(transformer: Any, site: ImageAttention, add: ImageBranch) -> Callable[[], None]:
    return tap_joint_attention(transformer, site, ATTENTION_CALL, add)


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents, and the text with its padding; ValueError
    where patches leave a rest."""
    config = transformer.config
    patch = config.patch_size_t, config.patch_size, config.patch_size
    grid = in_patches(hidden_states.shape[2:], patch)
    return VideoShape(*grid, text=encoder_hidden_states.shape[1])


def timestep(hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(B,)"""
    return timestep


def text_lengths(
    transformer: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[int, ...]:
    """Text tokens of each sample, the padding left out, as the model counts them. Waits for the
    device."""
    return tuple(encoder_attention_mask.sum(1, dtype=torch.int).tolist())


def context_parallel(transformer: Any) -> dict[str, Any]:
    """Plan in which each process holds the whole text, as the mask of its padding covers all
    tokens."""
    split = split_tokens()
    return {
        "transformer_blocks.0": {"hidden_states": split["tokens"]},
        "transformer_blocks.*": {"freqs_cis": split["rotary"]},
        "single_transformer_blocks.*": {"image_rotary_emb": split["rotary"]},
        "proj_out": split["gathered"],
    }


def no_context_parallel(transformer: Any) -> str | None:
    if transformer.config.image_condition_type != "token_replace":
        return None
    return "image_condition_type='token_replace' treats the first tokens apart"


@torch.no_grad()
def encode_video(pipe: Any, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents scaled as the transformer takes them."""
    latents, config = encoded(pipe, video, generator), pipe.vae.config
    return latents * config.scaling_factor


def decode_video(pipe: Any, latents: Tensor) -> Tensor:
    """Pixels of latents scaled as the transformer takes them."""
    return decoded(pipe, latents / pipe.vae.config.scaling_factor)


@torch.no_grad()
def encode_prompt(
    pipe: Any, prompts: list[str], max_tokens: int | None = None
) -> dict[str, Tensor]:
    """Encode B prompts into the arguments that `predict` passes to the transformer, a row each.

    Args:
        max_tokens: the pipelines' `max_sequence_length`, the prompt's template not counted; longer
            prompts are cut, shorter ones padded.

    Returns:
        encoder_hidden_states (B, max_tokens, D) and pooled_projections (B, P), in the dtypes of
        their text encoders, and encoder_attention_mask (B, max_tokens) int64, 0 for padding.
    """
    states, pooled, mask = pipe.encode_prompt(
        list(prompts),
        max_sequence_length=TEXT_TOKENS if max_tokens is None else max_tokens,
        device=next(pipe.text_encoder.parameters()).device,
    )
    return {
        "encoder_hidden_states": states,
        "encoder_attention_mask": mask,
        "pooled_projections": pooled,
    }


def prompt_arguments(
    pipe: Any, prompt: str, *, is_guided: bool, negative: str | None, max_tokens: int
) -> dict[str, Tensor]:
    """Encode a prompt as `HunyuanVideoPipeline` does; its guidance needs no negative one."""
    states, pooled, mask = pipe.encode_prompt(
        prompt,
        max_sequence_length=max_tokens,
        device=next(pipe.text_encoder.parameters()).device,
    )
    return {
        "prompt_embeds": states,
        "pooled_prompt_embeds": pooled,
        "prompt_attention_mask": mask,
    }


def latent_channels(config: Any) -> int:
    concat = config.image_condition_type == _CONCAT
    return (config.in_channels - 1) // 2 if concat else config.in_channels


@torch.no_grad()
def first_frame(pipe: Any, transformer: Any, image: Any, frames: int) -> dict[str, Tensor]:
    """Latents of the first frame alone, (C, 1, h, w)."""
    latents = encoded(pipe, pixels_of(pipe, image), None) * pipe.vae.config.scaling_factor
    return {FIRST_FRAME: latents[0]}


def given_latents(transformer: Any) -> int:
    """Number of latents that the first frame replaces: 0 where it has channels of its own."""
    return 1 if transformer.config.image_condition_type == _REPLACE else 0


@torch.no_grad()
def encode_prompt_with(
    pipe: Any, transformer: Any, image: Any, prompt: str, max_tokens: int | None = None
) -> dict[str, Tensor]:
    """Encode a prompt that the text encoder, a model of text and pictures, reads with the first
    frame.

    Args:
        image: the frame; None for a black one, as the pipeline has it for its negative prompts.
        max_tokens: as for `encode_prompt`; tokens of the frame come in front.
    """
    from PIL import Image

    interleave = _INTERLEAVE[transformer.config.image_condition_type]
    states, pooled, mask = pipe.encode_prompt(
        image=Image.new("RGB", (_BLACK, _BLACK)) if image is None else image,
        prompt=[prompt],
        max_sequence_length=TEXT_TOKENS if max_tokens is None else max_tokens,
        device=next(pipe.text_encoder.parameters()).device,
        image_embed_interleave=interleave,
    )
    return {
        "encoder_hidden_states": states,
        "encoder_attention_mask": mask,
        "pooled_projections": pooled,
    }


def tiny_from_frame(config: Mapping[str, Any]) -> dict[str, Any]:
    kind = config.get("image_condition_type")
    channels = 2 * _SMALL + 1 if kind == _CONCAT else _SMALL
    return {"image_condition_type": kind, "in_channels": channels}


def inputs(transformer: Any, video: VideoShape, text: int, batch: int) -> dict[str, Any]:
    config, like = transformer.config, {"device": transformer.device, "dtype": transformer.dtype}
    patch = config.patch_size_t, config.patch_size, config.patch_size
    frames, rows, columns = (n * p for n, p in zip(video.grid, patch, strict=True))
    given = {
        "hidden_states": torch.zeros(batch, config.in_channels, frames, rows, columns, **like),
        "timestep": torch.zeros(batch, **like),
        "encoder_hidden_states": torch.zeros(batch, text, config.text_embed_dim, **like),
        "encoder_attention_mask": torch.ones(
            batch, text, dtype=torch.int64, device=transformer.device
        ),
        "pooled_projections": torch.zeros(batch, config.pooled_projection_dim, **like),
    }
    if config.guidance_embeds:
        given["guidance"] = torch.zeros(batch, **like)
    return given


def tiny_conditions(config: Any, tokens: int) -> dict[str, Tensor]:
    return {
        "encoder_hidden_states": torch.zeros(tokens, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(tokens, dtype=torch.int64),
        "pooled_projections": torch.zeros(config.pooled_projection_dim),
    }


def predict(
    transformer: Any, noisy: Tensor, sigma: Tensor, conditions: dict[str, Tensor]
) -> Tensor:
    """The velocity, noise - clean, of `noisy` = (1 - sigma) clean + sigma noise.

    Args:
        noisy: (B, C, f, h, w) latents.
        sigma: (B,) in [0, 1].
        conditions: from `encode_prompt` and `first_frame`. Guidance-distilled models take
            `guidance` (B,), 1000 times the scale, instead of `_DISTILLED_GUIDANCE`.
    """
    if FIRST_FRAME in conditions:
        noisy, conditions = _with_first_frame(transformer, noisy, conditions)
    if transformer.config.guidance_embeds and "guidance" not in conditions:
        guidance = torch.full_like(sigma, 1000 * _DISTILLED_GUIDANCE)
        conditions = {**conditions, "guidance": guidance}
    return transformer(noisy, timestep=sigma * 1000, **conditions, return_dict=False)[0]


def _with_first_frame(
    transformer: Any, noisy: Tensor, conditions: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Put the first frame in the place of the first latent, whose timestep the model sets to 0, or
    beside the noisy latents, with a mask that is 1 for it."""
    if transformer.config.image_condition_type == _REPLACE:
        noisy, _, rest = in_place(noisy, noisy.new_zeros(len(noisy)), conditions)
        return noisy, rest
    rest = dict(conditions)
    frame = rest.pop(FIRST_FRAME).to(noisy.dtype)
    beside = noisy.new_zeros(len(noisy), frame.shape[1] + 1, *noisy.shape[2:])
    beside[:, :-1, :1], beside[:, -1:, :1] = frame, 1
    return torch.cat([noisy, beside], 1), rest


def temporal_frequencies(transformer: Any) -> Tensor:
    """(pairs,) float64: the angle of each rotary pair of the time axis per latent frame, in rad.
    Always the model's own, also after `set_temporal_frequencies`."""
    config = transformer.config
    dim = config.rope_axes_dim[0]
    exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return config.rope_theta**-exponent


def set_temporal_frequencies(transformer: Any, freqs: Tensor | None) -> None:
    """Give the rotary table of this model's time axis other frequencies.

    Args:
        freqs: (pairs,) in rad per latent frame after patchify. None: the model's own table, bit
            for bit as it was.
    """
    pairs = transformer.config.rope_axes_dim[0] // 2
    set_rotary(transformer, freqs, (pairs,), _TemporalRotary)


class _TemporalRotary(OtherRotary):
    """The model's rotary table with other frequencies on the time axis.

    Args:
        freqs: (pairs,), held as numbers, so that `.to()` does not round them.
    """

    def __init__(self, stock: Any, freqs: Tensor) -> None:
        super().__init__(stock)
        self.freqs = tuple(freqs.tolist())

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, head dim) each of cosines and sines."""
        stock: Any = self.stock
        cos, sin = stock(hidden_states)
        frames = hidden_states.shape[2] // stock.patch_size_t
        real: Any = {"dtype": widest(cos.device), "device": cos.device}
        frame = torch.arange(frames, **real).repeat_interleave(len(cos) // frames)
        angles = torch.outer(frame, torch.tensor(self.freqs, **real))
        angles = angles.repeat_interleave(2, 1)
        rest = angles.shape[1]
        return (
            torch.cat([angles.cos().to(cos.dtype), cos[:, rest:]], 1),
            torch.cat([angles.sin().to(sin.dtype), sin[:, rest:]], 1),
        )


def decode_parts(vae: Any) -> Callable[[Any, Tensor], Iterator[Tensor]] | None:
    """Return a decoder of the autoencoder's overlapping windows in time, unless these are
    disabled. It decodes and blends the same windows, and yields frames once no later window
    changes them."""
    return _blended_windows if vae.use_framewise_decoding else None


def _blended_windows(vae: Any, z: Tensor) -> Iterator[Tensor]:
    """Blend each window into the end of the one before, as `_temporal_tiled_decode` does."""
    factor, frames = vae.temporal_compression_ratio, z.shape[2]
    window = vae.tile_sample_min_num_frames // factor
    stride = vae.tile_sample_stride_num_frames
    overlap = vae.tile_sample_min_num_frames - stride
    if frames <= window:
        yield vae.decode(z, return_dict=False)[0]
        return
    rows = vae.tile_sample_min_height // vae.spatial_compression_ratio
    columns = vae.tile_sample_min_width // vae.spatial_compression_ratio
    tiled = vae.use_tiling and (z.shape[-1] > columns or z.shape[-2] > rows)
    left, before = (frames - 1) * factor + 1, None
    for i in range(0, frames, stride // factor):
        part = z[:, :, i : i + window + 1]
        if tiled:
            pixels = vae.tiled_decode(part, return_dict=True).sample
        else:
            pixels = vae.decoder(vae.post_quant_conv(part))
        if before is None:
            done = pixels[:, :, : stride + 1]
        else:
            pixels = vae.blend_t(before, pixels[:, :, 1:], overlap)
            done = pixels[:, :, :stride]
        done, before = done[:, :, :left], pixels
        left -= done.shape[2]
        if done.shape[2]:
            yield done
