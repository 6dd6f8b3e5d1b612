"""PSNR, SSIM and LPIPS of a video against a reference, as torchmetrics defines them, with VMAF and
ColorVideoVDP beside them.

A video is (F, H, W, 3) uint8. The figures work through it a few frames at a time, so that a long
clip costs no more memory than a short one. torchmetrics takes seconds to import, so it is
imported by the first call.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_accel.measure.perceptual import (
    VMAF,
    cvvdp_missing,
    cvvdp_of_streams,
    enlargement,
    too_small,
    vmaf_missing,
)
from gen_accel.measure.video_io import read_stream, video_fps
from gen_accel.registry import DEFAULT_METRICS, NOT_ASKED, needed_for
from gen_accel.registry import check_metrics as check_metric_names

PIXELS_AT_ONCE = 2**20  # about 400 MB of working memory for SSIM
SSIM_MARGIN = 5  # pixels that the 11 x 11 Gaussian window reaches beyond its centre
LPIPS_SIDE = 32  # pixels: smaller frames do not pass through the network
PICTURE = "vmaf is for videos, got a picture: it needs 2 frames at least"


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

    A figure that could not be computed is None, and its `..._missing` says why and how to get it;
    `NOT_ASKED` where it was left out.

    Args:
        psnr_db: see `psnr`.
        ssim: see `ssim`.
        lpips: see `LPIPS`.
        vmaf: mean over frames, 0 to 100; see `vmaf_per_frame`.
        vmaf_lowest: lowest of a frame.
        cvvdp_jod: 10 where no difference can be seen; see `cvvdp_of_streams`.
        enlarged: factor by which VMAF and cvvdp saw the frames larger, see `enlargement`.
    """

    frames: int
    psnr_db: float
    ssim: float
    lpips: float | None
    lpips_missing: str | None
    vmaf: float | None = None
    vmaf_lowest: float | None = None
    vmaf_missing: str | None = NOT_ASKED
    cvvdp_jod: float | None = None
    cvvdp_missing: str | None = NOT_ASKED
    enlarged: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_metrics(metrics: Sequence[str] | None) -> None:
    """Raise ValueError for a metric that is not known, or cannot be computed here."""
    check_metric_names(metrics)
    missing = {"lpips": lpips_missing, "vmaf": vmaf_missing, "cvvdp": cvvdp_missing}
    for name in metrics or ():
        if reason := missing[name]():
            raise ValueError(reason)


def compare_files(
    video: str | Path,
    reference: str | Path,
    *,
    metrics: Sequence[str] | None = None,
    fps: float | None = None,
) -> Fidelity:
    """`measure_fidelity` of two video files or folders of PNG frames.

    Args:
        fps: frames a second, which cvvdp needs where neither file states them.

    Raises:
        FileNotFoundError, OSError: see `read_video`.
        ValueError: see `check_pair` and `measure_fidelity`.
    """
    check_metrics(metrics)
    check_pair(video, reference)
    rate = _rate(video, reference) or fps
    return measure_fidelity(_File(video), _File(reference), metrics=metrics, fps=rate)


def figures_by_frame(video: str | Path, reference: str | Path) -> dict[str, list[float]]:
    """PSNR in dB and SSIM of each frame of two files or folders of PNG frames, F numbers each.

    Raises:
        FileNotFoundError, OSError, ValueError: as `compare_files`.
    """
    check_pair(video, reference)
    found: dict[str, list[float]] = {"psnr_db": [], "ssim": []}
    for frames, wanted in _aligned(_File(video), _File(reference)):
        found["psnr_db"] += psnr_per_frame(frames, wanted)
        found["ssim"] += ssim_per_frame(frames, wanted)
    return found


def measure_fidelity(
    video: Iterable[np.ndarray],
    reference: Iterable[np.ndarray],
    *,
    metrics: Sequence[str] | None = None,
    fps: float | None = None,
) -> Fidelity:
    """Read both videos once, next to each other; twice where cvvdp is asked for.

    Args:
        video, reference: chunks of (f, H, W, 3) uint8, in order; f may differ between them. With
            cvvdp they must be lists, or begin anew each time.
        metrics: figures beside PSNR and SSIM: "lpips", "vmaf" and "cvvdp". Without, LPIPS and VMAF
            where they can be computed. cvvdp takes a tenth of a second for a frame of 288 x 288
            pixels on a core of a CPU.
        fps: frames a second, for cvvdp.

    Raises:
        ValueError: no frames, other sizes or lengths, what `ssim` refuses, or a figure that was
            asked for by name and cannot be computed.
    """
    check_metrics(metrics)
    wanted = DEFAULT_METRICS if metrics is None else metrics
    twice = "cvvdp" in wanted
    if twice and (iter(video) is video or iter(reference) is reference):
        raise ValueError("cvvdp reads both videos a second time: give lists of chunks")
    if twice and fps is None:
        raise ValueError("cvvdp needs the frames a second, which neither video states: give fps")
    with ExitStack() as stack:
        figures = _Figures(wanted, stack)
        for pair in _aligned(video, reference):
            figures.add(*pair, strict=metrics is not None)
        found = figures.result(strict=metrics is not None)
    if not twice:
        return found
    assert fps is not None
    jod = cvvdp_of_streams(video, reference, frames=found.frames, fps=fps)
    return replace(found, cvvdp_jod=jod, cvvdp_missing=None)


class _Figures:
    """Figures that grow chunk by chunk.

    Args:
        stack: ends what runs beside this process.
    """

    def __init__(self, metrics: Sequence[str], stack: ExitStack) -> None:
        self._decibels: list[float] = []
        self._similarities: list[float] = []
        self._missing = {
            "lpips": lpips_missing() if "lpips" in metrics else NOT_ASKED,
            "vmaf": vmaf_missing() if "vmaf" in metrics else NOT_ASKED,
        }
        self._lpips: LPIPS | None = None
        self._vmaf: VMAF | None = None
        self._stack = stack
        self._factor = 1

    def add(self, frames: np.ndarray, wanted: np.ndarray, *, strict: bool) -> None:
        """Add a chunk of both videos.

        Args:
            strict: raise ValueError where the frames are too small for a figure.
        """
        _check(frames, wanted)
        if not self._decibels:
            self._begin(frames.shape[1], frames.shape[2], strict=strict)
        self._decibels += psnr_per_frame(frames, wanted)
        self._similarities += ssim_per_frame(frames, wanted)
        if self._lpips is not None:
            self._lpips.update(frames, wanted)
        if self._vmaf is not None:
            self._vmaf.update(frames, wanted)

    def result(self, *, strict: bool) -> Fidelity:
        if not self._decibels:
            raise ValueError("video and reference must hold a frame, got none")
        if len(self._decibels) == 1 and self._vmaf is not None:
            self._leave_out("vmaf", PICTURE, strict=strict)
            self._vmaf = None
        scores = [] if self._vmaf is None else self._vmaf.compute()
        return Fidelity(
            frames=len(self._decibels),
            psnr_db=_pooled(self._decibels),
            ssim=math.fsum(self._similarities) / len(self._similarities),
            lpips=None if self._lpips is None else self._lpips.compute(),
            lpips_missing=self._missing["lpips"],
            vmaf=math.fsum(scores) / len(scores) if scores else None,
            vmaf_lowest=min(scores, default=None),
            vmaf_missing=self._missing["vmaf"],
            enlarged=self._factor,
        )

    def _begin(self, height: int, width: int, *, strict: bool) -> None:
        self._factor = enlargement(height, width)
        small = {"vmaf": too_small("vmaf", height, width), "lpips": None}
        if min(height, width) < LPIPS_SIDE:
            small["lpips"] = f"lpips needs frames of at least {LPIPS_SIDE} x {LPIPS_SIDE} pixels"
        for name, reason in small.items():
            if reason and self._missing[name] is None:
                self._leave_out(name, reason, strict=strict)
        if self._missing["lpips"] is None:
            self._lpips = LPIPS()
        if self._missing["vmaf"] is None:
            self._vmaf = self._stack.enter_context(VMAF(threads=torch.get_num_threads()))

    def _leave_out(self, name: str, reason: str, *, strict: bool) -> None:
        if strict:
            raise ValueError(reason)
        self._missing[name] = reason


class _File:
    """Chunks of a video file, from the beginning each time."""

    def __init__(self, path: str | Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[np.ndarray]:
        return read_stream(self._path)


def check_pair(video: str | Path, reference: str | Path) -> None:
    """Refuse two files that cannot be compared, by their headers and first frames.

    Raises:
        FileNotFoundError, OSError: see `read_video`.
        ValueError: sizes or frame rates that differ.
    """
    _rate(video, reference)
    sizes = [next(read_stream(path, frames=1)).shape[1:3] for path in (video, reference)]
    if sizes[0] != sizes[1]:
        (rows, columns), (wanted_rows, wanted_columns) = sizes
        raise ValueError(
            f"video and reference must have one size, got {columns} x {rows} pixels of {video} "
            f"and {wanted_columns} x {wanted_rows} of {reference}"
        )


def _rate(video: str | Path, reference: str | Path) -> float | None:
    """Return the frame rate that two files state; None where neither does. GIFs, which round it,
    count where the other states none."""
    rates = [video_fps(path) for path in (video, reference)]
    known = [rate for rate in rates if rate is not None]
    exact = [
        rate
        for rate, path in zip(rates, (video, reference), strict=True)
        if rate is not None and Path(path).suffix.lower() != ".gif"
    ]
    if len(exact) == 2 and not math.isclose(*exact, rel_tol=0.01):
        raise ValueError(
            f"video and reference must have one frame rate, got {exact[0]:g} frames a second of "
            f"{video} and {exact[1]:g} of {reference}"
        )
    return next(iter([*exact, *known]), None)


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
