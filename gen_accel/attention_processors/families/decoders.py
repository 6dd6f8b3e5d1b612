"""Decoders that yield a few frames at a time, as an autoencoder decodes them whole."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_accel.attention_processors.families.sites import Model

Parts = Callable[[Model, Iterable[Tensor]], Iterator[Tensor]]
Decode = Callable[[Tensor], Tensor]  # the next latent frame to the pixels that it completes

_CONVOLUTIONS = "HunyuanVideo15CausalConv3d", "LTXVideoCausalConv3d", "LTX2VideoCausalConv3d"
_UPSAMPLERS = "HunyuanVideo15Upsample", "LTXVideoUpsampler3d", "LTX2VideoUpsampler3d"
_RESNETS = "LTXVideoResnetBlock3d", "LTX2VideoResnetBlock3d"
_ATTENTION = "HunyuanVideo15AttnBlock"
_BY_PART = "AutoencoderKLHunyuanVideo15", "AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video"
# Latent frames that the attention of HunyuanVideo 1.5's decoder sees: of 121 frames, the length of
# the published model's videos. It would see all before it, at a cost that grows with the video.
SEEN = 31


def parts_of(vae: Model) -> Parts | None:
    """Choose the function that decodes a few frames at a time, bit for bit as the autoencoder
    decodes them whole: the autoencoder and latents (1, C, f, h, w), which come one after the other
    in time, to (1, 3, F, H, W) each. None if the autoencoder cannot be decoded so, as it is set.
    """
    kinds = _kinds(vae)
    if "AutoencoderKLWan" in kinds:
        return frame_by_frame
    windows = "AutoencoderKLHunyuanVideo" in kinds and vae.use_framewise_decoding
    return blended_windows if windows else None


def endless_parts_of(vae: Model) -> Parts | None:
    """Choose a function as `parts_of`, in memory that does not grow with the video. Its pixels are
    the autoencoder's to rounding. The exception is HunyuanVideo 1.5 after `SEEN` latent frames."""
    if any(kind in _kinds(vae) for kind in _BY_PART):
        return part_by_part
    return parts_of(vae)


def _kinds(vae: Model) -> list[str]:
    return [kind.__name__ for kind in type(vae).__mro__]


def frame_by_frame(vae: Model, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Make the calls of `AutoencoderKLWan`, one latent frame after the other, with the cache of
    past features outside the model. Spatial tiles, if enabled, have a cache each."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    def of_tile() -> Decode:
        frames = _WanFrames(vae)
        return lambda part: frames(vae.post_quant_conv(part))

    decode: _Tiles | _WanFrames | None = None
    patch = vae.config.patch_size
    for z in parts:
        if decode is None:
            decode = _tiles_of(vae, z, of_tile, patch or 1) or _WanFrames(vae)
        z = z if isinstance(decode, _Tiles) else vae.post_quant_conv(z)
        for frame in z.split(1, dim=2):
            pixels = decode(frame)
            whole = pixels if patch is None else unpatchify(pixels, patch_size=patch)
            yield whole.clamp(-1.0, 1.0)


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


def _tiles_of(
    vae: Model, z: Tensor, decoder: Callable[[], Decode], patch: int = 1
) -> "_Tiles | None":
    """Return the spatial tiles that an autoencoder decodes latents in, each with a decoder of its
    own; None if it decodes whole frames.

    Args:
        patch: pixels a side in one of what the decoders make.
    """
    factor, (height, width) = vae.spatial_compression_ratio, z.shape[-2:]
    least = vae.tile_sample_min_height, vae.tile_sample_min_width
    if (share := getattr(vae, "tile_overlap_factor", None)) is None:
        rows, columns = least[0] // factor, least[1] // factor
        down, right = vae.tile_sample_stride_height, vae.tile_sample_stride_width
        steps = down // factor, right // factor
    else:
        rows, columns = vae.tile_latent_min_height, vae.tile_latent_min_width
        down, right = (side - int(side * share) for side in least)
        steps = int(rows * (1 - share)), int(columns * (1 - share))
    if not vae.use_tiling or (width <= columns and height <= rows):
        return None
    across, along = range(0, height, steps[0]), range(0, width, steps[1])
    return _Tiles(
        vae,
        {(i, j): decoder() for i in across for j in along},
        across,
        along,
        (rows, columns),
        (down // patch, right // patch),
        ((least[0] - down) // patch, (least[1] - right) // patch),
        (height * factor // patch, width * factor // patch),
    )


@dataclass
class _Tiles:
    """A decoder in spatial tiles, as `tiled_decode` makes them, which also blends a few frames at
    a time.

    Args:
        decoders: by where their tiles begin.
        across, along: where tiles begin, in latents.
        sides: rows and columns of a tile, in latents.
        stride, overlap: of the tiles in pixels, down and to the right.
        size: of the frames in pixels.
    """

    vae: Model
    decoders: Mapping[tuple[int, int], Callable[..., Tensor]]
    across: range
    along: range
    sides: tuple[int, int]
    stride: tuple[int, int]
    overlap: tuple[int, int]
    size: tuple[int, int]

    def __call__(self, frame: Tensor, **options: Any) -> Tensor:
        vae, above, bands, (rows, columns) = self.vae, list[Tensor](), [], self.sides
        for i in self.across:
            row: list[Tensor] = []
            for n, j in enumerate(self.along):
                tile = self.decoders[i, j](frame[..., i : i + rows, j : j + columns], **options)
                if above:
                    tile = vae.blend_v(above[n], tile, self.overlap[0])
                if row:
                    tile = vae.blend_h(row[-1], tile, self.overlap[1])
                row.append(tile)
            kept = [t[..., : self.stride[0], : self.stride[1]] for t in row]
            bands.append(torch.cat(kept, dim=-1))
            above = row
        return torch.cat(bands, dim=3)[..., : self.size[0], : self.size[1]]


def part_by_part(vae: Model, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Decode one latent frame after the other by the autoencoder's own decoder, whose parts keep
    what they need of earlier ones. One that looks ahead gives its frames as many latents later as
    it needs, and the last of them at the end."""
    decode: _Tiles | _Frames | None = None
    z = None
    for z in parts:
        if decode is None:
            decode = _tiles_of(vae, z, partial(_Frames, vae)) or _Frames(vae)
        for frame in z.split(1, dim=2):
            pixels = decode(frame)
            if pixels.shape[2]:
                yield pixels
    if decode is not None and z is not None and not _is_causal(vae):
        yield decode(z[:, :, :0], ends=True)


def _is_causal(vae: Model) -> bool:
    return vae.config.get("decoder_causal", True)


class _Frames:
    """A decoder with what its parts keep of the frames so far.

    A convolution keeps the frames that it needs again. If it looks ahead, it is a frame late, and
    what passes beside it is held back as long. Noise that is equal in all frames is drawn alike at
    each call.
    """

    def __init__(self, vae: Model) -> None:
        self.decoder, self.is_causal = vae.decoder, _is_causal(vae)
        self.kept: dict[object, Any] = {"begun": set()}
        self.ends = False
        self.state: list[Tensor] | None = None
        self.draws = any(vae.config.get("decoder_inject_noise") or ())
        self.more: tuple[Tensor | None, ...] = ()
        if "decoder_causal" in vae.config:
            # One that also removes noise is told that there is none, as by `decode_video`.
            is_told = vae.config.timestep_conditioning
            self.more = (torch.zeros(1, device=vae.device, dtype=vae.dtype) if is_told else None,)

    @torch.no_grad()
    def __call__(self, frame: Tensor, *, ends: bool = False) -> Tensor:
        """Decode the next latent frame, or none at the end, (1, C, 1 or 0, h, w)."""
        self.ends = ends
        with self._bound(), self._alike(frame.device):
            pixels = self.decoder(frame, *self.more)
        return pixels[:, :, : self.kept["frames"]]

    @contextmanager
    def _bound(self) -> Iterator[None]:
        """Let the parts of the decoder run with what is kept."""
        by_name = {
            **dict.fromkeys(_CONVOLUTIONS, self._convolved),
            **dict.fromkeys(_UPSAMPLERS, self._upsampled),
            _ATTENTION: self._attended,
        }
        undo: list[tuple[dict[str, Any], str, Any]] = []

        def put(module: nn.Module, name: str, value: Callable) -> None:
            undo.append((vars(module), name, vars(module).get(name, undo)))
            vars(module)[name] = value

        try:
            for module in self.decoder.modules():
                kind = type(module).__name__
                if kind in by_name:
                    put(module, "forward", partial(by_name[kind], module))
                if kind in _RESNETS and not self.is_causal:
                    self._hold_back(module, put)
            yield
        finally:
            for names, name, value in reversed(undo):
                if value is undo:
                    del names[name]
                else:
                    names[name] = value

    @contextmanager
    def _alike(self, device: torch.device) -> Iterator[None]:
        """Begin the random numbers of each call where those of the first one began."""
        if not self.draws:
            yield
            return
        from torch.random import fork_rng, get_rng_state, set_rng_state

        accelerated = device.type != "cpu"
        other = torch.get_device_module(device) if accelerated else None
        if self.state is None:
            self.state = [get_rng_state()]
            if other is not None:
                self.state.append(other.get_rng_state(device))
            yield
            return
        with fork_rng([device] if accelerated else [], device_type=device.type):
            set_rng_state(self.state[0])
            if other is not None:
                other.set_rng_state(self.state[1], device)
            yield

    def _ahead(self, convolution: Model) -> int:
        """Frames that a convolution looks ahead."""
        return 0 if self.is_causal else convolution.conv.kernel_size[0] // 2

    def _convolved(self, convolution: Model, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        inner, ahead = convolution.conv, self._ahead(convolution)
        size, kept = inner.kernel_size[0], self.kept.get(convolution)
        if kept is not None:
            x = torch.cat([kept, x], 2)
        elif x.shape[2]:
            x = torch.cat([*[x[:, :, :1]] * (size - 1 - ahead), x], 2)
        if self.ends:
            x = torch.cat([x, *[x[:, :, -1:]] * ahead], 2)
        frames = x.shape[2] - size + 1
        if x.shape[2]:
            self.kept[convolution] = x[:, :, max(0, frames) :].clone()
        is_last = convolution is self.decoder.conv_out
        if is_last:
            self.kept["frames"] = max(0, frames)
        if frames < 1:  # what comes last in a decoder takes no empty tensor
            return x.new_zeros(len(x), inner.out_channels, int(is_last), *x.shape[3:])
        if (sides := getattr(convolution, "time_causal_padding", None)) is not None:
            x = F.pad(x, (*sides[:4], 0, 0), mode=convolution.pad_mode)
        return inner(x)

    def _upsampled(self, upsampler: Model, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the model's own code, which makes fewer frames of the first one. Later ones come
        after an empty first frame, whose result is left out."""
        convolution = upsampler.conv
        made = convolution(x, *args, **kwargs)
        x = self._late(upsampler, x, self._ahead(convolution))
        is_first = upsampler not in self.kept["begun"] and x.shape[2] > 0
        if is_first:
            self.kept["begun"].add(upsampler)
        else:
            made, x = (F.pad(one, (0, 0, 0, 0, 1, 0)) for one in (made, x))
        streamed, convolution.forward = convolution.forward, lambda *_, **__: made
        try:
            out = type(upsampler).forward(upsampler, x, *args, **kwargs)
        finally:
            convolution.forward = streamed
        return out if is_first else out[:, :, 1:]

    def _late(self, key: object, x: Tensor, frames: int) -> Tensor:
        """Hold back some frames until others come, or the end."""
        if not frames:
            return x
        kept = self.kept.get(key)
        x = x if kept is None else torch.cat([kept, x], 2)
        count = max(0, x.shape[2] - (0 if self.ends else frames))
        self.kept[key] = x[:, :, count:].clone()
        return x[:, :, :count]

    def _hold_back(self, resnet: Model, put: Callable[[nn.Module, str, Any], None]) -> None:
        """Hold back what passes beside both convolutions of a block."""
        frames = self._ahead(resnet.conv1) + self._ahead(resnet.conv2)
        own = resnet.conv_shortcut
        if own is None:
            put(resnet, "conv_shortcut", lambda x: self._late(resnet, x, frames))
            return
        inner = getattr(own, "conv", own)

        def shortcut(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x = self._late(resnet, x, frames)
            if not x.shape[2]:
                return x.new_zeros(len(x), inner.out_channels, *x.shape[2:])
            return type(own).forward(own, x, *args, **kwargs)

        put(own, "forward", shortcut)

    def _attended(self, attention: Model, x: Tensor) -> Tensor:
        """Attention of one frame to itself and those before it."""
        normed = attention.norm(x)
        query, *own = (
            layer(normed).flatten(2).transpose(1, 2)[:, None]
            for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        seen = self.kept.setdefault(attention, [])
        seen.append(own)
        del seen[:-SEEN]
        keys, values = (torch.cat(some, 2) for some in zip(*seen, strict=True))
        out = F.scaled_dot_product_attention(query, keys, values)[:, 0].transpose(1, 2)
        return attention.proj_out(out.unflatten(2, x.shape[2:])) + x


def blended_windows(vae: Model, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Decode the overlapping windows in time of `AutoencoderKLHunyuanVideo`, and blend each into
    the end of the one before, as `_temporal_tiled_decode` does. Frames come once no later window
    changes them."""
    factor = vae.temporal_compression_ratio
    window = vae.tile_sample_min_num_frames // factor
    stride = vae.tile_sample_stride_num_frames
    overlap, step = vae.tile_sample_min_num_frames - stride, stride // factor
    rows = vae.tile_sample_min_height // vae.spatial_compression_ratio
    columns = vae.tile_sample_min_width // vae.spatial_compression_ratio
    before: Tensor | None = None

    def frames_of(part: Tensor) -> Tensor:
        nonlocal before
        if vae.use_tiling and (part.shape[-1] > columns or part.shape[-2] > rows):
            pixels = vae.tiled_decode(part, return_dict=True).sample
        else:
            pixels = vae.decoder(vae.post_quant_conv(part))
        if before is None:
            done = pixels[:, :, : stride + 1]
        else:
            pixels = vae.blend_t(before, pixels[:, :, 1:], overlap)
            done = pixels[:, :, :stride]
        before = pixels
        return done

    held, total, made = None, 0, 0  # latents from the next window on, and all; frames
    for z in parts:
        total += z.shape[2]
        held = z if held is None else torch.cat([held, z], 2)
        while held.shape[2] > window:
            done = frames_of(held[:, :, : window + 1])
            made += done.shape[2]
            yield done
            held = held[:, :, step:]
    if held is None:
        return
    if before is None:
        yield vae.decode(held, return_dict=False)[0]
        return
    left = (total - 1) * factor + 1 - made
    while held.shape[2] and left > 0:
        done = frames_of(held[:, :, : window + 1])[:, :, :left]
        left -= done.shape[2]
        if done.shape[2]:
            yield done
        held = held[:, :, step:]
