"""Encoding of clips, captions and images into a cache of latents."""

import hashlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, compress, groupby, islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gen_accel.attention_processors.lengths import latent_frames, patch_of, temporal_patch
from gen_accel.endings import unwinding
from gen_accel.files import clear_partial
from gen_accel.lora.captions import Captions, repeated
from gen_accel.lora.conditions import FIRST_FRAME, MASK, TEXT, condition_for
from gen_accel.lora.data import (
    CaptionedVideo,
    Size,
    check_teacher_captions,
    find_videos,
    nearest_size,
    open_image,
)
from gen_accel.lora.encoders import Encoders, check_trained, factors_of, load_encoders
from gen_accel.lora.fingerprint import hash_of
from gen_accel.lora.first_frames import FirstFrames
from gen_accel.lora.found import (
    Lost,
    Report,
    buckets_of,
    lost_picture,
    too_short,
    unused_frames,
    why_broken,
)
from gen_accel.lora.index import Again, Packed, Table
from gen_accel.lora.latents import IMAGE, LATENTS, PICTURE, RECIPE, TEXTS_AT_ONCE, Entry
from gen_accel.lora.masks import check_mask, mask_key, mask_of, read_mask
from gen_accel.lora.preview import Preview
from gen_accel.lora.reading import ahead
from gen_accel.lora.scenes import check_scenes
from gen_accel.lora.shards import SHARD_BYTES, Known, Shards, file_key, remembered_sha256
from gen_accel.lora.surveys import clip_key, scenes_in, survey
from gen_accel.lora.takes import Take
from gen_accel.owners import locked
from gen_accel.pipelines.generation.loading import DTYPES
from gen_accel.pipelines.generation.progress import progress_bar, waiting

PICTURES = 8  # first frames that are kept as pictures, to sample validation videos from

if TYPE_CHECKING:
    from rich.progress import Progress

    from gen_accel.lora.images import ImageCoder

# Kinds of work, which are the titles of their bars too.
READING, CAPTIONS, CLIPS, IMAGES = "reading", "captions", "clips", "images"
FIRST_FRAMES, MASKS, SHOWN_CAPTIONS = "first frames", "masks", "captions of first frames"
START, AS_WRITTEN = Take(), Captions()
Item = TypeVar("Item")
UNUSED_PICTURE = "a picture, which images or a stage of 1 frame would take"


def cache(
    model_or_pipe: Any,
    data: str | Path | Sequence[CaptionedVideo],
    out: str | Path,
    *,
    frames: Sequence[int],
    sizes: Sequence[Size],
    fps: float | None = None,
    max_tokens: int | None = None,
    on_broken: Literal["skip", "stop"] = "skip",
    store: Literal["float16", "bfloat16", "float32"] = "float16",
    device: str = "auto",
    dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    images: "ImageCoder | None" = None,
    teacher: bool = False,
    take: Take = START,
    captions: Captions = AS_WRITTEN,
    default_caption: str | None = None,
    repeats: Sequence[str] = (),
    pictures: bool = False,
    workers: int = 0,
    condition: Literal["text", "first_frame"] | None = None,
    masks: bool = False,
    spread: "Spread | None" = None,
) -> Report:
    """Encode all clips and captions of a data set that `out` does not hold yet.

        cache("models/Wan2.1", "clips", "cache", frames=(81, 161), sizes=[(480, 832)], fps=16)
        LatentCache("cache").latents(0)

    All clips are read once before the first is encoded, so that their faults are reported early.
    A killed run leaves its finished shards to the next run. A second run in the same folder is
    refused while the first one lasts.

    Args:
        model_or_pipe: the folder of a pipeline, a repository on the hub, or a pipeline, which is
            used as it is. The transformer of a folder or repository is not loaded.
        data: see `find_videos`; or the videos themselves.
        frames: lengths in pixel frames. A chunk of a clip is encoded at the longest length that it
            fills and, unless the autoencoder is causal, at each shorter length too.
        sizes: (height, width) in pixels; a clip takes the size of the nearest aspect ratio.
        fps: frame rate to resample clips to; None keeps the stored frames.
        max_tokens: length of the text, the pipeline's `max_sequence_length`.
        on_broken: "skip" leaves out a clip that cannot be read, "stop" ends the run.
        store: dtype in the shards. Latents have unit variance, for which float16 has eight times
            the resolution of bfloat16. Values that overflow it are refused.
        device: device to encode on; "auto" is the accelerator if there is one. The encoders of a
            pipeline are moved there while they work.
        dtype: dtype of the loaded encoders; "auto" is float32 for the autoencoder and, on a GPU,
            bfloat16 for the text encoders. Not for a pipeline, which has its own.
        shard_bytes: bytes to hold in memory before a shard is written.
        images: also encode the image prompt of each clip, by default its middle frame.
        teacher: also encode each clip's caption for the teacher; all clips must have one.
        take: which chunks of each clip are encoded.
        captions: what is made of the captions.
        default_caption: caption of clips without one; None refuses them.
        repeats: how often clips are shown, PATTERN=NUMBER each; see `captions.repeated`. It goes
            before the data's own numbers.
        pictures: also take pictures, as clips of one frame; a length of 1 takes them in any case.
        workers: threads that read clips ahead of the encoder; 0 reads between two clips.
        condition: "first_frame" also encodes the first frame of each clip. None: as the model's
            pipeline makes videos.
        masks: also keep the mask of each clip that has one, see `masks`.
        spread: workers that read and encode; this process writes what they send. None: this
            process does all of it. The cache is the same.

    Raises:
        ValueError: data that `find_videos` refuses, a model that `check_model` refuses, sizes or
            lengths that the model cannot take, a length or one of several sizes that no clip
            fills, an offloaded pipeline, or texts that `store` cannot hold.
        OSError: a broken clip with on_broken="stop", a folder that cannot be written, or a folder
            that another run writes to.
    """
    _check_options(frames, sizes, fps, max_tokens, on_broken, store, shard_bytes, workers)
    pictures = pictures or 1 in frames
    if take.scenes == "cut":
        check_scenes()
    if isinstance(data, str | Path):
        videos = find_videos(
            data,
            images=images is not None,
            pictures="all" if pictures else "captioned",
            default_caption=default_caption,
            masks=masks,
        )
    else:
        videos = data
    if not videos:
        raise ValueError("data holds no videos")
    if repeats:
        videos = repeated(videos, repeats)
    if masks and all(video.mask is None for video in videos):
        raise ValueError(
            f"masks is on, and no clip of {data if isinstance(data, str | Path) else 'data'} has "
            "one: put clip.mask.mp4 beside clip.mp4, or a column mask into the manifest"
        )
    if teacher:
        check_teacher_captions([v for v in videos if pictures or not v.is_picture])
    folder = Path(out)
    with unwinding(), locked(folder) as alone:
        clear_partial(folder, alone=alone)
        encoders = load_encoders(model_or_pipe, device, dtype)
        shown = _condition(encoders, model_or_pipe, condition)
        if shown == FIRST_FRAME and (images is not None or teacher):
            raise ValueError("an image prompt is trained under condition text, got first_frame")
        if shown == FIRST_FRAME and pictures:
            raise ValueError(
                "a picture is its own first frame, so that nothing is left to learn: leave "
                "pictures and lengths of 1 frame out, or take condition text"
            )
        _check_fit(encoders, frames, sizes)
        with waiting("hashing the encoders"):
            run = Run(
                encoders=encoders,
                frames=tuple(sorted(set(frames))),
                sizes=tuple(sizes),
                fps=None if fps is None else float(fps),
                max_tokens=max_tokens,
                on_broken=on_broken,
                store=store,
                images=images,
                teacher=teacher,
                take=take,
                captions=captions,
                pictures=pictures,
                repeats=tuple(repeats),
                default_caption=default_caption,
                workers=workers,
                condition=shown,
                masks=masks,
                spread=spread,
            )
            run.hash_models()
        return _fill(folder, run, videos, shard_bytes)


def _fill(folder: Path, run: "Run", videos: Sequence[CaptionedVideo], shard_bytes: int) -> Report:
    """Encode the tensors that the folder lacks, and write its manifest and its report."""
    with progress_bar() as bar, Shards(folder, shard_bytes, bar) as shards:
        jobs = run.read(videos, shards, bar)
        preview = Preview(jobs, len(jobs), run.frames_of)
        texts = run.encode_texts(jobs, shards, bar)
        pictures = run.encode_images(jobs, shards, bar)
        run.encode_first_frames(jobs, shards, bar)
        run.keep_masks(jobs, shards, bar)
        new = run.encode_clips(jobs, shards, bar, preview)
        held = bytearray(all(key in shards for key in job.keys) for job in jobs)
        if not any(held):
            reasons = (run.broken or run.left_out).values()
            raise ValueError(f"no clip could be encoded: {next(iter(reasons), 'none is left')}")
        done = Again(lambda: compress(jobs, held))
        entries = Again(lambda: (_about(_entry(job, run.encoders.pipe)) for job in done))
        removed = _removed(shards, entries)
        kept = run.keep_pictures(done, shards) | {"digests": run.digests(done)}
        used = chain(run.used(done), kept.get("pictures", ()))
        shards.finish(run.manifest() | kept, used, entries)
        remade = preview.write(shards, sum(held), run.encoders, bar)
        shards.memo.shrink()
    encoded = sum(job.latent_key in new for job in done)
    report = Report(
        folder=shards.folder,
        encoded=encoded,
        kept=sum(held) - encoded,
        removed=removed,
        texts=texts,
        short=tuple(run.short),
        broken=run.broken,
        damaged=shards.damaged,
        images=pictures,
        left_out=run.left_out,
        lost=run.lost(done),
        buckets=buckets_of((job.frames, job.size, run.seconds(job)) for job in done),
        videos=len(videos),
        remade=remade,
    )
    report.write()
    return report


def _removed(shards: Shards, entries: Iterable[dict[str, Any]]) -> int:
    """Count the entries that the folder held before and holds no more."""
    now, gone = Table(), Table()
    for entry in entries:
        now.add(_place(entry))
    places = map(_place, shards.earlier_entries())
    return sum(gone.add(place) for place in places if place not in now)


def _place(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']} {entry['pixel_frames']} {entry.get('begin')}"


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


class _Job(NamedTuple):
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


class _Looked(NamedTuple):
    """What was found out about a clip.

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


@dataclass
class Run:
    """Options of one call of `cache`, and the clips that it found broken."""

    encoders: Encoders
    frames: tuple[int, ...]
    sizes: tuple[Size, ...]
    fps: float | None
    max_tokens: int | None
    on_broken: str
    store: str
    images: "ImageCoder | None" = None
    teacher: bool = False
    take: Take = START
    captions: Captions = AS_WRITTEN
    pictures: bool = False
    repeats: tuple[str, ...] = ()
    default_caption: str | None = None
    workers: int = 0
    condition: str = TEXT
    masks: bool = False
    spread: "Spread | None" = None
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
        texts = self.encoders.states(*self.encoders.family.TEXT_PARTS, "tokenizer")
        self._text = hash_of([*common, self.max_tokens, *texts])
        self._image = None if self.images is None else hash_of([*common, self.images.state()])

    def text_key(self, caption: str, *clip: Any) -> str:
        key = hash_of([self._text, caption])
        return key if self.first_frames is None else self.first_frames.text_key(key, *clip)

    def image_key(self, *image: Any) -> str:
        assert self._image is not None
        return hash_of([self._image, *image])

    def read(
        self, videos: Sequence[CaptionedVideo], shards: Shards, bar: "Progress"
    ) -> Packed[_Job]:
        """Survey all clips. Returns the jobs to have in the cache."""
        jobs = Packed(lambda row: _Job(videos[row[0]], *row[1:])._replace(number=row[0]))
        clips, longest = Table(), 0
        died: dict[str, OSError] = {}
        if self.spread is not None:
            died = self._remember(self.spread, videos, shards, bar)
        looks = ahead(partial(self._look, shards, died), enumerate(videos), self.workers)
        with closing(looks):
            for number, found in bar.track(looks, total=len(videos), description="reading"):
                video = videos[number]
                if isinstance(found, OSError):
                    self._note(video, found)
                elif found is None:
                    self.left_out[video.name] = UNUSED_PICTURE
                else:
                    for key, digest in found.hashed:
                        shards.memo.put(key, digest)
                    for place, about in found.surveyed:
                        shards.clips[place] = about
                    clips.add(found.clip)
                    whole = video.is_picture
                    spans = [(0, 1)] if whole else scenes_in(found.about, self.take)
                    longest = max(longest, *(end - begin for begin, end in spans))
                    for job in self._jobs(video, found):
                        jobs.append((number, *job[1:-1]))
        self._check_lengths(len(clips), longest)
        self._check_sizes(jobs)
        shards.keep()
        return jobs

    def _remember(
        self,
        spread: "Spread",
        videos: Sequence[CaptionedVideo],
        shards: Shards,
        bar: "Progress",
    ) -> dict[str, OSError]:
        """Let workers read the clips that the memo does not know, so that it does.

        What they cannot read is left to this process, which finds the same fault. Returns the
        errors of clips that ended their workers, by name: this process must not open them.
        """
        new = [
            video
            for video in videos
            if isinstance(video.source, Path)
            and video.source.is_file()
            and (self.pictures or not video.is_picture)
            and shards.memo.get(file_key(video.source)[0]) is None
        ]
        found = spread.over(replace(self, images=None, condition=TEXT), READING, new)
        died: dict[str, OSError] = {}
        with closing(found):
            tracked = bar.track(found, total=len(new), description="reading")
            for video, looked in zip(new, tracked, strict=True):
                if isinstance(looked, OSError):
                    died[video.name] = looked
                    continue
                for key, digest in () if looked is None else looked.hashed:
                    shards.memo.put(key, digest)
                for place, about in () if looked is None else looked.surveyed:
                    shards.clips[place] = about
        return died

    def _look(
        self, shards: Shards, died: Mapping[str, OSError], item: tuple[int, CaptionedVideo]
    ) -> Iterator[tuple[int, "_Looked | OSError | None"]]:
        """Find out about a clip, which threads do at once; None for a picture that is not used."""
        number, video = item
        if video.is_picture and not self.pictures:
            yield number, None
            return
        if video.name in died:
            yield number, died[video.name]
            return
        try:
            yield number, self._looked(video, shards)
        except OSError as error:
            yield number, error

    def _looked(self, video: CaptionedVideo, shards: "Shards | Unknown") -> _Looked:
        """Hash and survey a clip, its image and its mask. Raises OSError for one that cannot be
        read."""
        hashed: list[tuple[str, str]] = []

        def hash_once(one: CaptionedVideo) -> tuple[str, str]:
            digest, key = _digest(one, shards.memo)
            if key is not None:
                hashed.append((key, digest))
            return digest, clip_key(one, digest, self.fps)

        longest = self.frames[-1]
        digest, clip = hash_once(video)
        about = survey(video, self.take, longest, self.fps, shards.clips.get(clip))
        surveyed = [(clip, about)]
        picture, mask = self._check_image(video, shards), None
        if self.masks and (film := mask_of(video)) is not None:
            try:
                mask, place = hash_once(film)
                known = shards.clips.get(place)
                found = survey(film, replace(self.take, scenes="off"), longest, self.fps, known)
            except OSError as error:
                raise OSError(f"its mask cannot be read: {error}") from error
            check_mask(found, about, is_picture=film.is_picture)
            surveyed.append((place, found))
        return _Looked(digest, clip, about, picture, mask, hashed, surveyed)

    def _jobs(self, video: CaptionedVideo, looked: _Looked) -> list[_Job]:
        """Return the jobs of a clip."""
        digest, about, picture = looked.digest, looked.about, looked.picture
        factors = factors_of(self.encoders.pipe)
        size = nearest_size(self.sizes, tuple(about["size"]))
        lengths = (1,) if video.is_picture else self.frames
        scenes = [(0, 1)] if video.is_picture else scenes_in(about, self.take)
        self._leave_out_scenes(video, scenes, lengths[0])
        texts = self.captions.of(video)
        text_keys = tuple(self.text_key(text) for text in texts)
        second = self.text_key(video.teacher_caption) if self.teacher else None
        jobs = []
        for begin, longest in self.take.of(digest, scenes, lengths):
            fitting = [length for length in lengths if length <= longest]
            for length in fitting[-1:] if self.encoders.family.CAUSAL_VAE else fitting:
                # The place is left out at the start, as in caches from before there were others.
                place = [digest, None if video.is_picture else self.fps, length, size]
                place += ["picture"] if video.is_picture else [begin] if begin else []
                image_key = picture
                if self.images is not None and image_key is None:
                    image_key = self.image_key(*place)
                latent_key = hash_of([self._vae, *place])
                frame_key = None
                if self.first_frames is not None:
                    frame_key = self.first_frames.key(*place)
                    text_keys = tuple(self.text_key(text, *place) for text in texts)
                keys = latent_key, text_keys, image_key, second, frame_key
                source = hash_of([self._vae, *place[:2], *place[3:]])
                mask = looked.mask
                mask = None if mask is None else mask_key(mask, factors, self.store, *place)
                jobs.append(_Job(video, length, size, *keys, begin, texts, about, source, mask))
        return jobs

    def _leave_out_scenes(
        self, video: CaptionedVideo, scenes: Sequence[tuple[int, int]], shortest: int
    ) -> None:
        """Note a clip, or those of its scenes, that fill no length."""
        longest = max(end - begin for begin, end in scenes)
        if longest < shortest:
            self.short.append(video.name)
            self.left_out[video.name] = too_short(longest, self.fps, shortest, len(scenes))
            return
        for begin, end in scenes:
            if end - begin < shortest:
                name = f"{video.name}, frames {begin} to {end - 1}"
                self.left_out[name] = too_short(end - begin, self.fps, shortest)

    def seconds(self, job: _Job) -> float | None:
        """Return how long a chunk is; None if unknown, and for a picture."""
        total, seconds = job.about["total"], job.about["seconds"]
        if job.video.is_picture:
            return None
        if self.fps is not None:
            return job.frames / self.fps
        return job.frames * seconds / total if seconds and total else None

    def lost(self, jobs: Iterable[_Job]) -> Packed[Lost]:
        """Return what is lost of each clip."""
        found = Packed(Lost._make)
        for _, group in groupby(jobs, lambda job: job.number):
            chunks = list(group)
            video, about = chunks[0].video, chunks[0].about
            picture = lost_picture(tuple(about["size"]), chunks[0].size)
            unused = unused_frames(about["total"], ((job.begin, job.frames) for job in chunks))
            found.append((video.name, picture, unused, about["total"]))
        return found

    def encode_texts(self, jobs: Packed[_Job], shards: Shards, bar: "Progress") -> int:
        """Encode all captions that the shards lack. Returns their number."""
        if self.first_frames is not None and self.first_frames.reads_prompts:
            return self._encode_texts_with(jobs, shards, bar)
        texts = Again(lambda: _lacking(self._texts(jobs), shards))
        count = sum(1 for _ in texts)
        parts = _in_parts(texts, TEXTS_AT_ONCE)
        total = -(-count // TEXTS_AT_ONCE)
        with closing(self._worked(CAPTIONS, parts, needed=count > 0)) as found:
            for part, made in bar.track(found, total=total, description="captions"):
                if isinstance(made, OSError):  # the workers died at it
                    raise ValueError(f"captions could not be encoded: {made}")
                for (key, text), tensors in zip(part, made, strict=True):
                    try:
                        self._put(key, tensors, shards, f"the text {text!r}")
                    except OSError as error:  # no clip's fault, which could be left out
                        raise ValueError(
                            f"{error}; float32 can what the text encoder made"
                        ) from None
        return count

    def _texts(self, jobs: Iterable[_Job]) -> Iterator[tuple[str, str]]:
        """Return all texts with their keys."""
        for job in jobs:
            yield from zip(job.text_keys, job.texts, strict=True)
        yield self.text_key(""), ""
        for job in jobs if self.teacher else ():
            if job.teacher_key:
                yield job.teacher_key, job.video.teacher_caption

    def _encode_texts_with(self, jobs: Packed[_Job], shards: Shards, bar: "Progress") -> int:
        """Do as `encode_texts`, each caption with the first frame of its clip."""
        texts = Again(lambda: _lacking(self._shown_texts(jobs), shards))
        count = sum(1 for _ in texts)
        with closing(self._worked(SHOWN_CAPTIONS, texts, needed=count > 0)) as found:
            made = bar.track(found, total=count, description="captions")
            for (key, (_, job)), tensors in made:
                try:
                    self._put(key, _sound(tensors), shards, "its caption")
                except OSError as error:
                    if job is None:
                        raise
                    self._note(job.video, error)
        return count

    def _shown_texts(self, jobs: Iterable[_Job]) -> Iterator[tuple[str, tuple[str, _Job | None]]]:
        """Return all texts and whose they are, with their keys."""
        yield self.text_key(""), ("", None)
        for job in jobs:
            for key, text in zip(job.text_keys, job.texts, strict=True):
                yield key, (text, job)

    def encode_first_frames(self, jobs: Packed[_Job], shards: Shards, bar: "Progress") -> None:
        """Encode all first frames that the shards lack."""
        if self.first_frames is not None:
            keyed = Again(lambda: ((job.frame_key, job) for job in jobs))
            self._each(keyed, shards, bar, FIRST_FRAMES, "its first frame")

    def keep_masks(self, jobs: Packed[_Job], shards: Shards, bar: "Progress") -> None:
        """Keep all masks that the shards lack, on the latents' grid."""
        if self.masks:
            keyed = Again(lambda: ((job.mask_key, job) for job in jobs))
            self._each(keyed, shards, bar, MASKS, "its mask")

    def keep_pictures(self, done: Iterable[_Job], shards: Shards) -> dict[str, Any]:
        """Keep the first frames of some clips as pictures, (H, W, 3) uint8.

        Returns the manifest's fields of the first frames.
        """
        if self.first_frames is None:
            return {}
        keys = []
        for job in islice(done, PICTURES):
            keys.append(hash_of([RECIPE, PICTURE, job.frame_key]))
            if keys[-1] not in shards:
                image = torch.from_numpy(np.array(self._first(job)))
                shards.put(keys[-1], {PICTURE: image})
        return {"condition": self.condition, "pictures": keys}

    def _first(self, job: _Job) -> Image.Image:
        """Read the first frame of a chunk, at the clip's size."""
        found = job.video.read(frames=1, size=job.size, fps=self.fps, begin=job.begin)
        return Image.fromarray(found[0])

    def _put(self, key: str, tensors: dict[str, Tensor], shards: Shards, what: str) -> None:
        """Store tensors. Raises OSError for values that `store` cannot hold."""
        stored = {name: self.stored(x) for name, x in tensors.items()}
        if not all(_finite(x) for x in stored.values()):
            raise OSError(f"store {self.store!r} cannot hold {what}")
        shards.put(key, stored)

    def encode_images(self, jobs: Packed[_Job], shards: Shards, bar: "Progress") -> int | None:
        """Encode all images that the shards lack. Returns their number, None without images."""
        if self.images is None:
            return None
        images, nothing = self.images, self.image_key("nothing")
        keyed = Again(lambda: ((job.image_key, job) for job in jobs))
        if nothing not in shards:
            with images.at_work(self.encoders.device):
                shards.put(nothing, {IMAGE: self.stored(images.nothing())})
        return self._each(keyed, shards, bar, IMAGES, "its image")

    def _each(
        self,
        keyed: Iterable[tuple[str | None, _Job]],
        shards: Shards,
        bar: "Progress",
        title: str,
        what: str,
    ) -> int:
        """Make the tensors that the shards lack, and note the clips whose cannot be made.

        Args:
            keyed: jobs by the key of their tensors; None where a job has none.
            title: the work, see `work`.
            what: a job's tensors, in words.

        Returns the number of keys that the shards lacked.
        """
        named = Again(lambda: ((key, job) for key, job in keyed if key is not None))
        new = Again(lambda: _lacking(named, shards))
        count = sum(1 for _ in new)
        with closing(self._worked(title, new)) as found:
            for (key, job), made in bar.track(found, total=count, description=title):
                try:
                    self._put(key, _sound(made), shards, what)
                except OSError as error:
                    self._note(job.video, error)
        return count

    def _worked(
        self,
        title: str,
        items: Iterable[Item],
        *,
        needed: bool = True,
    ) -> Generator[tuple[Item, Any], None, None]:
        """Work on all items in order, here or by workers; see `work`.

        Args:
            needed: whether there are items.

        Yields each item with what was made of it.
        """
        if self.spread is not None:
            held = [*items]
            yield from zip(held, self.spread.over(self, title, held), strict=True)
            return
        with self.work(title, needed=needed) as make:
            for item in items:
                yield item, make(item)

    @contextmanager
    def work(self, title: str, *, needed: bool = True) -> Iterator[Callable[[Any], Any]]:
        """Ready the models of one kind of work. Yields what does it for one item.

        What cannot be read of a clip is returned as its OSError.
        """
        encoders, first = self.encoders, self.first_frames
        with ExitStack() as stack:
            if title == CAPTIONS:
                parts = encoders.family.TEXT_PARTS
                stack.enter_context(encoders.at_work(*parts, needed=needed))
            elif title == SHOWN_CAPTIONS:
                stack.enter_context(encoders.at_work("text_encoder", needed=needed))
            elif title == FIRST_FRAMES and first is not None:
                stack.enter_context(first.at_work())
            elif title == IMAGES and self.images is not None:
                stack.enter_context(self.images.at_work(encoders.device))
            elif title == CLIPS:
                stack.enter_context(encoders.at_work("vae"))
            yield partial(self._make, title)

    def _make(self, title: str, item: Any) -> Any:
        """Do one kind of work for one item, as it is passed to `_worked`."""
        if title == CAPTIONS:
            family, pipe = self.encoders.family, self.encoders.pipe
            found = family.encode_prompt(pipe, [text for _, text in item], self.max_tokens)
            return [{name: x[i] for name, x in found.items()} for i in range(len(item))]
        if title == CLIPS:
            return [(_place_in(job), self._latents(made)) for job, made in self._chunks(item)]
        try:
            if title == READING:
                return self._looked(item, Unknown())
            if title == SHOWN_CAPTIONS:
                assert self.first_frames is not None
                text, job = item[1]
                image = None if job is None else self._first(job)
                return self.first_frames.prompt(text, image)
            job = item[1]
            if title == FIRST_FRAMES:
                assert self.first_frames is not None
                return self.first_frames(self._first(job), job.frames)
            if title == IMAGES:
                assert self.images is not None
                return {IMAGE: self.images(self._picture(job))}
            about = {"frames": job.frames, "size": job.size, "fps": self.fps, "begin": job.begin}
            return {MASK: read_mask(job.video, factors_of(self.encoders.pipe), **about)}
        except OSError as error:
            return None if title == READING else error

    def _latents(self, frames: np.ndarray | OSError) -> dict[str, Tensor] | OSError:
        if isinstance(frames, OSError):
            return frames
        found = self.encoders.family.encode_video(self.encoders.pipe, _pixels(frames))[0]
        return {LATENTS: found}

    def _encoded(
        self, clips: Iterable[list[_Job]], see: Callable[[_Job, np.ndarray], None]
    ) -> Generator[tuple[_Job, dict[str, Tensor] | OSError], None, None]:
        """Read and encode chunks, each clip's together, in order.

        Args:
            see: takes the frames of each chunk that is read in this process.
        """
        if self.spread is not None:
            held = [*clips]
            for jobs, made in zip(held, self.spread.over(self, CLIPS, held), strict=True):
                if isinstance(made, OSError):
                    yield from ((job, made) for job in jobs)
                    continue
                by_place = {_place_in(job): job for job in jobs}
                yield from ((by_place[place], one) for place, one in made)
            return
        with (
            self.work(CLIPS),
            closing(ahead(self._chunks, clips, self.workers)) as read,
        ):
            for job, frames in read:
                if not isinstance(frames, OSError):
                    see(job, frames)
                yield job, self._latents(frames)

    def encode_clips(
        self, jobs: Packed[_Job], shards: Shards, bar: "Progress", preview: Preview
    ) -> Table:
        """Encode all latents that the shards lack. Returns their keys."""
        new = Table()
        for job in jobs:
            if job.latent_key not in shards:
                new.add(job.latent_key)
        keyed = ((job.latent_key, job) for job in jobs)
        lacking = (job for _, job in _lacking(keyed, shards))
        clips = (list(group) for _, group in groupby(lacking, _source))
        with closing(self._encoded(clips, preview.see)) as encoded:
            for job, made in bar.track(encoded, total=len(new), description="clips"):
                try:
                    self._put(job.latent_key, _sound(made), shards, "its latents")
                except OSError as error:
                    self._note(job.video, error)
        return new

    def manifest(self) -> dict[str, Any]:
        """Build the manifest's fields."""
        about = {
            "model": type(self.encoders.pipe).__name__,
            "causal": self.encoders.family.CAUSAL_VAE,
            "fps": self.fps,
            "store": self.store,
            "max_tokens": self.max_tokens,
            "options": self._options(),
            "empty": self.text_key(""),
        }
        if self.masks:
            about["masks"] = True
        if self.images is not None:
            about["images"] = {**self.images.about, "nothing": self.image_key("nothing")}
        return about

    def _options(self) -> dict[str, Any]:
        """Return what was asked of the clips and captions, by the names of a config's fields."""
        return {
            "take": self.take.how,
            "chunks": self.take.chunks,
            "scenes": self.take.scenes,
            "trigger": self.captions.trigger,
            "prefix": self.captions.prefix,
            "shuffle_tags": self.captions.shuffle,
            "tag_orders": self.captions.orders,
            "default_caption": self.default_caption,
            "repeats": self.repeats,
        }

    def digests(self, done: Iterable[_Job]) -> dict[str, str]:
        """Hash the clips that fill each length, by its number of latent frames.

        With a causal autoencoder the hash is the same where clips are encoded at a longer length.
        """
        time, causal = factors_of(self.encoders.pipe)[0], self.encoders.family.CAUSAL_VAE
        hashes = {(length - 1) // time + 1: hashlib.sha256() for length in self.frames}
        for job in done:
            held = (job.frames - 1) // time + 1
            latents = job.source if causal else job.latent_key
            video = job.video
            shown = [video.name, video.repeats, video.is_picture]
            seen = [*shown, job.size, job.keys[1:], latents]
            for frames, digest in hashes.items():
                fits = held >= frames if causal else held == frames
                if fits or job.video.is_picture:  # pictures train in any stage
                    digest.update(hash_of(seen).encode())
        return {str(frames): digest.hexdigest() for frames, digest in hashes.items()}

    def used(self, done: Iterable[_Job]) -> Iterator[str]:
        """Return the keys that stay in the cache."""
        yield self.text_key("")
        if self.images is not None:
            yield self.image_key("nothing")
        for job in done:
            yield from job.keys

    def _check_image(self, video: CaptionedVideo, shards: "Shards | Unknown") -> str | None:
        """Read the clip's own image. Returns its key, or None if there is no image."""
        if self.images is None or video.image is None:
            return None
        try:
            data = video.image_bytes()
            key = self.image_key(hashlib.sha256(data).hexdigest())
            if key not in shards:
                self.images.check(open_image(data, video.image_name))
        except OSError as error:
            raise OSError(f"its image cannot be read: {error}") from error
        return key

    def _picture(self, job: _Job) -> Image.Image:
        """Return the clip's own image, or the middle frame of its length."""
        if job.video.image is not None:
            return open_image(job.video.image_bytes(), job.video.image_name)
        middle = job.begin + job.frames // 2
        frames = job.video.read(frames=1, size=job.size, fps=self.fps, begin=middle)
        return Image.fromarray(frames[-1])

    def _check_lengths(self, clips: int, longest: int) -> None:
        """Refuse a length that no clip fills.

        Args:
            clips: number of clips that could be read.
            longest: frames of the longest of them, or of the longest scene.
        """
        if not clips:
            reason = next(iter((self.broken or self.left_out).values()))
            raise ValueError(f"no clip could be read: {reason}")
        for length in self.frames:
            if length > longest:
                rate = "" if self.fps is None else f" at {self.fps:g} frames a second"
                what = "no scene of a clip" if self.take.scenes == "cut" else "no clip"
                raise ValueError(
                    f"{what} has {length} frames{rate}: the longest of {clips} has {longest}"
                )

    def _check_sizes(self, jobs: Packed[_Job]) -> None:
        """Refuse one of several sizes that no clip goes to."""
        filled = {job.size for job in jobs}
        for height, width in self.sizes:
            if len(self.sizes) > 1 and filled and (height, width) not in filled:
                others = ", ".join(f"{h}x{w}" for h, w in sorted(filled))
                raise ValueError(
                    f"no clip goes to size {height}x{width}: each has the shape of another "
                    f"({others}); leave it out of sizes"
                )

    def _note(self, video: CaptionedVideo, error: OSError) -> None:
        if self.on_broken == "stop":
            raise OSError(f"{video.name} is broken: {error}") from error
        self.broken[video.name] = str(error)
        self.left_out[video.name] = why_broken(str(error))

    def frames_of(self, job: _Job) -> np.ndarray | None:
        """Read the frames of a chunk, (F, H, W, 3) uint8; None where that fails."""
        for _, frames in self._chunks([job]):
            return None if isinstance(frames, OSError) else frames
        return None

    def _chunks(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, np.ndarray | OSError]]:
        """Read chunks of one clip, which is decoded once.

        Yields each job with its frames, (F, H, W, 3) uint8, or with the error of its clip.
        """
        waiting = {(job.begin, job.frames): job for job in jobs}
        video, size = jobs[0].video, jobs[0].size
        try:
            for chunk, frames in video.read_chunks(list(waiting), size=size, fps=self.fps):
                job = waiting.pop(chunk)
                if len(frames) < job.frames:
                    yield job, OSError(f"it has {len(frames)} frames now, and had {job.frames}")
                else:
                    yield job, frames
        except OSError as error:
            yield from ((job, error) for job in waiting.values())
        except (RuntimeError, MemoryError) as error:
            raise RuntimeError(f"{video.name} could not be read: {error!r}") from error

    def stored(self, x: Tensor) -> Tensor:
        """Convert a tensor to its form in the shards."""
        return x.to("cpu", DTYPES[self.store] if x.is_floating_point() else x.dtype)


def _check_options(
    frames: Sequence[int],
    sizes: Sequence[Size],
    fps: float | None,
    max_tokens: int | None,
    on_broken: str,
    store: str,
    shard_bytes: int,
    workers: int,
) -> None:
    if not frames or any(length < 1 for length in frames):
        raise ValueError(f"frames must be lengths of at least 1, got {list(frames)}")
    if not sizes or any(side < 1 for size in sizes for side in size):
        raise ValueError(f"sizes must be pairs of height and width, got {list(sizes)}")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive and finite, got {fps}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if on_broken not in ("skip", "stop"):
        raise ValueError(f"on_broken must be skip or stop, got {on_broken!r}")
    if store not in DTYPES:
        raise ValueError(f"store must be one of {', '.join(DTYPES)}, got {store!r}")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")


def _check_fit(encoders: Encoders, frames: Sequence[int], sizes: Sequence[Size]) -> None:
    pipe, config = encoders.pipe, encoders.transformer.config
    check_trained(encoders.family, type(pipe).__name__, config)
    time, space = factors_of(pipe)
    for length in frames:
        if (length - 1) % time:
            below = (length - 1) // time * time + 1
            raise ValueError(
                f"frames must be {time} n + 1 for this autoencoder, got {length}; nearest: "
                f"{below} and {below + time}"
            )
        latent_frames("frames", length, time, temporal_patch(encoders.transformer))
    patches = patch_of(config)[1:]
    for size in sizes:
        if any(side % (space * step) for side, step in zip(size, patches, strict=True)):
            rule = " and ".join(str(space * step) for step in patches)
            raise ValueError(f"sizes must be multiples of {rule} (height, width), got {size}")
    channels = getattr(pipe.vae.config, "z_dim", None) or pipe.vae.config.latent_channels
    taken = encoders.family.latent_channels(config)
    if taken != channels:
        raise ValueError(
            f"the transformer takes {taken} channels where the latents have "
            f"{channels}: such a model is not trained"
        )


def _condition(encoders: Encoders, model: Any, condition: str | None) -> str:
    """Choose the condition of a cache, see `condition_for`."""
    pipe = encoders.pipe
    index = {**pipe.config, "_class_name": type(pipe).__name__}
    name = model if isinstance(model, str | Path) else type(pipe).__name__
    asked = SimpleNamespace(model=name, condition=condition, first_frame_dropout=0.0)
    return condition_for(index, encoders.transformer.config, asked).condition


def _entry(job: _Job, pipe: Any) -> Entry:
    time, space = factors_of(pipe)
    return Entry(
        name=job.video.name,
        caption=job.texts[0],
        frames=(job.frames - 1) // time + 1,
        height=job.size[0] // space,
        width=job.size[1] // space,
        pixel_frames=job.frames,
        latent_key=job.latent_key,
        text_key=job.text_keys[0],
        image_key=job.image_key,
        teacher_key=job.teacher_key,
        frame_key=job.frame_key,
        begin=job.begin or None,
        text_keys=job.text_keys if len(job.text_keys) > 1 else None,
        repeats=job.video.repeats if job.video.repeats > 1 else None,
        is_picture=job.video.is_picture or None,
        mask_key=job.mask_key,
    )


def _about(entry: Entry) -> dict[str, Any]:
    """Return an entry's fields that are set.

    Leaving out None keeps the hash of caches from before these fields existed.
    """
    return {name: value for name, value in vars(entry).items() if value is not None}


def _digest(video: CaptionedVideo, memo: Known) -> tuple[str, str | None]:
    """Do as `remembered_sha256`; what is no file is hashed anew."""
    if isinstance(video.source, Path):
        return remembered_sha256(video.source, memo)
    return video.sha256(), None


def _place_in(job: _Job) -> tuple[int, int]:
    """Return where a chunk is in its clip: its first frame and their number."""
    return job.begin, job.frames


def _source(job: _Job) -> tuple[int, Size]:
    return job.number, job.size


def _pixels(frames: np.ndarray) -> Tensor:
    """Return frames, (F, H, W, 3) uint8, as (1, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def _lacking(keyed: Iterable[tuple[str, Item]], shards: Shards) -> Iterator[tuple[str, Item]]:
    """Leave out what the shards have, and all but the first of each key."""
    seen = Table()
    return (one for one in keyed if one[0] not in shards and seen.add(one[0]))


def _in_parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def _sound(made: dict[str, Tensor] | OSError) -> dict[str, Tensor]:
    """Raise what came in the place of tensors."""
    if isinstance(made, OSError):
        raise made
    return made


def _finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())
