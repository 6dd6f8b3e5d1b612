"""Clips as people have them: all containers and codecs of phones, cameras and the web, with names
of any alphabet, and files that are no clips."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 8
RED, BLUE, GREY = (220, 40, 40), (30, 60, 200), (120, 120, 120)
HEIGHT, WIDTH = 48, 64


@dataclass(frozen=True)
class Awkward:
    """A clip and what a reader must find in it.

    Args:
        name: path below the folder of the data set.
        encoder: without it the clip cannot be made.
        frames, size: as a player shows them; None where the clip must be refused.
        says: pattern of the reason why it is refused.
        steps: time of each frame in 1/RATE seconds, if they are not one after the other.
    """

    name: str
    encoder: str
    make: Callable[[Path], None]
    frames: int | None = RATE
    size: tuple[int, int] = (HEIGHT, WIDTH)
    says: str = ""
    steps: tuple[int, ...] | None = None


def pictures(frames: int = RATE, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A grey field, (frames, height, width, 3), red in its upper left corner, with a blue patch
    in the lower half that moves from left to right."""
    video = np.full((frames, height, width, 3), GREY, np.uint8)
    video[:, : height // 3, : width // 3] = RED
    side = width // 4
    for i, frame in enumerate(video):
        left = i * (width - side) // max(1, frames - 1)
        frame[-height // 3 :, left : left + side] = BLUE
    return video


def film(
    codec: str = "libx264",
    pixels: str = "yuv420p",
    *,
    frames: int = RATE,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    steps: tuple[int, ...] | None = None,
    sound: str = "",
    rate: int = RATE,
) -> Callable[[Path], None]:
    """Writer of a film with these properties.

    Args:
        pixels: format of pixels.
        steps: time of each frame, in frames.
        sound: layout of a sound track.
    """

    def write(path: Path) -> None:
        options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate, options=options)
            stream.height, stream.width = size
            stream.pix_fmt = pixels
            stream.time_base = Fraction(1, rate)
            track = container.add_stream("aac", rate=16000, layout=sound) if sound else None
            for i, picture in enumerate(pictures(frames, *size)):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
                frame.pts, frame.time_base = steps[i] if steps else i, Fraction(1, rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
            if track is not None:
                play(container, track, seconds=frames / rate)

    return write


def play(container, track, *, seconds: float) -> None:
    """Add a tone to a sound track."""
    channels = len(track.layout.channels)
    for start in range(0, int(16000 * seconds), 1024):
        tone = 0.1 * np.sin((start + np.arange(1024)) / 9).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(
            np.repeat(tone[None], channels, 0), format="fltp", layout=track.layout.name
        )
        frame.sample_rate, frame.pts = 16000, start
        container.mux(track.encode(frame))
    container.mux(track.encode())


def sound_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        play(container, container.add_stream("aac", rate=16000, layout="mono"), seconds=0.5)


def held_upright(path: Path) -> None:
    """A film of a phone: stored lying, with the matrix that turns it clockwise by 90 degrees."""
    film()(path)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    data[matrix : matrix + 36] = struct.pack(
        ">9i", 0, one, 0, -one, 0, 0, HEIGHT << 16, 0, 1 << 30
    )
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    """A film, its index in front, of which half has arrived."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        noise = np.random.default_rng(0).integers(0, 255, (12, 96, 128, 3), np.uint8)
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def holding(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data)  # pyright: ignore[reportReturnType]


H264, HEVC, VP9, GIF = "libx264", "libx265", "libvpx-vp9", "gif"
VARIED = (0, 1, 2, 6, 7, 9, 10, 15)
CLIPS = (
    Awkward("plain.mp4", H264, film()),
    Awkward("camera.mov", H264, film(pixels="yuvj420p")),
    Awkward("hevc 10 bit.mp4", HEVC, film(HEVC, "yuv420p10le")),
    Awkward("web.webm", VP9, film(VP9)),
    Awkward("animation.gif", GIF, film(GIF, "rgb8", rate=10), frames=8),
    Awkward("recording.mkv", H264, film()),
    Awkward("full colour.mp4", H264, film(pixels="yuv444p")),
    Awkward("ten bit 422.mkv", H264, film(pixels="yuv422p10le")),
    Awkward("vfr.mp4", H264, film(steps=VARIED), steps=VARIED),
    Awkward("upright.mov", H264, held_upright, size=(WIDTH, HEIGHT)),
    Awkward("surround.mp4", H264, film(sound="5.1")),
    Awkward("odd.mp4", H264, film(pixels="yuv444p", size=(97, 131)), size=(97, 131)),
    Awkward("Katze größer 猫.mp4", H264, film()),
    Awkward("with  two spaces.mp4", H264, film()),
    Awkward("LOUD.MP4", H264, film()),
    Awkward("sub folder/deeper/clip.mp4", H264, film()),
    Awkward("a colon 13:30.avi", "mpeg4", film("mpeg4")),
    Awkward("short.mp4", H264, film(frames=10, rate=25), frames=10),  # 0.4 s
    Awkward("broken.mp4", "", holding(b"\0\1\2 not a film" * 50), None, says="no video"),
    Awkward("empty.mp4", "", holding(b""), None, says="it is empty"),
    Awkward("cut.mp4", H264, cut_short, None, says="damaged"),
    Awkward("sound.mp4", "aac", sound_only, None, says=r"no video stream \(sound only\)"),
)
NO_CLIPS = ("Thumbs.db", "notes.txt")


def can_encode(encoder: str) -> bool:
    """Whether the installed PyAV has the encoder; "" needs none."""
    try:
        return not encoder or av.Codec(encoder, "w") is not None
    except av.codec.codec.UnknownCodecError:
        return False
