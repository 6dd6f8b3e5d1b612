"""Colours of latents: a linear map of their channels to red, green and blue, from -1 to 1.

The families hold published factors of published autoencoders. For any other autoencoder the map is
fitted here, by least squares, to a piece of the latents themselves and what the decoder makes of
it.
Random latents would not do: a small decoder makes other colours of them than of its own.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from gen_accel.attention_processors.families import families
from gen_accel.attention_processors.families.latents import unscaled
from gen_accel.attention_processors.families.sites import Model

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Colors = tuple[Tensor, Tensor]  # factors (C, 3) and bias (3,), float32 on the CPU

SIDE = 32  # most latents a side of the piece that is decoded for a fit
FRAMES = 2  # latent frames of it, each decoded by itself
RIDGE = 1e-2  # share of the variance that is added, so that channels without effect get none


def colors_of(pipe: "DiffusionPipeline", latents: Tensor) -> Colors:
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


def published_colors(vae: Model) -> Colors | None:
    """Return the published map of an autoencoder; None without."""
    kinds = [kind.__name__ for kind in type(vae).__mro__]
    for one in (one for family in families() for one in family.colors):
        value = vae.config.get(one.entry)
        value = tuple(value) if isinstance(value, list) else value
        factors = one.factors.T
        if one.autoencoder in kinds and value == one.value and len(factors) == channels_of(vae):
            return factors, torch.tensor(one.bias)
    return None


def channels_of(vae: Model) -> int:
    """Channels of an autoencoder's latents."""
    return int(vae.config.get("z_dim") or vae.config.latent_channels)


@torch.no_grad()
def fitted_colors(vae: Model, latents: Tensor, device: torch.device) -> Colors:
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


def _pixels(vae: Model, frame: Tensor, device: torch.device) -> Tensor:
    """Decode one latent frame, (C, 1, h, w), to the mean colour under each latent, (h w, 3)."""
    z = unscaled(vae, frame[None].to(device, vae.dtype))
    if type(vae).__name__ == "AutoencoderKL":  # of pictures
        made = vae.decode(z[:, :, 0], return_dict=False)[0][:, :, None]
    else:
        timed = getattr(vae.config, "timestep_conditioning", False)
        given = {"temb": torch.zeros(1, device=device, dtype=vae.dtype)} if timed else {}
        made = vae.decode(z, return_dict=False, **given)[0]
    height, width = frame.shape[2:]
    return F.adaptive_avg_pool3d(made.float().cpu(), (1, height, width))[0].flatten(1).T
