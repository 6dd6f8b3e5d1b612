"""Decoders that yield a few frames at a time, bit for bit as an autoencoder decodes them whole."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from gen_accel.attention_processors.families.sites import Model

Parts = Callable[[Model, Iterable[Tensor]], Iterator[Tensor]]


def parts_of(vae: Model) -> Parts | None:
    """Choose the function that decodes a few frames at a time: the autoencoder and latents (1, C,
    f, h, w), which come one after the other in time, to (1, 3, F, H, W) each. None if the
    autoencoder cannot be decoded so, as it is set.
    """
    kinds = {kind.__name__ for kind in type(vae).__mro__}
    if is_causal(vae):
        return frame_by_frame
    windows = "AutoencoderKLHunyuanVideo" in kinds and vae.use_framewise_decoding
    return blended_windows if windows else None


def is_causal(vae: Model) -> bool:
    """Whether latents are decoded from themselves and those before them alone."""
    return any(kind.__name__ == "AutoencoderKLWan" for kind in type(vae).__mro__)


def frame_by_frame(vae: Model, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Make the calls of `AutoencoderKLWan`, one latent frame after the other, with the cache of
    past features outside the model. Spatial tiles, if enabled, have a cache each."""
    decode: _WanFrames | _WanTiles | None = None
    for z in parts:
        if decode is None:
            decode = _tiles_of(vae, z) or _WanFrames(vae)
        z = z if isinstance(decode, _WanTiles) else vae.post_quant_conv(z)
        for frame in z.split(1, dim=2):
            yield _unpatchified(vae, decode(frame)).clamp(-1.0, 1.0)


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


def _tiles_of(vae: Model, z: Tensor) -> "_WanTiles | None":
    """Return the spatial tiles that an autoencoder decodes latents in; None if it decodes whole
    frames."""
    height, width = z.shape[-2:]
    factor = vae.spatial_compression_ratio
    rows, columns = vae.tile_sample_min_height // factor, vae.tile_sample_min_width // factor
    if vae.use_tiling and (width > columns or height > rows):
        return _WanTiles(vae, (height, width), rows, columns)
    return None


class _WanTiles:
    """The decoder in spatial tiles, as `tiled_decode` makes them, which also blends one frame at a
    time.

    Args:
        sides: of the latents.
        rows, columns: of a tile, in latents.
    """

    def __init__(self, vae: Model, sides: tuple[int, int], rows: int, columns: int) -> None:
        factor, patch = vae.spatial_compression_ratio, vae.config.patch_size or 1
        self.vae, self.rows, self.columns = vae, rows, columns
        self.size = sides[0] * factor // patch, sides[1] * factor // patch
        self.across = range(0, sides[0], vae.tile_sample_stride_height // factor)
        self.along = range(0, sides[1], vae.tile_sample_stride_width // factor)
        self.stride = vae.tile_sample_stride_height // patch, vae.tile_sample_stride_width // patch
        least = vae.tile_sample_min_height, vae.tile_sample_min_width
        if vae.config.patch_size is not None:
            least = least[0] // patch, least[1] // patch
        self.overlap = least[0] - self.stride[0], least[1] - self.stride[1]
        self.decoders = {(i, j): _WanFrames(vae) for i in self.across for j in self.along}

    def __call__(self, frame: Tensor) -> Tensor:
        vae, above, bands = self.vae, list[Tensor](), []
        for i in self.across:
            row: list[Tensor] = []
            for n, j in enumerate(self.along):
                part = vae.post_quant_conv(frame[..., i : i + self.rows, j : j + self.columns])
                tile = self.decoders[i, j](part)
                if above:
                    tile = vae.blend_v(above[n], tile, self.overlap[0])
                if row:
                    tile = vae.blend_h(row[-1], tile, self.overlap[1])
                row.append(tile)
            kept = [t[..., : self.stride[0], : self.stride[1]] for t in row]
            bands.append(torch.cat(kept, dim=-1))
            above = row
        return torch.cat(bands, dim=3)[..., : self.size[0], : self.size[1]]


def _unpatchified(vae: Model, pixels: Tensor) -> Tensor:
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    size = vae.config.patch_size
    return pixels if size is None else unpatchify(pixels, patch_size=size)


def blended_windows(vae: Model, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Decode the overlapping windows in time of `AutoencoderKLHunyuanVideo`, and blend each into
    the end of the one before, as `_temporal_tiled_decode` does. Frames come once no later window
    changes them."""
    z = torch.cat([*parts], 2)
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
