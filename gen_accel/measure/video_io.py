"""Videos and pictures read from and written to files. A video is (F, H, W, 3) uint8, RGB.

Every file is written under a temporary name in the same folder and renamed when it is whole. Files
carry texts about themselves, such as the prompt and the settings:

- Films (.mp4 and copies by `ffmpeg -c copy`): the comment of the container, which every tool
  copies. It is JSON, behind the note on an odd size if there is one.
- GIF: a comment block of the same JSON, in ASCII as the format wants.
- PNG: a text chunk for each, iTXt if the text is beyond Latin-1. Every text chunk is read, by
  whatever program it was written.

Films go through ffmpeg's libraries by PyAV. imageio cannot stand in: its plugin passes no options
to an encoder, states no colours, and reads on over packets that are cut off.
"""

import errno
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from gen_accel.io import FULL, check_folder, parse_json, replacing
from gen_accel.parsing import shown
from gen_accel.paths import (
    check_comments,
    check_input,
    check_replaceable,
    check_video_suffix,
    expanded,
    for_ffmpeg,
    real,
)
from gen_accel.registry import needed_for

if TYPE_CHECKING:
    from av import AudioFrame, VideoFrame, VideoStream
    from av.container import InputContainer, OutputContainer
    from av.filter import Graph

RATES = (0.01, 1000.0)  # frames a second allowed; ffmpeg takes some more, but fails late on others
FRAMES_AT_ONCE = 16  # frames read at once; 44 MB at 720 x 1280
FRAME_NAME = re.compile(r"\d{4,}\.png")
NAME = re.compile(r"[!-~]([ -~]{0,77}[!-~])?")  # what a PNG takes as a keyword
MARK = "gen_accel"  # the one key of our JSON
ODD_SIZE = "gen_accel size {height}x{width}"  # the comment in an mp4 with a padded edge
GIF_RATE = 100.0  # frames a second, by the unit of its times
GIF_COMMENT, GIF_PART = b"\x21\xfe", 255  # the block's beginning; most bytes in a part of it
GIF_END = b";"  # the trailer, a byte
ALONE = {"protocol_whitelist": "file"}  # no protocol that a file names opens a network
MICROSECOND = Fraction(1, 1_000_000)  # unit of a container's own times
LEAST_STRETCH, MOST_STRETCH = Fraction(1, 100), 4  # of pixels: less is left, more is refused
# Curves, primaries and matrices by their numbers in ITU-T H.273, which frames state.
HDR, BT2020, UNKNOWN = {16: "PQ", 18: "HLG"}, 9, 2
TO_SDR = (  # PyAV's wheels have no zscale, which ffmpeg has as a rule
    "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p"
)
Filters = tuple[tuple[str, str], ...]  # name and arguments of each


class Sound(NamedTuple):
    """Sound of a video.

    Args:
        samples: (channels, N) in [-1, 1], one channel or two.
        rate: samples a second.
    """

    samples: np.ndarray
    rate: int


class Coding(NamedTuple):
    """Coding of a film: encoder, its format of pixels, filters before it by name and arguments
    (none: one palette for all frames), its options, the container's, and the encoder of sound, ""
    for a format without."""

    codec: str
    pixels: str
    filters: Filters = ()
    options: Mapping[str, str] = {}
    of_container: Mapping[str, str] = {}
    sound: str = ""


CODINGS = {
    ".mp4": Coding(
        "libx264",
        "yuv420p",
        # Untagged files are decoded as BT.601 by some players and as BT.709 by others.
        (
            ("scale", "out_color_matrix=bt709:out_range=tv"),
            ("format", "yuv420p"),
            ("setparams", "colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"),
        ),
        # Without mbtree=0 x264 weighs blocks by memory that it never wrote: equal frames would
        # give other films.
        {"crf": "15", "x264-params": "mbtree=0"},
        {"movflags": "+faststart"},
        "aac",
    ),
    ".gif": Coding("gif", "pal8"),
}
# Options of a film whose index is in its parts, each of which is on the disk when it is whole.
FRAGMENTS = {"movflags": "+frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
HEARD_LESS = 0.1  # seconds that a container may state less of sound than was sent
SOUND_RATE = 192_000  # bits a second of the sound
TAGS = ("colorspace", "color_primaries", "color_trc", "color_range")  # 1 is BT.709, limited


def write_video(
    frames: np.ndarray,
    path: str | Path,
    *,
    fps: float,
    about: Mapping[str, str] | None = None,
    sound: Sound | None = None,
) -> Path:
    """Write `frames` in the format that the suffix of `path` names.

    - `.mp4`: H.264, yuv420p, which only knows even sizes. An odd edge is repeated once, never
      rescaled, and `read_video` takes it off again.
    - `.gif`: one palette of 256 colours for the whole clip; time in hundredths of a second, so
      that more than 100 frames a second are shown as 100.
    - `.png`: one frame is one picture; more go to a folder, `clip.png` to `clip/0000.png` and on.
    - no suffix: a folder of PNG frames. An earlier folder of numbered frames is replaced.

    Args:
        frames: (F, H, W, 3) uint8.
        fps: frames a second; PNG frames ignore it.
        about: texts by name, such as the prompt and the settings, to store in the file;
            `read_about` reads them. A folder keeps them in its first picture.
        sound: goes into an `.mp4`, as AAC; the other formats hold none.

    Returns:
        The file or folder written.

    Raises:
        ValueError: wrong frames, fps or `about`, or whatever `check_writable` refuses.
        OSError: the disk or the encoder failed. What was at `path` before is still there.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be (F, H, W, 3) uint8, got {frames.shape} {frames.dtype}")
    return write_stream([frames], path, fps=fps, about=about, sound=sound)


def holds_sound(path: str | Path) -> bool:
    """Whether `write_video` writes sound into a file of this suffix."""
    coding = CODINGS.get(Path(path).suffix.lower())
    return coding is not None and coding.sound != ""


def write_stream(
    chunks: Iterable[np.ndarray],
    path: str | Path,
    *,
    fps: float,
    about: Mapping[str, str] | None = None,
    sound: Sound | None = None,
) -> Path:
    """Write the frames of all chunks as `write_video` does, one chunk in memory at a time.

    An exception of `chunks` or an interrupt leaves no file. A GIF has one palette for all frames,
    which are held, 4 bytes a pixel, until the last one is known.

    Args:
        chunks: (f, H, W, 3) uint8 each, all of one height and width; f may differ.
        fps, about, sound: as of `write_video`.

    Returns:
        The file or folder written.

    Raises:
        ValueError: no frame, wrong chunks, fps or `about`, or whatever `check_writable` refuses.
        OSError: the disk or the encoder failed. What was at `path` before is still there.
    """
    check_rate(fps)
    texts = _checked_texts(about)
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix != ".png":  # a file or a folder, by how many frames there are
        check_writable(path)
    frames = frames_of(chunks)
    first = [*islice(frames, 2)]
    if not first:
        raise ValueError("chunks must hold a frame, got none")
    check_writable(path, frames=len(first))
    target, frames = _target(path, len(first)), chain(first, frames)
    with replacing(target) as partial:
        if _is_folder(path, len(first)):
            partial.mkdir()
            for i, frame in enumerate(frames):
                chunks_of = _png_chunks({} if i else texts)
                Image.fromarray(frame).save(partial / f"{i:04d}.png", pnginfo=chunks_of)
        elif suffix == ".png":
            Image.fromarray(first[0]).save(partial, pnginfo=_png_chunks(texts))
        elif suffix == ".gif":
            encode(frames, partial, fps=min(fps, GIF_RATE))
            _add_gif_comment(partial, texts)
        else:
            height, width = first[0].shape[:2]
            odd = height % 2 or width % 2
            notes = [ODD_SIZE.format(height=height, width=width) if odd else "", _comment(texts)]
            even = ((0, height % 2), (0, width % 2), (0, 0))
            padded = (np.pad(frame, even, mode="edge") for frame in frames)
            comment = "\n".join(filter(None, notes))
            encode(padded, partial, fps=fps, comment=comment, sound=sound)
    return target


def check_rate(fps: float) -> None:
    """Raise ValueError for frames a second that no file can state."""
    least, most = RATES
    if not least <= fps <= most:
        raise ValueError(
            f"fps must be from {least:g} to {most:g}, got {fps:g}: no player shows other rates"
        )


def check_writable(path: str | Path, *, frames: int | None = None) -> None:
    """Raise the errors of `write_video` now, before the work. Makes the folder of `path`.

    A link is followed: its target is written.

    Args:
        frames: how many there will be, when known: with 1 a `.png` is a file, else a folder.

    Raises:
        ValueError: unknown suffix; `path` is a folder but should be a file, or the reverse; the
            folder to replace holds more than numbered frames; a name that is too long.
        OSError: the folder of `path` cannot be made or written to, a file there is read-only, or
            the encoder is missing.
        ModuleNotFoundError: av (PyAV) is not installed, and the suffix needs it.
    """
    path = Path(path)
    check_video_suffix(path)
    if coding := CODINGS.get(path.suffix.lower()):
        _check_encoder(coding)
    target = _target(path, frames)
    check_replaceable(target)
    if not _is_folder(path, frames):
        if target.is_dir():
            raise ValueError(f"{target} must be a file, but it is a folder")
    elif target.exists():
        if not target.is_dir():
            raise ValueError(f"{target} must be a folder of frames, but it is a file")
        others = [p.name for p in target.iterdir() if not FRAME_NAME.fullmatch(p.name)]
        if others:
            raise ValueError(
                f"{target} must be new or hold numbered PNG frames only, it holds {min(others)}"
            )
    check_folder(real(target).parent)


def read_video(path: str | Path) -> np.ndarray:
    """Read every stored frame of `path`, once, as (F, H, W, 3) uint8.

    Args:
        path: a film that ffmpeg decodes, turned as a player shows it, a PNG picture, or a folder
            of numbered PNG frames.

    Raises:
        FileNotFoundError: nothing is there, or the folder holds no numbered PNG frame.
        OSError: no film, one without a video stream, or a damaged one.
    """
    return np.concatenate([*read_stream(path)])


def read_stream(path: str | Path, *, frames: int = FRAMES_AT_ONCE) -> Iterator[np.ndarray]:
    """Read as `read_video` does, in chunks of at most `frames` frames, (f, H, W, 3) uint8 each.

    Raises:
        ValueError: frames < 1.
        FileNotFoundError, OSError: as `read_video`.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    path, files = _stored(path)
    if not files:
        return _read_film(path, frames)
    return (
        np.stack([np.asarray(read_picture(f, f).convert("RGB")) for f in files[i : i + frames]])
        for i in range(0, len(files), frames)
    )


def _read_film(path: Path, frames: int) -> Iterator[np.ndarray]:
    with opened_film(path, path) as film:
        pictures, size = film.pictures(), None
        while part := [*islice(pictures, frames)]:
            size = size or part[0].shape
            if any(picture.shape != size for picture in part):
                raise OSError(f"{path} cannot be read: its frames change their size")
            rows, columns, _ = size
            if path.suffix.lower() == ".mp4":
                rows, columns = _stored_size(film.comment, rows, columns)
            yield np.stack(part)[:, :rows, :columns]


def frames_of(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the frames of chunks, (H, W, 3) uint8 each.

    Raises ValueError for a chunk that is not (f, H, W, 3) uint8, or not as large as the first one.
    """
    size = None
    for chunk in chunks:
        if chunk.ndim != 4 or chunk.shape[-1] != 3 or 0 in chunk.shape[1:]:
            raise ValueError(f"chunks must be (f, H, W, 3), got {chunk.shape}")
        if chunk.dtype != np.uint8:
            raise ValueError(f"chunks must be uint8, got {chunk.dtype}")
        size = size or chunk.shape[1:3]
        if chunk.shape[1:3] != size:
            raise ValueError(f"chunks must have one size, got {size} and {chunk.shape[1:3]}")
        yield from chunk


def video_fps(path: str | Path) -> float | None:
    """Frames a second that the file at `path` states; None for pictures, which state none.

    Raises:
        FileNotFoundError, OSError: as `read_video`.
    """
    path, files = _stored(path)
    if files:
        return None
    with opened_film(path, path) as film:
        return film.fps


def read_about(path: str | Path) -> dict[str, str]:
    """Texts that `write_video(about=)` stored in the file at `path`; {} for none.

    A film that was copied stream by stream (`ffmpeg -c copy`) has them too. A PNG gives whatever
    texts any program stored.

    Raises:
        FileNotFoundError, OSError: as `read_video`.
    """
    path, files = _stored(path)
    if not files and path.suffix.lower() != ".gif":
        with opened_film(path, path) as film:
            return _texts_in(film.comment)
    file = files[0] if files else path
    image = read_picture(file, file)
    if isinstance(image, PngImagePlugin.PngImageFile):
        return {str(name): str(text) for name, text in image.text.items()}
    comment = image.info.get("comment", b"")
    return _texts_in(comment.decode(errors="replace") if isinstance(comment, bytes) else comment)


def _stored(path: str | Path) -> tuple[Path, list[Path]]:
    """The file or folder at a path, and the pictures there in order; none of a film."""
    check_input(path)
    path = expanded(path)
    if not path.exists():
        raise FileNotFoundError(f"no video at {path}")
    if not path.is_dir():
        return path, [path] if path.suffix.lower() == ".png" else []
    found = (p for p in path.iterdir() if FRAME_NAME.fullmatch(p.name))
    files = sorted(found, key=lambda p: int(p.stem))
    if not files:
        raise FileNotFoundError(f"{path} holds no frames named like 0000.png")
    return path, files


def _target(path: Path, frames: int | None) -> Path:
    """Path that the frames are written to: `path`, or the folder of a PNG sequence."""
    return path.with_suffix("") if path.suffix and _is_folder(path, frames) else path


def _is_folder(path: Path, frames: int | None) -> bool:
    """Whether the frames go to a folder."""
    return not path.suffix or (path.suffix.lower() == ".png" and frames != 1)


def _av() -> ModuleType:
    with needed_for("reading or writing a video file", extra="video"):
        import av
    return av


@contextmanager
def opened_film(source: Path | IO[bytes], name: object) -> Iterator["FilmStream"]:
    """Open a film for reading.

    Args:
        source: a file, or its bytes as a file that seeks.
        name: of the film, for messages.

    Raises:
        OSError: no film, one without a video stream, or, while it is read, a damaged one; one
            line with the name and the reason.
        ValueError: `paths.check_input` refuses the file.
    """
    av = _av()
    if isinstance(source, Path):
        check_input(source)
    try:
        where = for_ffmpeg(source) if isinstance(source, Path) else source
        container = av.open(where, options=ALONE)
    except av.FFmpegError as error:
        why = error.strerror
        if isinstance(error, av.error.InvalidDataError):
            size = source.stat().st_size if isinstance(source, Path) else source.seek(0, 2)
            why = "it is no video that ffmpeg knows, or was cut off before its index"
            why = why if size else "it is empty"
        raise OSError(f"{name} cannot be read: {why}") from error
    with container:
        yield FilmStream(container, name)


class FilmStream:
    """The first video stream of an open container; a cover picture is none."""

    def __init__(self, container: "InputContainer", name: object) -> None:
        self.container, self.name = container, name
        covers = _av().stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & covers]
        if not streams:
            only = " (sound only)" if container.streams.audio else ""
            raise OSError(f"{name} cannot be read: it has no video stream{only}")
        self.stream = streams[0]
        self.stream.thread_type = "AUTO"
        self._start = (container.start_time or 0) * MICROSECOND
        self._step = 1 / (self.stream.average_rate or Fraction(25))

    @property
    def fps(self) -> float | None:
        """Frames a second that the file states, on average."""
        return float(self.stream.average_rate or self.stream.guessed_rate or 0) or None

    @property
    def comment(self) -> str:
        """Comment of the container; "" for none."""
        tags = {name.lower(): text for name, text in self.container.metadata.items()}
        return tags.get("comment", "")

    def extent(self) -> tuple[int, float]:
        """Count the stored frames, and measure the seconds to the end of the last one, without
        decoding them.

        Raises:
            OSError: the film is damaged or cut off.
        """
        count, end = 0, Fraction(0)
        with self._named():
            for packet in self.container.demux(self.stream):
                if packet.is_corrupt:
                    raise _av().error.InvalidDataError(0, "a packet is cut off")
                if packet.size > 0:
                    count += 1
                    base = packet.time_base or self.stream.time_base or MICROSECOND
                    lasts = packet.duration * base if packet.duration else self._step
                    time = end if packet.pts is None else packet.pts * base - self._start
                    end = max(end, time + lasts)
        return count, float(end)

    def heard(self) -> float:
        """Seconds of sound that the file states; 0 without any."""
        streams = self.container.streams.audio
        if not streams or streams[0].duration is None:
            return 0.0
        return float(streams[0].duration * (streams[0].time_base or MICROSECOND))

    def sound(self, begin: float, seconds: float, rate: int) -> np.ndarray | None:
        """Decode the sound from a time on, (2, N) float32 from -1 to 1, in stereo.

        Args:
            begin: seconds from the beginning of the film.
            rate: samples a second.

        Returns the samples, 0 where the film has no sound at that time; None for a film without
        sound.

        Raises:
            OSError: the sound is damaged.
        """
        if not self.container.streams.audio:
            return None
        stream, count = self.container.streams.audio[0], round(seconds * rate)
        found, place = np.zeros((2, count), np.float32), None
        if not count:
            return found
        resampler = _av().AudioResampler(format="fltp", layout="stereo", rate=rate)
        with self._named():
            for frame in chain(self.container.decode(stream), [None]):
                if place is None and frame is not None:
                    time = Fraction(frame.pts or 0) * (frame.time_base or MICROSECOND)
                    place = round((float(time - self._start) - begin) * rate)
                for piece in resampler.resample(frame):
                    samples, at = piece.to_ndarray(), place or 0
                    first, last = max(at, 0), min(at + samples.shape[1], count)
                    if first < last:
                        found[:, first:last] = samples[:, first - at : last - at]
                    place = at + samples.shape[1]
                if place is not None and place >= count:
                    break
        return found

    def pictures(
        self, *, fps: float | None = None, tell: Callable[[str], object] | None = None
    ) -> Iterator[np.ndarray]:
        """Decode the frames as a player shows them, (H, W, 3) uint8 each, RGB.

        They are turned. Interlaced ones are deinterlaced. Pixels that are not square are made so,
        with as many rows as are stored. Colours of BT.2020 are converted to BT.709.

        Args:
            fps: rate of a grid of times, as of `lora.data.CaptionedVideo.read`; None
                takes every stored frame once.
            tell: takes a line about each such change but a turn; None warns, with the film's name.

        Raises:
            OSError: the film is damaged, holds no frame, is HDR (PQ, HLG), or has pixels of a
                shape that nobody uses.
        """
        told, rate = set[str](), () if fps is None else (("fps", f"fps={fps!r}"),)

        def tell_once(line: str) -> None:
            if line not in told:
                told.add(line)
                tell(line) if tell else warnings.warn(f"{self.name}: {line}", stacklevel=2)

        def filters(frame: "VideoFrame") -> Filters:
            return *rate, *self._conversions(frame, tell_once), ("format", "rgb24")

        shown = self._filtered(self._deinterlaced(tell_once), filters)
        first = next(shown, None)
        if first is None:
            raise OSError(f"{self.name} cannot be read: it holds no frames")
        # Asked of the first alone: a frame that was asked keeps its memory until it is collected.
        matrix = _display_matrix(first)
        pictures = map(_av().VideoFrame.to_ndarray, chain([first], shown))
        yield from (_turned(picture, matrix) for picture in pictures)

    def _deinterlaced(self, tell: Callable[[str], None]) -> Iterator["VideoFrame"]:
        """Decode the stream; from the first interlaced frame on, make each of them progressive."""
        frames = self._frames()
        for frame in frames:
            if frame.interlaced_frame:
                tell("interlaced, and deinterlaced by bwdif")
                rest = chain([frame], frames)
                yield from self._filtered(
                    rest, lambda _: (("bwdif", "send_frame:deint=interlaced"),)
                )
                return
            yield frame

    def _conversions(
        self, frame: "VideoFrame", tell: Callable[[str], None]
    ) -> Iterator[tuple[str, str]]:
        """Choose the filters that make colours BT.709 and pixels square; none as a rule.

        Raises OSError for HDR, and for pixels that are too narrow or too wide.
        """
        if curve := HDR.get(frame.color_trc):
            raise OSError(
                f"{self.name} cannot be read: it is HDR ({curve}), and SDR is read; "
                f"ffmpeg -i IN -vf {TO_SDR} OUT.mp4 converts it"
            )
        if frame.color_primaries == BT2020:
            matrix = ":ispace=bt2020nc" if frame.colorspace == UNKNOWN else ""
            yield "colorspace", f"all=bt709:iprimaries=bt2020:itrc=bt2020-10{matrix}"
            tell("colours of BT.2020, converted to BT.709")
        shape: Any = self.stream.sample_aspect_ratio or Fraction(1)
        if abs(shape - 1) >= LEAST_STRETCH:
            said = f"its pixels are {shape.numerator}:{shape.denominator}"
            if not 1 / MOST_STRETCH <= shape <= MOST_STRETCH:
                raise OSError(
                    f"{self.name} cannot be read: {said}, and at most {MOST_STRETCH}:1 and "
                    f"1:{MOST_STRETCH} are read; ffmpeg -i IN -vf setsar=1 OUT.mp4 makes them "
                    "square"
                )
            width = round(frame.width * shape)
            yield "scale", f"{width}:{frame.height}"
            tell(f"{said}, and {frame.width} columns are made {width}")

    def _filtered(
        self, frames: Iterator["VideoFrame"], filters_of: Callable[["VideoFrame"], Filters]
    ) -> Iterator["VideoFrame"]:
        """Send frames through filters, a run of one size, format and filters at a time.

        libavfilter keeps to the colours that a frame states, as ffmpeg itself does.

        Raises OSError for frames that the filters do not take.
        """
        av, graph, kind = _av(), None, None
        for frame in chain(frames, [None]):
            stated = None if frame is None else (_stated(frame), filters_of(frame))
            try:
                if graph is not None and stated != kind:
                    graph.vpush(None)
                    yield from _pulled(graph)
                    graph = None
                if frame is None or stated is None:
                    return
                if graph is None:
                    kind = stated
                    graph = _filters({**stated[0], "time_base": str(frame.time_base)}, stated[1])
                graph.vpush(frame)
                yield from _pulled(graph)
            except av.FFmpegError as error:
                raise OSError(
                    f"{self.name} cannot be read: ffmpeg's filters do not take its frames, "
                    f"{frame and frame.format.name} with matrix {frame and int(frame.colorspace)} "
                    f"of ITU-T H.273: {error.strerror}"
                ) from error

    def _frames(self) -> Iterator["VideoFrame"]:
        """Decode the stream; times count from the start of the film and have no gap."""
        due, damaged = Fraction(0), _av().error.InvalidDataError
        with self._named():
            for packet in self.container.demux(self.stream):
                if packet.is_corrupt:  # the decoder may drop it without an error
                    raise damaged(0, "a packet is cut off")
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise damaged(0, "a frame is patched up")
                    base = frame.time_base or self.stream.time_base or MICROSECOND
                    stated = frame.dts if frame.pts is None else frame.pts
                    time = due if stated is None else stated * base - self._start
                    frame.pts, frame.time_base = round(time / base), base
                    due, self._count = time + self._step, self._count + 1
                    yield frame

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the file in the error of a decoder."""
        av, self._count = _av(), 0
        try:
            yield
        except av.FFmpegError as error:
            why = error.strerror
            if isinstance(error, av.error.InvalidDataError):
                place = f"after frame {self._count}" if self._count else "at its first frame"
                why = f"it is damaged or cut off {place}"
            raise OSError(f"{self.name} cannot be read: {why}") from error


def _filters(stated: Mapping[str, object], filters: Filters) -> "Graph":
    """Filters of ffmpeg one after the other; without any, one palette of 256 colours for all
    frames, which wait for it.

    Args:
        stated: size, format and so on of the frames that go in.
        filters: name and arguments of each.
    """
    graph = _av().filter.Graph()
    source = graph.add("buffer", ":".join(f"{name}={value}" for name, value in stated.items()))
    following = [graph.add(name, arguments) for name, arguments in filters]
    sink = graph.add("buffersink")
    if filters:
        graph.link_nodes(source, *following, sink)
    else:
        split, palette, use = map(graph.add, ("split", "palettegen", "paletteuse"))
        graph.link_nodes(source, split)
        split.link_to(use, 0, 0)
        split.link_to(palette, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
    graph.configure()
    return graph


def _pulled(graph: "Graph") -> Iterator["VideoFrame"]:
    """Frames that are ready at the end of a graph."""
    av = _av()
    with suppress(av.error.BlockingIOError, av.error.EOFError):
        while True:
            yield graph.vpull()


def _stated(frame: "VideoFrame") -> dict[str, object]:
    return {
        "video_size": f"{frame.width}x{frame.height}",
        "pix_fmt": frame.format.name,
        "colorspace": int(frame.colorspace),
        "range": int(frame.color_range),
    }


def _display_matrix(frame: "VideoFrame") -> tuple[int, int, int, int]:
    """Directions on the screen, across and down each, of a picture's columns and rows."""
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


def encode(
    frames: Iterator[np.ndarray],
    path: Path,
    *,
    fps: float,
    comment: str = "",
    sound: Sound | None = None,
    growing: int = 0,
) -> None:
    """Write frames, at least one, to a film and check that it holds them all.

    Args:
        growing: frames after which the film plays while it is written, each time, also if nothing
            ever ends it; 0: it plays when it is whole.
        frames: (height, width, 3) uint8 each.
        path: ending in one of `CODINGS`.
        comment: of the container; "" for none.
        sound: for a format that holds sound.

    Raises:
        OSError: the encoder or the disk failed; one line with the reason, and with the number of
            the error if the disk is full.
    """
    coding = CODINGS[path.suffix.lower()]
    if growing:
        now = {"tune": "zerolatency", "g": str(growing)}
        coding = coding._replace(options={**coding.options, **now}, of_container=FRAGMENTS)
    _check_encoder(coding)
    av = _av()
    try:
        rate = Fraction(fps).limit_denominator()
        sent = _encoded(frames, path, coding, rate, comment, sound if coding.sound else None)
    except av.FFmpegError as error:
        if error.errno in FULL:
            raise OSError(error.errno, os.strerror(error.errno or errno.ENOSPC)) from error
        raise OSError(f"ffmpeg wrote no {path.suffix} file: {error.strerror}") from error
    try:  # ffmpeg may not notice a full disk
        written = count_frames(path)
    except OSError as error:
        reason = str(error).rpartition("cannot be read: ")[2]
        raise OSError(f"ffmpeg wrote no readable {path.suffix} file: {reason}") from error
    if written != sent:
        raise OSError(f"ffmpeg wrote {written} of {sent} frames to the {path.suffix} file")
    if sound is not None and coding.sound:
        lasts = sound.samples.shape[1] / sound.rate
        with opened_film(path, path) as film:
            heard = film.heard()
        if heard < lasts - HEARD_LESS:
            raise OSError(
                f"ffmpeg wrote {heard:.2f} of {lasts:.2f} s of sound to the {path.suffix} file"
            )
    # A truncated last frame is counted all the same.
    if path.suffix.lower() == ".gif" and path.read_bytes()[-1:] != GIF_END:
        raise OSError("ffmpeg wrote no end to the .gif file: is the disk full?")


def finish(film: Path, path: Path, about: Mapping[str, str] | None = None) -> Path:
    """Write a film of H.264 that grew as an ordinary `.mp4`, without coding it again.

    Args:
        about: see `write_video`.

    Raises:
        ValueError, OSError: as `write_stream`, and for a film that cannot be read.
    """
    av, comment = _av(), _comment(_checked_texts(about))
    with replacing(path) as partial, opened_film(film, film) as source:
        options = dict(CODINGS[".mp4"].of_container)
        with av.open(for_ffmpeg(partial), "w", format="mp4", options=options) as whole:
            if comment:
                whole.metadata["comment"] = comment
            stream = whole.add_stream_from_template(source.stream)
            for packet in source.container.demux(source.stream):
                if packet.dts is not None:
                    packet.stream = stream
                    whole.mux(packet)
    return path


def count_frames(path: Path) -> int:
    """Count the frames that are stored in a film. Raises OSError as `FilmStream.extent`."""
    with opened_film(path, path) as film:
        return film.extent()[0]


def _check_encoder(coding: Coding) -> None:
    """Raise OSError if PyAV is built without the encoder."""
    av = _av()
    try:
        av.Codec(coding.codec, "w")
    except av.codec.codec.UnknownCodecError as error:
        raise OSError(
            f"PyAV {av.__version__} here has no encoder {coding.codec}: its wheels have it "
            "(pip install --force-reinstall av)"
        ) from error


def _encoded(
    frames: Iterator[np.ndarray],
    path: Path,
    coding: Coding,
    rate: Fraction,
    comment: str,
    sound: Sound | None,
) -> int:
    """Write the film; return how many frames were sent to the encoder."""
    av = _av()
    first = next(frames)
    height, width = first.shape[:2]
    given = {"video_size": f"{width}x{height}", "pix_fmt": "rgb24", "time_base": str(1 / rate)}
    suffix = path.suffix.lower().removeprefix(".")
    film = av.open(for_ffmpeg(path), "w", format=suffix, options=dict(coding.of_container))
    count = 0
    try:
        if comment:
            film.metadata["comment"] = comment
        stream: VideoStream = film.add_stream(
            coding.codec, rate=rate, options=dict(coding.options)
        )
        stream.height, stream.width, stream.pix_fmt = height, width, coding.pixels
        stream.thread_type = "AUTO"  # by slices alone, PyAV's default, files are larger
        for name in TAGS if coding.filters else ():
            setattr(stream.codec_context, name, 1)
        graph = _filters(given, coding.filters)
        heard = None if sound is None else _hearing(film, coding, sound)

        def push(frame: "VideoFrame | None") -> None:
            graph.vpush(frame)
            for ready in _pulled(graph):
                film.mux(stream.encode(ready))

        def flush() -> None:
            push(None)
            film.mux(stream.encode())

        try:
            for count, picture in enumerate(chain([first], frames), 1):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = count - 1, 1 / rate
                push(frame)
                if heard is not None:
                    heard(count / rate)
        except BaseException:
            if coding.of_container == FRAGMENTS and count:  # what was made so far plays
                with suppress(av.FFmpegError):
                    flush()
            raise
        flush()
        if heard is not None:
            heard(None)
    except BaseException:
        with suppress(av.FFmpegError):
            film.close()
        raise
    film.close()
    return count


def _hearing(
    film: "OutputContainer", coding: Coding, sound: Sound
) -> "Callable[[Fraction | None], None]":
    """Add a stream of sound to a film. Returns what writes it up to a time in seconds, or all of
    the rest and its end for None."""
    av = _av()
    rates = av.Codec(coding.sound, "w").audio_rates or [sound.rate]
    rate = sound.rate if sound.rate in rates else max(rates)
    stream: Any = film.add_stream(coding.sound, rate=rate, layout="stereo")
    stream.bit_rate = SOUND_RATE
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=rate)
    samples = np.broadcast_to(sound.samples, (2, sound.samples.shape[-1])).clip(-1, 1)
    place = 0

    def write(until: Fraction | None) -> None:
        nonlocal place
        whole = samples.shape[1]
        end = whole if until is None else min(whole, int(until * sound.rate))
        pieces: list[AudioFrame | None] = []
        if end > place:
            part = np.ascontiguousarray(samples[:, place:end], np.float32)
            piece = av.AudioFrame.from_ndarray(part, format="fltp", layout="stereo")
            piece.sample_rate, piece.time_base = sound.rate, Fraction(1, sound.rate)
            piece.pts, place = place, end
            pieces.append(piece)
        pieces += [None] if until is None else []
        for piece in pieces:
            for ready in resampler.resample(piece):
                film.mux(stream.encode(ready))
        if until is None:
            film.mux(stream.encode(None))

    return write


def _stored_size(comment: str, height: int, width: int) -> tuple[int, int]:
    """Height and width before `write_stream` repeated an odd edge; as given for other films."""
    found = re.match(ODD_SIZE.format(height=r"(\d+)", width=r"(\d+)"), comment)
    if found is None:
        return height, width
    stored = (int(found[1]), int(found[2]))
    # An editor that rescales a film may keep its comment.
    padded = tuple(n + n % 2 for n in stored) == (height, width)
    return stored if padded else (height, width)


def _checked_texts(about: Mapping[str, str] | None) -> dict[str, str]:
    """Copy the texts, their lone surrogates (of file names that are not UTF-8) escaped.

    Raises ValueError for a name that is not 1 to 79 characters of ASCII, or a value that is no
    text.
    """
    texts = {}
    for name, text in (about or {}).items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                f"a name in about must be 1 to 79 characters of ASCII, got {shown(name)}"
            )
        if not isinstance(text, str):
            raise ValueError(f"about[{shown(name)}] must be text, got {shown(text)}")
        texts[name] = text.encode(errors="backslashreplace").decode()
    return texts


def _comment(texts: Mapping[str, str], *, ascii_only: bool = False) -> str:
    """Write the texts as a comment, "" for none."""
    return json.dumps({MARK: dict(texts)}, ensure_ascii=ascii_only) if texts else ""


def _texts_in(comment: str) -> dict[str, str]:
    """Texts in a comment that `_comment` wrote, also behind other words; {} in any other."""
    start = comment.find(f'{{"{MARK}"')
    try:
        told = parse_json(comment[start:], MARK)[MARK] if start >= 0 else {}
        return _checked_texts(told)
    except (ValueError, TypeError, AttributeError, KeyError):
        return {}


def _png_chunks(texts: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    return chunks


def _add_gif_comment(path: Path, texts: Mapping[str, str]) -> None:
    """Put the texts into a GIF file, before its first frame."""
    if not texts:
        return
    data, comment = path.read_bytes(), _comment(texts, ascii_only=True).encode()
    colours = data[10]  # the flag and the size of the global palette
    start = 13 + (3 << (colours & 7) + 1 if colours & 0x80 else 0)
    parts = (comment[i : i + GIF_PART] for i in range(0, len(comment), GIF_PART))
    block = GIF_COMMENT + b"".join(bytes([len(part)]) + part for part in parts) + b"\0"
    path.write_bytes(data[:start] + block + data[start:])


def read_picture(source: Path | IO[bytes], name: object) -> Image.Image:
    """Read and decode the picture in a file.

    Above Pillow's limit on pixels (`Image.MAX_IMAGE_PIXELS`) a warning says how large the picture
    is. Pictures of twice as many pixels are refused.

    Args:
        name: of the file, for messages.

    Raises:
        OSError: no such file, no picture, a broken one, or one that is too large.
        ValueError: `paths.check_input` or `paths.check_comments` refuses the file.
    """
    if isinstance(source, Path):
        check_input(source)
        check_comments(source)
    most = Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                image.load()
    except Image.UnidentifiedImageError as error:
        raise OSError(f"{name} is no image that Pillow knows") from error
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))  # Pillow gives the number in its message alone
        has = f"{int(found[0]):,} pixels" if found else "too many pixels"
        raise OSError(
            f"{name} has {has}, and at most {2 * (most or 0):,} are read: scale it down"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system
            raise
        raise OSError(f"{name} is a broken image: {error}") from error
    if most is not None and image.width * image.height > most:
        size = f"{image.width} x {image.height} = {image.width * image.height:,} pixels"
        warnings.warn(f"{name} is large, {size}: a smaller one is read faster", stacklevel=2)
    return image


def pixels(image: Image.Image) -> str:
    """Identify a picture by its size and a hash of its pixels."""
    return f"{image.width} x {image.height} {hashlib.sha256(image.tobytes()).hexdigest()}"
