"""PSNR, SSIM and LPIPS of a video against a reference, as torchmetrics defines them.

A video is (F, H, W, 3) uint8. The figures work through it a few frames at a time, so that a long
clip costs no more memory than a short one. torchmetrics takes seconds to import, so it is
imported by the first call.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_accel.extras import needed_for
from gen_accel.measure.video_io import read_stream

PIXELS_AT_ONCE = 2**20  # about 400 MB of working memory for SSIM
SSIM_MARGIN = 5  # pixels that the 11 x 11 Gaussian window reaches beyond its centre
LPIPS_SIDE = 32  # pixels: smaller frames do not pass through the network


def check_installed() -> None:
    """Raise ModuleNotFoundError now, where `psnr` and `ssim` would raise it after the work."""
    with needed_for("comparing videos", extra="quality"):
        import torchmetrics  # noqa: F401


def psnr(video: np.ndarray, reference: np.ndarray) -> float:
    """10 log10(255^2 / mean((video - reference)^2)) in dB, the mean taken over the whole clip.

    This is not the mean of `psnr_per_frame`, which one identical frame would make infinite.

    Returns:
        dB, higher is closer, `inf` for identical videos.

    Raises:
        ValueError: shapes differ, or they are not (F, H, W, 3) uint8.
    """
    return _pooled(psnr_per_frame(video, reference))


def psnr_per_frame(video: np.ndarray, reference: np.ndarray) -> list[float]:
    """`psnr` of each frame by itself, F numbers in dB; raises as `psnr` does."""
    with needed_for("PSNR", extra="quality"):
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
    with needed_for("SSIM", extra="quality"):
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


@dataclass(frozen=True)
class Fidelity:
    """Closeness of a video to a reference.

    Args:
        psnr_db: see `psnr`.
        ssim: see `ssim`.
        lpips: see `LPIPS`; None where it cannot be computed here.
        lpips_missing: why LPIPS cannot be computed, and how to get it.
    """

    frames: int
    psnr_db: float
    ssim: float
    lpips: float | None
    lpips_missing: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_files(video: str | Path, reference: str | Path) -> Fidelity:
    """`measure_fidelity` of two video files or folders of PNG frames.

    Raises:
        FileNotFoundError, OSError: see `read_video`.
        ValueError: see `measure_fidelity`.
    """
    return measure_fidelity(read_stream(video), read_stream(reference))


def measure_fidelity(video: Iterable[np.ndarray], reference: Iterable[np.ndarray]) -> Fidelity:
    """Read both videos once, next to each other.

    Args:
        video, reference: chunks of (f, H, W, 3) uint8, in order; f may differ between them.

    Raises:
        ValueError: no frames, other sizes or lengths, or what `ssim` refuses.
    """
    missing = lpips_missing()
    distance = None
    decibels: list[float] = []
    similarities: list[float] = []
    for frames, wanted in _aligned(video, reference):
        if not decibels and missing is None:
            if min(frames.shape[1:3]) < LPIPS_SIDE:
                missing = f"lpips needs frames of at least {LPIPS_SIDE} x {LPIPS_SIDE} pixels"
            else:
                distance = LPIPS()
        decibels += psnr_per_frame(frames, wanted)
        similarities += ssim_per_frame(frames, wanted)
        if distance is not None:
            distance.update(frames, wanted)
    if not decibels:
        raise ValueError("video and reference must hold a frame, got none")
    return Fidelity(
        frames=len(decibels),
        psnr_db=_pooled(decibels),
        ssim=math.fsum(similarities) / len(similarities),
        lpips=None if distance is None else distance.compute(),
        lpips_missing=missing,
    )


def lpips(video: np.ndarray, reference: np.ndarray) -> float:
    """`LPIPS` of two videos in memory, the mean over frames; raises as its methods do."""
    distance = LPIPS()
    distance.update(video, reference)
    return distance.compute()


class LPIPS:
    """Learned perceptual distance, 0 for identical videos: a mean over frames, chunk by chunk.

    Zhang et al., 2018, https://arxiv.org/abs/1801.03924, with AlexNet. Its weights are the file of
    torchvision, which is never downloaded here, and is read as tensors only.

    Raises:
        ValueError: torchvision or the weights are not there; see `lpips_missing`.
    """

    def __init__(self) -> None:
        with needed_for("LPIPS", extra="quality"):
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        missing = lpips_missing()
        if missing is not None:
            raise ValueError(missing)
        self._metric = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)

    @torch.no_grad()
    def update(self, video: np.ndarray, reference: np.ndarray) -> None:
        """Add a chunk; ValueError for shapes that differ, or frames under 32 x 32 pixels."""
        _check(video, reference)
        if min(video.shape[1:3]) < LPIPS_SIDE:
            raise ValueError(
                f"lpips needs frames of at least {LPIPS_SIDE} x {LPIPS_SIDE} pixels, "
                f"got {video.shape}"
            )
        for frames, wanted in _batches(video, reference):
            self._metric.update(frames / 255, wanted / 255)

    def compute(self) -> float:
        return float(self._metric.compute())


def lpips_missing() -> str | None:
    """Return why `lpips` cannot run here, and how to get it; None where it can."""
    if find_spec("torchvision") is None:
        return 'lpips needs torchvision: pip install "gen_accel[lpips]"'
    from torchvision.models import AlexNet_Weights  # pyright: ignore[reportMissingImports]

    url = AlexNet_Weights.DEFAULT.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        return f"lpips needs the weights of AlexNet: download {url} to {file}"
    return None


def _pooled(decibels: list[float]) -> float:
    """Convert the PSNR of frames to the PSNR of the clip."""
    errors = [10 ** (-one / 10) for one in decibels]
    mean = math.fsum(errors) / len(errors)
    return -10 * math.log10(mean) if mean > 0 else math.inf


def _aligned(
    video: Iterable[np.ndarray], reference: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield chunks of equal length from both."""
    left, right = iter(video), iter(reference)
    frames, wanted = next(left, None), next(right, None)
    done = 0
    while frames is not None and wanted is not None:
        count = min(len(frames), len(wanted))
        if count:
            yield frames[:count], wanted[:count]
        done += count
        frames = frames[count:] if len(frames) > count else next(left, None)
        wanted = wanted[count:] if len(wanted) > count else next(right, None)
    if frames is not None or wanted is not None:
        shorter, longer = ("video", "reference") if frames is None else ("reference", "video")
        raise ValueError(
            f"video and reference must have as many frames, got {done} of the {shorter}, and more "
            f"of the {longer}"
        )


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
