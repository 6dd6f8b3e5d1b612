"""Visible difference of two videos in JOD, by ColorVideoVDP.

Mantiuk et al., 2024, https://doi.org/10.1145/3658144, package cvvdp, whose parameters are in its
wheel: nothing is downloaded. It models an eye before a display, in colour and over time.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np

from gen_accel.extras import needed_for
from gen_accel.measure.enlarging import enlarged, enlargement
from gen_accel.measure.video_io import frames_of

DISPLAY = "standard_4k"
CVVDP_SIDE = 16  # pixels, below which its pyramid has no level
FREE_SHARE = 0.5  # of a GPU's free memory


def cvvdp_jod(
    video: np.ndarray,
    reference: np.ndarray,
    *,
    fps: float,
    display: str = DISPLAY,
    device: str | None = None,
) -> float:
    """`cvvdp_of_streams` of two videos in memory, (F, H, W, 3) uint8."""
    if video.shape != reference.shape:
        raise ValueError(
            f"video and reference must have one shape, got {video.shape} and {reference.shape}"
        )
    frames = len(video)
    given: dict[str, Any] = {"fps": fps, "display": display, "device": device}
    return cvvdp_of_streams([video], [reference], frames=frames, **given)


def cvvdp_of_streams(
    video: Iterable[np.ndarray],
    reference: Iterable[np.ndarray],
    *,
    frames: int,
    fps: float,
    display: str = DISPLAY,
    device: str | None = None,
) -> float:
    """Quality of a video beside a reference in JOD, just objectionable differences: 10 where no
    difference can be seen, and one less where three in four viewers prefer the reference.

    Small frames are enlarged by `enlargement`, pixel by pixel. Both videos are read once, in step.

    Args:
        video, reference: chunks of (f, H, W, 3) uint8, in order.
        frames: how many either holds; one is a picture.
        fps: frames a second, which decides what the eye can follow.
        display: one of cvvdp's displays, viewed pixel by pixel. "standard_4k" is its own default:
            30 inches of 3840 x 2160 pixels and 200 cd/m2, at twice the height of the screen, in an
            office.
        device: of torch; without, a GPU where there is one.

    Raises:
        ValueError: cvvdp is not installed, frames under 16 pixels, fps that is not positive, or a
            stream that ends early.
    """
    if missing := cvvdp_missing():
        raise ValueError(missing)
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive and finite, got {fps}")
    import torch

    with needed_for("cvvdp", extra="quality"), _no_new_handlers():
        import pycvvdp
    where = None if device is None else torch.device(device)
    with _no_new_handlers(), torch.no_grad():
        metric = pycvvdp.cvvdp(
            display_name=display, quiet=True, device=where, gpu_mem=_gigabytes()
        )
        source = _Source((video, reference), frames, fps, metric.display_photometry)
        score, _ = metric.predict_video_source(source)
    return float(score)


def cvvdp_missing() -> str | None:
    """Return why cvvdp cannot run here, and how to get it; None where it can."""
    if find_spec("pycvvdp") is None:
        return 'cvvdp needs pycvvdp: pip install "gen_accel[quality]"'
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
        height, width = shapes[0][:2]
        if reason := too_small(height, width):
            raise ValueError(reason)
        self._factor = enlargement(height, width)
        self._size = (self._factor * height, self._factor * width, frames)

    def get_video_size(self) -> tuple[int, int, int]:
        return self._size

    def get_batch_size(self) -> int:
        return 1

    def get_frames_per_second(self) -> float:
        return self._fps if self._frames > 1 else 0

    def get_test_frame(self, frame: int, device: Any, colorspace: str) -> Any:
        return self._next(0, device, colorspace)

    def get_reference_frame(self, frame: int, device: Any, colorspace: str) -> Any:
        return self._next(1, device, colorspace)

    def _next(self, which: int, device: Any, colorspace: str) -> Any:
        pixels = self._ahead[which]
        if pixels is None:
            raise ValueError(f"video and reference must hold {self._frames} frames, got fewer")
        self._ahead[which] = next(self._left[which], None)
        import torch

        seen = torch.from_numpy(enlarged(pixels, self._factor)).to(device)
        shaped = seen.movedim(-1, 0)[None, :, None].float() / 255
        return self._photometry.source_2_target_colorspace(shaped, colorspace)


def too_small(height: int, width: int) -> str | None:
    """Return why frames of this size have no JOD; None where they have."""
    if min(height, width) >= CVVDP_SIDE:
        return None
    return (
        f"cvvdp needs frames of at least {CVVDP_SIDE} x {CVVDP_SIDE} pixels, got "
        f"{height} x {width}"
    )


def _gigabytes() -> float | None:
    """Share of a GPU's memory that cvvdp may take, which a model may hold most of."""
    import torch

    if not torch.cuda.is_available():
        return None
    return FREE_SHARE * torch.cuda.mem_get_info()[0] / 1e9


@contextmanager
def _no_new_handlers() -> Iterator[None]:
    """Take off what pycvvdp's logging adds to the root logger, for all libraries."""
    root = logging.getLogger()
    before = [*root.handlers]
    try:
        yield
    finally:
        for handler in [*root.handlers]:
            if handler not in before:
                root.removeHandler(handler)
