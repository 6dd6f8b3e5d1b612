"""Chunks of clips in a cache, the keys of their tensors, and the survey that finds them."""

import hashlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from gen_accel.lora.caching.encoders import Encoders, factors_of, hash_of
from gen_accel.lora.caching.inputs import FIRST_FRAME, MASK, TEXT, FirstFrames, ImageCoder
from gen_accel.lora.caching.latents import RECIPE
from gen_accel.lora.caching.store import EmptyStore, Rows, Store, file_key, remembered_sha256
from gen_accel.lora.data.captions import Captions
from gen_accel.lora.data.clips import CaptionedVideo, Size, nearest_size, open_image
from gen_accel.lora.data.masks import check_mask, mask_of
from gen_accel.lora.data.report import (
    UNUSED_PICTURE,
    too_short,
    unfilled_length,
    unfilled_size,
    why_broken,
)
from gen_accel.lora.data.scenes import Take
from gen_accel.lora.data.survey import ahead, clip_key, scenes_in, survey
from gen_accel.pipelines.generation.loading import DTYPES

if TYPE_CHECKING:
    from gen_accel.pipelines.generation.progress import Progress

# Kinds of work, which are the titles of their bars too.
READING, CAPTIONS, CLIPS, IMAGES = "reading", "captions", "clips", "images"
FIRST_FRAMES, MASKS, SHOWN_CAPTIONS = "first frames", "masks", "captions of first frames"
START, AS_WRITTEN = Take(), Captions()


class Executor(Protocol):
    """Workers that read and encode instead of this process."""

    def map(self, encoding: Any, title: str, items: Sequence[Any]) -> Generator[Any, None, None]:
        """Yield what `encoding` makes of each item by the work `title`, in order; an OSError of a
        clip that ended each worker which was at it."""
        ...


class ClipChunk(NamedTuple):
    """A chunk of a clip at one length.

    Args:
        frames: pixel frames.
        size: height and width in pixels.
        begin: first frame of the chunk.
        texts: captions as they are encoded, with the key of each in `text_keys`.
        about: findings of `survey` about the clip.
        source: hash of all inputs of the latents but the number of frames.
        number: number of the clip in the data.
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
        return (self.latent_key, *(key for key in keys if key is not None))

    @property
    def name(self) -> str:
        """Name with frames, at the rate that clips are resampled to."""
        return f"{self.video.name}, frames {self.begin} to {self.begin + self.frames - 1}"


class ClipSurvey(NamedTuple):
    """Findings about a clip before it is encoded.

    Args:
        digest: hash of its bytes.
        about: see `survey`.
        picture: key of the clip's own image; None without one.
        mask: hash of the clip's mask; None without one.
        facts: hashes and findings to remember, of the clip and its mask, by their keys.
    """

    digest: str
    about: dict[str, Any]
    picture: str | None
    mask: str | None
    facts: list[tuple[str, Any]]


@dataclass
class Options:
    """Options of one call of `cache`, the keys of its tensors, and the clips found broken."""

    encoders: Encoders
    frames: tuple[int, ...]
    sizes: tuple[Size, ...]
    fps: float | None
    max_tokens: int | None
    on_broken: str
    store: str
    images: ImageCoder | None = None
    teacher: bool = False
    take: Take = START
    captions: Captions = AS_WRITTEN
    pictures: bool = False
    repeats: tuple[str, ...] = ()
    default_caption: str | None = None
    workers: int = 0
    condition: str = TEXT
    masks: bool = False
    executor: Executor | None = None
    broken: dict[str, str] = field(default_factory=dict)
    short: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        common = [RECIPE, self.store]
        self.first_frames = None
        if self.condition == FIRST_FRAME:
            self.first_frames = FirstFrames(self.encoders, common, self.max_tokens)

    def hash_models(self) -> None:
        """Hash the encoders, which all keys depend on."""
        common = [RECIPE, self.store]
        self._vae = hash_of([*common, *self.encoders.states("vae")])
        texts = self.encoders.states(*self.encoders.family.training.text_parts, "tokenizer")
        self._text = hash_of([*common, self.max_tokens, *texts])
        self._image = None if self.images is None else hash_of([*common, self.images.state()])

    def text_key(self, caption: str, *clip: Any) -> str:
        key = hash_of([self._text, caption])
        return key if self.first_frames is None else self.first_frames.text_key(key, *clip)

    def image_key(self, *image: Any) -> str:
        assert self._image is not None
        return hash_of([self._image, *image])

    def stored(self, x: Tensor) -> Tensor:
        """Convert a tensor to its form in the shards."""
        return x.to("cpu", DTYPES[self.store] if x.is_floating_point() else x.dtype)

    def leave_out(self, name: str, error: OSError) -> None:
        """Note a clip, or a chunk of one, as broken. Raises OSError if none may be."""
        if self.on_broken == "stop":
            raise OSError(f"{name} is broken: {error}") from error
        self.broken[name] = str(error)
        self.left_out[name] = why_broken(str(error))


class Survey(Options):
    """Survey of all clips, before the first is encoded."""

    def find_chunks(
        self, videos: Sequence[CaptionedVideo], store: Store, bar: "Progress"
    ) -> Rows[ClipChunk]:
        """Survey all clips. Returns the chunks to have in the cache, by clip."""

        def chunk_of(row: tuple[Any, ...]) -> ClipChunk:
            return ClipChunk(videos[row[-1]], *row)

        chunks, found = store.rows(chunk_of), 0
        longest, filled = 0, set[Size]()
        died: dict[str, OSError] = {}
        if self.executor is not None:
            died = self._read_by(self.executor, videos, store, bar)
        looks = ahead(partial(self._look, store, died), enumerate(videos), self.workers)
        with closing(looks):
            for number, look in bar.track(looks, total=len(videos), description="reading"):
                video = videos[number]
                if isinstance(look, OSError):
                    self.leave_out(video.name, look)
                    continue
                if look is None:
                    self.left_out[video.name] = UNUSED_PICTURE
                    continue
                found += 1
                for key, fact in look.facts:
                    store.remember(key, fact)
                scenes = [(0, 1)] if video.is_picture else scenes_in(look.about, self.take)
                longest = max(longest, *(end - begin for begin, end in scenes))
                self._leave_out_scenes(video, scenes)
                for chunk in self._chunks_of(video, look, scenes):
                    chunks.append((*chunk[1:-1], number))
                    filled.add(chunk.size)
        self._check_filled(found, longest, filled)
        store.commit()
        return chunks

    def _read_by(
        self,
        executor: Executor,
        videos: Sequence[CaptionedVideo],
        store: Store,
        bar: "Progress",
    ) -> dict[str, OSError]:
        """Let workers read the clips that the store does not know.

        Clips that they cannot read are left to this process, which finds the same fault. Returns
        the errors of clips that ended their workers, by name: this process must not open them.
        """
        new = [
            video
            for video in videos
            if isinstance(video.source, Path)
            and video.source.is_file()
            and (self.pictures or not video.is_picture)
            and store.fact(file_key(video.source)[0]) is None
        ]
        died: dict[str, OSError] = {}
        with closing(executor.map(replace(self, images=None, condition=TEXT), READING, new)) as f:
            tracked = bar.track(f, total=len(new), description="reading")
            for video, look in zip(new, tracked, strict=True):
                if isinstance(look, OSError):
                    died[video.name] = look
                elif look is not None:
                    for key, fact in look.facts:
                        store.remember(key, fact)
        return died

    def _look(
        self, store: Store, died: Mapping[str, OSError], item: tuple[int, CaptionedVideo]
    ) -> Iterator[tuple[int, ClipSurvey | OSError | None]]:
        """Survey a clip, which threads do at once; None for a picture that is not used."""
        number, video = item
        if video.is_picture and not self.pictures:
            yield number, None
        elif video.name in died:
            yield number, died[video.name]
        else:
            try:
                yield number, self.look(video, store)
            except OSError as error:
                yield number, error

    def look(self, video: CaptionedVideo, store: Store | EmptyStore) -> ClipSurvey:
        """Hash and survey a clip, its image and its mask. Raises OSError for one that cannot be
        read."""
        facts: list[tuple[str, Any]] = []

        def surveyed(one: CaptionedVideo, take: Take) -> tuple[str, dict[str, Any]]:
            if isinstance(one.source, Path):
                digest, key = remembered_sha256(one.source, store)
                facts.extend([] if key is None else [(key, digest)])
            else:
                digest = one.sha256()
            place = f"clip {clip_key(one, digest, self.fps)}"
            about = survey(one, take, self.frames[-1], self.fps, store.fact(place))
            facts.append((place, about))
            return digest, about

        digest, about = surveyed(video, self.take)
        picture, mask = self._check_image(video, store), None
        if self.masks and (film := mask_of(video)) is not None:
            try:
                mask, found = surveyed(film, replace(self.take, scenes="off"))
            except OSError as error:
                raise OSError(f"its mask cannot be read: {error}") from error
            check_mask(found, about, is_picture=film.is_picture)
        return ClipSurvey(digest, about, picture, mask, facts)

    def _chunks_of(
        self, video: CaptionedVideo, look: ClipSurvey, scenes: Sequence[tuple[int, int]]
    ) -> Iterator[ClipChunk]:
        digest, about = look.digest, look.about
        factors = factors_of(self.encoders.pipe)
        size = nearest_size(self.sizes, tuple(about["size"]))
        lengths = (1,) if video.is_picture else self.frames
        texts = self.captions.of(video)
        text_keys = tuple(self.text_key(text) for text in texts)
        teacher_key = self.text_key(video.teacher_caption) if self.teacher else None
        for begin, longest in self.take.of(scenes, lengths):
            fitting = [length for length in lengths if length <= longest]
            for length in fitting[-1:] if self.encoders.family.training.causal_vae else fitting:
                place = [digest, None if video.is_picture else self.fps, length, size]
                place += ["picture"] if video.is_picture else [begin] if begin else []
                image_key = look.picture
                if self.images is not None and image_key is None:
                    image_key = self.image_key(*place)
                frame_key = None
                if self.first_frames is not None:
                    frame_key = self.first_frames.key(*place)
                    text_keys = tuple(self.text_key(text, *place) for text in texts)
                mask_key = None
                if look.mask is not None:
                    mask_key = hash_of([MASK, self.store, look.mask, factors, *place])
                yield ClipChunk(
                    video=video,
                    frames=length,
                    size=size,
                    latent_key=hash_of([self._vae, *place]),
                    text_keys=text_keys,
                    image_key=image_key,
                    teacher_key=teacher_key,
                    frame_key=frame_key,
                    begin=begin,
                    texts=texts,
                    about=about,
                    source=hash_of([self._vae, *place[:2], *place[3:]]),
                    mask_key=mask_key,
                )

    def _leave_out_scenes(self, video: CaptionedVideo, scenes: Sequence[tuple[int, int]]) -> None:
        """Note a clip, or those of its scenes, that fill no length."""
        shortest = 1 if video.is_picture else self.frames[0]
        longest = max(end - begin for begin, end in scenes)
        if longest < shortest:
            self.short.append(video.name)
            self.left_out[video.name] = too_short(longest, self.fps, shortest, len(scenes))
            return
        for begin, end in scenes:
            if end - begin < shortest:
                name = f"{video.name}, frames {begin} to {end - 1}"
                self.left_out[name] = too_short(end - begin, self.fps, shortest)

    def _check_image(self, video: CaptionedVideo, store: Store | EmptyStore) -> str | None:
        """Read the clip's own image. Returns its key, or None if there is no image."""
        if self.images is None or video.image is None:
            return None
        try:
            data = video.image_bytes()
            key = self.image_key(hashlib.sha256(data).hexdigest())
            if key not in store:
                self.images.check(open_image(data, video.image_name))
        except OSError as error:
            raise OSError(f"its image cannot be read: {error}") from error
        return key

    def _check_filled(self, clips: int, longest: int, filled: set[Size]) -> None:
        """Refuse a length, or one of several sizes, that no clip fills.

        Args:
            clips: number of clips that could be read.
            longest: frames of the longest of them, or of the longest scene.
        """
        if not clips:
            reason = next(iter((self.broken or self.left_out).values()))
            raise ValueError(f"no clip could be read: {reason}")
        for length in self.frames:
            if length > longest:
                scenes = self.take.scenes == "cut"
                raise ValueError(unfilled_length(length, self.fps, clips, longest, scenes=scenes))
        for size in self.sizes:
            if len(self.sizes) > 1 and filled and size not in filled:
                raise ValueError(unfilled_size(size, filled))
