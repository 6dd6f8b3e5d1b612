"""Clips with captions, the frames that are read of them, and the captions as they are encoded; and
the settings of one of several data sets.

Only the frames that are needed are decoded; they are resized one at a time.
"""

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args

import numpy as np
from PIL import Image, ImageOps

from gen_accel.config import Config, mapping_in, option
from gen_accel.io import file_sha256
from gen_accel.measure.video_io import opened_film, read_picture
from gen_accel.parsing import shown
from gen_accel.paths import check_comments, check_input

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

EMPTY = "it holds no frames"
UNLESS = "unless student_steps is given with starts own or teacher"  # clips are needed
MOST_PIXELS = 65_536  # of a side

Size = tuple[int, int]  # height and width in pixels
How = Literal["start", "middle", "all"]
Scenes = Literal["off", "cut"]


@dataclass(frozen=True, eq=False)
class CaptionedVideo:
    """A clip and its caption, or a prompt alone.

    Args:
        name: name of the clip in its data set; of a prompt its text.
        source: a film, a function that returns the bytes of such a file, or the
            frames, (F, H, W, 3) uint8, already at the wanted rate; None of a prompt.
        image: image prompt of this clip; None uses a frame of the clip.
        teacher_caption: caption of the teacher that an image prompt is trained to match; may be
            empty.
        more_captions: further captions; one of all is shown at a time.
        starts: frame from which `caption` and each of `more_captions` holds, which are then parts
            of one caption; None: each describes the whole clip.
        repeats: how often it is shown while a clip of 1 is shown once.
        is_picture: whether `source` is a picture, which is a clip of one frame.
        mask: film or picture in gray, white pixels count in the loss; None: all pixels count.
        control: film that controls this one, such as its depth or its edges.
        rule: how its data set is cut and captioned; None: as all are.
    """

    name: str
    caption: str
    source: Path | Callable[[], bytes] | np.ndarray | None
    image: Path | Callable[[], bytes] | None = None
    teacher_caption: str = ""
    more_captions: tuple[str, ...] = ()
    starts: tuple[int, ...] | None = None
    repeats: int = 1
    is_picture: bool = False
    mask: Path | Callable[[], bytes] | None = None
    control: Path | Callable[[], bytes] | None = None
    rule: "ClipRule | None" = None

    @property
    def is_prompt(self) -> bool:
        """Whether there is a caption alone, without a clip."""
        return self.source is None

    def sha256(self) -> str:
        """Hash the bytes of the file, or the frames and their shape."""
        match self.source:
            case Path():
                return file_sha256(self.source)
            case np.ndarray():
                frames = np.ascontiguousarray(self.source)
                return hashlib.sha256(repr(frames.shape).encode() + frames.tobytes()).hexdigest()
        assert self.source is not None
        return hashlib.sha256(self.source()).hexdigest()

    @property
    def image_name(self) -> str:
        """Name of the image, for messages."""
        return str(self.image) if isinstance(self.image, Path) else f"the image of {self.name}"

    def image_bytes(self) -> bytes:
        """Read the image file. Raises OSError if it is missing."""
        assert self.image is not None
        return _bytes_of(self.image)

    def survey(
        self,
        *,
        frames: int | None,
        fps: float | None,
        see: Callable[[np.ndarray], None] | None = None,
        tell: Callable[[str], object] = str,
    ) -> tuple[int, Size]:
        """Count the frames, by decoding them.

        Args:
            frames: number at which to stop; None counts all.
            see: takes each frame.
            tell: takes a line about each conversion, see `FilmStream.pictures`.

        Returns their number, and the height and width as a player shows them.

        Raises OSError as `read` does.
        """
        count, size = 0, (0, 0)
        with self.playing(fps, tell) as pictures:
            for picture in islice(pictures, frames):
                count, size = count + 1, (picture.shape[0], picture.shape[1])
                if see is not None:
                    see(picture)
        if not count:
            raise OSError(EMPTY)
        return count, size

    def read(self, *, frames: int, size: Size, fps: float | None, begin: int = 0) -> np.ndarray:
        """Read `frames` frames of the video from frame `begin` on, or fewer if it ends before.

        Each frame is resized by an antialiased cubic, its aspect ratio kept, until it covers
        `size`; then its center is cropped. No further frames are decoded, and only one frame at a
        time is held at its stored size.

        Args:
            size: height and width in pixels.
            fps: frames a second. Each stored frame goes to the nearest time of this grid. The
                last of several frames at one time stays; a time without a frame repeats the frame
                before. None takes the stored frames as they come.

        Returns:
            (F, H, W, 3) uint8.

        Raises:
            OSError: no film, or one that is damaged before the last frame asked for.
        """
        [(_, found)] = self.read_chunks([(begin, frames)], size=size, fps=fps)
        if not len(found):
            raise OSError(EMPTY)
        return found

    def read_chunks(
        self, chunks: Sequence[tuple[int, int]], *, size: Size, fps: float | None
    ) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        """Read several parts of the video as `read` does, decoding it once.

        Args:
            chunks: first frame and number of frames of each; they may overlap.

        Yields:
            Each chunk with its frames, in the order in which they end. A chunk beyond the end of
            the video has fewer frames.
        """
        waiting = sorted(set(chunks), key=lambda chunk: (sum(chunk), chunk))
        if not waiting:
            return
        held: dict[int, np.ndarray] = {}
        with self.playing(fps) as pictures:
            for number, picture in enumerate(pictures):
                if any(begin <= number < begin + frames for begin, frames in waiting):
                    held[number] = _fitted(picture, size)
                while waiting and number + 1 >= sum(waiting[0]):
                    chunk = waiting.pop(0)
                    yield chunk, _stacked(held, chunk, size)
                if not waiting:
                    return
                first = min(begin for begin, _ in waiting)
                held = {place: frame for place, frame in held.items() if place >= first}
        for chunk in waiting:
            yield chunk, _stacked(held, chunk, size)

    @contextmanager
    def playing(
        self, fps: float | None, tell: Callable[[str], object] = str
    ) -> Iterator[Iterator[np.ndarray]]:
        """Open the clip for its frames, (H, W, 3) uint8 RGB, one at a time, at the rate `fps`.

        Args:
            tell: as of `survey`, which is where it is told.
        """
        name = self._place
        if isinstance(self.source, np.ndarray):
            frames = self.source
            if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
                raise ValueError(
                    f"{name} must be (F, H, W, 3) uint8, got {frames.shape} {frames.dtype}"
                )
            yield iter(frames)
        elif self.is_picture:
            assert self.source is not None
            from gen_accel.pipelines.image_prompt.encoder import as_rgb

            image = open_image(_bytes_of(self.source), name)
            try:
                picture = np.asarray(as_rgb(image))
            except ValueError as error:
                raise OSError(f"{name} cannot be read: {error}") from error
            yield iter([picture])
        else:
            with opened_film(self._film(), name) as film:
                yield film.pictures(fps=fps, tell=tell)

    def sound(self, begin: float, seconds: float, rate: int) -> np.ndarray | None:
        """Read the sound as `FilmStream.sound` does; None of frames in memory and of pictures."""
        if isinstance(self.source, np.ndarray) or self.is_picture:
            return None
        with opened_film(self._film(), self._place) as film:
            return film.sound(begin, seconds, rate)

    def extent(self) -> tuple[int, float | None]:
        """Count the stored frames, and measure the seconds that they last, without decoding.

        Frames in memory and pictures last for no known time.
        """
        if isinstance(self.source, np.ndarray):
            return len(self.source), None
        if self.is_picture:
            return 1, None
        with opened_film(self._film(), self._place) as film:
            return film.extent()

    @property
    def _place(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else self.name

    def _film(self) -> Path | io.BytesIO:
        assert self.source is not None
        assert not isinstance(self.source, np.ndarray)
        return self.source if isinstance(self.source, Path) else io.BytesIO(self.source())


def _bytes_of(source: Path | Callable[[], bytes]) -> bytes:
    if not isinstance(source, Path):
        return source()
    check_input(source)
    check_comments(source)
    return source.read_bytes()


def why_clips(needs_clips: bool, **asked: object) -> str | None:
    """Say in words what clips are needed for; None where prompts without clips are enough.

    Args:
        needs_clips: whether clips train.
        asked: values of options that read more of a clip than its caption, by name.
    """
    if needs_clips:
        return UNLESS
    for name, value in asked.items():
        if value and value != "text":
            return f"for {name}" if value is True else f"for {name} {value}"
    return None


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Parse "480x832,832x480", height first, to pairs. Raises ValueError for anything else."""
    try:
        sizes = tuple(
            (int(height), int(width))
            for height, width in (part.lower().split("x") for part in text.split(","))
        )
    except ValueError:
        sizes = ()
    if not sizes or any(side < 1 for size in sizes for side in size):
        raise ValueError(f"sizes are written HEIGHTxWIDTH, as 480x832,832x480, got {shown(text)}")
    if any(side > MOST_PIXELS for size in sizes for side in size):
        raise ValueError(f"sizes have at most {MOST_PIXELS} pixels a side, got {shown(text)}")
    return sizes


def nearest_size(sizes: Sequence[Size], stored: Sequence[int]) -> Size:
    """Choose the size of the nearest aspect ratio.

    Among several, choose the largest that does not enlarge the clip.
    """

    def order(size: Size) -> tuple[float, bool, int]:
        (height, width), enlarged = size, size[0] > stored[0] or size[1] > stored[1]
        area = height * width
        off = abs(math.log(height * stored[1] / (width * stored[0])))
        return round(off, 9), enlarged, area if enlarged else -area

    return min(sizes, key=order)


def open_image(data: bytes, name: object) -> Image.Image:
    """Decode an image and rotate it as a viewer shows it.

    Args:
        name: name of its file, for messages.

    Raises OSError for data that is no whole image, or for too large an image.
    """
    return ImageOps.exif_transpose(read_picture(io.BytesIO(data), name))


def _fitted(picture: np.ndarray, size: Size) -> np.ndarray:
    if picture.shape[:2] == size:
        return picture
    (height, width), image = size, Image.fromarray(picture)
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))


def _stacked(held: dict[int, np.ndarray], chunk: tuple[int, int], size: Size) -> np.ndarray:
    """Stack the frames of a chunk that are held, (F, H, W, 3)."""
    begin, frames = chunk
    found = [held[i] for i in range(begin, begin + frames) if i in held]
    return np.stack(found) if found else np.zeros((0, *size, 3), np.uint8)


class Captioned(Protocol):
    """A clip with a caption; see `CaptionedVideo`."""

    @property
    def name(self) -> str: ...

    @property
    def starts(self) -> tuple[int, ...] | None: ...


def refuse_parts(clips: Iterable[Captioned]) -> None:
    """Raise ValueError for a clip whose caption changes with time."""
    for clip in clips:
        if clip.starts is not None:
            raise ValueError(
                f"the caption of {clip.name} changes at frame {clip.starts[1]}, which objective "
                "causal alone trains: take that objective, or write one caption for the clip"
            )


@dataclass(frozen=True)
class Captions:
    """Changes of the captions of a clip.

    Args:
        trigger: word before every caption that does not hold it, with a comma after.
        prefix: text put before every caption as it is, after the trigger.
        shuffle: number of tags that stay in front while the others change their order; tags have
            commas between them. None changes no order.
        orders: number of orders of the tags, the written one included.
    """

    trigger: str | None = None
    prefix: str | None = None
    shuffle: int | None = None
    orders: int = 4

    def __post_init__(self) -> None:
        if self.shuffle is not None and self.shuffle < 0:
            raise ValueError(f"shuffle must not be negative, got {self.shuffle}")
        if self.orders < 1:
            raise ValueError(f"orders must be at least 1, got {self.orders}")

    def of(self, video: CaptionedVideo) -> tuple[str, ...]:
        """Make the texts to encode. One of them is drawn at each step, all alike; parts of one
        caption stay as many, with their tags as written.

        Texts repeat where a caption has fewer orders than asked for, so that each caption keeps
        its share. A single text stays alone.
        """
        written = [video.caption, *video.more_captions]
        if video.starts is not None:
            return tuple(map(self._headed, written))
        each = [[self._headed(text) for text in self._orders(caption)] for caption in written]
        texts = tuple(chain.from_iterable(each))
        return texts if len(set(texts)) > 1 else texts[:1]

    def _headed(self, text: str) -> str:
        text = f"{self.prefix or ''}{text}"
        if self.trigger is None or re.search(rf"(?<!\w){re.escape(self.trigger)}(?!\w)", text):
            return text
        return f"{self.trigger}, {text}" if text else self.trigger

    def _orders(self, caption: str) -> list[str]:
        """Return `orders` texts, the first as it is written."""
        if self.shuffle is None:
            return [caption]
        tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
        front, rest = tags[: self.shuffle], tags[self.shuffle :]
        if len(rest) < 2:
            return [caption] * self.orders
        found = {tuple(rest): caption}
        for number in range(1, 8 * self.orders):  # some of the orders come twice
            if len(found) == self.orders:
                break
            order = tuple(sorted(rest, key=lambda tag, n=number: _tag_hash(caption, n, tag)))
            found.setdefault(order, ", ".join([*front, *order]))
        texts = list(found.values())
        return [texts[i % len(texts)] for i in range(self.orders)]


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
                raise ValueError(
                    f"{name} must be one of {known}, got {shown(getattr(self, name))}"
                )

    @property
    def reads_all(self) -> bool:
        """Whether all frames of a clip must be decoded to choose its chunks."""
        return self.how != "start" or self.scenes == "cut"

    def of(
        self, scenes: Sequence[tuple[int, int]], lengths: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Choose the chunks of a clip.

        Args:
            scenes: first frame and the frame after the last one of each.
            lengths: in frames, ascending.

        Returns first frame and number of frames of each, at the rate of the training.
        """
        found: list[tuple[int, int]] = []
        for begin, end in scenes:
            fitting = [length for length in lengths if length <= end - begin]
            if self.how == "all":
                for length in reversed(fitting):
                    while end - begin >= length:
                        found.append((begin, length))
                        begin += length
            elif fitting:
                spare = end - begin - fitting[-1] if self.how == "middle" else 0
                found.append((begin + spare // 2, fitting[-1]))
        return found


@dataclass(frozen=True)
class ClipRule:
    """How the clips of a data set are cut, and their captions changed.

    Args:
        sizes: height and width in pixels; a clip takes the nearest shape.
        frames: lengths in pixel frames, ascending.
    """

    take: Take
    captions: Captions
    sizes: Sequence[Size]
    frames: Sequence[int]


class Dataset(Config):
    """One of several data sets of a training. What is not given is the training's."""

    VERB: ClassVar[str] = "train"

    data: str = option(
        ..., "Data set", "Videos with captions, as the field data has them.", reads=Path
    )
    repeats: int = option(
        1,
        "Data set",
        "Number of times that its clips are shown while others are shown once.",
        ge=1,
    )
    sizes: tuple[str, ...] = option((), "Data set", "Sizes as HEIGHTxWIDTH.", commas=True)
    frames: tuple[int, ...] = option(
        (), "Data set", "Numbers of frames, of those of the stages, that its clips are cut to."
    )
    take: How | None = option(None, "Data set", "Piece of a clip longer than a stage.")
    scenes: Scenes | None = option(None, "Data set", "Scene detection.")
    trigger: str | None = option(
        None, "Data set", "Word put before every caption that does not hold it."
    )
    prefix: str | None = option(None, "Data set", "Text put before every caption.")
    default_caption: str | None = option(None, "Data set", "Caption of clips that have none.")
    shuffle_tags: int | None = option(
        None, "Data set", "Number of leading tags that keep their place.", ge=0
    )

    @classmethod
    def parse(cls, told: str | Mapping[Any, object], origin: str) -> "Dataset":
        """Read a data set from a folder, from fields by name, or from these as YAML in braces.

        Args:
            origin: where it stands, for errors.
        """
        if isinstance(told, str):
            is_folder = not told.lstrip().startswith("{")
            told = {"data": told} if is_folder else mapping_in(told, origin)
        made = cls.read(told, origin=origin)
        if made.sizes:
            try:
                parse_sizes(",".join(made.sizes))
            except ValueError as error:
                raise ValueError(f"{origin}: {error}") from None
        return made

    def rule(self, own: ClipRule) -> ClipRule:
        """Say how its clips are cut and captioned.

        Args:
            own: of the training, for what is not given.

        Raises ValueError for a number of frames that is not of the training.
        """
        if unknown := {*self.frames} - {*own.frames}:
            raise ValueError(
                f"frames of the data set {self.data} must be of the stages, "
                f"{', '.join(map(str, own.frames))}, got {min(unknown)}"
            )
        said = {"trigger": self.trigger, "prefix": self.prefix, "shuffle": self.shuffle_tags}
        return ClipRule(
            Take(self.take or own.take.how, self.scenes or own.take.scenes),
            replace(own.captions, **{name: x for name, x in said.items() if x is not None}),
            parse_sizes(",".join(self.sizes)) if self.sizes else own.sizes,
            sorted(self.frames) or own.frames,
        )


def repeated(videos: Sequence[CaptionedVideo], patterns: Sequence[str]) -> list[CaptionedVideo]:
    """Set `repeats` of the videos whose names match a pattern; the last match counts.

    Args:
        patterns: see `parse_repeats`.

    Raises ValueError for a pattern that matches no name.
    """
    found = list(videos)
    for text in patterns:
        pattern, count = parse_repeats(text)
        matching = [i for i, video in enumerate(found) if fnmatchcase(video.name, pattern)]
        if not matching:
            raise ValueError(
                f"repeats {shown(text)} matches none of the {len(found)} clips, as {found[0].name}"
            )
        for i in matching:
            found[i] = replace(found[i], repeats=count)
    return found


def parse_repeats(text: object) -> tuple[str, int]:
    """Parse "people/*=3" to a pattern of names and a number. Raises ValueError for other text."""
    pattern, equals, count = str(text).rpartition("=")
    if not (equals and pattern and count.strip().isdecimal() and int(count) >= 1):
        raise ValueError(
            "repeats count some clips against the others, as people/*=3, PATTERN=NUMBER each, "
            f"got {shown(text)}"
        )
    return pattern.strip(), int(count)


def _tag_hash(*words: object) -> bytes:
    return hashlib.sha256(repr(words).encode()).digest()
