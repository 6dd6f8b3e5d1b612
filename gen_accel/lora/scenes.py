"""Cuts of a film, by PySceneDetect's detector of changes that stand out from their neighbours.

The detector is given our own frames, at the rate and the way up that the clip is trained in, so
that a cut is a frame of the clip to the frame. Fades and dissolves are no cuts.
"""

from importlib.util import find_spec
from typing import Any

import numpy as np

from gen_accel.extras import needed_for

RECIPE = 1  # version of the detection; another one looks for the cuts again
WINDOW = 2  # frames on both sides that a change is compared with
WIDTH = 256  # pixels that a frame is reduced to, as PySceneDetect does


def check_scenes() -> None:
    """Raise ModuleNotFoundError where PySceneDetect is missing, without importing it."""
    with needed_for("scenes cut", extra="scenes"):
        for name in ("scenedetect", "cv2"):
            if find_spec(name) is None:
                raise ModuleNotFoundError(f"no module {name}", name=name)


class CutFinder:
    """The cuts of one clip, whose frames are given one at a time.

    The first and the last frame count as long still, so that cuts next to them are found too.
    """

    def __init__(self, rate: float) -> None:
        with needed_for("scenes cut", extra="scenes"):
            import cv2  # pyright: ignore[reportMissingImports]
            from scenedetect import FrameTimecode
            from scenedetect.detectors import AdaptiveDetector
        self._cv2, self._time, self._rate = cv2, FrameTimecode, rate
        self._detector = AdaptiveDetector(min_scene_len=1, window_width=WINDOW)
        self._count, self._found = 0, []
        self._size: tuple[int, int] | None = None
        self._last: Any = None

    def see(self, picture: np.ndarray) -> None:
        """Take the next frame, (H, W, 3) uint8 RGB."""
        if self._size is None:
            height, width = picture.shape[:2]
            scale = min(1.0, WIDTH / width)
            self._size = max(1, round(width * scale)), max(1, round(height * scale))
        bgr = np.ascontiguousarray(picture[..., ::-1])
        small = self._cv2.resize(bgr, self._size, interpolation=self._cv2.INTER_AREA)
        if self._last is None:
            self._pass(small, WINDOW)
        self._pass(small, 1)
        self._last = small

    def cuts(self) -> list[int]:
        """Return the first frame of each scene but the first, after all frames were seen."""
        if self._last is not None:
            self._pass(self._last, WINDOW)
            self._last = None
        return [cut for cut in self._found if cut > 0]

    def _pass(self, small: np.ndarray, times: int) -> None:
        for _ in range(times):
            now = self._time(self._count, fps=self._rate)
            found = self._detector.process_frame(now, small)
            self._found += [cut.frame_num - WINDOW for cut in found]
            self._count += 1
