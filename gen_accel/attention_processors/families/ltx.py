"""LTX-Video.

Tokens are the video's, in raster order; text is seen by cross-attention. They come as a row, with
the sizes of their grid, or with the time and place of each. In the second case, conditioning
frames may stand before or after the video: whole frames at times of the grid, but no part of it.
Rotary positions are in seconds and pixels. Their frequencies lie densely over the width of the
model, so that each head has others.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    ImageAttention,
    Preset,
    SelfAttention,
    decoded,
    encoded,
    image_sites,
    outside_graphs,
    standardised,
    unguided,
    unstandardised,
)
from gen_accel.attention_processors.families.given import FIRST_FRAME, in_place, pixels_of
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.families.rotary import OtherRotary, set_rotary, stock_rotary
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.plan import widest
from gen_accel.video import VideoShape

MODELS = "LTX-Video"
CLASSES = ("LTXVideoTransformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video, with other frames before or after it where they condition it"
KIND = "video"
LATENT_AXES = "tokens last"
FPS = 25  # as the pipelines call it
TAKES_FPS = True
HEADS_ALIKE = False
GUIDANCE = "batched"
TRAINED_FRAMES = 257  # most that its model card advises
TEMPORAL_FACTOR = 8  # frames in a latent frame, all but the first
SPATIAL_FACTOR = 32
PRESETS = {"LTX-Video": Preset("Lightricks/LTX-Video", 1.92)}
TEXT_TOKENS = 128
CAUSAL_VAE = True  # the first latents of a long clip are the latents of its beginning
_SMALL = 16  # channels of the tiny model
TINY = {
    "in_channels": _SMALL,
    "out_channels": _SMALL,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 8,
}

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"time": "one",
            r"caption_projection|attn2\.to_[kv]$": "text",
        },
        {
            r"attn2\.to_q$": ("video", "text"),
        },
        uncounted="frames that condition the video",
    )


def inputs(transformer: Any, video: VideoShape, text: int, batch: int) -> dict[str, Any]:
    config, like = transformer.config, {"device": transformer.device, "dtype": transformer.dtype}
    width = config.caption_channels
    return {
        "hidden_states": torch.zeros(batch, video.video_tokens, config.in_channels, **like),
        "timestep": torch.zeros(batch, **like),
        "encoder_hidden_states": torch.zeros(batch, text, width, **like),
        "encoder_attention_mask": torch.ones(batch, text, **like),
        "num_frames": video.frames,
        "height": video.height,
        "width": video.width,
    }


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
    names = [f"transformer_blocks.{i}.attn2" for i in blocks]
    return image_sites(transformer, names, norm="norm_k")


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    encoder_attention_mask: Tensor,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rope_interpolation_scale: Any = None,
    video_coords: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """Grid from the coordinates that the pipeline passes, else from its sizes.

    Reading coordinates waits for the device.

    Raises:
        ValueError: it passes neither, or coordinates that form no grid."""
    if video_coords is not None:
        return _in_coordinates(video_coords).video
    if num_frames is None or height is None or width is None:
        raise ValueError(
            f"num_frames, height and width, or video_coords, must be given to "
            f"{type(transformer).__name__}, got {(num_frames, height, width)}: without them the "
            "grid of its tokens is unknown"
        )
    return VideoShape(num_frames, height, width)


def before(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    encoder_attention_mask: Tensor,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rope_interpolation_scale: Any = None,
    video_coords: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Number of tokens of the frames before the video."""
    return 0 if video_coords is None else _in_coordinates(video_coords).before


@outside_graphs
def _in_coordinates(video_coords: Tensor) -> Tokens:
    """Find the video among whole frames of one size. The video begins at time 0, and lasts as long
    as the time rises from frame to frame. Waits for the device.

    Args:
        video_coords: (B, 3, N), time, row and column of each token in any units.
    """
    times, rows, columns = video_coords[0]
    height, width = len(rows.unique()), len(columns.unique())
    starts = times[:: height * width].tolist()
    if len(times) % (height * width) or 0 not in starts:
        raise ValueError(
            "video_coords must be those of whole frames, the first of the video at time 0, got "
            f"{len(times)} tokens of {height} rows and {width} columns from times {starts}"
        )
    first = starts.index(0)
    last = first + 1
    while last < len(starts) and starts[last] > starts[last - 1]:
        last += 1
    others = (len(starts) - (last - first)) * height * width
    return Tokens(VideoShape(last - first, height, width, others), first * height * width)


def no_frames(transformer: Any, *args: Any, **kwargs: Any) -> str | None:
    """Reason why frames are not known: cross-attention has the queries of further frames too."""
    if video_shape(transformer, *args, **kwargs).text:
        return "LTX-Video is given further frames beside those of the video"
    return None


def no_context_parallel(transformer: Any) -> str:
    return "the mask of its text is made for all heads, while a process attends for some"


def timestep(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,), or (B, tokens) where some frames are given (image to video)."""
    return timestep


@torch.no_grad()
def encode_video(pipe: Any, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents of zero mean and unit variance a channel, as the pipelines pack them for the
    transformer."""
    vae = pipe.vae
    latents = encoded(pipe, video, generator)
    return standardised(latents, vae.latents_mean, vae.latents_std) * vae.config.scaling_factor


def decode_video(pipe: Any, latents: Tensor) -> Tensor:
    """Pixels of latents of zero mean and unit variance a channel. An autoencoder that also removes
    noise is told that there is none, as the pipelines tell it by default."""
    vae, time = pipe.vae, None
    if vae.config.timestep_conditioning:
        time = torch.zeros(len(latents), device=latents.device)
    latents = latents / vae.config.scaling_factor
    return decoded(pipe, unstandardised(latents, vae.latents_mean, vae.latents_std), time)


@torch.no_grad()
def first_frame(pipe: Any, transformer: Any, image: Any, frames: int) -> dict[str, Tensor]:
    """Latents of the first frame alone, (C, 1, h, w): the mode, where the pipeline draws."""
    vae, latents = pipe.vae, encoded(pipe, pixels_of(pipe, image), None)
    return {FIRST_FRAME: standardised(latents, vae.latents_mean, vae.latents_std)[0]}


def given_latents(transformer: Any) -> int:
    return 1


def tiny_from_frame(config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


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
        encoder_attention_mask (B, max_tokens) bool, False for padding.
    """
    states, mask, *_ = unguided(pipe, prompts, TEXT_TOKENS if max_tokens is None else max_tokens)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def tiny_conditions(config: Any, tokens: int) -> dict[str, Tensor]:
    return {
        "encoder_hidden_states": torch.zeros(tokens, config.caption_channels),
        "encoder_attention_mask": torch.ones(tokens, dtype=torch.bool),
    }


def predict(
    transformer: Any, noisy: Tensor, sigma: Tensor, conditions: dict[str, Tensor]
) -> Tensor:
    """The velocity, noise - clean, of `noisy` = (1 - sigma) clean + sigma noise.

    Args:
        noisy: (B, C, f, h, w) latents.
        sigma: (B,) in [0, 1].
        conditions: from `encode_prompt` and `first_frame`, and `fps` (B,) of the clips, by
            default FPS, which the rotary positions in time are made of.
    """
    from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline

    timestep, told, patch = sigma * 1000, dict(conditions), transformer.config.patch_size
    patches = {"patch_size": patch, "patch_size_t": transformer.config.patch_size_t}
    frames, height, width = noisy.shape[2:]
    grid = {
        "num_frames": frames // patches["patch_size_t"],
        "height": height // patch,
        "width": width // patch,
    }
    if FIRST_FRAME in told:
        noisy, times, told = in_place(noisy, timestep, told)
        timestep = times.repeat_interleave(grid["height"] * grid["width"], 1)
    fps = told.pop("fps", torch.full_like(sigma, FPS)).float().view(-1, 1, 1, 1, 1)
    said = transformer(
        LTXPipeline._pack_latents(noisy, **patches),
        timestep=timestep,
        **told,
        **grid,
        rope_interpolation_scale=(TEMPORAL_FACTOR / fps, SPATIAL_FACTOR, SPATIAL_FACTOR),
        return_dict=False,
    )
    return LTXPipeline._unpack_latents(said[0], **grid, **patches)


def temporal_frequencies(transformer: Any) -> Tensor:
    """(pairs,) float64: the angle of each rotary pair of the time axis per latent frame of FPS
    frames a second, in rad, over all heads. Always the model's own, also after
    `set_temporal_frequencies`."""
    rope = stock_rotary(transformer)
    a_second = 2 * _rotary(rope) / rope.base_num_frames  # the grid goes from -1
    return a_second * TEMPORAL_FACTOR * transformer.config.patch_size_t / FPS


def set_temporal_frequencies(transformer: Any, freqs: Tensor | None) -> None:
    """Give the rotary table of this model's time axis other frequencies.

    Args:
        freqs: (pairs,) in rad per latent frame of FPS frames a second. At another rate they
            change as the model's own do. None: the model's own, bit for bit.
    """
    own = temporal_frequencies(transformer)
    set_rotary(
        transformer,
        freqs,
        own.shape,
        lambda stock, freqs: _TemporalRotary(stock, freqs.to(own) / own),
    )


def _rotary(rope: Any) -> Tensor:
    """(pairs,) float64: rad per half of the range that positions are divided by."""
    spread = torch.linspace(0, 1, rope.dim // 6, dtype=torch.float64)
    return rope.theta**spread * math.pi / 2


class _TemporalRotary(OtherRotary):
    """The model's rotary table with other frequencies on the time axis.

    Args:
        ratios: (pairs,) of the frequencies to the model's own. Pairs of ratio 1 are not touched.
    """

    def __init__(self, stock: Any, ratios: Tensor) -> None:
        super().__init__(stock)
        changed = (ratios != 1).nonzero().flatten()
        # Held as numbers, so that `.to()` does not round them.
        self.pairs = tuple(changed.tolist())
        own = _rotary(stock)[changed]
        self.own, self.made = tuple(own.tolist()), tuple((own * ratios[changed]).tolist())

    def forward(
        self,
        hidden_states: Tensor,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        rope_interpolation_scale: Any = None,
        video_coords: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, tokens, width) each of cosines and sines."""
        stock: Any = self.stock
        sizes = num_frames, height, width, rope_interpolation_scale
        cos, sin = stock(hidden_states, *sizes, video_coords)
        if video_coords is None:
            batch, device = hidden_states.shape[0], hidden_states.device
            time = stock._prepare_video_coords(batch, *sizes, device)[..., 0]
        else:
            time = video_coords[:, 0] / stock.base_num_frames
        real: Any = {"dtype": widest(cos.device), "device": cos.device}
        own, made = (torch.tensor(x, **real) for x in (self.own, self.made))
        angles = (2 * time[..., None].to(**real) * made - own).repeat_interleave(2, -1)
        # Pairs come axis by axis, after columns that are left over.
        first = stock.dim % 6 + 6 * torch.tensor(self.pairs, device=cos.device)
        columns = torch.stack([first, first + 1], 1).flatten()
        return (
            cos.index_copy(-1, columns, angles.cos().to(cos.dtype)),
            sin.index_copy(-1, columns, angles.sin().to(sin.dtype)),
        )
