"""Masks of clips: a film or a picture in gray, which weighs the loss of each latent.

White counts as 1, black as `mask_floor`. A mask is resampled, resized and cropped as its clip is,
and averaged over the pixels and frames of each latent. The first latent is the first frame; each
further one is a group of as many frames as the autoencoder takes together.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_accel.lora.data.clips import CaptionedVideo, Size

WHITE = 255
ALIKE = 0.02  # most relative difference of a mask's aspect ratio from its clip's


def mask_of(video: CaptionedVideo) -> CaptionedVideo | None:
    """Return the mask of a clip as a clip of its own; None where the clip has none."""
    if video.mask is None:
        return None
    given = {"caption": "", "image": None, "mask": None, "more_captions": ()}
    name = f"the mask of {video.name}"
    return replace(video, name=name, source=video.mask, is_picture=video.mask_is_picture, **given)


def check_mask(found: dict[str, Any], about: dict[str, Any], *, is_picture: bool) -> None:
    """Compare a clip's mask with the clip.

    Args:
        found, about: what `survey` found out about the mask and about the clip.
        is_picture: the mask is one picture for all frames.

    Raises OSError for a mask of another length, or of another shape.
    """
    (height, width), (rows, columns) = about["size"], found["size"]
    if abs(columns * height / (rows * width) - 1) > ALIKE:
        raise OSError(
            f"its mask is {rows} x {columns} pixels, the clip {height} x {width}: a mask has its "
            "clip's shape"
        )
    if is_picture:
        return
    have, wanted = (_frames(one) for one in (found, about))
    most = min(found["asked"], about["asked"])  # of either, no more may have been decoded
    alike = min(found["frames"], most) == min(about["frames"], most)
    # Without decoding, the whole length is known to a frame.
    if not alike or abs(have - wanted) > 1:
        raise OSError(f"its mask has {have} frames, the clip {wanted}: make them equal")


def _frames(about: dict[str, Any]) -> int:
    return about["frames"] if about["total"] is None else about["total"]


def read_mask(
    video: CaptionedVideo,
    factors: tuple[int, int],
    *,
    frames: int,
    size: Size,
    fps: float | None,
    begin: int = 0,
) -> Tensor:
    """Read the mask of a part of a clip, and reduce it to the latents' grid.

    Returns:
        (f, h, w) float32 from 0 to 1.

    Raises OSError for a mask that cannot be read, has too few frames, or is black throughout.
    """
    mask = mask_of(video)
    assert mask is not None
    if mask.is_picture:
        pictures = mask.read(frames=1, size=size, fps=fps).repeat(frames, axis=0)
    else:
        pictures = mask.read(frames=frames, size=size, fps=fps, begin=begin)
    if len(pictures) < frames:
        raise OSError(f"its mask has {begin + len(pictures)} frames, {begin + frames} are needed")
    reduced = reduce_mask(pictures, factors)
    if not reduced.any():
        raise OSError(f"its mask is black in frames {begin} to {begin + frames - 1}")
    return reduced


def reduce_mask(frames: np.ndarray, factors: tuple[int, int]) -> Tensor:
    """Average a mask, (F, H, W, 3) uint8, over the pixels and frames of each latent.

    Args:
        factors: frames and pixels of a latent, in time and in space.
    """
    time, space = factors
    gray = torch.from_numpy(frames).float().mean(3) / WHITE
    count, height, width = gray.shape
    tiles = gray.view(count, height // space, space, width // space, space).mean((2, 4))
    rest = tiles[1:].view((count - 1) // time, time, *tiles.shape[1:]).mean(1)
    return torch.cat([tiles[:1], rest])
