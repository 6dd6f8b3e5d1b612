"""Parts of a clip that are trained on: its scenes between cuts, and the chunks of each.

Cuts are found by two detectors of PySceneDetect. AdaptiveDetector finds a change of brightness
that stands out from the changes around it, and HistogramDetector a change of its distribution,
which a moving camera leaves as it is. A find of either is a cut. They are given our own frames, at
the rate and the way up of the training, so that a cut is exact to the frame. Fades and dissolves
are no cuts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import numpy as np

from gen_accel.registry import needed_for

How = Literal["start", "middle", "all"]
Scenes = Literal["off", "cut"]
RECIPE = 1  # version of the detection; another one looks for the cuts again
WINDOW = 2  # frames on both sides that a change is compared with
# Pixels that the wider side of a frame is reduced to; few of them average the noise of a camera.
FINE, COARSE = 256, 64
LEAST = 10.0  # mean change of a pixel, of 255, below which a change of the distribution is a fade


class Chunk(NamedTuple):
    """A part of a clip, in frames at the rate that clips are resampled to."""

    begin: int
    frames: int


@dataclass(frozen=True)
class Take:
    """Rule that picks the chunks of a clip, or of each of its scenes.

    A chunk is as long as the longest length that fits.

    Args:
        how: "start", "middle": one chunk; "all": chunks one after the other, the last ones
            shorter.
        scenes: "cut": no chunk crosses a cut; "off": cuts are not looked for.
    """

    how: How = "start"
    scenes: Scenes = "off"

    def __post_init__(self) -> None:
        for name, kind in (("how", How), ("scenes", Scenes)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")

    @property
    def reads_all(self) -> bool:
        """Whether all frames of a clip must be decoded to choose its chunks."""
        return self.how != "start" or self.scenes == "cut"

    def of(self, scenes: Sequence[tuple[int, int]], lengths: Sequence[int]) -> list[Chunk]:
        """Choose the chunks of a clip.

        Args:
            scenes: first frame and the frame after the last one of each.
            lengths: in frames, ascending.
        """
        found: list[Chunk] = []
        for begin, end in scenes:
            fitting = [length for length in lengths if length <= end - begin]
            if self.how == "all":
                for length in reversed(fitting):
                    while end - begin >= length:
                        found.append(Chunk(begin, length))
                        begin += length
            elif fitting:
                spare = end - begin - fitting[-1] if self.how == "middle" else 0
                found.append(Chunk(begin + spare // 2, fitting[-1]))
        return found


def scenes_of(frames: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Split a clip at its cuts, each the first frame of a scene."""
    edges = [0, *(cut for cut in cuts if 0 < cut < frames), frames]
    return [(begin, end) for begin, end in pairwise(edges) if end > begin]


def check_scenes() -> None:
    """Raise ModuleNotFoundError where PySceneDetect is missing, without importing it."""
    with needed_for("scenes: cut", extra="scenes"):
        for name in ("scenedetect", "cv2"):
            if find_spec(name) is None:
                raise ModuleNotFoundError(f"no module {name}", name=name)


class CutFinder:
    """The cuts of one clip, whose frames are given one at a time.

    The clip counts as still before its first frame and after its last one, so that cuts next to
    them are found too.

    Args:
        rate: frames a second.
    """

    def __init__(self, rate: float) -> None:
        with needed_for("scenes: cut", extra="scenes"):
            import cv2  # pyright: ignore[reportMissingImports]
            from scenedetect import FrameTimecode
            from scenedetect.detectors import AdaptiveDetector, HistogramDetector
        self._cv2, self._time, self._rate = cv2, FrameTimecode, rate
        adaptive = AdaptiveDetector(min_scene_len=1, window_width=WINDOW, luma_only=True)
        self._detectors = {FINE: HistogramDetector(min_scene_len=1), COARSE: adaptive}
        self._found: set[int] = set()
        self._count = 0
        self._sizes: dict[int, tuple[int, int]] = {}
        self._last: dict[int, np.ndarray] = {}

    def see(self, picture: np.ndarray) -> None:
        """Take the next frame, (H, W, 3) uint8 RGB."""
        if not self._sizes:
            height, width = picture.shape[:2]
            for side in self._detectors:
                scale = min(1.0, side / max(height, width))
                self._sizes[side] = max(1, round(width * scale)), max(1, round(height * scale))
        frame = np.ascontiguousarray(picture[..., ::-1])
        small = {
            side: self._cv2.resize(frame, size, interpolation=self._cv2.INTER_AREA)
            for side, size in self._sizes.items()
        }
        if not self._last:
            self._pass(small, WINDOW)
        self._pass(small, 1)
        self._last = small

    def cuts(self) -> list[int]:
        """Return the first frame of each scene but the first, after all frames were seen."""
        if self._last:
            self._pass(self._last, WINDOW)
            self._last = {}
        return sorted(cut for cut in self._found if cut > 0)

    def _pass(self, small: dict[int, np.ndarray], times: int) -> None:
        before = self._last.get(COARSE, small[COARSE])
        change = float(self._cv2.absdiff(small[COARSE], before).mean())
        for _ in range(times):
            now = self._time(self._count, fps=self._rate)
            for side, detector in self._detectors.items():
                found = detector.process_frame(now, small[side])
                if side == COARSE or change >= LEAST:
                    self._found.update(cut.frame_num - WINDOW for cut in found)
            self._count += 1
