"""Looping, drift, motion and flicker of one video, without a reference.

Chunks of (f, H, W, 3) uint8 are read once, in order. For each frame only colours, contrast and a
16 x 16 thumbnail are kept, 3 KB, whatever its size.

Dynamic degree and flicker are VBench's, Huang et al., 2024, https://arxiv.org/abs/2311.17982 and
https://github.com/Vchitect/VBench, which scores many videos; the deviations are named where they
are computed. Loop score and drift are our own.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.measure.flow import Flow, flow_missing, largest
from gen_accel.measure.video_io import frames_of, read_stream, video_fps

LUMA = (0.2126, 0.7152, 0.0722)  # of linear R, G, B in BT.709, used here on coded values
GRID = 16  # rows and columns of a thumbnail
LEVEL = 1 / 255  # what 8 bits can tell apart
TIE = 0.01  # by which a later return must be closer than an earlier one
LARGEST_LAG = 2 / 3  # of the clip: a third of all frames is compared at least

SAMPLED_FPS = 8.0  # at which VBench looks at motion
STILL = 6 / 256  # of the smaller side: VBench's least motion from one sampled frame to the next


@dataclass(frozen=True)
class Motion:
    """Results of `measure_motion`.

    Args:
        loop_score: how much the clip returns to earlier frames, 0 to 1; see `loop_score`.
        loop_lag: the number of frames after which it returns most; None where it never does.
        similarity: similarity at the lag asked for, 1 where the clip repeats itself exactly; see
            `similarities`.
        color_drift: change of the mean R, G and B in 100 frames, as shares of their range: the
            slope of the least-squares line.
        contrast_drift: the same for the standard deviation of brightness within a frame.
        flicker: 1 less the mean absolute difference of consecutive frames, as a share of the
            range: 1 is a still picture. VBench asks for still scenes; in others motion counts too.
        flow: pixels of the video that its fastest parts move from one sampled frame to the next,
            the mean over the clip; see `flow.Flow`. None, as are the next two, without OpenCV.
        dynamic_degree: share of the sampled steps with more motion than VBench's threshold, 0 to
            1. VBench says of a video only whether it is at least about a quarter: `dynamic`.
        flow_missing: why there is no flow, and how to get it.
    """

    frames: int
    fps: float
    loop_score: float
    loop_lag: int | None
    similarity: float | None
    color_drift: tuple[float, float, float]
    contrast_drift: float
    flicker: float
    flow: float | None = None
    dynamic_degree: float | None = None
    dynamic: bool | None = None
    flow_missing: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Course:
    """Course of a video from frame to frame, which `Motion` sums up.

    Args:
        colors: (F, 3): mean R, G and B of each frame, 0 to 1.
        contrasts: (F,): standard deviation of brightness within each frame.
        similarity: (F,) by lag; see `similarities`.
    """

    colors: np.ndarray
    contrasts: np.ndarray
    similarity: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Return what it holds as lists; a similarity that is not defined is None."""
        return {
            "colors": self.colors.tolist(),
            "contrasts": self.contrasts.tolist(),
            "similarity": [x if math.isfinite(x) else None for x in self.similarity.tolist()],
        }


def course_of_file(path: str | Path) -> Course:
    """`course_of` a video file or a folder of PNG frames; raises as `measure_file` does."""
    return course_of(read_stream(path))


def course_of(chunks: Iterable[np.ndarray]) -> Course:
    """Read a video once, and keep what changes over time of each frame.

    Args:
        chunks: as for `measure_motion`.

    Raises:
        ValueError: fewer than 2 frames, or chunks that are not as there.
    """
    looks = _Looks()
    for pixels in frames_of(chunks):
        looks.add(*_levels(pixels))
    return looks.course()


def measure_file(path: str | Path, *, lag: int | None = None, fps: float | None = None) -> Motion:
    """`measure_motion` of a video file or a folder of PNG frames.

    Args:
        fps: frames a second where the file states none, as a folder does.

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
    looks, changes, flows = _Looks(), [], []
    before = sampled = None
    missing = flow_missing()
    moved = Flow() if missing is None else None
    threshold = 0.0
    frames = 0
    for pixels in frames_of(chunks):
        frame, brightness = _levels(pixels)
        if before is None:
            threshold = max(1.0, SAMPLED_FPS / fps) * STILL * min(frame.shape[1:])
        looks.add(frame, brightness)
        if before is not None:
            changes.append((frame - before).abs().mean().item())
        if moved is not None and frames % interval == 0:
            levels = (255 * brightness).round().byte().numpy()
            if sampled is not None:
                flows.append(largest(moved.speeds(sampled, levels)))
            sampled = levels
        before = frame
        frames += 1
    course = looks.course()
    if lag is not None and lag >= frames:
        raise ValueError(f"lag must be less than the {frames} frames, got {lag}")
    score, found = loop_score(course.similarity)
    red, green, blue = _slopes(course.colors)
    [contrast] = _slopes(course.contrasts[:, None])
    return Motion(
        frames=frames,
        fps=fps,
        loop_score=score,
        loop_lag=found,
        similarity=None if lag is None else float(course.similarity[lag]),
        color_drift=(red, green, blue),
        contrast_drift=contrast,
        flicker=1 - math.fsum(changes) / len(changes),
        flow_missing=missing,
        **({} if missing else _of_flow(flows, threshold)),
    )


def _levels(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """(H, W, 3) uint8 to (3, H, W) colours and (H, W) brightness, 0 to 1."""
    frame = torch.from_numpy(pixels.astype(np.float32)).movedim(-1, 0) / 255
    return frame, (frame * torch.tensor(LUMA).view(3, 1, 1)).sum(0)


class _Looks:
    """Colours, contrast and a thumbnail of each frame."""

    def __init__(self) -> None:
        self.colors: list[Tensor] = []
        self.contrasts: list[Tensor] = []
        self.thumbnails: list[Tensor] = []

    def add(self, frame: Tensor, brightness: Tensor) -> None:
        self.colors.append(frame.mean((1, 2)))
        self.contrasts.append(brightness.std(correction=0))
        self.thumbnails.append(F.adaptive_avg_pool2d(frame, GRID).flatten())

    def course(self) -> Course:
        """Raise ValueError for fewer than 2 frames."""
        frames = len(self.colors)
        if frames < 2:
            raise ValueError(f"a video needs at least 2 frames to show motion, got {frames}")
        colors, contrasts, thumbnails = (
            torch.stack(some).double().numpy()
            for some in (self.colors, self.contrasts, self.thumbnails)
        )
        return Course(colors, contrasts, similarities(thumbnails))


def _of_flow(flows: Sequence[float], threshold: float) -> dict[str, Any]:
    """Figures of the flow between sampled frames.

    VBench takes the flow from RAFT, and a clip of two sampled frames as dynamic whatever it shows.
    """
    moving = sum(flow > threshold for flow in flows)
    return {
        "flow": math.fsum(flows) / len(flows) if flows else 0.0,
        "dynamic_degree": moving / len(flows) if flows else 0.0,
        "dynamic": moving >= max(1, round((len(flows) + 1) / 4)),
    }


def similarities(features: np.ndarray) -> np.ndarray:
    """Similarity of frames at each lag from 0 to F - 1.

    1 - D(lag) / D, where D(lag) is the mean squared distance of frames that far apart and D the
    distance of frames drawn at random. 1 is an exact repetition, 0 is as alike as any two frames,
    and negative values are less alike. All NaN where frames differ by less than a level of 8 bits.

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
