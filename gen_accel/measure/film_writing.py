"""Films coded by ffmpeg's libraries through PyAV."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gen_accel.files import FULL
from gen_accel.measure.film_reading import chain_of, opened_film, pulled, pyav
from gen_accel.paths import for_ffmpeg

# Untagged files are decoded as BT.601 by some players and as BT.709 by others.
BT709 = [
    ("scale", "out_color_matrix=bt709:out_range=tv"),
    ("format", "yuv420p"),
    ("setparams", "colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"),
]
TAGS = {"colorspace": 1, "color_primaries": 1, "color_trc": 1, "color_range": 1}  # the same
# Without it x264 weighs blocks by memory that it never wrote: equal frames would give other films.
STEADY = "mbtree=0"
GIF_END = b";"  # the trailer, a byte


@dataclass(frozen=True)
class Coding:
    """How a film is coded.

    Args:
        codec: name of the encoder.
        pixels: its format of pixels.
        graph: makes the filters before it, from what is stated of the frames.
        options: of the encoder.
        of_container: options of the container.
        tags: colours that the file states.
    """

    codec: str
    pixels: str
    graph: Callable[[Mapping[str, object]], Any]
    options: Mapping[str, str] = field(default_factory=dict)
    of_container: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, int] = field(default_factory=dict)


def _in_bt709(stated: Mapping[str, object]) -> Any:
    return chain_of(stated, BT709)


def _with_palette(stated: Mapping[str, object]) -> Any:
    """One palette of 256 colours for all frames, which wait for it."""
    graph = pyav().filter.Graph()
    source = graph.add("buffer", ":".join(f"{name}={value}" for name, value in stated.items()))
    split, generate = graph.add("split"), graph.add("palettegen")
    use, sink = graph.add("paletteuse"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(generate, 1, 0)
    generate.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


H264 = Coding(
    codec="libx264",
    pixels="yuv420p",
    graph=_in_bt709,
    options={"crf": "15", "x264-params": STEADY},
    of_container={"movflags": "+faststart"},
    tags=TAGS,
)
GIF = Coding(codec="gif", pixels="pal8", graph=_with_palette)


def encode(
    frames: Iterator[np.ndarray],
    path: Path,
    coding: Coding,
    *,
    fps: float,
    comment: str = "",
) -> None:
    """Write frames, at least one, to a film and check that it holds them all.

    Args:
        frames: (height, width, 3) uint8 each.
        comment: of the container; "" for none.

    Raises:
        OSError: the encoder or the disk failed; one line with the reason, and with the number of
            the error where the disk is full.
    """
    check_encoder(coding)
    av = pyav()
    try:
        sent = _encoded(frames, path, coding, Fraction(fps).limit_denominator(), comment)
    except av.FFmpegError as error:
        raise _failed(path, error.errno, error.strerror) from error
    _check_written(path, sent)


def check_encoder(coding: Coding) -> None:
    """Raise OSError where PyAV is built without the encoder."""
    av = pyav()
    try:
        av.Codec(coding.codec, "w")
    except av.codec.codec.UnknownCodecError as error:
        raise OSError(
            f"PyAV {av.__version__} here has no encoder {coding.codec}: its wheels have it "
            "(pip install --force-reinstall av)"
        ) from error


def count_frames(path: Path) -> int:
    """Count the frames that are stored in a film. Raises OSError as `opened_film`."""
    with opened_film(path, path) as film:
        return film.packets()


def _encoded(
    frames: Iterator[np.ndarray], path: Path, coding: Coding, rate: Fraction, comment: str
) -> int:
    """Write the film; return how many frames were sent to the encoder."""
    first = next(frames)
    height, width = first.shape[:2]
    stated = {
        "video_size": f"{width}x{height}",
        "pix_fmt": "rgb24",
        "time_base": str(1 / rate),
    }
    suffix = path.suffix.lower().removeprefix(".")
    options = dict(coding.of_container)
    film = pyav().open(for_ffmpeg(path), "w", format=suffix, options=options)
    count = 0
    try:
        if comment:
            film.metadata["comment"] = comment
        stream = _stream(film, coding, rate, (height, width))
        graph = coding.graph(stated)
        for count, picture in enumerate(chain([first], frames), 1):
            frame = pyav().VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = count - 1, 1 / rate
            graph.vpush(frame)
            _mux(film, stream, graph)
        graph.vpush(None)
        _mux(film, stream, graph)
        film.mux(stream.encode())
    except BaseException:
        with suppress(pyav().FFmpegError):
            film.close()
        raise
    film.close()
    return count


def _stream(film: Any, coding: Coding, rate: Fraction, size: tuple[int, int]) -> Any:
    stream = film.add_stream(coding.codec, rate=rate, options=dict(coding.options))
    stream.height, stream.width = size
    stream.pix_fmt = coding.pixels
    stream.thread_type = "AUTO"  # by slices alone, which PyAV has by default, files are larger
    for name, value in coding.tags.items():
        setattr(stream.codec_context, name, value)
    return stream


def _mux(film: Any, stream: Any, graph: Any) -> None:
    for frame in pulled(graph):
        film.mux(stream.encode(frame))


def _check_written(path: Path, sent: int) -> None:
    """Read the file again: ffmpeg may not notice a full disk."""
    try:
        written = count_frames(path)
    except OSError as error:
        reason = str(error).rpartition("cannot be read: ")[2]
        raise OSError(f"ffmpeg wrote no readable {path.suffix} file: {reason}") from error
    if written != sent:
        raise OSError(f"ffmpeg wrote {written} of {sent} frames to the {path.suffix} file")
    # A truncated last frame is counted all the same.
    if path.suffix.lower() == ".gif" and path.read_bytes()[-1:] != GIF_END:
        raise OSError("ffmpeg wrote no end to the .gif file: is the disk full?")


def _failed(path: Path, number: int | None, said: str) -> OSError:
    if number in FULL:
        return OSError(number, os.strerror(number or errno.ENOSPC))
    return OSError(f"ffmpeg wrote no {path.suffix} file: {said}")
