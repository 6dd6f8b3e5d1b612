"""Whole-clip encoding and decoding for `AutoencoderKLWan`, for training.

The class works through a clip in chunks with a cache of past frames, which saves memory and costs
time. Its convolutions are causal, so that one pass over the whole clip gives the same numbers;
only the first frame, which the class never resamples in time, is treated apart.
"""

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from torch import Tensor


def encode(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] to the mean and log variance, (B, 2 z, f, h, w)."""
    encoder: Any = vae.encoder
    x = encoder.conv_in(patchify(video, vae.config["patch_size"]))
    for layer in encoder.down_blocks:
        x = _resample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.mid_block(x)
    return vae.quant_conv(encoder.conv_out(encoder.nonlinearity(encoder.norm_out(x))))


def decode(vae: AutoencoderKLWan, latent: Tensor) -> Tensor:
    """(B, z, f, h, w) to (B, 3, F, H, W), not clamped."""
    decoder: Any = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latent)))
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = layer(x)
        if block.upsamplers is not None:
            x = _resample(block.upsamplers[0], x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return unpatchify(x, vae.config["patch_size"])


def _resample(layer: WanResample, x: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        first, rest = x[:, :, :1], layer.time_conv(x[:, :, 1:])
        x = torch.cat([first, rest.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)], dim=2)
    frames = x.shape[2]
    x = layer.resample(x.transpose(1, 2).flatten(0, 1))
    x = x.unflatten(0, (-1, frames)).transpose(1, 2)
    if layer.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x
