"""Chunks of clips that a cache encodes, and the kinds of work on them."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from gen_accel.lora.caching.index import Table
from gen_accel.lora.caching.shards import Shards
from gen_accel.lora.data.clips import CaptionedVideo, Size

# Kinds of work, which are the titles of their bars too.
READING, CAPTIONS, CLIPS, IMAGES = "reading", "captions", "clips", "images"
FIRST_FRAMES, MASKS, SHOWN_CAPTIONS = "first frames", "masks", "captions of first frames"
Item = TypeVar("Item")


class Spread(Protocol):
    """Workers that read and encode in the place of this process."""

    def over(self, run: Any, title: str, items: Sequence[Any]) -> Generator[Any, None, None]:
        """Yield what `run` makes of each item by the work `title`, in order; an OSError of a clip
        that ended each worker which was at it."""
        ...


class Unknown:
    """A cache that knows nothing, for workers that look at a clip."""

    @property
    def memo(self) -> "Unknown":
        return self

    @property
    def clips(self) -> "Unknown":
        return self

    def get(self, key: str) -> None:
        return None

    def __contains__(self, key: str) -> bool:
        return False


class Job(NamedTuple):
    """A chunk of a clip at one length.

    Args:
        frames: pixel frames.
        size: height and width in pixels.
        begin: first frame of the chunk.
        texts: captions as they are encoded, with the key of each in `text_keys`.
        about: what `survey` found out about the clip.
        source: hash of all that the latents depend on but the number of frames.
        number: of the clip in the data.
    """

    video: CaptionedVideo
    frames: int
    size: Size
    latent_key: str
    text_keys: tuple[str, ...]
    image_key: str | None
    teacher_key: str | None
    frame_key: str | None
    begin: int
    texts: tuple[str, ...]
    about: dict[str, Any]
    source: str
    mask_key: str | None = None
    number: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        keys = (*self.text_keys, self.image_key, self.teacher_key, self.frame_key, self.mask_key)
        keys = (self.latent_key, *keys)
        return tuple(key for key in keys if key is not None)


class Looked(NamedTuple):
    """Findings about a clip.

    Args:
        digest: hash of its bytes.
        clip: key of `about`.
        about: see `survey`.
        picture: key of the clip's own image; None if there is none.
        mask: hash of the clip's mask; None without.
        hashed: hashes to remember, of the clip and its mask, by their keys.
        surveyed: what `survey` found out about both, by their keys.
    """

    digest: str
    clip: str
    about: dict[str, Any]
    picture: str | None
    mask: str | None
    hashed: list[tuple[str, str]]
    surveyed: list[tuple[str, dict[str, Any]]]


def lacking(keyed: Iterable[tuple[str, Item]], shards: Shards) -> Iterator[tuple[str, Item]]:
    """Leave out what the shards have, and all but the first of each key."""
    seen = Table()
    return (one for one in keyed if one[0] not in shards and seen.add(one[0]))


def place_in(job: Job) -> tuple[int, int]:
    """Return where a chunk is in its clip: its first frame and their number."""
    return job.begin, job.frames


def chunk_name(job: Job) -> str:
    """Name a chunk of a clip by its frames, at the rate that clips are resampled to."""
    return f"{job.video.name}, frames {job.begin} to {job.begin + job.frames - 1}"


def clip_and_size(job: Job) -> tuple[int, Size]:
    return job.number, job.size
