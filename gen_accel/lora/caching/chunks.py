"""Chunks of clips in a cache, the keys of their tensors, and the survey that finds them."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from gen_accel.lora.caching.encoders import Encoders, factors_of, hash_of
from gen_accel.lora.caching.inputs import (
    FIRST_FRAME,
    MASK,
    FirstFrames,
    ImageCoder,
    check_mask,
    mask_of,
)
from gen_accel.lora.caching.latents import RECIPE, Entry
from gen_accel.lora.caching.store import Fact, Store, remembered_sha256
from gen_accel.lora.data.clips import CaptionedVideo, Captions, Size, nearest_size, open_image
from gen_accel.lora.data.report import UNUSED_PICTURE, lost_picture, too_short, why_broken
from gen_accel.lora.data.survey import (
    ClipFacts,
    Take,
    ahead,
    clip_key,
    refuse_unfilled,
    scenes_in,
    survey,
)
from gen_accel.pipelines.generation.loading import DTYPES

if TYPE_CHECKING:
    from gen_accel.pipelines.generation.progress import Progress

START, AS_WRITTEN = Take(), Captions()


@dataclass(frozen=True)
class CacheOptions:
    """Options of `cache`.

    Args:
        frames: lengths in pixel frames. A chunk of a clip is encoded at the longest length that it
            fills and, unless the autoencoder is causal, at each shorter length too.
        sizes: (height, width) in pixels; a clip takes the size of the nearest aspect ratio.
        fps: frame rate to resample clips to; None keeps the stored frames.
        max_tokens: length of the text, the pipeline's `max_sequence_length`.
        on_broken: "skip" leaves out a clip that cannot be read, "stop" ends the run.
        store: dtype in the shards. Latents have unit variance, for which float16 has eight times
            the resolution of bfloat16. Values that overflow it are refused.
        images: also encode the image prompt of each clip, by default its middle frame.
        teacher: also encode each clip's caption for the teacher; all clips must have one.
        take: which chunks of each clip are encoded.
        captions: changes of the captions.
        default_caption: caption of clips without one; None refuses them.
        repeats: how often clips are shown, PATTERN=NUMBER each; see `repeated`. It goes
            before the data's own numbers.
        pictures: also take pictures, as clips of one frame; a length of 1 takes them in any case.
        workers: threads that read clips ahead of the encoder; 0 reads between two clips.
        condition: "first_frame" also encodes the first frame of each clip. None: as the model's
            pipeline makes videos.
        masks: also keep the mask of each clip with one, see `read_mask`.
    """

    frames: Sequence[int]
    sizes: Sequence[Size]
    fps: float | None = None
    max_tokens: int | None = None
    on_broken: str = "skip"
    store: str = "float16"
    images: ImageCoder | None = None
    teacher: bool = False
    take: Take = START
    captions: Captions = AS_WRITTEN
    default_caption: str | None = None
    repeats: Sequence[str] = ()
    pictures: bool = False
    workers: int = 0
    condition: str | None = None
    masks: bool = False

    def __post_init__(self) -> None:
        if not self.frames or any(length < 1 for length in self.frames):
            raise ValueError(f"frames must be lengths of at least 1, got {list(self.frames)}")
        if not self.sizes or any(side < 1 for size in self.sizes for side in size):
            raise ValueError(f"sizes must be pairs of height and width, got {list(self.sizes)}")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be positive and finite, got {self.fps}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.on_broken not in ("skip", "stop"):
            raise ValueError(f"on_broken must be skip or stop, got {self.on_broken!r}")
        if self.store not in DTYPES:
            raise ValueError(f"store must be one of {', '.join(DTYPES)}, got {self.store!r}")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")
        plain = {
            "frames": tuple(sorted({*self.frames})),
            "sizes": tuple(self.sizes),
            "fps": None if self.fps is None else float(self.fps),
            "pictures": self.pictures or 1 in self.frames,
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)


class ClipChunk(NamedTuple):
    """A chunk of a clip at one length.

    Args:
        size: height and width in pixels.
        entry: its fields in the cache, with the keys of its tensors.
        texts: captions as they are encoded, in the order of the entry's keys.
        source: hash of all inputs of the latents but the number of frames.
        seconds: duration; None if unknown, and of a picture.
        total: frames of the whole clip; None if a part is damaged.
        lost: share of each frame that the crop takes away.
    """

    video: CaptionedVideo
    size: Size
    entry: Entry
    texts: tuple[str, ...]
    source: str
    seconds: float | None
    total: int | None
    lost: float

    @property
    def frames(self) -> int:
        return self.entry.pixel_frames

    @property
    def begin(self) -> int:
        return self.entry.begin or 0

    @property
    def name(self) -> str:
        """Name with frames, at the rate that clips are resampled to."""
        return f"{self.video.name}, frames {self.begin} to {self.begin + self.frames - 1}"


class ClipSurvey(NamedTuple):
    """Findings about a clip before it is encoded.

    Args:
        digest: hash of its bytes.
        about: see `survey`.
        mask: hash of the clip's mask; None without one.
        facts: hashes and findings to remember, of the clip and its mask, by their keys.
        image: key of the clip's own image; None without one.
    """

    digest: str
    about: ClipFacts
    mask: str | None
    facts: list[tuple[str, object]]
    image: str | None = None


def survey_clip(video: CaptionedVideo, options: CacheOptions, fact: Fact) -> ClipSurvey:
    """Hash and survey a clip and its mask. Raises OSError for one that cannot be read."""
    facts, mask = list[tuple[str, object]](), None

    def surveyed(one: CaptionedVideo, take: Take) -> tuple[str, ClipFacts]:
        if isinstance(one.source, Path):
            digest, key = remembered_sha256(one.source, fact)
            facts.extend([] if key is None else [(key, digest)])
        else:
            digest = one.sha256()
        place = f"clip {clip_key(one, digest, options.fps)}"
        about = survey(one, take, options.frames[-1], options.fps, fact(place))
        facts.append((place, about))
        return digest, about

    digest, about = surveyed(video, options.take)
    if options.masks and (film := mask_of(video)) is not None:
        try:
            mask, found = surveyed(film, replace(options.take, scenes="off"))
        except OSError as error:
            raise OSError(f"its mask cannot be read: {error}") from error
        check_mask(found, about, is_picture=film.is_picture)
    return ClipSurvey(digest, about, mask, facts)


class Survey:
    """Survey of all clips before the first is encoded, and the keys of their tensors.

    Args:
        encoders: the model without its transformer's weights.

    Attributes:
        broken: reason of each clip that could not be read or encoded, by its name.
        short: names of clips with fewer frames than the shortest length.
        left_out: reason of each clip and scene that is not trained on, by its name.
    """

    def __init__(self, encoders: Encoders, options: CacheOptions) -> None:
        self.encoders, self.options = encoders, options
        self.broken: dict[str, str] = {}
        self.short: list[str] = []
        self.left_out: dict[str, str] = {}
        self.first_frames = None
        if options.condition == FIRST_FRAME:
            common = [RECIPE, options.store]
            self.first_frames = FirstFrames(encoders, common, options.max_tokens)

    def hash_models(self) -> None:
        """Hash the encoders, which all keys depend on."""
        common, encoders, images = [RECIPE, self.options.store], self.encoders, self.options.images
        self._vae = hash_of([*common, *encoders.states("vae")])
        texts = encoders.states(*encoders.family.training.text_parts, "tokenizer")
        self._text = hash_of([*common, self.options.max_tokens, *texts])
        self._image = None if images is None else hash_of([*common, images.state()])

    def text_key(self, caption: str, *clip: object) -> str:
        key = hash_of([self._text, caption])
        return key if self.first_frames is None else self.first_frames.text_key(key, *clip)

    def image_key(self, *image: object) -> str:
        return hash_of([self._image, *image])

    def stored(self, x: Tensor) -> Tensor:
        """Convert a tensor to its form in the shards."""
        return x.to("cpu", DTYPES[self.options.store] if x.is_floating_point() else x.dtype)

    def leave_out(self, name: str, error: OSError) -> None:
        """Note a clip, or a chunk of one, as broken. Raises OSError if none may be."""
        if self.options.on_broken == "stop":
            raise OSError(f"{name} is broken: {error}") from error
        self.broken[name] = str(error)
        self.left_out[name] = why_broken(str(error))

    def find_chunks(
        self,
        videos: Sequence[CaptionedVideo],
        store: Store,
        bar: "Progress",
        died: Mapping[str, OSError],
    ) -> list[ClipChunk]:
        """Survey all clips. Returns the chunks to have in the cache, by clip.

        Args:
            died: errors of clips that this process must not open, by name.
        """
        chunks: list[ClipChunk] = []
        count = longest = 0
        surveys = ahead(partial(self._survey_one, store, died), videos, self.options.workers)
        with closing(surveys):
            for video, found in bar.track(surveys, total=len(videos), description="reading"):
                if isinstance(found, OSError):
                    self.leave_out(video.name, found)
                    continue
                if found is None:
                    self.left_out[video.name] = UNUSED_PICTURE
                    continue
                count += 1
                for key, fact in found.facts:
                    store.remember(key, fact)
                scenes = [(0, 1)]
                if not video.is_picture:
                    scenes = scenes_in(found.about, self.options.take)
                longest = max(longest, *(end - begin for begin, end in scenes))
                self._leave_out_scenes(video, scenes)
                chunks += self._chunks_of(video, found, scenes)
        if not count:
            reason = next(iter((self.broken or self.left_out).values()))
            raise ValueError(f"no clip could be read: {reason}")
        refuse_unfilled(
            self.options.frames,
            self.options.sizes,
            self.options.fps,
            clips=count,
            longest=longest,
            filled={chunk.size for chunk in chunks},
            scenes=self.options.take.scenes == "cut",
        )
        store.commit()
        return chunks

    def _survey_one(
        self, store: Store, died: Mapping[str, OSError], video: CaptionedVideo
    ) -> Iterator[tuple[CaptionedVideo, ClipSurvey | OSError | None]]:
        """Look at one clip, which threads do at once; None for a picture that is not used."""
        if video.is_picture and not self.options.pictures:
            yield video, None
        elif video.name in died:
            yield video, died[video.name]
        else:
            try:
                found = survey_clip(video, self.options, store.fact)
                yield video, found._replace(image=self._check_image(video, store))
            except OSError as error:
                yield video, error

    def _check_image(self, video: CaptionedVideo, store: Store) -> str | None:
        """Read the clip's own image. Returns its key, or None if there is no image."""
        if self.options.images is None or video.image is None:
            return None
        try:
            data = video.image_bytes()
            key = self.image_key(hashlib.sha256(data).hexdigest())
            if key not in store:
                self.options.images.check(open_image(data, video.image_name))
        except OSError as error:
            raise OSError(f"its image cannot be read: {error}") from error
        return key

    def _chunks_of(
        self, video: CaptionedVideo, found: ClipSurvey, scenes: Sequence[tuple[int, int]]
    ) -> Iterator[ClipChunk]:
        options, factors = self.options, factors_of(self.encoders.pipe)
        size = nearest_size(options.sizes, found.about["size"])
        lost = lost_picture(found.about["size"], size)
        total, lasts, rate = found.about["total"], found.about["seconds"], options.fps
        if rate is None and total and lasts:
            rate = total / lasts
        lengths = (1,) if video.is_picture else options.frames
        texts = options.captions.of(video)
        text_keys = [self.text_key(text) for text in texts]
        for begin, longest in options.take.of(scenes, lengths):
            fitting = [length for length in lengths if length <= longest]
            for length in fitting[-1:] if self.encoders.family.training.causal_vae else fitting:
                place: list[Any] = [
                    found.digest,
                    None if video.is_picture else options.fps,
                    length,
                ]
                place += [size, *(["picture"] if video.is_picture else [begin] if begin else [])]
                image_key, frame_key, mask_key = found.image, None, None
                if options.images is not None and image_key is None:
                    image_key = self.image_key(*place)
                if self.first_frames is not None:
                    frame_key = self.first_frames.key(*place)
                    text_keys = [self.text_key(text, *place) for text in texts]
                if found.mask is not None:
                    mask_key = hash_of([MASK, options.store, found.mask, factors, *place])
                entry = Entry(
                    name=video.name,
                    caption=texts[0],
                    frames=(length - 1) // factors[0] + 1,
                    height=size[0] // factors[1],
                    width=size[1] // factors[1],
                    pixel_frames=length,
                    latent_key=hash_of([self._vae, *place]),
                    text_key=text_keys[0],
                    image_key=image_key,
                    teacher_key=self.text_key(video.teacher_caption) if options.teacher else None,
                    frame_key=frame_key,
                    begin=begin or None,
                    text_keys=tuple(text_keys) if len(text_keys) > 1 else None,
                    repeats=video.repeats if video.repeats > 1 else None,
                    is_picture=video.is_picture or None,
                    mask_key=mask_key,
                )
                source = hash_of([self._vae, *place[:2], *place[3:]])
                seconds = None if video.is_picture or rate is None else length / rate
                yield ClipChunk(video, size, entry, texts, source, seconds, total, lost)

    def _leave_out_scenes(self, video: CaptionedVideo, scenes: Sequence[tuple[int, int]]) -> None:
        """Note a clip, or those of its scenes, that fill no length."""
        fps, shortest = self.options.fps, 1 if video.is_picture else self.options.frames[0]
        longest = max(end - begin for begin, end in scenes)
        if longest < shortest:
            self.short.append(video.name)
            self.left_out[video.name] = too_short(longest, fps, shortest, len(scenes))
            return
        for begin, end in scenes:
            if end - begin < shortest:
                name = f"{video.name}, frames {begin} to {end - 1}"
                self.left_out[name] = too_short(end - begin, fps, shortest)
