"""Encoding of captions, clips, images and first frames that a cache lacks."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gen_accel.lora.caching.encoders import factors_of, hash_of
from gen_accel.lora.caching.index import Again, Packed, Table
from gen_accel.lora.caching.inputs import MASK
from gen_accel.lora.caching.jobs import (
    CAPTIONS,
    CLIPS,
    FIRST_FRAMES,
    IMAGES,
    MASKS,
    READING,
    SHOWN_CAPTIONS,
    Item,
    Job,
    Unknown,
    chunk_name,
    clip_and_size,
    lacking,
    place_in,
)
from gen_accel.lora.caching.latents import IMAGE, LATENTS, PICTURE, RECIPE, TEXTS_AT_ONCE
from gen_accel.lora.caching.preview import Preview
from gen_accel.lora.caching.shards import Shards
from gen_accel.lora.caching.survey import Survey
from gen_accel.lora.data.clips import open_image
from gen_accel.lora.data.masks import read_mask
from gen_accel.lora.data.survey import ahead

if TYPE_CHECKING:
    from rich.progress import Progress


PICTURES = 8  # first frames that are kept as pictures, to sample validation videos from


class Run(Survey):
    """Encoding of what the survey found, by this process or by workers."""

    def encode_texts(self, jobs: Packed[Job], shards: Shards, bar: "Progress") -> int:
        """Encode all captions that the shards lack. Returns their number."""
        if self.first_frames is not None and self.first_frames.reads_prompts:
            return self._encode_texts_with(jobs, shards, bar)
        texts = Again(lambda: lacking(self._texts(jobs), shards))
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

    def _texts(self, jobs: Iterable[Job]) -> Iterator[tuple[str, str]]:
        """Return all texts with their keys."""
        for job in jobs:
            yield from zip(job.text_keys, job.texts, strict=True)
        yield self.text_key(""), ""
        for job in jobs if self.teacher else ():
            if job.teacher_key:
                yield job.teacher_key, job.video.teacher_caption

    def _encode_texts_with(self, jobs: Packed[Job], shards: Shards, bar: "Progress") -> int:
        """Do as `encode_texts`, each caption with the first frame of its clip."""
        texts = Again(lambda: lacking(self._shown_texts(jobs), shards))
        count = sum(1 for _ in texts)
        with closing(self._worked(SHOWN_CAPTIONS, texts, needed=count > 0)) as found:
            made = bar.track(found, total=count, description="captions")
            for (key, (_, job)), tensors in made:
                try:
                    self._put(key, _sound(tensors), shards, "its caption")
                except OSError as error:
                    if job is None:
                        raise
                    self._note(job.video.name, error)
        return count

    def _shown_texts(self, jobs: Iterable[Job]) -> Iterator[tuple[str, tuple[str, Job | None]]]:
        """Return all texts and whose they are, with their keys."""
        yield self.text_key(""), ("", None)
        for job in jobs:
            for key, text in zip(job.text_keys, job.texts, strict=True):
                yield key, (text, job)

    def encode_first_frames(self, jobs: Packed[Job], shards: Shards, bar: "Progress") -> None:
        """Encode all first frames that the shards lack."""
        if self.first_frames is not None:
            keyed = Again(lambda: ((job.frame_key, job) for job in jobs))
            self._each(keyed, shards, bar, FIRST_FRAMES, "its first frame")

    def keep_masks(self, jobs: Packed[Job], shards: Shards, bar: "Progress") -> None:
        """Keep all masks that the shards lack, on the latents' grid."""
        if self.masks:
            keyed = Again(lambda: ((job.mask_key, job) for job in jobs))
            self._each(keyed, shards, bar, MASKS, "its mask")

    def keep_pictures(self, done: Iterable[Job], shards: Shards) -> dict[str, Any]:
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

    def _first(self, job: Job) -> Image.Image:
        """Read the first frame of a chunk, at the clip's size."""
        found = job.video.read(frames=1, size=job.size, fps=self.fps, begin=job.begin)
        return Image.fromarray(found[0])

    def _put(self, key: str, tensors: dict[str, Tensor], shards: Shards, what: str) -> None:
        """Store tensors. Raises OSError for values that `store` cannot hold."""
        stored = {name: self.stored(x) for name, x in tensors.items()}
        if not all(_finite(x) for x in stored.values()):
            raise OSError(f"store {self.store!r} cannot hold {what}")
        shards.put(key, stored)

    def encode_images(self, jobs: Packed[Job], shards: Shards, bar: "Progress") -> int | None:
        """Encode all images that the shards lack. Returns their number, None without images."""
        if self.images is None:
            return None
        images, nothing = self.images, self.image_key("nothing")
        keyed = Again(lambda: ((job.image_key, job) for job in jobs))
        if nothing not in shards:
            with images.at_work(self.encoders.device):
                shards.put(nothing, {IMAGE: self.stored(images.nothing())})
        return self._each(keyed, shards, bar, IMAGES, "its image")

    def _picture(self, job: Job) -> Image.Image:
        """Return the clip's own image, or the middle frame of its length."""
        if job.video.image is not None:
            return open_image(job.video.image_bytes(), job.video.image_name)
        middle = job.begin + job.frames // 2
        frames = job.video.read(frames=1, size=job.size, fps=self.fps, begin=middle)
        return Image.fromarray(frames[-1])

    def _each(
        self,
        keyed: Iterable[tuple[str | None, Job]],
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
        new = Again(lambda: lacking(named, shards))
        count = sum(1 for _ in new)
        with closing(self._worked(title, new)) as found:
            for (key, job), made in bar.track(found, total=count, description=title):
                try:
                    self._put(key, _sound(made), shards, what)
                except OSError as error:
                    self._note(job.video.name, error)
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
                parts = encoders.family.training.text_parts
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
            return [(place_in(job), self._latents(made)) for job, made in self._chunks(item)]
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
        self, clips: Iterable[list[Job]], see: Callable[[Job, np.ndarray], None]
    ) -> Generator[tuple[Job, dict[str, Tensor] | OSError], None, None]:
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
                by_place = {place_in(job): job for job in jobs}
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
        self, jobs: Packed[Job], shards: Shards, bar: "Progress", preview: Preview
    ) -> Table:
        """Encode all latents that the shards lack. Returns their keys."""
        new = Table()
        for job in jobs:
            if job.latent_key not in shards:
                new.add(job.latent_key)
        keyed = ((job.latent_key, job) for job in jobs)
        new_jobs = (job for _, job in lacking(keyed, shards))
        clips = (list(group) for _, group in groupby(new_jobs, clip_and_size))
        failed: list[tuple[Job, OSError]] = []
        with closing(self._encoded(clips, preview.see)) as encoded:
            for job, made in bar.track(encoded, total=len(new), description="clips"):
                try:
                    self._put(job.latent_key, _sound(made), shards, "its latents")
                except OSError as error:
                    if self.on_broken == "stop":
                        self._note(job.video.name, error)  # which raises
                    failed.append((job, error))
        if failed:
            held = {job.number for job in jobs if job.latent_key in shards}
            for job, error in failed:
                self._note(chunk_name(job) if job.number in held else job.video.name, error)
        return new

    def frames_of(self, job: Job) -> np.ndarray | None:
        """Read the frames of a chunk, (F, H, W, 3) uint8; None where that fails."""
        for _, frames in self._chunks([job]):
            return None if isinstance(frames, OSError) else frames
        return None

    def _chunks(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, np.ndarray | OSError]]:
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


def _pixels(frames: np.ndarray) -> Tensor:
    """Return frames, (F, H, W, 3) uint8, as (1, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


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
