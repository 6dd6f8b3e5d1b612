"""Closeness of a video to a reference: PSNR, SSIM, LPIPS, VMAF and ColorVideoVDP.

A video is (F, H, W, 3) uint8. The figures work through it a few frames at a time, so that a long
clip costs no more memory than a short one. Nothing is downloaded.

PSNR, SSIM and LPIPS are computed by torchmetrics.

VMAF, Li et al., 2016, https://github.com/Netflix/vmaf, is computed by the libvmaf in the ffmpeg of
imageio_ffmpeg, with the model that is built into it, vmaf_v0.6.1. It was trained on films of
1920 x 1080 pixels, seen from three heights of the screen; on other sizes and on drawn toys it
ranks, and its scale is not calibrated. It looks at brightness alone.

ColorVideoVDP, Mantiuk et al., 2024, https://doi.org/10.1145/3658144, package cvvdp, whose
parameters are in its wheel, models an eye before a display, in colour and over time.
"""

import json
import logging
import math
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partialmethod
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from gen_accel.measure.video_io import frames_of, read_stream, video_fps
from gen_accel.registry import DEFAULT_METRICS, NOT_ASKED, needed_for, needs
from gen_accel.registry import check_metrics as check_metric_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

PIXELS_AT_ONCE = 2**20  # about 400 MB of working memory for SSIM
SSIM_MARGIN = 5  # pixels that the 11 x 11 Gaussian window reaches beyond its centre
LPIPS_SIDE = 32  # pixels: smaller frames do not pass through the network
VIEWED_SIDE = 288  # pixels: the height of CIF, the smallest format that films are shown in
LEAST_SIDE = 16  # pixels: libvmaf 3 crashes on smaller frames, and cvvdp's pyramid has no level
PICTURE = "vmaf is for videos, got a picture: it needs 2 frames at least"
MODEL = "vmaf_v0.6.1"
_LOG = "vmaf.json"
# Video above, reference below, in one stream, so that frames cannot get out of step. libvmaf takes
# YUV, of which its model reads Y: as in MP4 files of `write_video`, BT.709 in the limited range.
_GRAPH = (
    "split[a][b];[a]crop={width}:{height}:0:0,{shown}[video];"
    "[b]crop={width}:{height}:0:{height},{shown}[reference];"
    "[video][reference]libvmaf=log_fmt=json:log_path={log}:n_threads={threads}"
)
_SHOWN = "scale={width}:{height}:flags=neighbor:out_color_matrix=bt709:out_range=tv,format=yuv444p"
DISPLAY = "standard_4k"  # of cvvdp
FREE_SHARE = 0.5  # of a GPU's free memory that cvvdp may take


def check_installed() -> None:
    """Raise ModuleNotFoundError now, and not from `psnr` or `ssim` after the work."""
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

    values = []
    for frames, wanted in _batches(video, reference):
        values += peak_signal_noise_ratio(
            frames, wanted, data_range=255.0, dim=(1, 2, 3), reduction="none"
        ).tolist()
    return values


def _pooled(decibels: list[float]) -> float:
    """Convert the PSNR of frames to the PSNR of the clip."""
    mean = math.fsum(10 ** (-one / 10) for one in decibels) / len(decibels)
    return -10 * math.log10(mean) if mean > 0 else math.inf


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

    values = []
    for frames, wanted in _batches(video, reference, "ssim", SSIM_MARGIN + 1):
        similarity = structural_similarity_index_measure(
            frames, wanted, data_range=255.0, reduction="none"
        )
        assert not isinstance(similarity, tuple)
        values += similarity.tolist()
    return values


def lpips(video: np.ndarray, reference: np.ndarray) -> float:
    """Learned perceptual distance, the mean over frames; 0 for identical videos.

    Zhang et al., 2018, https://arxiv.org/abs/1801.03924, with AlexNet. Its weights are the file of
    torchvision, which is never downloaded here, and is read as tensors only.

    Raises:
        ValueError: torchvision or the weights are not there, see `lpips_missing`; shapes that
            differ, or frames under 32 x 32 pixels.
    """
    metric = _lpips_metric()
    _add_to(metric, video, reference)
    return float(metric.compute())


def _lpips_metric() -> "LearnedPerceptualImagePatchSimilarity":
    with needed_for("LPIPS", extra="quality"):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    if missing := lpips_missing():
        raise ValueError(missing)
    return LearnedPerceptualImagePatchSimilarity("alex", normalize=True)


def _add_to(
    metric: "LearnedPerceptualImagePatchSimilarity", video: np.ndarray, reference: np.ndarray
) -> None:
    import torch

    with torch.no_grad():
        for frames, wanted in _batches(video, reference, "lpips", LPIPS_SIDE):
            metric.update(frames / 255, wanted / 255)


def lpips_missing() -> str | None:
    """Return why `lpips` cannot run here, and how to get it; None if it can."""
    if find_spec("torchvision") is None:
        return needs("lpips", "torchvision", "lpips")
    import torch
    from torchvision.models import AlexNet_Weights  # pyright: ignore[reportMissingImports]

    url = AlexNet_Weights.DEFAULT.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        return f"lpips needs the weights of AlexNet: download {url} to {file}"
    return None


def vmaf(video: np.ndarray, reference: np.ndarray) -> float:
    """Mean of `vmaf_per_frame`, 0 to 100."""
    scores = vmaf_per_frame(video, reference)
    return math.fsum(scores) / len(scores)


def vmaf_per_frame(video: np.ndarray, reference: np.ndarray) -> list[float]:
    """VMAF of each frame, 0 to 100; identical videos score near 100, not always 100.

    Small frames are enlarged by `enlargement`, pixel by pixel.

    Args:
        video, reference: (F, H, W, 3) uint8.

    Raises:
        ValueError: shapes differ, or a refusal of `VMAF`.
        OSError: ffmpeg failed.
    """
    with VMAF() as metric:
        metric.update(video, reference)
        return metric.compute()


class VMAF:
    """VMAF of two videos, chunk by chunk; see `vmaf_per_frame`. Use it in a `with`, which ends the
    process of ffmpeg.

    Args:
        threads: threads of libvmaf; the scores do not depend on them.

    Raises:
        ValueError: ffmpeg is not there, or has no libvmaf; see `vmaf_missing`.
    """

    def __init__(self, *, threads: int = 1) -> None:
        if missing := vmaf_missing():
            raise ValueError(missing)
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._size = (0, 0)
        self._frames = 0
        # Both live as long as the metric.
        self._folder = tempfile.TemporaryDirectory(prefix="gen-accel-vmaf-")
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> "VMAF":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._words.close()
        self._folder.cleanup()

    def update(self, video: np.ndarray, reference: np.ndarray) -> None:
        """Add a chunk, (f, H, W, 3) uint8; ValueError for shapes that differ, or frames under 16
        pixels."""
        _check_shapes(video, reference)
        if reason := too_small("vmaf", *video.shape[1:3]):
            raise ValueError(reason)
        if len(video) == 0:
            return
        if self._process is None:
            self._size = (video.shape[1], video.shape[2])
            self._process = self._start()
        elif video.shape[1:3] != self._size:
            raise ValueError(f"chunks must have one size, got {self._size} and {video.shape[1:3]}")
        for frames in zip(video, reference, strict=True):
            with self._failing() as pipe:
                pipe.write(np.concatenate(frames).tobytes())
            self._frames += 1

    def compute(self) -> list[float]:
        """VMAF of each frame so far. No chunk can be added after it.

        Raises:
            ValueError: no frames.
            OSError: ffmpeg failed.
        """
        if self._process is None:
            raise ValueError("video and reference must hold a frame, got none")
        with self._failing() as pipe:
            pipe.close()
            if self._process.wait():
                raise OSError
        log = json.loads((Path(self._folder.name) / _LOG).read_text(encoding="utf-8"))
        scores = [float(frame["metrics"]["vmaf"]) for frame in log["frames"]]
        if len(scores) != self._frames:
            raise OSError(f"ffmpeg scored {len(scores)} of {self._frames} frames")
        return scores

    def _start(self) -> "subprocess.Popen[bytes]":
        height, width = self._size
        factor = enlargement(height, width)
        shown = _SHOWN.format(width=factor * width, height=factor * height)
        graph = _GRAPH.format(
            log=_LOG, threads=self._threads, width=width, height=height, shown=shown
        )
        command = [
            *(ffmpeg_binary(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"),
            *("-s", f"{width}x{2 * height}", "-i", "-", "-lavfi", graph, "-f", "null", "-"),
        ]
        # Out of the terminal's reach: Ctrl-C is answered here.
        return subprocess.Popen(
            command,
            cwd=self._folder.name,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._words,
            start_new_session=True,
        )

    @contextmanager
    def _failing(self) -> Iterator[IO[bytes]]:
        """Yield ffmpeg's input; an OSError, as of a process that ended, gets ffmpeg's words."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            yield self._process.stdin
        except OSError:
            status = self._process.wait()
            self._words.seek(0)
            said = self._words.read().decode(errors="replace").strip()
            reason = said.split("\n")[-1] if said else f"it ended with status {status}"
            raise OSError(f"ffmpeg computed no VMAF: {reason}") from None


def vmaf_missing() -> str | None:
    """Return why VMAF cannot be computed here, and how to get it; None if it can."""
    if find_spec("imageio_ffmpeg") is None:
        return needs("vmaf", "imageio_ffmpeg", "quality")
    try:
        executable = ffmpeg_binary()
    except OSError:  # there is no wheel with a binary for this machine
        return "vmaf needs an ffmpeg with libvmaf: name one by IMAGEIO_FFMPEG_EXE"
    if not _has_libvmaf(executable):
        return (
            f"vmaf needs an ffmpeg with libvmaf and its model {MODEL}, which {executable} has "
            "not: name another by IMAGEIO_FFMPEG_EXE"
        )
    return None


def ffmpeg_binary() -> str:
    """Path of the ffmpeg of imageio-ffmpeg, or of the one that IMAGEIO_FFMPEG_EXE names.

    Raises:
        ModuleNotFoundError: imageio_ffmpeg is not installed; with the command that installs it.
        OSError: it has no ffmpeg for this machine.
    """
    with needed_for("the program ffmpeg", extra="quality"):
        import imageio_ffmpeg
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise OSError(f"imageio_ffmpeg has no ffmpeg for this machine: {error}") from error


@cache
def _has_libvmaf(executable: str) -> bool:
    try:
        asked = [executable, "-hide_banner", "-h", "filter=libvmaf"]
        told = subprocess.run(asked, capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return f"version={MODEL}" in told.stdout.decode(errors="replace")


def cvvdp_jod(video: np.ndarray, reference: np.ndarray, *, fps: float) -> float:
    """`cvvdp_of_streams` of two videos in memory, (F, H, W, 3) uint8."""
    _check_shapes(video, reference)
    return cvvdp_of_streams([video], [reference], frames=len(video), fps=fps)


def cvvdp_of_streams(
    video: Iterable[np.ndarray], reference: Iterable[np.ndarray], *, frames: int, fps: float
) -> float:
    """Quality of a video beside a reference in JOD, just objectionable differences: 10 if no
    difference can be seen, and one less where three in four viewers prefer the reference.

    The display is cvvdp's own default, viewed pixel by pixel: 30 inches of 3840 x 2160 pixels and
    200 cd/m2, at twice the height of the screen, in an office. Small frames are enlarged by
    `enlargement`, pixel by pixel. Both videos are read once, in step, on a GPU if there is one.

    Args:
        video, reference: chunks of (f, H, W, 3) uint8, in order.
        frames: how many either holds; one is a picture.
        fps: frames a second, which decides what the eye can follow.

    Raises:
        ValueError: cvvdp is not installed, frames under 16 pixels, fps that is not positive, or a
            stream that ends early.
    """
    if missing := cvvdp_missing():
        raise ValueError(missing)
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive and finite, got {fps}")
    import torch

    free = None  # GB of a GPU, most of which a model may hold
    if torch.cuda.is_available():
        free = FREE_SHARE * torch.cuda.mem_get_info()[0] / 1e9
    with needed_for("cvvdp", extra="cvvdp"), _no_new_handlers(), torch.no_grad():
        import pycvvdp

        metric = pycvvdp.cvvdp(display_name=DISPLAY, quiet=True, device=None, gpu_mem=free)
        source = _Source((video, reference), frames, fps, metric.display_photometry)
        score, _ = metric.predict_video_source(source)
    return float(score)


def cvvdp_missing() -> str | None:
    """Return why cvvdp cannot run here, and how to get it; None if it can."""
    if find_spec("pycvvdp") is None:
        return needs("cvvdp", "pycvvdp", "cvvdp")
    return None


class _Source:
    """Frames of both videos in order, as pycvvdp asks for them: one of each in turn."""

    def __init__(
        self, videos: Sequence[Iterable[np.ndarray]], frames: int, fps: float, photometry: Any
    ) -> None:
        self._left = [frames_of(video) for video in videos]
        self._ahead = [next(left, None) for left in self._left]
        self._frames, self._fps, self._photometry = frames, fps, photometry
        shapes = [None if frame is None else frame.shape for frame in self._ahead]
        if shapes[0] is None or shapes[0] != shapes[1]:
            raise ValueError(f"video and reference must have one shape, got {shapes} of a frame")
        self._size = shapes[0][:2]
        if reason := too_small("cvvdp", *self._size):
            raise ValueError(reason)

    def get_video_size(self) -> tuple[int, int, int]:
        height, width = self._size
        factor = enlargement(height, width)
        return factor * height, factor * width, self._frames

    def get_batch_size(self) -> int:
        return 1

    def get_frames_per_second(self) -> float:
        return self._fps if self._frames > 1 else 0

    def _next(self, which: int, frame: int, device: "torch.device", colorspace: str) -> "Tensor":
        pixels = self._ahead[which]
        if pixels is None:
            raise ValueError(f"video and reference must hold {self._frames} frames, got fewer")
        self._ahead[which] = next(self._left[which], None)
        import torch

        seen = torch.from_numpy(enlarged(pixels, enlargement(*self._size))).to(device)
        shaped = seen.movedim(-1, 0)[None, :, None].float() / 255
        return self._photometry.source_2_target_colorspace(shaped, colorspace)

    get_test_frame = partialmethod(_next, 0)
    get_reference_frame = partialmethod(_next, 1)


@contextmanager
def _no_new_handlers() -> Iterator[None]:
    """Take off what pycvvdp's logging adds to the root logger, for all libraries."""
    root = logging.getLogger()
    before = [*root.handlers]
    try:
        yield
    finally:
        root.handlers[:] = [handler for handler in root.handlers if handler in before]


def enlargement(height: int, width: int) -> int:
    """Whole factor that brings the smaller side up to 288 pixels at most; 1 from 145 on.

    Frames of a toy model are seen enlarged, pixel by pixel, and metrics that model an eye before a
    screen would call blocks of 96 pixels invisible.
    """
    return max(1, VIEWED_SIDE // min(height, width))


def enlarged(frame: np.ndarray, factor: int) -> np.ndarray:
    """Repeat each pixel of (H, W, 3) `factor` times down and across."""
    return frame if factor == 1 else frame.repeat(factor, 0).repeat(factor, 1)


def too_small(metric: str, height: int, width: int) -> str | None:
    """Reason why frames of this size have no figure of "vmaf" or "cvvdp"; None if they have."""
    if min(height, width) >= LEAST_SIDE:
        return None
    return (
        f"{metric} needs frames of at least {LEAST_SIDE} x {LEAST_SIDE} pixels, got "
        f"{height} x {width}"
    )


@dataclass(frozen=True)
class Fidelity:
    """Closeness of a video to a reference.

    A figure that could not be computed is None, and its `..._missing` says why and how to get it;
    `NOT_ASKED` if it was left out.

    Args:
        psnr_db: see `psnr`.
        ssim: see `ssim`.
        lpips: see `lpips`.
        vmaf: mean over frames, 0 to 100; see `vmaf_per_frame`.
        vmaf_lowest: lowest of a frame.
        cvvdp_jod: 10 if no difference can be seen; see `cvvdp_of_streams`.
        enlarged: factor by which VMAF and cvvdp saw the frames larger, see `enlargement`.
        by_frame: "psnr_db" and "ssim" of each frame; no part of `to_dict`.
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
    by_frame: dict[str, list[float]] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, object]:
        return {name: value for name, value in asdict(self).items() if name != "by_frame"}


def check_metrics(metrics: Sequence[str] | None) -> None:
    """Raise ValueError for a metric that is not known, or cannot be computed here."""
    check_metric_names(metrics)
    missing = {"lpips": lpips_missing, "vmaf": vmaf_missing, "cvvdp": cvvdp_missing}
    for name in metrics or ():
        if reason := missing[name]():
            raise ValueError(reason)


def measure_fidelity(
    video: Iterable[np.ndarray],
    reference: Iterable[np.ndarray],
    *,
    metrics: Sequence[str] | None = None,
    fps: float | None = None,
) -> Fidelity:
    """Read both videos once, next to each other; twice if cvvdp is asked for.

    Args:
        video, reference: chunks of (f, H, W, 3) uint8, in order; f may differ between them. With
            cvvdp they must be lists, or begin from the start each time.
        metrics: figures beside PSNR and SSIM: "lpips", "vmaf" and "cvvdp". None: LPIPS and VMAF,
            if they can be computed. cvvdp takes a tenth of a second for a frame of 288 x 288
            pixels on a core of a CPU.
        fps: frames a second, for cvvdp.

    Raises:
        ValueError: no frames, other sizes or lengths, what `ssim` refuses, or a figure that was
            asked for by name and cannot be computed.
    """
    check_metrics(metrics)
    chosen = DEFAULT_METRICS if metrics is None else metrics
    twice = "cvvdp" in chosen
    if twice and (iter(video) is video or iter(reference) is reference):
        raise ValueError("cvvdp reads both videos a second time: give lists of chunks")
    if twice and fps is None:
        raise ValueError("cvvdp needs the frames a second, which neither video states: give fps")
    missing = {
        "lpips": lpips_missing() if "lpips" in chosen else NOT_ASKED,
        "vmaf": vmaf_missing() if "vmaf" in chosen else NOT_ASKED,
    }

    def leave_out(name: str, reason: str | None) -> None:
        if reason and missing[name] is None:
            if metrics is not None:
                raise ValueError(reason)
            missing[name] = reason

    decibels: list[float] = []
    similarities: list[float] = []
    distance, viewer, factor = None, None, 1
    with ExitStack() as stack:
        for frames, wanted in _aligned(video, reference):
            _check(frames, wanted)
            if not decibels:
                height, width = frames.shape[1:3]
                factor = enlargement(height, width)
                leave_out("vmaf", too_small("vmaf", height, width))
                if min(height, width) < LPIPS_SIDE:
                    side = f"{LPIPS_SIDE} x {LPIPS_SIDE}"
                    leave_out("lpips", f"lpips needs frames of at least {side} pixels")
                if missing["lpips"] is None:
                    distance = _lpips_metric()
                if missing["vmaf"] is None:
                    import torch

                    viewer = stack.enter_context(VMAF(threads=torch.get_num_threads()))
            decibels += psnr_per_frame(frames, wanted)
            similarities += ssim_per_frame(frames, wanted)
            if distance is not None:
                _add_to(distance, frames, wanted)
            if viewer is not None:
                viewer.update(frames, wanted)
        if not decibels:
            raise ValueError("video and reference must hold a frame, got none")
        if len(decibels) == 1:
            leave_out("vmaf", PICTURE)
        scores = viewer.compute() if viewer is not None and missing["vmaf"] is None else []
    jod = None
    if twice and fps is not None:
        jod = cvvdp_of_streams(video, reference, frames=len(decibels), fps=fps)
    return Fidelity(
        frames=len(decibels),
        psnr_db=_pooled(decibels),
        ssim=math.fsum(similarities) / len(similarities),
        lpips=None if distance is None else float(distance.compute()),
        lpips_missing=missing["lpips"],
        vmaf=math.fsum(scores) / len(scores) if scores else None,
        vmaf_lowest=min(scores, default=None),
        vmaf_missing=missing["vmaf"],
        cvvdp_jod=jod,
        cvvdp_missing=None if twice else NOT_ASKED,
        enlarged=factor,
        by_frame={"psnr_db": decibels, "ssim": similarities},
    )


class _File:
    """Chunks of a video file, from the beginning each time."""

    def __init__(self, path: str | Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[np.ndarray]:
        return read_stream(self._path)


def compare_files(
    video: str | Path,
    reference: str | Path,
    *,
    metrics: Sequence[str] | None = None,
    fps: float | None = None,
) -> Fidelity:
    """`measure_fidelity` of two video files or folders of PNG frames.

    Args:
        fps: frames a second for cvvdp, if neither file states them.

    Raises:
        FileNotFoundError, OSError: see `read_video`.
        ValueError: see `check_pair` and `measure_fidelity`.
    """
    check_metrics(metrics)
    rate = check_pair(video, reference) or fps
    return measure_fidelity(_File(video), _File(reference), metrics=metrics, fps=rate)


def check_pair(video: str | Path, reference: str | Path) -> float | None:
    """Refuse two files that cannot be compared, by their headers and first frames.

    Returns:
        The frame rate that they state, frames a second; None if neither does. A GIF rounds it: it
        counts if the other file states none.

    Raises:
        FileNotFoundError, OSError: see `read_video`.
        ValueError: sizes or frame rates that differ.
    """
    rates = {path: video_fps(path) for path in (video, reference)}
    known = [rate for rate in rates.values() if rate is not None]
    exact = [r for path, r in rates.items() if r and Path(path).suffix.lower() != ".gif"]
    if len(exact) == 2 and not math.isclose(*exact, rel_tol=0.01):
        raise ValueError(
            f"video and reference must have one frame rate, got {exact[0]:g} frames a second of "
            f"{video} and {exact[1]:g} of {reference}"
        )
    sizes = [next(read_stream(path, frames=1)).shape[1:3] for path in (video, reference)]
    if sizes[0] != sizes[1]:
        (rows, columns), (wanted_rows, wanted_columns) = sizes
        raise ValueError(
            f"video and reference must have one size, got {columns} x {rows} pixels of {video} "
            f"and {wanted_columns} x {wanted_rows} of {reference}"
        )
    return next(iter([*exact, *known]), None)


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
    _check_shapes(video, reference)
    for name, array in (("video", video), ("reference", reference)):
        if array.ndim != 4 or array.shape[-1] != 3 or array.size == 0 or array.dtype != np.uint8:
            raise ValueError(f"{name} must be (F, H, W, 3) uint8, got {array.shape} {array.dtype}")


def _check_shapes(video: np.ndarray, reference: np.ndarray) -> None:
    if video.shape != reference.shape:
        raise ValueError(
            f"video and reference must have one shape, got {video.shape} and {reference.shape}"
        )


def _batches(
    video: np.ndarray, reference: np.ndarray, metric: str = "psnr", least: int = 1
) -> Iterator[tuple["Tensor", "Tensor"]]:
    """Pairs of (n, 3, H, W) float32, n frames at a time.

    Raises ValueError for videos that differ in shape, or with sides under `least` pixels.
    """
    import torch

    _check(video, reference)
    if min(video.shape[1:3]) < least:
        raise ValueError(
            f"{metric} needs frames of at least {least} x {least} pixels, got {video.shape}"
        )
    count = max(1, PIXELS_AT_ONCE // (video.shape[1] * video.shape[2]))
    for start in range(0, len(video), count):
        frames, wanted = (
            torch.from_numpy(array[start : start + count].astype(np.float32)).movedim(-1, 1)
            for array in (video, reference)
        )
        yield frames, wanted
