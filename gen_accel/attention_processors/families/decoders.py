"""Decoders that yield a few frames at a time, bit for bit as an autoencoder decodes them whole."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gen_accel.attention_processors.families.sites import Model

Parts = Callable[[Model, Tensor], Iterator[Tensor]]


def parts_of(vae: Model) -> Parts | None:
    """Choose the function that decodes a few frames at a time: the autoencoder and latents (1, C,
    f, h, w) to (1, 3, F, H, W) each. None if the autoencoder cannot be decoded so, as it is set.
    """
    kinds = {kind.__name__ for kind in type(vae).__mro__}
    if "AutoencoderKLWan" in kinds:
        return frame_by_frame
    windows = "AutoencoderKLHunyuanVideo" in kinds and vae.use_framewise_decoding
    return blended_windows if windows else None


def frame_by_frame(vae: Model, z: Tensor) -> Iterator[Tensor]:
    """Make the calls of `AutoencoderKLWan`, one latent frame after the other, with the cache of
    past features outside the model. Spatial tiles, if enabled, have a cache each."""
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

    def __init__(self, vae: Model) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        self.decoder = vae.decoder
        convolutions = sum(isinstance(m, WanCausalConv3d) for m in self.decoder.modules())
        self.cache: list[object] = [None] * convolutions
        self.first = True

    def __call__(self, frame: Tensor) -> Tensor:
        pixels = self.decoder(frame, feat_cache=self.cache, feat_idx=[0], first_chunk=self.first)
        self.first = False
        return pixels


def _tiled(vae: Model, z: Tensor, rows: int, columns: int) -> Iterator[Tensor]:
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


def _unpatchified(vae: Model, pixels: Tensor) -> Tensor:
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    size = vae.config.patch_size
    return pixels if size is None else unpatchify(pixels, patch_size=size)


def blended_windows(vae: Model, z: Tensor) -> Iterator[Tensor]:
    """Decode the overlapping windows in time of `AutoencoderKLHunyuanVideo`, and blend each into
    the end of the one before, as `_temporal_tiled_decode` does. Frames come once no later window
    changes them."""
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
