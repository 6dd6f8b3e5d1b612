"""Colours of latents: a linear map of their channels to red, green and blue, from -1 to 1.

Published factors serve published autoencoders. They are the figures of ComfyUI's
`comfy/latent_formats.py` (https://github.com/comfyanonymous/ComfyUI, read at commit 75399d7),
which were fitted to pairs of latents and pictures. For any other autoencoder the map is fitted
here, by least squares, to a piece of the latents themselves and what the decoder makes of it.
Random latents would not do: a small decoder makes other colours of them than of its own.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Colors = tuple[Tensor, Tensor]  # factors (C, 3) and bias (3,), float32 on the CPU

SIDE = 32  # most latents a side of the piece that is decoded for a fit
FRAMES = 2  # latent frames of it, each decoded by itself
RIDGE = 1e-2  # share of the variance that is added, so that channels without effect get none


class Known(NamedTuple):
    """Published factors of an autoencoder.

    Args:
        autoencoder: its class.
        entry, value: of its config, by which it differs from others of the class.
        red, green, blue: a factor for each channel of the latents.
    """

    autoencoder: str
    entry: str
    value: Any
    red: tuple[float, ...]
    green: tuple[float, ...]
    blue: tuple[float, ...]
    bias: tuple[float, float, float]


def _row(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


KNOWN = (
    Known(  # Wan 2.1 and 2.2 A14B
        "AutoencoderKLWan",
        "base_dim",
        96,
        red=_row(
            """
            -0.1299 0.0671 0.3568 0.0372 0.0313 0.0296 -0.3477 0.0166 -0.0412 -0.1293 0.068
            0.0032 -0.1251 0.006 0.3477 0.1984
            """
        ),
        green=_row(
            """
            -0.1692 0.0406 0.2548 0.2344 0.0189 -0.0956 -0.4059 0.1902 0.0267 0.074 0.3019
            0.0581 0.0927 -0.0633 0.2275 0.0913
            """
        ),
        blue=_row(
            """
            0.2932 0.0442 0.1747 0.142 -0.0328 -0.0665 -0.2925 0.1975 -0.1364 0.1636 0.1128
            0.0639 0.1699 0.0005 0.295 0.1861
            """
        ),
        bias=(-0.1835, -0.0868, -0.336),
    ),
    Known(  # Wan 2.2 TI2V-5B
        "AutoencoderKLWan",
        "base_dim",
        160,
        red=_row(
            """
            0.0119 -0.1062 0.014 -0.0813 0.0656 0.0264 0.0295 -0.0244 0.0443 -0.0465 0.0359
            -0.0776 0.0564 0.0006 -0.0319 -0.0268 0.0539 -0.0359 -0.0285 0.1041 -0.0086
            0.039 0.0069 0.0006 0.0313 -0.1454 0.0714 -0.0304 0.0401 -0.0758 0.0568 -0.0055
            0.0239 -0.0663 -0.0416 0.0166 -0.0211 0.1833 -0.0368 -0.3441 -0.0479 -0.066
            -0.0101 -0.069 -0.0145 0.0421 0.0504 -0.0837
            """
        ),
        green=_row(
            """
            0.0103 -0.0504 0.0409 -0.0677 0.0851 0.0463 0.0326 -0.027 -0.0102 -0.009 0.0236
            0.0854 0.0264 0.0594 -0.0542 0.0024 0.0265 -0.0312 -0.1032 0.0537 -0.0374 0.067
            0.0144 -0.0167 -0.0574 -0.0902 0.0827 -0.0574 0.0384 -0.0297 0.1307 -0.031
            -0.0305 -0.0673 -0.0047 0.0112 0.0011 0.1466 0.037 -0.3543 -0.0489 -0.0153
            0.0068 -0.0452 0.0041 0.0451 -0.0483 0.0168
            """
        ),
        blue=_row(
            """
            0.0046 0.0165 0.0491 0.0607 0.0808 0.0912 0.059 0.0025 0.0288 -0.0205 0.0082
            0.1048 0.0561 0.0418 -0.0637 0.026 0.0358 -0.0287 -0.1237 0.0622 -0.0051 0.2863
            0.0082 0.0079 -0.0232 -0.0481 0.0447 -0.0196 0.0204 -0.0014 0.1372 -0.038 0.0325
            -0.014 -0.0023 -0.0093 0.0331 0.225 0.0295 -0.2008 -0.042 0.08 0.0156 -0.0927
            0.0015 0.0373 -0.0356 0.0055
            """
        ),
        bias=(0.0317, -0.0878, -0.1388),
    ),
    Known(  # HunyuanVideo, FramePack, Kandinsky 5
        "AutoencoderKLHunyuanVideo",
        "block_out_channels",
        (128, 256, 512, 512),
        red=_row(
            """
            -0.0395 0.0696 0.0135 0.0108 -0.0209 -0.0804 -0.0991 -0.0646 -0.0696 -0.0799
            0.1166 0.1165 -0.2315 -0.027 -0.0616 0.0249
            """
        ),
        green=_row(
            """
            -0.0331 0.0795 -0.0945 -0.025 0.0032 -0.0254 0.0271 -0.0422 -0.0595 -0.0208
            0.1627 0.0432 -0.192 0.0401 -0.0997 -0.0469
            """
        ),
        blue=_row(
            """
            0.0445 0.0518 -0.0282 -0.0765 0.0224 -0.0639 -0.0669 -0.04 -0.0894 -0.0375
            0.0962 0.0407 -0.1355 -0.0821 -0.0727 -0.1703
            """
        ),
        bias=(0.0259, -0.0192, -0.0761),
    ),
    Known(  # Mochi 1
        "AutoencoderKLMochi",
        "decoder_block_out_channels",
        (128, 256, 512, 768),
        red=_row(
            """
            -0.0069 0.0154 0.0333 -0.139 -0.0725 0.0074 -0.0176 0.5294 -0.0326 -0.0659
            0.0185 -0.0396
            """
        ),
        green=_row(
            """
            -0.0045 -0.0692 0.0019 0.0628 0.0134 -0.027 -0.0277 0.5204 -0.0446 0.0153
            -0.0217 -0.0495
            """
        ),
        blue=_row(
            """
            0.0018 -0.0274 0.0206 0.1678 -0.1898 -0.0209 -0.0221 0.3852 -0.0143 -0.0153
            0.0014 -0.0281
            """
        ),
        bias=(-0.094, -0.1418, -0.1453),
    ),
    Known(  # Cosmos 1
        "AutoencoderKLCosmos",
        "decode_block_out_channels",
        (256, 512, 512, 512),
        red=_row(
            """
            0.1817 -0.0586 -0.4703 0.0803 -0.082 0.2511 -0.183 -0.0621 0.3619 0.3164 0.1152
            -0.1434 0.0635 -0.3635 -0.1865 0.0447
            """
        ),
        green=_row(
            """
            0.2284 -0.0862 -0.4255 0.1963 -0.105 0.3098 -0.2117 -0.2187 0.1082 0.3922 0.0231
            -0.3609 0.1471 -0.1963 0.0365 0.0994
            """
        ),
        blue=_row(
            """
            0.2423 -0.3108 -0.3995 0.1001 0.04 0.2787 -0.004 -0.0939 0.1455 0.2575 -0.0462
            -0.3665 0.168 -0.3248 0.2346 0.0881
            """
        ),
        bias=(-0.1223, -0.1889, -0.1976),
    ),
    Known(  # Stable Diffusion 1: AnimateDiff, Latte
        "AutoencoderKL",
        "block_out_channels",
        (128, 256, 512, 512),
        red=_row(
            """
            0.3512 0.325 -0.2829 -0.212
            """
        ),
        green=_row(
            """
            0.2297 0.4974 0.1762 -0.2616
            """
        ),
        blue=_row(
            """
            0.3227 0.235 0.2721 -0.7177
            """
        ),
        bias=(0, 0, 0),
    ),
)


def colors_of(pipe: Any, latents: Tensor) -> Colors:
    """Return the map for the latents of a pipeline: published, fitted, or in false colours.

    An autoencoder that waits in the CPU's memory decodes nothing in between, as that would move
    the transformer out.

    Args:
        latents: (C, f, h, w), as the pipeline denoises them, with as little noise as can be.
    """
    found = published_colors(pipe.vae)
    if found is not None:
        return found
    if hasattr(pipe.vae, "_hf_hook"):
        return false_colors(latents)
    try:
        return fitted_colors(pipe.vae, latents, pipe._execution_device)
    except Exception:  # whatever a decoder says of a size or a frame that it does not take
        return false_colors(latents)


def published_colors(vae: Any) -> Colors | None:
    """Return the published map of an autoencoder; None without."""
    kinds = [kind.__name__ for kind in type(vae).__mro__]
    for one in KNOWN:
        value = vae.config.get(one.entry)
        value = tuple(value) if isinstance(value, list) else value
        if one.autoencoder in kinds and value == one.value and len(one.red) == channels_of(vae):
            return torch.tensor([one.red, one.green, one.blue]).T, torch.tensor(one.bias)
    return None


def channels_of(vae: Any) -> int:
    """Channels of an autoencoder's latents."""
    return int(vae.config.get("z_dim") or vae.config.latent_channels)


@torch.no_grad()
def fitted_colors(vae: Any, latents: Tensor, device: torch.device) -> Colors:
    """Fit the map by least squares, from a piece of (C, f, h, w) latents to its decoded pixels."""
    frames, height, width = latents.shape[1:]
    top, left = max(0, height - SIDE) // 2, max(0, width - SIDE) // 2
    piece = latents[:, :, top : top + SIDE, left : left + SIDE].float()
    chosen = torch.linspace(0, frames - 1, min(FRAMES, frames)).round().long().tolist()
    x = torch.cat([piece[:, i].flatten(1).T for i in chosen]).double().cpu()
    y = torch.cat([_pixels(vae, piece[:, i : i + 1], device) for i in chosen]).double()
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("latents or pixels are not finite")
    mean_x, mean_y = x.mean(0), y.mean(0)
    covariance = (x - mean_x).T @ (x - mean_x)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    factors = torch.linalg.solve(covariance, (x - mean_x).T @ (y - mean_y))
    return factors.float(), (mean_y - mean_x @ factors).float()


def false_colors(latents: Tensor) -> Colors:
    """Map the three directions in which (C, f, h, w) latents differ most to three colours."""
    x = latents.float().flatten(1).T.cpu()
    mean = x.mean(0)
    values, directions = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    most = min(3, len(values))
    factors = torch.zeros(len(values), 3)
    deviations = values[-most:].clamp(min=1e-12).sqrt()
    factors[:, :most] = (directions[:, -most:] / (2 * deviations)).flip(1)
    return factors, -mean @ factors


def _pixels(vae: Any, frame: Tensor, device: torch.device) -> Tensor:
    """Decode one latent frame, (C, 1, h, w), to the mean colour under each latent, (h w, 3)."""
    z = in_units_of(vae, frame[None].to(device, vae.dtype))
    if type(vae).__name__ == "AutoencoderKL":  # of pictures
        made = vae.decode(z[:, :, 0], return_dict=False)[0][:, :, None]
    else:
        timed = getattr(vae.config, "timestep_conditioning", False)
        given = {"temb": torch.zeros(1, device=device, dtype=vae.dtype)} if timed else {}
        made = vae.decode(z, return_dict=False, **given)[0]
    height, width = frame.shape[2:]
    return F.adaptive_avg_pool3d(made.float().cpu(), (1, height, width))[0].flatten(1).T


def in_units_of(vae: Any, latents: Tensor) -> Tensor:
    """Scale latents of a pipeline to the autoencoder's own units."""
    config = vae.config

    def held(name: str) -> Any:
        value = config.get(name)
        value = getattr(vae, name, None) if value is None else value
        return None if value is None else torch.as_tensor(value).view(1, -1, 1, 1, 1).to(latents)

    mean, std = held("latents_mean"), held("latents_std")
    latents = latents / (config.get("scaling_factor") or 1.0)
    if mean is not None and std is not None:
        return latents * std + mean
    return latents + (config.get("shift_factor") or 0.0)
