"""Clips as people have them: all containers and codecs of phones, cameras and the web, with names
of any alphabet, and files that are no clips."""

import struct
from collections.abc import Callable, Mapping
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
        rate: frames a second that the file states.
        tells: pattern of the only line that is told about it.
        is_upright: it is turned clockwise by 90 degrees.
    """

    name: str
    encoder: str
    make: Callable[[Path], None]
    frames: int | None = RATE
    size: tuple[int, int] = (HEIGHT, WIDTH)
    says: str = ""
    steps: tuple[int, ...] | None = None
    rate: int = RATE
    tells: str = ""
    is_upright: bool = False


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
    shape: Fraction | None = None,
    is_interlaced: bool = False,
    states: Mapping[str, int] | None = None,
) -> Callable[[Path], None]:
    """Writer of a film with these properties.

    Args:
        pixels: format of pixels.
        steps: time of each frame, in frames.
        sound: layout of a sound track.
        shape: width of a pixel by its height.
        is_interlaced: each frame holds two pictures, the first one in its odd rows.
        states: colours by their numbers in H.273: colorspace, color_primaries and so on.
    """
    states = states or {}
    into = {f"dst_{k}": states[k] for k in ("colorspace", "color_range") if states.get(k, 10) < 10}

    def write(path: Path) -> None:
        options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        options |= {"x264-params": "bff=1"} if is_interlaced else {}
        shown = pictures(frames * (1 + is_interlaced), *size)
        if is_interlaced:
            shown[1::2, 1::2] = shown[::2, 1::2]
            shown = shown[1::2]
        if states.get("color_primaries") == 9:
            shown = in_bt2020(shown)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate, options=options)
            stream.height, stream.width = size
            stream.pix_fmt = pixels
            stream.time_base = Fraction(1, rate)
            for name, number in states.items():
                setattr(stream.codec_context, name, number)
            if shape is not None:
                stream.codec_context.sample_aspect_ratio = shape
            track = container.add_stream("aac", rate=16000, layout=sound) if sound else None
            for i, picture in enumerate(shown):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame = frame.reformat(format=pixels, **into)
                frame.pts, frame.time_base = steps[i] if steps else i, Fraction(1, rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
            if track is not None:
                play(container, track, seconds=frames / rate)

    return write


def in_bt2020(video: np.ndarray) -> np.ndarray:
    """Write colours of BT.709 as colours of BT.2020, by the matrix of ITU-R BT.2087."""
    matrix = np.array(
        [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    )
    coded = video / 255
    linear = np.where(coded < 0.081, coded / 4.5, ((coded + 0.099) / 1.099) ** (1 / 0.45))
    linear = linear @ matrix.T
    coded = np.where(linear < 0.018, linear * 4.5, 1.099 * linear**0.45 - 0.099)
    return np.rint(coded * 255).astype(np.uint8)


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


def held_upright(shape: Fraction | None = None) -> Callable[[Path], None]:
    """A film of a phone: stored lying, with the matrix that turns it clockwise by 90 degrees."""
    return lambda path: turn(path, film(shape=shape))


def turn(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
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


PAL, ANAMORPHIC, HALF = Fraction(16, 11), Fraction(4, 3), Fraction(1, 2)
HLG = {"colorspace": 9, "color_primaries": 9, "color_trc": 18, "color_range": 1}
MPEG2, H264, HEVC, VP9, GIF = "mpeg2video", "libx264", "libx265", "libvpx-vp9", "gif"
VARIED = (0, 1, 2, 6, 7, 9, 10, 15)
CLIPS = (
    Awkward("plain.mp4", H264, film()),
    Awkward("camera.mov", H264, film(pixels="yuvj420p")),
    Awkward("hevc 10 bit.mp4", HEVC, film(HEVC, "yuv420p10le")),
    Awkward("web.webm", VP9, film(VP9)),
    Awkward("animation.gif", GIF, film(GIF, "rgb8", rate=10), rate=10),
    Awkward("recording.mkv", H264, film()),
    Awkward("full colour.mp4", H264, film(pixels="yuv444p")),
    Awkward("ten bit 422.mkv", H264, film(pixels="yuv422p10le")),
    Awkward("vfr.mp4", H264, film(steps=VARIED), steps=VARIED),
    Awkward("upright.mov", H264, held_upright(), size=(WIDTH, HEIGHT), is_upright=True),
    Awkward("surround.mp4", H264, film(sound="5.1")),
    Awkward("odd.mp4", H264, film(pixels="yuv444p", size=(97, 131)), size=(97, 131)),
    Awkward("Katze größer 猫.mp4", H264, film()),
    Awkward("with  two spaces.mp4", H264, film()),
    Awkward("LOUD.MP4", H264, film()),
    Awkward("sub folder/deeper/clip.mp4", H264, film()),
    Awkward("a colon 13:30.avi", "mpeg4", film("mpeg4")),
    Awkward("short.mp4", H264, film(frames=10, rate=25), frames=10, rate=25),  # 0.4 s
    Awkward("dvd.mpg", MPEG2, film(MPEG2, rate=25), rate=25),
    Awkward("old.mpeg", "mpeg1video", film("mpeg1video", rate=25), rate=25),
    Awkward("title.VOB", MPEG2, film(MPEG2, rate=25), rate=25),
    Awkward("studio.mxf", MPEG2, film(MPEG2, rate=25), rate=25),
    Awkward("station.ts", H264, film(sound="mono")),
    Awkward("blu ray.m2ts", H264, film()),
    Awkward("windows.wmv", "wmv2", film("wmv2")),
    Awkward("flip phone.3gp", "mpeg4", film("mpeg4")),
    Awkward("flash.flv", "flv", film("flv")),
    Awkward("later flash.f4v", H264, film()),
    Awkward("free.ogv", "libvpx", film("libvpx")),
    Awkward("tablet.m4v", H264, film()),
    Awkward(
        "camcorder.MTS",
        H264,
        film(pixels="yuv422p", frames=16, is_interlaced=True),
        16,
        tells="interlaced",
    ),
    Awkward("tape.avi", "mpeg4", film("mpeg4", shape=PAL), size=(48, 93), tells="16:11.* 64.* 93"),
    Awkward("narrow.mkv", H264, film(shape=HALF), size=(48, 32), tells="1:2.* 64 .* 32"),
    Awkward("nearly square.mp4", H264, film(shape=Fraction(640, 639))),
    Awkward(
        "upright anamorphic.mov",
        H264,
        held_upright(ANAMORPHIC),
        size=(85, 48),
        tells="4:3.* 64 .* 85",
        is_upright=True,
    ),
    Awkward("full range.mkv", H264, film(states={"color_range": 2})),
    Awkward(
        "wide colours.mkv",
        H264,
        film(pixels="yuv420p10le", states={**HLG, "color_trc": 14}),
        tells="BT.2020",
    ),
    Awkward("phone hdr.mov", H264, film(states=HLG), None, says=r"HDR \(HLG\).* ffmpeg -i"),
    Awkward("disc hdr.mp4", H264, film(states={**HLG, "color_trc": 16}), None, says="HDR .PQ"),
    Awkward("ictcp.mp4", H264, film(states={"colorspace": 14}), None, says="with matrix 14"),
    Awkward("needles.mp4", H264, film(shape=Fraction(8)), None, says="its pixels are 8:1"),
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
