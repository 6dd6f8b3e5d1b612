"""Survey of clips before they are encoded: size, length, scenes between cuts, and their chunks.

Cuts are found by two detectors of PySceneDetect. AdaptiveDetector finds a change of brightness
larger than the changes around it, and HistogramDetector a change of its distribution, which a
moving camera leaves as it is. A find of either is a cut. They are given our own frames, at the
rate and the way up of the training, so that a cut is exact to the frame. Fades and dissolves are
no cuts.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from itertools import islice, pairwise
from typing import TYPE_CHECKING, TypedDict, TypeVar

import numpy as np

from gen_accel.lora.data.clips import CaptionedVideo, ClipRule, Size, Take, nearest_size
from gen_accel.registry import needed_for

if TYPE_CHECKING:
    from typing_extensions import NotRequired

RECIPE = 1  # version of the detection of cuts; another one looks for the cuts again
WINDOW = 2  # frames on both sides that a change is compared with
# Pixels that the wider side of a frame is reduced to; few of them average the noise of a camera.
FINE, COARSE = 256, 64
LEAST = 10.0  # mean change of a pixel, of 255, below which a change of the distribution is a fade


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


FIRST = 1000  # clips that `check_filled` looks at; the survey of all comes after
RATE = 25.0  # frames a second where clips keep their own; for messages of the detector alone


class ClipFacts(TypedDict):
    """Findings about a clip, fit for JSON, with its cuts if they were asked for.

    Args:
        frames: number of frames found; all of them if that is less than `asked`.
        asked: number of frames that were asked for.
        size: stored height and width in pixels.
        total: frames of the whole clip, a frame more or less if not all were decoded; None if the
            rest is damaged.
        seconds: duration; None if unknown.
        cuts: first frame of each scene but the first, see `CutFinder`.
        cuts_by: version of the detection.
        converted: how the frames differ from the stored ones, see `FilmStream.pictures`.
    """

    frames: int
    asked: int
    size: list[int]
    total: int | None
    seconds: float | None
    cuts: "NotRequired[list[int]]"
    cuts_by: "NotRequired[int]"
    converted: "NotRequired[list[str]]"


def survey(
    video: CaptionedVideo,
    take: Take,
    longest: int,
    fps: float | None,
    known: ClipFacts | None = None,
) -> ClipFacts:
    """Find out about a clip what `known` from an earlier run does not tell.

    Args:
        longest: frames of the longest length; no more are decoded unless `take` needs them.

    Raises OSError for a clip that cannot be read.
    """
    cuts = take.scenes == "cut" and not video.is_picture
    if known is not None and (not cuts or known.get("cuts_by") == RECIPE):
        is_whole = known["frames"] < known["asked"]
        if is_whole or (not take.reads_all and known["asked"] >= longest):
            return known
    finder = CutFinder(fps or RATE) if cuts else None
    most, see = None if take.reads_all else longest, None if finder is None else finder.see
    converted: list[str] = []
    count, size = video.survey(frames=most, fps=fps, see=see, tell=converted.append)
    about = _facts(video, count, count + 1 if most is None else most, size, fps)
    if converted:
        about["converted"] = converted
    if finder is not None:
        about["cuts"], about["cuts_by"] = finder.cuts(), RECIPE
    return about


def _facts(
    video: CaptionedVideo, frames: int, asked: int, size: Sequence[int], fps: float | None
) -> ClipFacts:
    """Add the frames and the seconds of the whole clip to what was decoded."""
    total, seconds = frames if frames < asked else None, None
    with suppress(OSError):  # of what lies beyond the frames that are needed
        stored, seconds = video.extent()
        if total is None:
            known = stored if fps is None or seconds is None else round(seconds * fps)
            total = max(frames, known)
        if seconds is None and fps is not None and not video.is_picture:
            seconds = total / fps
    return {
        "frames": frames,
        "asked": asked,
        "size": [*size],
        "total": total,
        "seconds": seconds,
    }


def check_filled(
    videos: Sequence[CaptionedVideo], own: ClipRule, sizes: Sequence[Size], fps: float | None
) -> None:
    """Refuse the longest length or one of several sizes that no clip fills, before a model is
    loaded.

    Clips are decoded in order until both are filled, which the first few do as a rule; of more
    than `FIRST` clips nothing is refused.

    Args:
        videos: without pictures that are not used.
        own: rule of videos without one.
        sizes: of all rules.

    Raises ValueError.
    """
    filled, frames = set[Size](), own.frames[-1]
    clips = longest = 0
    for video in islice(videos, FIRST):
        rule = video.rule or own
        if video.is_prompt:  # which is as long and as large as asked
            longest = max(longest, rule.frames[-1])
            filled.update(rule.sizes)
            continue
        most = 1 if video.is_picture or longest >= frames else frames
        try:
            count, size = video.survey(frames=most, fps=fps)
        except OSError:  # which is reported with all others
            continue
        clips += 1
        longest = max(longest, min(count, rule.frames[-1]))
        filled.add(nearest_size(rule.sizes, size))
        if longest >= frames and len(filled) == len(sizes):
            return
    if clips and len(videos) <= FIRST:
        refuse_unfilled([frames], sizes, fps, clips=clips, longest=longest, filled=filled)


def refuse_unfilled(
    lengths: Sequence[int],
    sizes: Sequence[Size],
    fps: float | None,
    *,
    clips: int,
    longest: int,
    filled: set[Size],
    scenes: bool = False,
) -> None:
    """Raise ValueError for a length, or one of several sizes, that no clip fills.

    Args:
        lengths: in frames.
        clips: number of clips that could be read.
        longest: frames of the longest clip, or of the longest scene.
        filled: sizes of the clips.
        scenes: whether clips are cut into scenes.
    """
    for length in lengths:
        if length > longest:
            rate = "" if fps is None else f" at {fps:g} frames a second"
            what = "no scene of a clip" if scenes else "no clip"
            raise ValueError(
                f"{what} has {length} frames{rate}: the longest of {clips} has {longest}"
            )
    for size in sizes:
        if len(sizes) > 1 and filled and size not in filled:
            others = ", ".join(f"{height}x{width}" for height, width in sorted(filled))
            raise ValueError(
                f"no clip goes to size {size[0]}x{size[1]}: each has the shape of another "
                f"({others}); leave it out of sizes"
            )


def scenes_in(about: ClipFacts, take: Take) -> list[tuple[int, int]]:
    """Return the scenes of a surveyed clip: its frames between cuts, or all frames."""
    return scenes_of(about["frames"], about.get("cuts", ()) if take.scenes == "cut" else ())


PATIENCE = 0.1  # seconds between two looks at whether the reader was stopped

Item = TypeVar("Item")
Made = TypeVar("Made")
# Results of one item; at their end None or an error.
Results = queue.Queue[tuple[Made] | BaseException | None]


def ahead(
    work: Callable[[Item], Iterable[Made]], items: Iterable[Item], workers: int
) -> Generator[Made, None, None]:
    """Chain `work(item)` over all items, in order, worked ahead by threads.

    Close an iterator that is not read to its end: this stops the threads, each after its item.

    Args:
        work: must not depend on the order in which it is called. What it raises is raised here, at
            the item's place.
        items: taken a few ahead.
        workers: number of threads. At most two results of each wait. 0: no thread; `work` is
            called when its result is asked for.
    """
    if not workers:
        for item in items:
            yield from work(item)
        return
    stopped = threading.Event()

    def put(results: "Results[Made]", made: tuple[Made] | BaseException | None) -> bool:
        """Wait for a free place. Returns whether there was one before the reader stopped."""
        while not stopped.is_set():
            with suppress(queue.Full):
                results.put(made, timeout=PATIENCE)
                return True
        return False

    def fill(item: Item, results: "Results[Made]") -> None:
        end = None
        try:
            if not all(put(results, (made,)) for made in work(item)):
                return
        except BaseException as error:
            end = error
        put(results, end)

    def drained(results: "Results[Made]") -> Iterator[Made]:
        while isinstance(made := results.get(), tuple):
            yield made[0]
        if made is not None:
            raise made

    waiting: deque[tuple[Results[Made], Future[None]]] = deque()
    with ThreadPoolExecutor(workers, "reading") as pool:
        try:
            for item in items:
                results: Results[Made] = queue.Queue(1)
                waiting.append((results, pool.submit(fill, item, results)))
                if len(waiting) > workers:
                    yield from drained(waiting[0][0])
                    waiting.popleft()
            while waiting:
                yield from drained(waiting[0][0])
                waiting.popleft()
        finally:
            stopped.set()
            for _, future in waiting:
                future.cancel()
