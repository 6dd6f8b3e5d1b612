"""Wan 2.1 and 2.2, text to video, image to video, and VACE.

Tokens are the video's alone, in raster order; text and image are seen by cross-attention. VACE's
control blocks run over the same grid, of which its reference images are the first frames.
"""

from collections.abc import Callable, Iterator, Mapping
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
    in_patches,
    split_tokens,
    standardised,
    unguided,
    unstandardised,
)
from gen_accel.attention_processors.families.given import FIRST_FRAME, in_place, pixels_of
from gen_accel.attention_processors.families.layers import Layers
from gen_accel.attention_processors.families.rotary import check_shape
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
_ROTARY_BASE = 10_000.0  # of all published models; no configuration holds it

# Layers by the end of their names, inside the blocks.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ffn.net.0.proj", "ffn.net.2"),
}
CAUSAL_VAE = True  # the first latents of a long clip are the latents of its beginning
AUTOENCODER = "AutoencoderKLWan"
_SMALL = 16  # channels of the tiny model
TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": _SMALL,
    "out_channels": _SMALL,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "rope_max_seq_len": 64,
}
SPATIAL_FACTOR = 8
# Defaults of the class are for 14B.
PRESETS = {
    "Wan2.1-T2V-1.3B": Preset(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        1.42,
        {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    ),
    "Wan2.1-T2V-14B": Preset("Wan-AI/Wan2.1-T2V-14B-Diffusers", 14.3),
    "Wan2.1-I2V-14B": Preset(
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        16.4,
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    "Wan2.2-T2V-A14B": Preset("Wan-AI/Wan2.2-T2V-A14B-Diffusers", 14.3),
    "Wan2.2-TI2V-5B": Preset(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        5.0,
        {
            "num_attention_heads": 24,
            "num_layers": 30,
            "ffn_dim": 14336,
            "in_channels": 48,
            "out_channels": 48,
        },
    ),
}
TEXT_TOKENS = 512  # as the pipelines call it; `encode_prompt` on its own has another default


def layers(transformer: Any) -> Layers:
    return Layers(
        {
            r"text_embedder|attn2\.to_[kv]$": "text",
            r"image_embedder|attn2\.add_[kv]_proj$": "image",
            r"time": "one",
        },
        {
            r"attn2\.to_q$": ("video", "text + image"),
        },
        lengths={"image": _image_tokens(transformer.config)},
        uncounted="the timestep of each token" if _is_ti2v(transformer) else "",
    )


def inputs(transformer: Any, video: VideoShape, text: int, batch: int) -> dict[str, Any]:
    config, like = transformer.config, {"device": transformer.device, "dtype": transformer.dtype}
    frames, rows, columns = (n * p for n, p in zip(video.grid, config.patch_size, strict=True))
    given = {
        "hidden_states": torch.zeros(batch, config.in_channels, frames, rows, columns, **like),
        "timestep": torch.zeros(batch, **like),
        "encoder_hidden_states": torch.zeros(batch, text, config.text_dim, **like),
    }
    if _is_ti2v(transformer):
        given["timestep"] = torch.zeros(batch, video.video_tokens, **like)
    if images := _image_tokens(config):
        states = torch.zeros(batch, images, config.image_dim, **like)
        given["encoder_hidden_states_image"] = states
    return given


def _image_tokens(config: Any) -> int:
    """Number of CLIP's image tokens that cross-attention sees beside the text."""
    return 0 if config.added_kv_proj_dim is None else config.pos_embed_seq_len or 257


def trained_frames(transformer: Any) -> int:
    """Number of frames of the videos that it was trained on. The 5B model of Wan 2.2 takes 24
    frames a second, and is recognised by the channels of its latents."""
    return _TI2V_FRAMES if _is_ti2v(transformer) else TRAINED_FRAMES


def fps(transformer: Any) -> int:
    return _TI2V_FPS if _is_ti2v(transformer) else FPS


def spatial_factor(transformer: Any) -> int:
    """Pixels a side in a latent. The autoencoder of the 5B model halves the sides once more."""
    return 2 * SPATIAL_FACTOR if _is_ti2v(transformer) else SPATIAL_FACTOR


def _is_ti2v(transformer: Any) -> bool:
    return transformer.config.in_channels == _TI2V_CHANNELS


def self_attentions(transformer: nn.Module) -> list[SelfAttention]:
    config: Any = transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    return [
        SelfAttention(f"{stack}.{layer}", block.attn1, layer, heads, dim)
        for stack in ("blocks", "vace_blocks")
        for layer, block in enumerate(getattr(transformer, stack, ()))
    ]


def image_attentions(transformer: Any) -> list[ImageAttention]:
    """Cross-attentions of the blocks, without VACE's control blocks."""
    names = [f"blocks.{i}.attn2" for i in range(len(transformer.blocks))]
    return image_sites(transformer, names, norm="norm_k")


def video_shape(transformer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> VideoShape:
    """The grid of (B, C, frames, height, width) latents; ValueError where patches leave a rest."""
    return VideoShape(*in_patches(hidden_states.shape[2:], transformer.config.patch_size))


def no_frames(transformer: Any, *args: Any, **kwargs: Any) -> str | None:
    """Reason why frames are not known with VACE's reference images. They come before the video in
    unknown number. They are recognised by zeros in the control latents and mask, which no encoded
    video has. Waits for the device."""
    control = kwargs.get("control_hidden_states")
    if control is None or control[:, transformer.config.in_channels :, 0].any():
        return None
    return "VACE puts its reference images before the frames of the video"


def timestep(hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(B,), or (B, tokens) where each token has its own (Wan 2.2 TI2V-5B)."""
    return timestep


def context_parallel(transformer: Any) -> dict[str, Any] | None:
    """Plan for VACE; for Wan itself diffusers has one."""
    if not hasattr(transformer, "vace_blocks"):
        return None
    split = split_tokens()
    both = {"hidden_states": split["tokens"], "control_hidden_states": split["tokens"]}
    return {
        "rope": _split_rotary(),
        "vace_blocks.0": both,
        "blocks.0": {"hidden_states": split["tokens"]},
        "proj_out": split["gathered"],
    }


def _split_rotary() -> dict[int, Any]:
    """Cosines and sines (1, N, 1, dim), as they leave their module."""
    from diffusers.models._modeling_parallel import ContextParallelInput

    return {i: ContextParallelInput(1, expected_dims=4, split_output=True) for i in range(2)}


@torch.no_grad()
def encode_video(pipe: Any, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents of zero mean and unit variance a channel, as the transformer takes them."""
    config = pipe.vae.config
    return standardised(encoded(pipe, video, generator), config.latents_mean, config.latents_std)


def decode_video(pipe: Any, latents: Tensor) -> Tensor:
    """Pixels of latents of zero mean and unit variance a channel."""
    config = pipe.vae.config
    return decoded(pipe, unstandardised(latents, config.latents_mean, config.latents_std))


@torch.no_grad()
def encode_prompt(
    pipe: Any, prompts: list[str], max_tokens: int | None = None
) -> dict[str, Tensor]:
    """Encode B prompts into the arguments that `predict` passes to the transformer, a row each.

    Args:
        max_tokens: the pipelines' `max_sequence_length`; longer prompts are cut, shorter ones
            filled with zeros, which cross-attention sees.

    Returns:
        encoder_hidden_states (B, max_tokens, D), in the text encoder's dtype.
    """
    states, _ = unguided(pipe, prompts, TEXT_TOKENS if max_tokens is None else max_tokens)
    return {"encoder_hidden_states": states}


def prompt_arguments(
    pipe: Any, prompt: str, *, is_guided: bool, negative: str | None, max_tokens: int
) -> dict[str, Tensor]:
    """Encode a prompt, and with guidance the negative one, as `WanPipeline` does."""
    states, unwanted = pipe.encode_prompt(
        prompt,
        negative,
        do_classifier_free_guidance=is_guided,
        max_sequence_length=max_tokens,
        device=next(pipe.text_encoder.parameters()).device,
    )
    found = {"prompt_embeds": states}
    return found | ({"negative_prompt_embeds": unwanted} if is_guided else {})


def tiny_conditions(config: Any, tokens: int) -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.zeros(tokens, config.text_dim)}


def latent_channels(config: Any) -> int:
    return config.out_channels if _takes_frames(config) else config.in_channels


@torch.no_grad()
def first_frame(pipe: Any, transformer: Any, image: Any, frames: int) -> dict[str, Tensor]:
    """Latents of the first frame, and CLIP's features of it where the model takes them.

    Models with channels for the frames to keep take the latents of a clip that is grey after its
    first frame. The autoencoder is causal, so that they are cut to the latents of a shorter clip.
    Wan 2.2 TI2V-5B takes the latents of the frame alone, in the place of the first noisy ones.
    """
    config, video = transformer.config, pixels_of(pipe, image)
    if _takes_frames(config):
        rest = video.new_zeros(*video.shape[:2], frames - 1, *video.shape[3:])
        video = torch.cat([video, rest], 2)
    latents, scale = encoded(pipe, video, None), pipe.vae.config
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (scale.latents_mean, scale.latents_std)
    )
    found = {FIRST_FRAME: ((latents - mean) * (1.0 / std))[0]}  # rounded as the pipeline does
    if config.image_dim is not None:
        device = next(pipe.image_encoder.parameters()).device
        found["encoder_hidden_states_image"] = pipe.encode_image(image, device)[0]
    return found


def given_latents(transformer: Any) -> int:
    """Number of latents that the first frame replaces: 0 where it has channels of its own."""
    return 0 if _takes_frames(transformer.config) else 1


def _takes_frames(config: Any) -> bool:
    """Whether there are channels for the frames to keep, beside the noisy latents."""
    return config.in_channels > (config.out_channels or config.in_channels)


def tiny_from_frame(config: Mapping[str, Any]) -> dict[str, Any]:
    channels = config.get("in_channels", _SMALL)
    if channels <= (config.get("out_channels") or channels):
        return {}
    tiny: dict[str, Any] = {"in_channels": 2 * _SMALL + TEMPORAL_FACTOR}
    if config.get("image_dim") is not None:
        tiny |= {"image_dim": 8, "added_kv_proj_dim": 32}
    return tiny


def tiny_first_frame(transformer: Any, frames: int, height: int, width: int) -> dict[str, Tensor]:
    config = transformer.config
    own = frames if _takes_frames(config) else 1
    found = {FIRST_FRAME: torch.zeros(latent_channels(config), own, height, width)}
    if config.image_dim is not None:
        found["encoder_hidden_states_image"] = torch.zeros(_image_tokens(config), config.image_dim)
    return found


def predict(
    transformer: Any, noisy: Tensor, sigma: Tensor, conditions: dict[str, Tensor]
) -> Tensor:
    """The velocity, noise - clean, of `noisy` = (1 - sigma) clean + sigma noise.

    Args:
        noisy: (B, C, f, h, w) latents.
        sigma: (B,) in [0, 1].
        conditions: from `encode_prompt` and `first_frame`.
    """
    timestep = sigma * 1000
    if FIRST_FRAME in conditions:
        given = _with_frames if _takes_frames(transformer.config) else _in_tokens
        noisy, timestep, conditions = given(transformer, noisy, timestep, conditions)
    return transformer(noisy, timestep=timestep, **conditions, return_dict=False)[0]


def _with_frames(
    transformer: Any, noisy: Tensor, timestep: Tensor, conditions: dict[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Add the channels of the frames to keep: a mask, 1 for the frames that are there, and their
    latents."""
    rest = dict(conditions)
    latents = rest.pop(FIRST_FRAME).to(noisy.dtype)
    masks = transformer.config.in_channels - noisy.shape[1] - latents.shape[1]
    mask = noisy.new_zeros(len(noisy), masks, *noisy.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([noisy, mask, latents], 1), timestep, rest


def _in_tokens(
    transformer: Any, noisy: Tensor, timestep: Tensor, conditions: dict[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Put the first frame in place, with a timestep for each token (B, tokens)."""
    noisy, times, rest = in_place(noisy, timestep, conditions)
    _, rows, columns = in_patches(noisy.shape[2:], transformer.config.patch_size)
    return noisy, times.repeat_interleave(rows * columns, 1), rest


def longest(transformer: Any) -> int:
    """The latent frames after patchify that its rotary table has positions for."""
    return transformer.config.rope_max_seq_len


def temporal_frequencies(transformer: Any) -> Tensor:
    """(pairs,) float64: the angle of each rotary pair of the time axis per latent frame, in rad.
    Always the model's own, also after `set_temporal_frequencies`."""
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
    check_shape(freqs, (dim // 2,))
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


def decode_parts(vae: Any) -> Callable[[Any, Tensor], Iterator[Tensor]]:
    """Return a decoder that makes the autoencoder's calls, one latent frame after the other, with
    the cache of past features outside the model. Spatial tiles, if enabled, have a cache each."""
    return _frame_by_frame


def _frame_by_frame(vae: Any, z: Tensor) -> Iterator[Tensor]:
    height, width = z.shape[-2:]
    factor = vae.spatial_compression_ratio
    rows, columns = vae.tile_sample_min_height // factor, vae.tile_sample_min_width // factor
    if vae.use_tiling and (width > columns or height > rows):
        frames = _tiled(vae, z, rows, columns)
    else:
        decode, z = _WanFrames(vae), vae.post_quant_conv(z)
        frames = (decode(frame) for frame in z.split(1, dim=2))
    for pixels in frames:
        yield _unpatchified(vae, pixels).clamp(-1.0, 1.0)


class _WanFrames:
    """The decoder with its cache of past features: one latent frame after the other."""

    def __init__(self, vae: Any) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        self.decoder = vae.decoder
        convolutions = sum(isinstance(m, WanCausalConv3d) for m in self.decoder.modules())
        self.cache: list[Any] = [None] * convolutions
        self.first = True

    def __call__(self, frame: Tensor) -> Tensor:
        pixels = self.decoder(frame, feat_cache=self.cache, feat_idx=[0], first_chunk=self.first)
        self.first = False
        return pixels


def _tiled(vae: Any, z: Tensor, rows: int, columns: int) -> Iterator[Tensor]:
    """Decode in spatial tiles, as `tiled_decode` does, which also blends one frame at a time.

    Args:
        rows, columns: of a tile, in latents.
    """
    factor, patch = vae.spatial_compression_ratio, vae.config.patch_size or 1
    height, width = (n * factor // patch for n in z.shape[-2:])
    across = range(0, z.shape[-2], vae.tile_sample_stride_height // factor)
    along = range(0, z.shape[-1], vae.tile_sample_stride_width // factor)
    stride_height = vae.tile_sample_stride_height // patch
    stride_width = vae.tile_sample_stride_width // patch
    if vae.config.patch_size is None:
        overlap_height = vae.tile_sample_min_height - stride_height
        overlap_width = vae.tile_sample_min_width - stride_width
    else:
        overlap_height = vae.tile_sample_min_height // patch - stride_height
        overlap_width = vae.tile_sample_min_width // patch - stride_width
    decoders = {(i, j): _WanFrames(vae) for i in across for j in along}
    for frame in z.split(1, dim=2):
        above: list[Tensor] = []
        bands = []
        for i in across:
            row: list[Tensor] = []
            for n, j in enumerate(along):
                part = vae.post_quant_conv(frame[..., i : i + rows, j : j + columns])
                tile = decoders[i, j](part)
                if above:
                    tile = vae.blend_v(above[n], tile, overlap_height)
                if row:
                    tile = vae.blend_h(row[-1], tile, overlap_width)
                row.append(tile)
            bands.append(torch.cat([t[..., :stride_height, :stride_width] for t in row], dim=-1))
            above = row
        yield torch.cat(bands, dim=3)[..., :height, :width]


def _unpatchified(vae: Any, pixels: Tensor) -> Tensor:
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    size = vae.config.patch_size
    return pixels if size is None else unpatchify(pixels, patch_size=size)
