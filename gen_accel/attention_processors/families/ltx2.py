"""LTX-2, video with sound.

Tokens of the video's self-attention are the video's, in raster order, and then the tokens of key
frames and reference videos, of any size. Self-attention of the sound, and cross-attention between
video, sound and text, are left as they are. Image prompts are added to the cross-attention of the
video and its references to the text. A mask between the video and its references, which LTX-2's
pipeline has for strengths below 1, is refused.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_accel.attention_processors.families import (
    ImageAttention,
    Preset,
    SelfAttention,
    encoded,
    ltx,
    outside_graphs,
    unguided,
)
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.families.rotary import OtherRotary, set_rotary, stock_rotary
from gen_accel.plan import widest
from gen_accel.video import VideoShape

MODELS = "LTX-2"
CLASSES = ("LTX2VideoTransformer3DModel",)
ATTENTION_CALL = "dispatch_attention_fn"
ORDER = "video, with key frames and other videos after it where they condition it"
KIND = "video"
LATENT_AXES = "tokens first"
GUIDANCE = ltx.GUIDANCE
FPS = 24  # as the pipelines call it
TAKES_FPS = True
HEADS_ALIKE = False
# 20 s, in which its positions are counted, and the longest that its pipelines choose themselves.
TRAINED_FRAMES = 481
TEMPORAL_FACTOR = ltx.TEMPORAL_FACTOR
SPATIAL_FACTOR = 32
CAUSAL_VAE = True  # the first latents of a long clip are the latents of its beginning
_SMALL = 16  # channels of the tiny model
TINY = {
    "in_channels": _SMALL,
    "out_channels": _SMALL,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "caption_channels": 8,
}
PRESETS = {"LTX-2": Preset("Lightricks/LTX-2", 18.9)}
TEXT_TOKENS = 1024
TEXT_PARTS = "text_encoder", "connectors"

# Layers by the end of their names, inside the blocks: the video's alone.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": tuple(
        f"{attention}.{name}"
        for attention in ("attn1", "attn2")
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    ),
    "feed_forward": ltx.LORA_TARGETS["feed_forward"],
}


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"time_embed|^av_cross_attn|^prompt_adaln": "one",
            r"caption_projection|attn2\.to_[kv]$": "text",
            r"video_to_audio_attn\.to_[kv]$": "video",
            r"audio_to_video_attn\.to_[kv]$": "sound",
            r"audio_to_video_attn": "video",
            r"audio": "sound",
        },
        {
            r"\.attn2\.to_q$": ("video", "text"),
            r"audio_attn2\.to_q$": ("sound", "text"),
            r"audio_attn1\.to_q$": ("sound", "sound"),
            r"audio_to_video_attn\.to_q$": ("video", "sound"),
            r"video_to_audio_attn\.to_q$": ("sound", "video"),
        },
        uncounted="the sound, and what conditions the video",
    )


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    return ltx.self_attentions(transformer)


def image_attentions(transformer: Any) -> list[ImageAttention]:
    return ltx.image_attentions(transformer)


def video_shape(
    transformer: Any,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    timestep: Tensor,
    audio_timestep: Tensor | None = None,
    sigma: Tensor | None = None,
    audio_sigma: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    audio_encoder_attention_mask: Tensor | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float = 24.0,
    audio_num_frames: int | None = None,
    video_coords: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> VideoShape:
    """Grid from the sizes that the pipeline passes, else from its coordinates.

    Reading coordinates waits for the device.

    Raises:
        ValueError: it passes neither."""
    if num_frames is not None and height is not None and width is not None:
        grid = num_frames, height, width
    elif video_coords is not None:
        grid = _grid_in(video_coords)
    else:
        raise ValueError(
            f"num_frames, height and width, or video_coords, must be given to "
            f"{type(transformer).__name__}, got {(num_frames, height, width)}: without them the "
            "grid of its tokens is unknown"
        )
    frames, rows, columns = grid
    return VideoShape(*grid, text=hidden_states.shape[1] - frames * rows * columns)


@outside_graphs
def _grid_in(video_coords: Tensor) -> tuple[int, int, int]:
    """Grid of the video, whose tokens come first. It lasts as long as each frame begins where the
    one before ends. Waits for the device.

    Args:
        video_coords: (B, 3, N, 2), where each token begins and ends in time, rows and columns.
    """
    (times, rows, _), (ends, _, _) = video_coords[0].unbind(-1)
    same_time = times == times[0]
    same_row = same_time & (rows == rows[0])
    onwards = F.pad(rows.diff() >= 0, (1, 0), value=True)
    width = int(same_row.cumprod(0).sum())
    tokens = int((same_time & onwards).cumprod(0).sum())
    starts, ends = times[::tokens].tolist(), ends[::tokens].tolist()
    frames = 1
    while frames < len(times) // tokens and starts[frames] == ends[frames - 1]:
        frames += 1
    return frames, tokens // width, width


def no_frames(
    transformer: Any, *args: Any, video_keyframes_mask: Tensor | None = None, **kwargs: Any
) -> str | None:
    """Reason why frames are not known: cross-attention has the queries of further frames too."""
    if video_keyframes_mask is not None:
        return "LTX-2's pipelines of distilled models run tile after tile"
    if video_shape(transformer, *args, **kwargs).text:
        return "LTX-2 is given key frames or videos beside the one that it makes"
    return None


no_context_parallel = ltx.no_context_parallel


def timestep(
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    timestep: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """(B,), or (B, tokens) where some frames are given (image to video)."""
    return timestep


@torch.no_grad()
def encode_video(pipe: Any, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents of zero mean and unit variance a channel, as the transformer takes them, but not yet
    in tokens."""
    latents, vae = encoded(pipe, video, generator), pipe.vae
    return pipe._normalize_latents(
        latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    )


decode_video = ltx.decode_video


@torch.no_grad()
def encode_prompt(
    pipe: Any, prompts: list[str], max_tokens: int | None = None
) -> dict[str, Tensor]:
    """Encode B prompts into the arguments that `predict` passes to the transformer, a row each:
    what the pipelines' connectors make for the video of the text encoder's layers.

    Args:
        max_tokens: the pipelines' `max_sequence_length`, a multiple of the connectors' registers;
            longer prompts are cut, shorter ones padded.

    Returns:
        encoder_hidden_states (B, max_tokens, D), in the text encoder's dtype, and
        encoder_attention_mask (B, max_tokens) int64, 0 for padding.
    """
    tokens = TEXT_TOKENS if max_tokens is None else max_tokens
    states, seen, _, _ = unguided(pipe, prompts, tokens)
    side = pipe.tokenizer.padding_side
    of_video, _, mask = pipe.connectors(states, seen, padding_side=side)
    return {"encoder_hidden_states": of_video, "encoder_attention_mask": mask}


def tiny_conditions(config: Any, tokens: int) -> dict[str, Tensor]:
    return {
        "encoder_hidden_states": torch.zeros(tokens, config.caption_channels),
        "encoder_attention_mask": torch.ones(tokens, dtype=torch.int64),
    }


def predict(
    transformer: Any, noisy: Tensor, sigma: Tensor, conditions: dict[str, Tensor]
) -> Tensor:
    """The velocity, noise - clean, of `noisy` = (1 - sigma) clean + sigma noise.

    The video is predicted without its sound: with `isolate_modalities`, no layer reads sound into
    the video, as in the pipelines' own call for the guidance of one by the other. Clips thus need
    no sound, and the attention between the two stays as it is. Sound is one token of silence,
    which the video does not depend on.

    Args:
        noisy: (B, C, f, h, w) latents.
        sigma: (B,) in [0, 1].
        conditions: from `encode_prompt`, and `fps` (B,) of the clips, by default FPS, which the
            rotary positions in time are made of.
    """
    config, batch, told = transformer.config, len(noisy), dict(conditions)
    fps = told.pop("fps", torch.full_like(sigma, FPS))
    frames, height, width = grid = noisy.shape[2:]
    width_of_text = (
        config.caption_channels
        if config.use_prompt_embeddings
        else config.audio_num_attention_heads * config.audio_attention_head_dim
    )
    velocity, _ = transformer(
        hidden_states=noisy.flatten(2).transpose(1, 2),
        audio_hidden_states=noisy.new_zeros(batch, 1, config.audio_in_channels),
        audio_encoder_hidden_states=noisy.new_zeros(batch, 1, width_of_text),
        timestep=sigma * 1000,
        sigma=sigma * 1000,
        num_frames=frames,
        height=height,
        width=width,
        fps=fps.view(-1, 1, 1),
        audio_num_frames=1,
        isolate_modalities=True,
        **told,
        return_dict=False,
    )
    return velocity.transpose(1, 2).unflatten(2, grid)


def temporal_frequencies(transformer: Any) -> Tensor:
    """(pairs,) float64: the angle of each rotary pair of the time axis per latent frame of FPS
    frames a second, in rad, over all heads. Always the model's own, also after
    `set_temporal_frequencies`."""
    return _a_frame(transformer) * ltx._rotary(stock_rotary(transformer))


def set_temporal_frequencies(transformer: Any, freqs: Tensor | None) -> None:
    """Give the rotary table of the video's self-attention other frequencies on the time axis. The
    positions by which video and sound find each other stay in seconds.

    Args:
        freqs: (pairs,) in rad per latent frame of FPS frames a second. At another rate they
            change as the model's own do. None: the model's own, bit for bit.
    """
    a_frame, pairs = _a_frame(transformer), stock_rotary(transformer).dim // 6
    set_rotary(
        transformer,
        freqs,
        (pairs,),
        lambda stock, freqs: _TemporalRotary(stock, freqs.double().cpu() / a_frame),
    )


def _a_frame(transformer: Any) -> float:
    """Return how far a latent frame lies after the one before, in halves of that range."""
    rope = stock_rotary(transformer)
    seconds = rope.scale_factors[0] * rope.patch_size_t / FPS
    return 2 * seconds / rope.base_num_frames


class _TemporalRotary(OtherRotary):
    """The model's rotary table with other frequencies on the time axis.

    Args:
        freqs: (pairs,) in rad per half of the range that positions are divided by, held as
            numbers, so that `.to()` does not round them.
    """

    def __init__(self, stock: Any, freqs: Tensor) -> None:
        super().__init__(stock)
        self.own, self.freqs = tuple(ltx._rotary(stock).tolist()), tuple(freqs.tolist())

    def prepare_video_coords(self, *args: Any, **kwargs: Any) -> Tensor:
        stock: Any = self.stock
        return stock.prepare_video_coords(*args, **kwargs)

    def forward(self, coords: Tensor, device: Any = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines in the stock's shapes.

        Args:
            coords: (B, 3, N, 2), where each token begins and ends in seconds, rows and columns; or
                (B, 3, N), its middle.
        """
        stock: Any = self.stock
        cos, sin = stock(coords, device=device)
        real: Any = {"dtype": widest(cos.device), "device": cos.device}
        own, freqs = (torch.tensor(x, **real) for x in (self.own, self.freqs))
        seconds = coords[:, 0].mean(-1) if coords.ndim == 4 else coords[:, 0]
        place = 2 * seconds.to(**real) / stock.base_num_frames
        angles = place[..., None] * freqs - own  # as the model's positions, which begin at -1
        return (
            _with_time(stock, cos, angles.cos().to(cos.dtype)),
            _with_time(stock, sin, angles.sin().to(sin.dtype)),
        )


def _with_time(stock: Any, table: Tensor, values: Tensor) -> Tensor:
    """Write the values of the time axis into a table of cosines or sines.

    Args:
        table: (B, N, dim) where `rope_type` is interleaved, the two numbers of a pair side by
            side; (B, heads, N, head dim / 2) where it is split. Of each three pairs the first is
            of time, after padding in front.
        values: (B, N, pairs).
    """
    split = stock.rope_type == "split"
    flat = (table.transpose(1, 2).flatten(2) if split else table).clone()
    numbers = 1 if split else 2  # of a pair
    padding = flat.shape[-1] - 3 * numbers * values.shape[-1]
    for place in range(numbers):
        flat[..., padding + place :: 3 * numbers] = values
    return flat.unflatten(2, (stock.num_attention_heads, -1)).transpose(1, 2) if split else flat
