"""Decoding of latents to pixels, a few frames at a time, and files of latents.

`vae.decode` holds every frame of a clip in floats, several times over while it joins them. Here
each part is passed on as uint8 as soon as it is decoded, so that only the latents grow with the
number of frames. The pixels equal the pixels of `vae.decode`, bit for bit:

- `AutoencoderKLWan` and `AutoencoderKLHunyuanVideo` have functions in `families.decoders`.
  Streams are decoded by further ones there, whose pixels are those of `vae.decode` to rounding.
- Any other autoencoder decodes the clip as a whole, which warns with `DecodedWhole`.
"""

import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gen_accel.attention_processors.attached.clock import first_transformer
from gen_accel.attention_processors.families import families, family_named, served_classes
from gen_accel.attention_processors.families.decoders import (
    Parts,
    endless_parts_of,
    parts_of,
)
from gen_accel.attention_processors.families.latents import unscaled as own_unit
from gen_accel.attention_processors.families.pipelines import takes
from gen_accel.attention_processors.families.sites import Model
from gen_accel.io import fields_of, parse_json, replacing, save_tensors, typed
from gen_accel.paths import check_output, expanded

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LATENTS = ".safetensors"
FRAMES_AT_ONCE = 16  # frames converted to uint8 together if a clip is decoded as a whole
ABOUT = "gen_accel"  # key of a latents file's metadata


class DecodedWhole(UserWarning):
    """The autoencoder cannot be decoded in parts: memory grows with the number of frames."""


def is_streamed(pipe: "DiffusionPipeline") -> bool:
    """Whether `decode_stream` gives the video that `pipe` would decode from its latents.

    Other pipelines pack, order or scale latents in their own ways, and decode by themselves.
    """
    row = takes(type(pipe).__name__)
    if row is not None and row.joins:
        return False
    module = first_transformer(pipe)
    kinds = type(getattr(module, "_orig_mod", module)).__mro__
    return any(streams(kind.__name__, type(pipe.vae).__name__) for kind in kinds)


def streamed_families() -> list[str]:
    """List the families whose pipelines give latents in the form of `decode_stream`."""
    return [one.name for one in families() if one.generation.autoencoder is not None]


def streams(transformer: str | None, autoencoder: str | None) -> bool:
    """Whether pipelines of these classes, given by name, pass `is_streamed`."""
    family = served_classes().get(transformer or "")
    if family is None or autoencoder is None:
        return False
    return family_named(family).generation.autoencoder == autoencoder


def check_streamed(transformer: str | None, autoencoder: str | None) -> None:
    """Refuse, by a ValueError, classes whose latents `decode_stream` cannot decode."""
    if not streams(transformer, autoencoder):
        known = ", ".join(streamed_families())
        raise ValueError(
            f"latents can be kept for {known} alone, as other pipelines decode "
            f"theirs in ways of their own, got {transformer} with {autoencoder}; generate the "
            "video without keeping latents"
        )


def decode_stream(
    pipe: "DiffusionPipeline", latents: Tensor, *, device: torch.device | None = None
) -> Iterator[np.ndarray]:
    """Decode `latents` to the video of `pipe`, in chunks of (f, H, W, 3) uint8.

    Args:
        pipe: a diffusers pipeline; its `vae` and `video_processor` are used.
        latents: (1, C, f, h, w), from a pipeline with `output_type="latent"`.
        device: where the autoencoder is; None: where the pipeline runs.

    Raises:
        ValueError: another shape, or an autoencoder without a scale of its latents. While
            decoding: pixels that are not finite.
    """
    vae = pipe.vae
    config = vae.config
    channels = config.get("z_dim", config.get("latent_channels"))
    if latents.ndim != 5 or len(latents) != 1 or 0 in latents.shape:
        raise ValueError(f"latents must be (1, C, f, h, w), got {tuple(latents.shape)}")
    if channels is not None and latents.shape[1] != channels:
        raise ValueError(
            f"latents must have the {channels} channels of {type(vae).__name__}, "
            f"got {latents.shape[1]}"
        )
    if config.get("latents_mean") is None and config.get("scaling_factor") is None:
        raise ValueError(
            f"{type(vae).__name__} does not say how its latents are scaled: it has neither "
            "latents_mean nor scaling_factor"
        )
    parts = parts_of(vae)
    if parts is None:
        warnings.warn(
            f"{type(vae).__name__} is decoded whole, which takes memory for all frames at once",
            DecodedWhole,
            stacklevel=2,
        )
    return _decoded(pipe, [latents], parts or _whole, device)


def decode_chunks(pipe: "DiffusionPipeline", chunks: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Decode latents as they come, (1, C, f, h, w) each, one after the other in time, to chunks of
    (f, H, W, 3) uint8. The autoencoder has `endless_parts_of`."""
    parts = endless_parts_of(pipe.vae)
    assert parts is not None
    return _decoded(pipe, chunks, parts, None)


def on_its_device(vae: Model) -> None:
    """Move the weights of an offloaded model, as a decorator of `vae.decode` does."""
    hook = getattr(vae, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)


def save_latents(path: str | Path, latents: Tensor, about: dict[str, Any]) -> Path:
    """Write `latents`, and `about` as JSON in the metadata; the file is complete or absent.

    Raises:
        ValueError, OSError: a path that `check_output` refuses.
        NoRoom: a full disk.
    """
    path = Path(path)
    check_output(path, LATENTS)
    with replacing(path) as partial:
        save_tensors({"latents": latents.cpu()}, partial, {ABOUT: json.dumps(about)})
    return path


def load_latents(path: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """Read a file of `save_latents`: latents, in the stored dtype, and `about`.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: not a file of latents.
    """
    from safetensors import SafetensorError, safe_open

    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of latents at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            latents = file.get_tensor("latents")
            if latents.ndim != 5:
                raise ValueError(f"latents must be (1, C, f, h, w), got {tuple(latents.shape)}")
            about = fields_of(parse_json((file.metadata() or {}).get(ABOUT, "{}"), path), path)
            typed(about, "fps", float, type(None), origin=path, default=None)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no file of latents: {error}") from error
    return latents, about


@torch.no_grad()
def _decoded(
    pipe: "DiffusionPipeline",
    latents: Iterable[Tensor],
    parts: Parts,
    device: torch.device | None,
) -> Iterator[np.ndarray]:
    vae = pipe.vae

    def ready() -> Iterator[Tensor]:
        for chunk in latents:
            on_its_device(vae)  # between chunks, the transformer may have been there
            yield unscaled(vae, chunk, device or pipe._execution_device)

    try:
        for pixels in parts(vae, ready()):
            [video] = pipe.video_processor.postprocess_video(pixels, output_type="np")
            yield as_uint8(video, vae)
    finally:
        pipe.maybe_free_model_hooks()


def as_uint8(video: np.ndarray, maker: "Model | DiffusionPipeline") -> np.ndarray:
    """Convert pixels in [0, 1] to uint8. Raises ValueError for pixels that are not finite.

    Args:
        maker: the model or pipeline that the error names.
    """
    if not np.isfinite(video).all():
        raise ValueError(
            f"{type(maker).__name__} made pixels that are not finite, in {maker.dtype}; try "
            "dtype float32 or bfloat16"
        )
    return (video * 255).round().clip(0, 255).astype(np.uint8)


def unscaled(vae: Model, latents: Tensor, device: torch.device) -> Tensor:
    """Scale latents to the autoencoder's own units, rounded as the pipelines round."""
    latents, config = latents.to(device, vae.dtype), vae.config
    if config.get("latents_mean") is None:
        return own_unit(vae, latents)
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1).to(latents)
    inverse = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1).to(latents)
    return latents / inverse + mean


def _whole(vae: Model, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    z = torch.cat([*parts], 2)
    yield from vae.decode(z, return_dict=False)[0].split(FRAMES_AT_ONCE, dim=2)
