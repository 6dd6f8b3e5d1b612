"""How close a video is to a reference: PSNR and SSIM, as torchmetrics defines them.

A video is (F, H, W, 3) uint8. Both figures work through it a few frames at a time, so that a long
clip costs no more memory than a short one. torchmetrics takes seconds to import, so it is
imported by the first call.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

PIXELS_AT_ONCE = 2**20  # about 400 MB of working memory for SSIM
SSIM_MARGIN = 5  # pixels that the 11 x 11 Gaussian window reaches beyond its centre


def psnr(video: np.ndarray, reference: np.ndarray) -> float:
    """10 log10(255^2 / mean((video - reference)^2)) in dB, the mean taken over the whole clip.

    This is not the mean of `psnr_per_frame`, which one identical frame would make infinite.

    Returns:
        dB, higher is closer, `inf` for identical videos.

    Raises:
        ValueError: shapes differ, or they are not (F, H, W, 3) uint8.
    """
    errors = [10 ** (-decibels / 10) for decibels in psnr_per_frame(video, reference)]
    mean = math.fsum(errors) / len(errors)
    return -10 * math.log10(mean) if mean > 0 else math.inf


def psnr_per_frame(video: np.ndarray, reference: np.ndarray) -> list[float]:
    """`psnr` of each frame by itself, F numbers in dB; raises as `psnr` does."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check(video, reference)
    return [
        decibels
        for frames, wanted in _batches(video, reference)
        for decibels in peak_signal_noise_ratio(
            frames, wanted, data_range=255.0, dim=(1, 2, 3), reduction="none"
        ).tolist()
    ]


def ssim(video: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity, the mean over frames.

    Wang et al., 2004, https://doi.org/10.1109/TIP.2003.819861, with a Gaussian window of sigma
    1.5. As in torchmetrics, and unlike the paper, it is computed for each colour channel and
    counts the border, where the frame is reflected.

    Returns:
        At most 1, which identical videos reach.

    Raises:
        ValueError: shapes differ, they are not (F, H, W, 3) uint8, or a side is under 6 pixels.
    """
    values = ssim_per_frame(video, reference)
    return math.fsum(values) / len(values)


def ssim_per_frame(video: np.ndarray, reference: np.ndarray) -> list[float]:
    """`ssim` of each frame by itself, F numbers; raises as `ssim` does."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check(video, reference)
    if min(video.shape[1:3]) <= SSIM_MARGIN:
        raise ValueError(
            f"ssim needs frames of at least {SSIM_MARGIN + 1} x {SSIM_MARGIN + 1} pixels, "
            f"got {video.shape}"
        )
    values = []
    for frames, wanted in _batches(video, reference):
        similarity = structural_similarity_index_measure(
            frames, wanted, data_range=255.0, reduction="none"
        )
        assert isinstance(similarity, Tensor)
        values += similarity.tolist()
    return values


def _check(video: np.ndarray, reference: np.ndarray) -> None:
    if video.shape != reference.shape:
        raise ValueError(
            f"video and reference must have one shape, got {video.shape} and {reference.shape}"
        )
    for name, array in (("video", video), ("reference", reference)):
        if array.ndim != 4 or array.shape[-1] != 3 or array.size == 0 or array.dtype != np.uint8:
            raise ValueError(f"{name} must be (F, H, W, 3) uint8, got {array.shape} {array.dtype}")


def _batches(video: np.ndarray, reference: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of (n, 3, H, W) float32, n frames at a time."""
    count = max(1, PIXELS_AT_ONCE // (video.shape[1] * video.shape[2]))
    for start in range(0, len(video), count):
        frames, wanted = (
            torch.from_numpy(array[start : start + count].astype(np.float32)).movedim(-1, 1)
            for array in (video, reference)
        )
        yield frames, wanted
