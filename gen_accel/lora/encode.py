"""Encoding of clips, captions and images into a cache of latents."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from gen_accel.attention_processors.lengths import latent_frames, patch_of, temporal_patch
from gen_accel.endings import unwinding
from gen_accel.files import clear_partial
from gen_accel.lora.data import (
    CaptionedVideo,
    Size,
    check_teacher_captions,
    find_videos,
    nearest_size,
    open_image,
)
from gen_accel.lora.encoders import Encoders, factors_of, load_encoders
from gen_accel.lora.fingerprint import hash_of
from gen_accel.lora.latents import IMAGE, LATENTS, RECIPE, TEXTS_AT_ONCE, Entry
from gen_accel.lora.shards import SHARD_BYTES, Shards
from gen_accel.owners import locked
from gen_accel.pipelines.generation.loading import DTYPES
from gen_accel.pipelines.generation.progress import progress_bar

if TYPE_CHECKING:
    from rich.progress import Progress

    from gen_accel.lora.images import ImageCoder


@dataclass(frozen=True)
class Report:
    """Report of a run of `cache`. A clip counts once for each length.

    Args:
        encoded: number of clips encoded now.
        kept: number of clips that were in the cache already.
        removed: number of clips that the cache held before and holds no more.
        texts: number of captions encoded now, the empty one included.
        short: names of videos with fewer frames than the shortest length.
        broken: names of videos that could not be read, with the reason.
        damaged: names of shards that had to be encoded again.
        images: number of images encoded now; None without image prompts.
    """

    folder: Path
    encoded: int
    kept: int
    removed: int
    texts: int
    short: tuple[str, ...] = ()
    broken: dict[str, str] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
    images: int | None = None

    def __str__(self) -> str:
        parts = [
            f"{self.encoded} clips encoded",
            f"{self.kept} kept",
            f"{self.removed} removed",
            f"{self.texts} texts encoded",
            *([] if self.images is None else [f"{self.images} images encoded"]),
            f"{len(self.short)} too short",
            f"{len(self.broken)} broken",
        ]
        lines = [f"{self.folder}: {', '.join(parts)}"]
        lines += [f"  {name}: {reason}" for name, reason in self.broken.items()]
        return "\n".join(lines)


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
        frames: lengths in pixel frames. A clip is encoded at the longest length that it fills
            and, unless the autoencoder is causal, at each shorter length too.
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

    Raises:
        ValueError: data that `find_videos` refuses, a model that `check_model` refuses, sizes or
            lengths that the model cannot take, a length that no clip fills, an offloaded pipeline,
            or texts that `store` cannot hold.
        OSError: a broken clip with on_broken="stop", a folder that cannot be written, or a folder
            that another run writes to.
    """
    _check_options(frames, sizes, fps, max_tokens, on_broken, store, shard_bytes)
    if isinstance(data, str | Path):
        videos = find_videos(data, images=images is not None)
    else:
        videos = list(data)
    if not videos:
        raise ValueError("data holds no videos")
    if teacher:
        check_teacher_captions(videos)
    folder = Path(out)
    with unwinding(), locked(folder) as alone:
        clear_partial(folder, alone=alone)
        encoders = load_encoders(model_or_pipe, device, dtype)
        _check_fit(encoders, frames, sizes)
        run = _Run(
            encoders,
            tuple(sorted(set(frames))),
            tuple(sizes),
            None if fps is None else float(fps),
            max_tokens,
            on_broken,
            store,
            images,
            teacher,
        )
        return _fill(folder, run, videos, shard_bytes)


def _fill(folder: Path, run: "_Run", videos: Sequence[CaptionedVideo], shard_bytes: int) -> Report:
    """Encode the tensors that the folder lacks, and write its manifest."""
    with Shards(folder, shard_bytes) as shards, progress_bar() as bar:
        jobs, known, short = run.read(videos, shards, bar)
        texts = run.encode_texts(jobs, shards, bar)
        pictures = run.encode_images(jobs, shards, bar)
        new = run.encode_clips(jobs, shards, bar)
        done = [job for job in jobs if all(key in shards for key in job.keys)]
        if not done:
            raise ValueError(f"no clip could be encoded: {next(iter(run.broken.values()))}")
        entries = [_entry(job, run.encoders.pipe) for job in done]
        before = {(e["name"], e["pixel_frames"]) for e in shards.earlier.get("entries", ())}
        sources = {job.latent_key: job.source for job in done}
        shards.finish(run.manifest(entries, known) | {"sources": sources}, run.used(done))
    return Report(
        folder=shards.folder,
        encoded=sum(job.latent_key in new for job in done),
        kept=sum(job.latent_key not in new for job in done),
        removed=len(before - {(entry.name, entry.pixel_frames) for entry in entries}),
        texts=texts,
        short=short,
        broken=run.broken,
        damaged=shards.damaged,
        images=pictures,
    )


class _Job(NamedTuple):
    """A clip at one length.

    Args:
        frames: pixel frames.
        size: height and width in pixels.
        source: hash of all that the latents depend on but the clip's length.
    """

    video: CaptionedVideo
    frames: int
    size: Size
    latent_key: str
    text_key: str
    image_key: str | None = None
    teacher_key: str | None = None
    source: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        keys = (self.latent_key, self.text_key, self.image_key, self.teacher_key)
        return tuple(key for key in keys if key is not None)


@dataclass
class _Run:
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
    broken: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        common = [RECIPE, self.store]
        self._vae = hash_of([*common, *self.encoders.states("vae")])
        texts = self.encoders.states("text_encoder", "tokenizer")
        self._text = hash_of([*common, self.max_tokens, *texts])
        self._image = None if self.images is None else hash_of([*common, self.images.state()])

    def text_key(self, caption: str) -> str:
        return hash_of([self._text, caption])

    def image_key(self, *image: Any) -> str:
        assert self._image is not None
        return hash_of([self._image, *image])

    def read(
        self, videos: Sequence[CaptionedVideo], shards: Shards, bar: "Progress"
    ) -> tuple[list[_Job], dict[str, Any], tuple[str, ...]]:
        """Survey all clips.

        Returns the jobs to have in the cache, the data about its clips, and the names of videos
        that are too short.
        """
        jobs: list[_Job] = []
        known: dict[str, Any] = {}
        short = []
        for video in bar.track(videos, description="reading"):
            try:
                digest = video.sha256()
                clip = f"{digest} {self.fps}"
                about = self._survey(video, shards.clips.get(clip))
                picture = self._check_image(video, shards)
            except OSError as error:
                self._note(video, error)
                continue
            known[clip] = shards.clips[clip] = about
            size = nearest_size(self.sizes, tuple(about["size"]))
            lengths = [length for length in self.frames if length <= about["frames"]]
            if not lengths:
                short.append(video.name)
            for length in lengths[-1:] if self.encoders.family.CAUSAL_VAE else lengths:
                latent_key = hash_of([self._vae, digest, self.fps, length, size])
                image_key = picture
                if self.images is not None and image_key is None:
                    image_key = self.image_key(digest, self.fps, length, size)
                text_key = self.text_key(video.caption)
                second = self.text_key(video.teacher_caption) if self.teacher else None
                keys = latent_key, text_key, image_key, second
                source = hash_of([self._vae, digest, self.fps, size])
                jobs.append(_Job(video, length, size, *keys, source))
        self._check_lengths(known)
        return jobs, known, tuple(short)

    def encode_texts(self, jobs: Sequence[_Job], shards: Shards, bar: "Progress") -> int:
        """Encode all captions that the shards lack. Returns their number."""
        captions = {job.text_key: job.video.caption for job in jobs} | {self.text_key(""): ""}
        captions |= {job.teacher_key: job.video.teacher_caption for job in jobs if job.teacher_key}
        new = [key for key in captions if key not in shards]
        parts = [new[i : i + TEXTS_AT_ONCE] for i in range(0, len(new), TEXTS_AT_ONCE)]
        family, pipe = self.encoders.family, self.encoders.pipe
        with self.encoders.at_work("text_encoder"):
            for part in bar.track(parts, description="captions"):
                prompts = [captions[key] for key in part]
                found = family.encode_prompt(pipe, prompts, self.max_tokens)
                for i, key in enumerate(part):
                    tensors = {name: self._stored(x[i]) for name, x in found.items()}
                    if not all(_finite(x) for x in tensors.values()):
                        raise ValueError(
                            f"store {self.store!r} cannot hold the text {prompts[i]!r}; float32 "
                            "can what the text encoder made"
                        )
                    shards.put(key, tensors)
        return len(new)

    def encode_images(self, jobs: Sequence[_Job], shards: Shards, bar: "Progress") -> int | None:
        """Encode all images that the shards lack. Returns their number, None without images."""
        if self.images is None:
            return None
        new = {
            job.image_key: job
            for job in jobs
            if job.image_key is not None and job.image_key not in shards
        }
        nothing = self.image_key("nothing")
        with self.images.at_work(self.encoders.device):
            if nothing not in shards:
                shards.put(nothing, {IMAGE: self._stored(self.images.nothing())})
            for key, job in bar.track(list(new.items()), description="images"):
                try:
                    found = self._stored(self.images(self._picture(job)))
                    if not _finite(found):
                        raise OSError(f"store {self.store!r} cannot hold its image")
                except OSError as error:
                    self._note(job.video, error)
                    continue
                shards.put(key, {IMAGE: found})
        return len(new)

    def encode_clips(self, jobs: Sequence[_Job], shards: Shards, bar: "Progress") -> set[str]:
        """Encode all latents that the shards lack. Returns their keys."""
        new = {job.latent_key: job for job in jobs if job.latent_key not in shards}
        family, pipe = self.encoders.family, self.encoders.pipe
        with self.encoders.at_work("vae"):
            for key, job in bar.track(list(new.items()), description="clips"):
                try:
                    latents = self._stored(family.encode_video(pipe, self._pixels(job))[0])
                    if not _finite(latents):
                        raise OSError(f"store {self.store!r} cannot hold its latents")
                except OSError as error:
                    self._note(job.video, error)
                    continue
                shards.put(key, {LATENTS: latents})
        return set(new)

    def manifest(self, entries: Sequence[Entry], known: dict[str, Any]) -> dict[str, Any]:
        """Build the manifest's fields.

        Args:
            known: data about each clip, by its hash and frame rate.
        """
        about = {
            "model": type(self.encoders.pipe).__name__,
            "causal": self.encoders.family.CAUSAL_VAE,
            "fps": self.fps,
            "store": self.store,
            "max_tokens": self.max_tokens,
            "clips": known,
            "empty": self.text_key(""),
            "entries": [_about(entry) for entry in entries],
        }
        if self.images is not None:
            about["images"] = {**self.images.about, "nothing": self.image_key("nothing")}
        return about

    def used(self, done: Sequence[_Job]) -> set[str]:
        """Return the keys that stay in the cache."""
        keys = {self.text_key("")} | {key for job in done for key in job.keys}
        return keys if self.images is None else keys | {self.image_key("nothing")}

    def _check_image(self, video: CaptionedVideo, shards: Shards) -> str | None:
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
        frames = job.video.read(frames=job.frames // 2 + 1, size=job.size, fps=self.fps)
        return Image.fromarray(frames[-1])

    def _survey(self, video: CaptionedVideo, about: dict[str, Any] | None) -> dict[str, Any]:
        """Return the clip's number of frames, at most the longest length, and its stored size."""
        longest = self.frames[-1]
        if about and (about["frames"] < about["asked"] or about["asked"] >= longest):
            return about
        found = video.survey(frames=longest, fps=self.fps)
        return {"frames": found.frames, "asked": longest, "size": list(found.size)}

    def _check_lengths(self, known: dict[str, Any]) -> None:
        """Refuse a length that no clip fills."""
        if not known:
            raise ValueError(f"no clip could be read: {next(iter(self.broken.values()))}")
        longest = max(about["frames"] for about in known.values())
        for length in self.frames:
            if length > longest:
                rate = "" if self.fps is None else f" at {self.fps:g} frames a second"
                raise ValueError(
                    f"no clip has {length} frames{rate}: the longest of {len(known)} has {longest}"
                )

    def _note(self, video: CaptionedVideo, error: OSError) -> None:
        if self.on_broken == "stop":
            raise OSError(f"{video.name} is broken: {error}") from error
        self.broken[video.name] = str(error)

    def _pixels(self, job: _Job) -> Tensor:
        """Read the clip's pixels, (1, 3, F, H, W) in [-1, 1]."""
        frames = job.video.read(frames=job.frames, size=job.size, fps=self.fps)
        if len(frames) < job.frames:
            raise OSError(f"it has {len(frames)} frames now, and had {job.frames}")
        return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1

    def _stored(self, x: Tensor) -> Tensor:
        return x.to("cpu", DTYPES[self.store] if x.is_floating_point() else x.dtype)


def _check_options(
    frames: Sequence[int],
    sizes: Sequence[Size],
    fps: float | None,
    max_tokens: int | None,
    on_broken: str,
    store: str,
    shard_bytes: int,
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


def _check_fit(encoders: Encoders, frames: Sequence[int], sizes: Sequence[Size]) -> None:
    pipe, config = encoders.pipe, encoders.transformer.config
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
            f"{channels}: only models from text to video are trained"
        )


def _entry(job: _Job, pipe: Any) -> Entry:
    time, space = factors_of(pipe)
    return Entry(
        name=job.video.name,
        caption=job.video.caption,
        frames=(job.frames - 1) // time + 1,
        height=job.size[0] // space,
        width=job.size[1] // space,
        pixel_frames=job.frames,
        latent_key=job.latent_key,
        text_key=job.text_key,
        image_key=job.image_key,
        teacher_key=job.teacher_key,
    )


def _about(entry: Entry) -> dict[str, Any]:
    """Return an entry's fields that are set.

    Leaving out None keeps the hash of caches from before these fields existed.
    """
    return {name: value for name, value in asdict(entry).items() if value is not None}


def _finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())
