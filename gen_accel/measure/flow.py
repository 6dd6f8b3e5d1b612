"""Optical flow from one frame to the next, by OpenCV's DIS."""

from importlib.util import find_spec
from typing import Any

import numpy as np

from gen_accel.extras import needed_for

TOP = 0.05  # share of the flow that counts, the largest
LEAST_SIDE = 16  # pixels: smaller frames are continued at their edges
WINDOW = 9  # pixels, over which a match is judged
WORTH = 1.0  # level of 8 bits by which a match must beat standing still, a pixel
LEFT_OVER = 0.5  # of the difference that standing still leaves


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
    """Return why there is no optical flow here, and how to get it; None where there is."""
    if find_spec("cv2") is None:
        return 'optical flow needs cv2: pip install "gen_accel[quality]"'
    return None
