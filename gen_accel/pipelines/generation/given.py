"""Pictures and video that a video is made from, read and checked before a model is loaded."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gen_accel.files import file_sha256, folder_sha256
from gen_accel.measure.video_io import frames_of, pixels, read_stream, video_fps
from gen_accel.names import FIRST, LAST, VIDEO, check_strength
from gen_accel.paths import expanded
from gen_accel.pipelines.image_prompt.encoder import as_rgb


class Picture(NamedTuple):
    """A picture in RGB.

    Args:
        name: for messages.
    """

    name: str
    image: Image.Image


@dataclass(frozen=True)
class Film:
    """A video whose frames are read when they are asked for.

    Args:
        name: for messages.
        source: a file, a folder of numbered PNG frames, (F, H, W, 3) uint8 or a list of pictures.
        fps: frames a second; None where the source does not state it.
        height, width: in pixels, of its first frame.
    """

    name: str
    source: Any
    fps: float | None
    height: int
    width: int

    def frames(self) -> Iterator[Image.Image]:
        return _frames(self.source)

    def count(self, most: int) -> int:
        """Count the frames, as far as `most`."""
        return sum(1 for _ in islice(self.frames(), most))

    def identity(self) -> str:
        """Identify files by a hash of their bytes, others by a hash of their pixels."""
        if isinstance(self.source, Path):
            if self.source.is_dir():
                return folder_sha256(sorted(f for f in self.source.iterdir() if f.is_file()))
            return file_sha256(self.source)
        held = hashlib.sha256()
        for frame in self.frames():
            held.update(pixels(frame).encode())
        return held.hexdigest()


@dataclass(frozen=True)
class Given:
    """What a video is made from besides its prompt. Pictures are files, PIL images or
    (H, W, 3) uint8.

    Args:
        image: first frame.
        last_image: last frame.
        video: a file, a folder of numbered PNG frames, (F, H, W, 3) uint8 or a list of pictures.
        strength: share of the video that is made anew, above 0 and at most 1. None: the
            pipeline's own.
    """

    image: Any = None
    last_image: Any = None
    video: Any = None
    strength: float | None = None

    def __post_init__(self) -> None:
        check_strength(self.strength, has_video=self.video is not None)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is given, of `names.KINDS`."""
        held = {FIRST: self.image, LAST: self.last_image, VIDEO: self.video}
        return tuple(kind for kind, value in held.items() if value is not None)

    def opened(self) -> "Given":
        """Read the pictures and the first frame of the video.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is no picture, or an array of another shape or type.
            OSError: a video that cannot be read.
        """
        return replace(
            self,
            image=_opened(self.image, "the first frame"),
            last_image=_opened(self.last_image, "the last frame"),
            video=None if self.video is None else _film(self.video),
        )

    def identity(self) -> dict[str, Any]:
        """Identify pictures by their pixels, and a video; call it after `opened`."""
        pictures = {"image": self.image, "last_image": self.last_image}
        found = {name: one and pixels(one.image) for name, one in pictures.items()}
        video = None if self.video is None else self.video.identity()
        return found | {"video": video, "strength": self.strength}


def _opened(source: Any, name: str) -> Picture | None:
    if source is None or isinstance(source, Picture):
        return source
    if isinstance(source, np.ndarray):
        return Picture(name, next(_frames(source[None])))
    path = isinstance(source, str | Path)
    return Picture(Path(source).name if path else name, as_rgb(source))


def _film(source: Any) -> Film:
    if isinstance(source, Film):
        return source
    name, fps = "the video", None
    if isinstance(source, str | Path):
        path = expanded(source)
        name, fps, source = path.name, video_fps(path), path
    elif isinstance(source, np.ndarray):
        pass
    elif isinstance(source, Sequence) and source:
        source = tuple(as_rgb(frame) for frame in source)
        sizes = {frame.size for frame in source}
        if len(sizes) > 1:
            (width, height), (other_width, other_height) = sorted(sizes)[:2]
            raise ValueError(
                "frames of a video must have one size, got "
                f"{height} x {width} and {other_height} x {other_width}"
            )
    else:
        raise ValueError(
            "video must be a file, a folder, (F, H, W, 3) uint8 or a list of pictures, got "
            f"{type(source).__name__}"
        )
    first = next(_frames(source), None)
    if first is None:
        raise ValueError(f"{name} holds no frame")
    return Film(name, source, fps, first.height, first.width)


def _frames(source: Any) -> Iterator[Image.Image]:
    if isinstance(source, tuple):
        yield from source
        return
    chunks = read_stream(source) if isinstance(source, Path) else iter([source])
    for frame in frames_of(chunks):
        yield Image.fromarray(frame)
