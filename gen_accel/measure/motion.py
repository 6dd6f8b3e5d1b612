"""Looping, drift, motion and flicker of one video, without a reference.

Chunks of (f, H, W, 3) uint8 are read once, in order. For each frame only colours, contrast and a
16 x 16 thumbnail are kept, 3 KB, whatever its size.

Dynamic degree and flicker are VBench's, Huang et al., 2024, https://arxiv.org/abs/2311.17982 and
https://github.com/Vchitect/VBench, which scores many videos; the deviations are named where they
are computed. Loop score and drift are our own.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.measure.video_io import frames_of, read_stream, video_fps
from gen_accel.registry import needed_for, needs

LUMA = (0.2126, 0.7152, 0.0722)  # of linear R, G, B in BT.709, used here on coded values
GRID = 16  # rows and columns of a thumbnail
LEVEL = 1 / 255  # what 8 bits can tell apart
TIE = 0.01  # by which a later return must be closer than an earlier one
LARGEST_LAG = 2 / 3  # of the clip: a third of all frames is compared at least
SAMPLED_FPS = 8.0  # at which VBench looks at motion
# Of the optical flow by OpenCV's DIS.
TOP = 0.05  # share of the flow that counts, the largest
LEAST_SIDE = 16  # pixels: smaller frames are continued at their edges
WINDOW = 9  # pixels, over which a match is judged
WORTH = 1.0  # level of 8 bits by which a match must beat standing still, a pixel
LEFT_OVER = 0.5  # of the difference that standing still leaves

STILL = 6 / 256  # of the smaller side: VBench's least motion from one sampled frame to the next


class MotionCurves(NamedTuple):
    """A video's changes from frame to frame, which `Motion` sums up.

    Args:
        colors: (F, 3): mean R, G and B of each frame, 0 to 1.
        contrasts: (F,): standard deviation of brightness within each frame.
        similarity: (F,) by lag; see `similarities`.
    """

    colors: np.ndarray
    contrasts: np.ndarray
    similarity: np.ndarray


@dataclass(frozen=True)
class Motion:
    """Results of `measure_motion`.

    Args:
        loop_score: how much the clip returns to earlier frames, 0 to 1; see `loop_score`.
        loop_lag: the number of frames after which it returns most; None if it never does.
        similarity: similarity at the lag asked for, 1 if the clip repeats itself exactly; see
            `similarities`.
        color_drift: change of the mean R, G and B in 100 frames, as shares of their range: the
            slope of the least-squares line.
        contrast_drift: the same for the standard deviation of brightness within a frame.
        flicker: 1 less the mean absolute difference of consecutive frames, as a share of the
            range: 1 is a still picture. VBench asks for still scenes; in others motion counts too.
        flow: pixels of the video that its fastest parts move from one sampled frame to the next,
            the mean over the clip; see `Flow`. None, as are the next two, without OpenCV.
        dynamic_degree: share of the sampled steps with more motion than VBench's threshold, 0 to
            1. VBench says of a video only whether it is at least about a quarter: `dynamic`.
        flow_missing: why there is no flow, and how to get it.
        curves: figures of each frame; no part of `to_dict`.
    """

    frames: int
    fps: float
    loop_score: float
    loop_lag: int | None
    similarity: float | None
    color_drift: tuple[float, float, float]
    contrast_drift: float
    flicker: float
    flow: float | None
    dynamic_degree: float | None
    dynamic: bool | None
    flow_missing: str | None
    curves: MotionCurves = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "curves"}

    @property
    def by_frame(self) -> dict[str, object]:
        """The curves as lists; an undefined similarity is None."""
        found: dict[str, object] = {k: x.tolist() for k, x in self.curves._asdict().items()}
        defined = [x if math.isfinite(x) else None for x in self.curves.similarity.tolist()]
        return {**found, "similarity": defined}


def measure_file(path: str | Path, *, lag: int | None = None, fps: float | None = None) -> Motion:
    """`measure_motion` of a video file or a folder of PNG frames.

    Args:
        fps: frames a second if the file states none, as a folder does.

    Raises:
        FileNotFoundError, OSError: see `read_video`.
        ValueError: see `measure_motion`.
    """
    return measure_motion(read_stream(path), fps=video_fps(path) or fps or SAMPLED_FPS, lag=lag)


def measure_motion(
    chunks: Iterable[np.ndarray], *, fps: float = SAMPLED_FPS, lag: int | None = None
) -> Motion:
    """Read a video once and measure how it changes over time.

    Args:
        chunks: (f, H, W, 3) uint8 each, in order; `[video]` will do.
        fps: frames a second. Motion is looked at 8 times a second, as far as whole frames allow.
        lag: frames, to state the similarity at, such as the length that a model was trained on.

    Raises:
        ValueError: fewer than 2 frames, fps that is not positive, a lag that leaves no pair of
            frames, or chunks that are not as above.
    """
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive and finite, got {fps}")
    if lag is not None and lag < 1:
        raise ValueError(f"lag must be at least 1, got {lag}")
    interval = max(1, round(fps / SAMPLED_FPS))
    colors: list[Tensor] = []
    contrasts: list[Tensor] = []
    thumbnails: list[Tensor] = []
    changes: list[float] = []
    flows: list[float] = []
    before = sampled = None
    missing = flow_missing()
    flow = Flow() if missing is None else None
    threshold = 0.0
    for number, pixels in enumerate(frames_of(chunks)):
        frame = torch.from_numpy(pixels.astype(np.float32)).movedim(-1, 0) / 255
        brightness = (frame * torch.tensor(LUMA).view(3, 1, 1)).sum(0)
        colors.append(frame.mean((1, 2)))
        contrasts.append(brightness.std(correction=0))
        thumbnails.append(F.adaptive_avg_pool2d(frame, GRID).flatten())
        if before is None:
            threshold = max(1.0, SAMPLED_FPS / fps) * STILL * min(frame.shape[1:])
        else:
            changes.append((frame - before).abs().mean().item())
        if flow is not None and number % interval == 0:
            levels = (255 * brightness).round().byte().numpy()
            if sampled is not None:
                flows.append(largest(flow.speeds(sampled, levels)))
            sampled = levels
        before = frame
    frames = len(colors)
    if frames < 2:
        raise ValueError(f"a video needs at least 2 frames to show motion, got {frames}")
    if lag is not None and lag >= frames:
        raise ValueError(f"lag must be less than the {frames} frames, got {lag}")
    by_frame, contrast_of, small = (
        torch.stack(some).double().numpy() for some in (colors, contrasts, thumbnails)
    )
    curves = MotionCurves(by_frame, contrast_of, similarities(small))
    score, loop_lag = loop_score(curves.similarity)
    red, green, blue = _slopes(curves.colors)
    [contrast] = _slopes(curves.contrasts[:, None])
    # VBench takes the flow from RAFT, and a clip of two sampled frames as dynamic in any case.
    moving = sum(one > threshold for one in flows)
    return Motion(
        frames=frames,
        fps=fps,
        loop_score=score,
        loop_lag=loop_lag,
        similarity=None if lag is None else float(curves.similarity[lag]),
        color_drift=(red, green, blue),
        contrast_drift=contrast,
        flicker=1 - math.fsum(changes) / len(changes),
        flow=None if missing else math.fsum(flows) / max(len(flows), 1),
        dynamic_degree=None if missing else moving / max(len(flows), 1),
        dynamic=None if missing else moving >= max(1, round((len(flows) + 1) / 4)),
        flow_missing=missing,
        curves=curves,
    )


def similarities(features: np.ndarray) -> np.ndarray:
    """Similarity of frames at each lag from 0 to F - 1.

    1 - D(lag) / D, where D(lag) is the mean squared distance of frames that far apart and D the
    distance of frames drawn at random. 1 is an exact repetition, 0 is as alike as any two frames,
    and negative values are less alike. All NaN if frames differ by less than a level of 8 bits.

    Args:
        features: (F, D), a row for each frame, of 0 to 1.
    """
    count = len(features)
    centered = features - features.mean(0)
    energy = np.square(centered).sum(1)
    spread = energy.mean()
    if spread <= LEVEL**2 * features.shape[1]:
        return np.full(count, np.nan)
    products = np.zeros(count)
    for start in range(0, features.shape[1], 64):  # which bounds the memory of the transforms
        spectrum = np.fft.rfft(centered[:, start : start + 64], n=2 * count, axis=0)
        power = np.square(np.abs(spectrum)).sum(1)
        products += np.fft.irfft(power, n=2 * count)[:count]
    pairs = np.arange(count, 0, -1)
    passed = np.concatenate([[0.0], np.cumsum(energy)])
    early, late = passed[::-1][:count], passed[-1] - passed[:count]
    return 1 - (early + late - 2 * products) / pairs / (2 * spread)


def loop_score(similarity: np.ndarray) -> tuple[float, int | None]:
    """Return the largest of `similarities` once the clip has become unlike itself, and its lag. Of
    peaks within 0.01 of the highest, the first counts.

    Lags count from the first at which frames are no more alike than any two, up to two thirds of
    the clip. A looping clip scores 1 at its period; a still one, and one that only moves on,
    scores 0. Repetition can be right: a clock should loop.
    """
    lags = similarity[: int(LARGEST_LAG * len(similarity)) + 1]
    unlike = np.flatnonzero(lags <= 0)
    if not len(unlike):
        return 0.0, None
    later = lags[unlike[0] :]
    best = later.max()
    if best <= 0:
        return 0.0, None
    lag = int((later >= best - TIE).argmax())
    while lag + 1 < len(later) and later[lag + 1] > later[lag]:
        lag += 1
    return float(min(best, 1.0)), int(unlike[0]) + lag


def _slopes(values: np.ndarray) -> list[float]:
    """Slope of each column of (F, n), in 100 frames."""
    line = np.polyfit(np.arange(len(values)), values, 1)
    return [100 * float(slope) for slope in line[0]]


class Flow:
    """Dense inverse search, Kroeger et al., 2016, https://arxiv.org/abs/1603.03590, at OpenCV's
    medium preset.

    DIS gives noise on a plain wall large flows. Unlike there, a pixel stands still unless its flow
    explains the next frame: in a window of 9 x 9 pixels, once both have the same mean, it has to
    leave less than half the difference that standing still leaves, and at least a level less.

    Raises:
        ModuleNotFoundError: OpenCV is not installed; see `flow_missing`.
    """

    def __init__(self) -> None:
        with needed_for("optical flow", extra="quality"):
            import cv2
        self._cv2: Any = cv2
        self._dis = self._cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def speeds(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Return how far each pixel moves, in pixels.

        Args:
            before, after: (H, W) uint8 of brightness.

        Returns:
            (H, W) float32.
        """
        height, width = before.shape
        missing = ((0, max(0, LEAST_SIDE - height)), (0, max(0, LEAST_SIDE - width)))
        before, after = (np.pad(frame, missing, mode="edge") for frame in (before, after))
        flow = self._dis.calc(before, after, None)
        columns, rows = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in before.shape[::-1]))
        start, end = before.astype(np.float32), after.astype(np.float32)
        moved = self._cv2.remap(
            end,
            columns + flow[..., 0],
            rows + flow[..., 1],
            interpolation=self._cv2.INTER_CUBIC,
            borderMode=self._cv2.BORDER_REPLICATE,
        )
        still, left = self._difference(start, end), self._difference(start, moved)
        explained = (left < LEFT_OVER * still) & (left < still - WORTH)
        found = np.hypot(flow[..., 0], flow[..., 1]) * explained
        return found[:height, :width].astype(np.float32)

    def _difference(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Mean absolute difference around each pixel, without the difference of the means."""
        off = one - other
        off -= self._cv2.blur(off, (WINDOW, WINDOW))
        return self._cv2.blur(np.abs(off), (WINDOW, WINDOW))


def largest(speeds: np.ndarray) -> float:
    """Mean speed of the fastest 5 % of a frame, in pixels, as VBench takes it."""
    ordered = np.sort(speeds, axis=None)[::-1]
    return float(ordered[: max(1, int(TOP * len(ordered)))].mean())


def flow_missing() -> str | None:
    """Return why there is no optical flow here, and how to get it; None if there is."""
    if find_spec("cv2") is None:
        return needs("optical flow", "cv2", "quality")
    return None
