"""Latents and prompts as pipelines encode them, and first frames that condition a model."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gen_accel.attention_processors.families.sites import Model
from gen_accel.video import Coding, vae_factor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

# Conditions of `predict`: latents of the first and the last frame, and whether a sample is given
# its own (B,).
FIRST_FRAME, IS_GIVEN = "first_frame", "first_frame_is_given"
LAST_FRAME, LAST_IS_GIVEN = "last_frame", "last_frame_is_given"
CONTROL = "control"  # condition of `predict`: latents of a control video


def encoded(
    pipe: "DiffusionPipeline",
    video: Tensor,
    generator: torch.Generator | None,
    coding: Coding | None = None,
) -> Tensor:
    """Encode a video by the autoencoder, to float32 latents that are not yet scaled; see
    `Family.encode_video`.

    Args:
        coding: the autoencoder's; None: as the pipeline says.
    """
    vae, step = pipe.vae, vae_factor(pipe, "temporal")
    if coding is None and step is None:
        raise ValueError(f"{type(pipe).__name__} does not say how many frames a latent has")
    rule = coding or Coding(step or 1)
    if not rule.codes(video.shape[2]):
        raise ValueError(f"video must have {rule.rule} frames, got {video.shape[2]}")
    weight = next(vae.parameters())
    posterior = vae.encode(video.to(weight.device, weight.dtype)).latent_dist
    latents = posterior.mode() if generator is None else posterior.sample(generator)
    return latents.float()


@torch.no_grad()
def decoded(pipe: "DiffusionPipeline", latents: Tensor, *more: Tensor | None) -> Tensor:
    """Decode latents (B, C, f, h, w) in the autoencoder's own scale.

    Args:
        more: further arguments of `vae.decode`.
    """
    weight = next(pipe.vae.parameters())
    return pipe.vae.decode(latents.to(weight.device, weight.dtype), *more, return_dict=False)[0]


def scaled(vae: Model, latents: Tensor) -> Tensor:
    """Scale an autoencoder's latents (B, C, f, h, w) as its pipelines do: to zero mean and unit
    variance a channel, if these are known, and by its factor, if it has one."""
    mean, std, factor = _scale_of(vae)
    if mean is not None and std is not None:
        mean, std = (_channels(x, latents) for x in (mean, std))
        latents = (latents - mean) / std
    return latents if factor is None else latents * factor


def unscaled(vae: Model, latents: Tensor) -> Tensor:
    """Undo `scaled`, also of an autoencoder with a shift, as of pictures."""
    mean, std, factor = _scale_of(vae)
    latents = latents if factor is None else latents / factor
    if mean is not None and std is not None:
        mean, std = (_channels(x, latents) for x in (mean, std))
        return latents * std + mean
    shift = vae.config.get("shift_factor")
    return latents if shift is None else latents + shift


Scale = Sequence[float] | Tensor | None  # of each channel


def _scale_of(vae: Model) -> tuple[Scale, Scale, float | None]:
    """Mean and standard deviation of the channels, from the config or a buffer, and the factor."""
    config = vae.config

    def held(name: str) -> Scale:
        return config[name] if name in config else getattr(vae, name, None)

    return held("latents_mean"), held("latents_std"), config.get("scaling_factor")


def _channels(values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    made = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    return made.view(1, -1, 1, 1, 1)


def unguided(
    pipe: "DiffusionPipeline", prompts: Sequence[str], max_tokens: int
) -> tuple[Tensor, ...]:
    """Encode prompts by the pipeline's own `encode_prompt`, on the device of its text encoder and
    without negative prompts.

    Args:
        max_tokens: the pipeline's `max_sequence_length`.
    """
    return pipe.encode_prompt(
        list(prompts),
        do_classifier_free_guidance=False,
        max_sequence_length=max_tokens,
        device=text_device(pipe),
    )


def text_device(pipe: "DiffusionPipeline") -> torch.device:
    return next(pipe.text_encoder.parameters()).device


def pixels_of(pipe: "DiffusionPipeline", image: "Image") -> Tensor:
    """Return a picture as the pipeline's autoencoder takes it, (1, 3, 1, H, W) in [-1, 1]."""
    pixels = pipe.video_processor.preprocess(image, height=image.height, width=image.width)
    return pixels.to(torch.float32).unsqueeze(2)


def in_place(
    noisy: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Put the first frame's latents in the place of the first noisy ones.

    Args:
        noisy: (B, C, f, h, w).
        timestep: (B,).
        conditions: with FIRST_FRAME, (B, C, 1, h, w), and IS_GIVEN, unless all samples are given
            theirs.

    Returns:
        The latents, the timestep of each latent frame (B, f), 0 for the given one, and the other
        conditions.
    """
    rest = dict(conditions)
    first, is_given = rest.pop(FIRST_FRAME).to(noisy.dtype), rest.pop(IS_GIVEN, None)
    times = timestep[:, None].repeat(1, noisy.shape[2])
    if is_given is None:
        times[:, 0] = 0
    else:
        given = is_given.bool()
        times[:, 0] = torch.where(given, 0, times[:, 0])
        first = torch.where(given.view(-1, 1, 1, 1, 1), first, noisy[:, :, :1])
    return torch.cat([first, noisy[:, :, 1:]], 2), times, rest
