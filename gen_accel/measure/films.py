"""Films, which are files of coded video, read and written by ffmpeg's libraries through PyAV.

imageio cannot stand in: its plugin passes no options to an encoder, states no colours, and reads
on over packets that are cut off.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

from gen_accel.io import FULL
from gen_accel.paths import for_ffmpeg
from gen_accel.registry import needed_for

ALONE = {"protocol_whitelist": "file"}  # no protocol that a file names opens a network
MICROSECOND = Fraction(1, 1_000_000)  # unit of a container's own times
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


def pyav() -> Any:
    """The module av, which is ffmpeg's libraries."""
    with needed_for("reading or writing a video file", extra="video"):
        import av
    return av


@contextmanager
def opened_film(source: Path | IO[bytes], name: object) -> Iterator["Film"]:
    """Open a film for reading.

    Args:
        source: a file, or its bytes as a file that seeks.
        name: of the film, for messages.

    Raises:
        OSError: no film, one without a video stream, or, while it is read, a damaged one; one
            line with the name and the reason.
    """
    av = pyav()
    where = for_ffmpeg(source) if isinstance(source, Path) else source
    try:
        container = av.open(where, options=ALONE)
    except av.FFmpegError as error:
        raise OSError(f"{name} cannot be read: {_why_not_opened(source, error)}") from error
    with container:
        yield Film(container, name)


def _why_not_opened(source: Path | IO[bytes], error: Any) -> str:
    if not isinstance(error, pyav().error.InvalidDataError):
        return error.strerror
    size = source.stat().st_size if isinstance(source, Path) else source.seek(0, 2)
    if not size:
        return "it is empty"
    return "it is no video that ffmpeg knows, or was cut off before its index"


class Film:
    """The first video stream of an open container; a cover picture is none."""

    def __init__(self, container: Any, name: object) -> None:
        self.container, self.name = container, name
        covers = pyav().stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & covers]
        if not streams:
            only = " (sound only)" if container.streams.audio else ""
            raise OSError(f"{name} cannot be read: it has no video stream{only}")
        self.stream = streams[0]
        self.stream.thread_type = "AUTO"

    @property
    def fps(self) -> float | None:
        """Frames a second that the file states, on average."""
        return float(self.stream.average_rate or self.stream.guessed_rate or 0) or None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as stored."""
        return self.stream.height, self.stream.width

    @property
    def comment(self) -> str:
        """Comment of the container; "" for none."""
        tags = {name.lower(): text for name, text in self.container.metadata.items()}
        return tags.get("comment", "")

    def packets(self) -> int:
        """Count the stored frames without decoding them."""
        with self._told(0):
            return sum(packet.size > 0 for packet in self.container.demux(self.stream))

    def extent(self) -> tuple[int, float]:
        """Count the stored frames, and measure the seconds to the end of the last one, without
        decoding them.

        Raises:
            OSError: the film is damaged or cut off.
        """
        step = 1 / (self.stream.average_rate or Fraction(25))
        start = (self.container.start_time or 0) * MICROSECOND
        count, end = 0, Fraction(0)
        with self._told(0):
            for packet in self.container.demux(self.stream):
                if packet.is_corrupt:
                    raise pyav().error.InvalidDataError(0, "a packet is cut off")
                if packet.size > 0:
                    count += 1
                    base = packet.time_base or self.stream.time_base
                    lasts = packet.duration * base if packet.duration else step
                    time = end if packet.pts is None else packet.pts * base - start
                    end = max(end, time + lasts)
        return count, float(end)

    def pictures(self, *, fps: float | None = None) -> Iterator[np.ndarray]:
        """Decode the frames, turned as a player shows them, (H, W, 3) uint8 each, RGB.

        Args:
            fps: rate of a grid of times, as of `lora.data.CaptionedVideo.read`; None
                takes every stored frame once.

        Raises:
            OSError: the film is damaged, or holds no frame.
        """
        count = 0
        for picture in self._converted(fps):
            count += 1
            yield picture
        if not count:
            raise OSError(f"{self.name} cannot be read: it holds no frames")

    def _converted(self, fps: float | None) -> Iterator[np.ndarray]:
        conversion = None
        for frame in self._frames():
            if conversion is None or not conversion.takes(frame):
                if conversion is not None:
                    yield from conversion.rest()
                conversion = _Conversion(frame, fps)
            yield from conversion.of(frame)
        if conversion is not None:
            yield from conversion.rest()

    def _frames(self) -> Iterator[Any]:
        """Decode the stream; times count from the start of the film and have no gap."""
        start = (self.container.start_time or 0) * MICROSECOND
        step, due = 1 / (self.stream.average_rate or Fraction(25)), Fraction(0)
        count, frames = 0, self._decoded()
        while True:
            with self._told(count):
                frame = next(frames, None)
            if frame is None:
                return
            base = frame.time_base or self.stream.time_base
            stated = frame.dts if frame.pts is None else frame.pts
            time = due if stated is None else stated * base - start
            frame.pts, frame.time_base = round(time / base), base
            due, count = time + step, count + 1
            yield frame

    def _decoded(self) -> Iterator[Any]:
        damaged = pyav().error.InvalidDataError
        for packet in self.container.demux(self.stream):
            if packet.is_corrupt:  # the decoder may drop it without an error
                raise damaged(0, "a packet is cut off")
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise damaged(0, "a frame is patched up")
                yield frame

    @contextmanager
    def _told(self, count: int) -> Iterator[None]:
        """Name the file in the error of a decoder that has given `count` frames."""
        av = pyav()
        try:
            yield
        except av.error.InvalidDataError as error:
            place = f"after frame {count}" if count else "at its first frame"
            said = f"it is damaged or cut off {place}"
            raise OSError(f"{self.name} cannot be read: {said}") from error
        except av.FFmpegError as error:
            raise OSError(f"{self.name} cannot be read: {error.strerror}") from error


class _Conversion:
    """Frames of one size and format to RGB, upright, and to a rate.

    libavfilter keeps to the colours that a frame states, as ffmpeg itself does.
    """

    def __init__(self, frame: Any, fps: float | None) -> None:
        self.kind, self.turn = _kind(frame), _matrix(frame)
        width, height, pixels, space, span = self.kind
        stated = {
            "video_size": f"{width}x{height}",
            "pix_fmt": pixels,
            "time_base": str(frame.time_base),
            "colorspace": space,
            "range": span,
        }
        rate = [] if fps is None else [("fps", f"fps={fps!r}")]
        self.graph = chain_of(stated, [*rate, ("format", "rgb24")])

    def takes(self, frame: Any) -> bool:
        return _kind(frame) == self.kind

    def of(self, frame: Any) -> Iterator[np.ndarray]:
        self.graph.vpush(frame)
        return self._pictures()

    def rest(self) -> Iterator[np.ndarray]:
        """Frames that are due at the end."""
        self.graph.vpush(None)
        return self._pictures()

    def _pictures(self) -> Iterator[np.ndarray]:
        return (_turned(frame.to_ndarray(), self.turn) for frame in pulled(self.graph))


def chain_of(stated: Mapping[str, object], filters: list[tuple[str, str]]) -> Any:
    """Filters of ffmpeg one after the other.

    Args:
        stated: size, format and so on of the frames that go in.
        filters: name and arguments of each.
    """
    graph = pyav().filter.Graph()
    end = graph.add("buffer", ":".join(f"{name}={value}" for name, value in stated.items()))
    for name, arguments in (*filters, ("buffersink", None)):
        following = graph.add(name, arguments)
        end.link_to(following)
        end = following
    graph.configure()
    return graph


def pulled(graph: Any) -> Iterator[Any]:
    """Frames that are ready at the end of a graph."""
    av = pyav()
    while True:
        try:
            frame = graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        yield frame


def _kind(frame: Any) -> tuple[int, int, str, int, int]:
    return (
        frame.width,
        frame.height,
        frame.format.name,
        int(frame.colorspace),
        int(frame.color_range),
    )


def _matrix(frame: Any) -> tuple[int, int, int, int]:
    """How columns and rows of a picture lead across and down on the screen."""
    stated = frame.side_data.get("DISPLAYMATRIX")
    if not stated:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(stated), np.int32)[:5].tolist()
    return a, b, c, d


def _turned(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Turn and mirror; an angle between goes to the nearest quarter."""
    a, b, c, d = matrix
    across, down = a, d
    if abs(b) > abs(a):
        picture, across, down = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


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
        stream: Any = film.add_stream(coding.codec, rate=rate, options=dict(coding.options))
        stream.height, stream.width, stream.pix_fmt = height, width, coding.pixels
        stream.thread_type = "AUTO"  # by slices alone, PyAV's default, files are larger
        for name, value in coding.tags.items():
            setattr(stream.codec_context, name, value)
        graph = coding.graph(stated)

        def push(frame: Any) -> None:
            graph.vpush(frame)
            for ready in pulled(graph):
                film.mux(stream.encode(ready))

        for count, picture in enumerate(chain([first], frames), 1):
            frame = pyav().VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = count - 1, 1 / rate
            push(frame)
        push(None)
        film.mux(stream.encode())
    except BaseException:
        with suppress(pyav().FFmpegError):
            film.close()
        raise
    film.close()
    return count


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
