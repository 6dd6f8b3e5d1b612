"""Encoding of captions, clips, images, first frames and masks that a cache lacks.

This process makes the tensors, or workers of Ray make them and this process writes what they send.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from gen_accel.cluster import Machines
from gen_accel.lora.caching.chunks import CacheOptions, ClipChunk, ClipSurvey, Survey, survey_clip
from gen_accel.lora.caching.encoders import Encoders, factors_of, hash_of
from gen_accel.lora.caching.inputs import FRAME_MODELS, MASK, read_mask
from gen_accel.lora.caching.latents import IMAGE, LATENTS, PICTURE, RECIPE
from gen_accel.lora.caching.store import Store, file_key
from gen_accel.lora.data.clips import CaptionedVideo, open_image
from gen_accel.lora.data.survey import ahead

if TYPE_CHECKING:
    from gen_accel.pipelines.generation.progress import Progress

# Kinds of work in their order, which are the titles of their bars too.
READING = "reading"
CAPTIONS, SHOWN_CAPTIONS, IMAGES = "captions", "captions of first frames", "images"
FIRST_FRAMES, MASKS, CLIPS = "first frames", "masks", "clips"
WHAT = {  # tensors of a chunk, in words
    CAPTIONS: "its caption",
    SHOWN_CAPTIONS: "its caption",
    IMAGES: "its image",
    FIRST_FRAMES: "its first frame",
    MASKS: "its mask",
    CLIPS: "its latents",
}
KEYS = {  # of an entry
    IMAGES: "image_key",
    FIRST_FRAMES: "frame_key",
    MASKS: "mask_key",
    CLIPS: "latent_key",
}
NOTHING = "nothing"  # in the key of the features for no image
TEXTS_AT_ONCE = 8
PICTURES = 8  # first frames that are kept as pictures, to sample validation videos from

Tensors = dict[str, Tensor]


class Input(NamedTuple):
    """Text or chunk of a clip, of which the tensors of a key are made.

    Args:
        chunk: None for a text alone, and for the stand-in of no image.
    """

    key: str
    chunk: ClipChunk | None = None
    text: str = ""


Made = tuple[Input, Tensors | OSError]


class Encoding(Survey):
    """Encoding of the chunks that the survey found.

    Args:
        executor: workers that read and encode; None: this process does.
    """

    def __init__(
        self, encoders: Encoders, options: CacheOptions, executor: "Workers | None" = None
    ) -> None:
        super().__init__(encoders, options)
        self.executor = executor

    def read_by_workers(
        self, videos: Sequence[CaptionedVideo], store: Store, bar: "Progress"
    ) -> dict[str, OSError]:
        """Let workers read the clips that the store does not know.

        Clips that they cannot read are left to this process, which finds the same fault. Returns
        the errors of clips that ended their workers, by name.
        """
        died: dict[str, OSError] = {}
        if self.executor is None:
            return died
        new = [
            video
            for video in videos
            if isinstance(video.source, Path)
            and video.source.is_file()
            and (self.options.pictures or not video.is_picture)
            and store.fact(file_key(video.source)[0]) is None
        ]
        with closing(self.executor.map(READING, self.options, new)) as found:
            tracked = bar.track(found, total=len(new), description=READING)
            for video, surveyed in zip(new, tracked, strict=True):
                if isinstance(surveyed, OSError):
                    died[video.name] = surveyed
                for key, fact in surveyed.facts if isinstance(surveyed, ClipSurvey) else ():
                    store.remember(key, fact)
        return died

    def encode(
        self,
        chunks: Sequence[ClipChunk],
        store: Store,
        bar: "Progress",
        see: Callable[[ClipChunk, np.ndarray], None],
    ) -> dict[str, list[str]]:
        """Encode all tensors that the store lacks, and note the clips that fail.

        Args:
            see: takes the frames of each chunk that is read in this process.

        Returns the keys that the store lacked, by the kind of work.
        """
        new, failed = {kind: list[str]() for kind in WHAT}, list[tuple[ClipChunk, OSError]]()
        for kind in WHAT:
            groups = self._lacking(kind, chunks, store)
            new[kind] = [one.key for group in groups for one in group]
            if not groups:
                continue
            with closing(self._each_made(kind, groups, see)) as found:
                for one, made in bar.track(found, total=len(new[kind]), description=kind):
                    try:
                        self._put(one.key, made, store, WHAT[kind])
                    except OSError as error:
                        if one.chunk is None:  # no clip's fault, which could be left out
                            name = f"the text {one.text!r}"
                            if kind == IMAGES:
                                name = "the stand-in for no image"
                            raise ValueError(f"{name} could not be encoded: {error}") from None
                        if self.options.on_broken == "stop":
                            self.leave_out(one.chunk.video.name, error)  # which raises
                        failed.append((one.chunk, error))
        broken = {chunk.entry.latent_key for chunk, _ in failed}
        whole = {chunk.video for chunk in chunks if chunk.entry.latent_key not in broken}
        for chunk, error in failed:
            self.leave_out(chunk.name if chunk.video in whole else chunk.video.name, error)
        return new

    def _lacking(self, kind: str, chunks: Sequence[ClipChunk], store: Store) -> list[list[Input]]:
        """Find the inputs of one kind of work that the store lacks, those made together in one
        list."""
        is_shown = self.first_frames is not None and self.first_frames.reads_prompts
        inputs: list[Input] = []
        if kind in KEYS:
            keyed = ((getattr(chunk.entry, KEYS[kind]), chunk) for chunk in chunks)
            inputs = [Input(key, chunk) for key, chunk in keyed if key is not None]
            if kind == IMAGES and inputs:
                inputs.insert(0, Input(self.image_key(NOTHING)))
        elif is_shown == (kind == SHOWN_CAPTIONS):
            for chunk in chunks:
                keys = chunk.entry.text_keys or (chunk.entry.text_key,)
                for key, text in zip(keys, chunk.texts, strict=True):
                    inputs.append(Input(key, chunk if is_shown else None, text))
            inputs.append(Input(self.text_key("")))
            taught = ((c.entry.teacher_key, c.video.teacher_caption) for c in chunks)
            inputs += [Input(key, None, text) for key, text in taught if key is not None]
        found: dict[str, Input] = {}
        for one in inputs:
            if one.key not in found and one.key not in store:
                found[one.key] = one
        new = [*found.values()]
        if kind == CAPTIONS:
            return [new[i : i + TEXTS_AT_ONCE] for i in range(0, len(new), TEXTS_AT_ONCE)]
        if kind == CLIPS:
            groups = groupby(new, lambda one: one.chunk and (one.chunk.video, one.chunk.size))
            return [[*group] for _, group in groups]
        return [[one] for one in new]

    def _each_made(
        self,
        kind: str,
        groups: list[list[Input]],
        see: Callable[[ClipChunk, np.ndarray], None],
    ) -> Generator[Made, None, None]:
        """Yield what was made of each input, here or by workers."""
        if self.executor is not None:
            for group, made in zip(
                groups, self.executor.map(kind, self.options, groups), strict=True
            ):
                inputs = {one.key: one for one in group}
                if isinstance(made, OSError):  # the workers died at it
                    made = [(key, made) for key in inputs]
                yield from ((inputs[key], one) for key, one in made)
            return
        with self.work(kind) as make:
            if kind != CLIPS:
                for group in groups:
                    yield from make(group)
                return
            with closing(ahead(self._read, groups, self.options.workers)) as read:
                for one, frames in read:
                    if one.chunk is not None and not isinstance(frames, OSError):
                        see(one.chunk, frames)
                    yield one, self._latents(frames)

    def _put(self, key: str, made: Tensors | OSError, store: Store, what: str) -> None:
        """Store tensors. Raises what came in their place, and OSError for values that the stored
        dtype cannot hold."""
        if isinstance(made, OSError):
            raise made
        stored = {name: self.stored(x) for name, x in made.items()}
        if not all(x.isfinite().all() for x in stored.values()):
            raise OSError(f"store {self.options.store!r} cannot hold {what}")
        store.put(key, stored)

    @contextmanager
    def work(self, kind: str) -> Iterator[Callable[[list[Input]], Iterable[Made]]]:
        """Ready the models for one kind of work. Yields a function that does it for a group."""
        encoders, images = self.encoders, self.options.images
        parts = {
            CAPTIONS: encoders.family.training.text_parts,
            SHOWN_CAPTIONS: ("text_encoder",),
            FIRST_FRAMES: FRAME_MODELS,
            CLIPS: ("vae",),
        }
        with ExitStack() as stack:
            stack.enter_context(encoders.at_work(*parts.get(kind, ())))
            if kind == IMAGES and images is not None:
                stack.enter_context(images.at_work(encoders.device))
            yield partial(self._make, kind)

    def _make(self, kind: str, group: list[Input]) -> Iterator[Made]:
        if kind == CLIPS:
            for one, frames in self._read(group):
                yield one, self._latents(frames)
        elif kind == CAPTIONS:
            texts, length = [one.text for one in group], self.options.max_tokens
            found = self.encoders.family.encode_prompt(self.encoders.pipe, texts, length)
            for i, one in enumerate(group):
                yield one, {name: x[i] for name, x in found.items()}
        else:
            for one in group:
                try:
                    yield one, self._beside(kind, one.chunk, one.text)
                except OSError as error:
                    yield one, error

    def _beside(self, kind: str, chunk: ClipChunk | None, text: str) -> Tensors:
        """Make the tensors of a chunk other than its latents and plain captions."""
        images, first_frames = self.options.images, self.first_frames
        if kind == SHOWN_CAPTIONS and first_frames is not None:
            return first_frames.prompt(text, None if chunk is None else self._frame(chunk, 0))
        if kind == IMAGES and images is not None and chunk is None:
            return {IMAGE: images.nothing()}
        assert chunk is not None
        if kind == IMAGES and images is not None:
            if chunk.video.image is None:
                image = self._frame(chunk, chunk.frames // 2)
            else:
                image = open_image(chunk.video.image_bytes(), chunk.video.image_name)
            return {IMAGE: images(image)}
        if kind == FIRST_FRAMES and first_frames is not None:
            return first_frames(self._frame(chunk, 0), chunk.frames)
        mask = read_mask(
            chunk.video,
            factors_of(self.encoders.pipe),
            frames=chunk.frames,
            size=chunk.size,
            fps=self.options.fps,
            begin=chunk.begin,
        )
        return {MASK: mask}

    def _frame(self, chunk: ClipChunk, place: int) -> Image.Image:
        """Read one frame of a chunk."""
        place += chunk.begin
        found = chunk.video.read(frames=1, size=chunk.size, fps=self.options.fps, begin=place)
        return Image.fromarray(found[-1])

    def _latents(self, frames: np.ndarray | OSError) -> Tensors | OSError:
        """Encode frames, (F, H, W, 3) uint8, as (1, 3, F, H, W) in [-1, 1]."""
        if isinstance(frames, OSError):
            return frames
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        return {LATENTS: self.encoders.family.encode_video(self.encoders.pipe, pixels)[0]}

    def frames_of(self, chunk: ClipChunk) -> np.ndarray | None:
        """Read the frames of a chunk, (F, H, W, 3) uint8; None if that fails."""
        [(_, frames)] = self._read([Input("", chunk)])
        return None if isinstance(frames, OSError) else frames

    def _read(self, group: list[Input]) -> Iterator[tuple[Input, np.ndarray | OSError]]:
        """Read chunks of one clip, which is decoded once.

        Yields each input with its frames, (F, H, W, 3) uint8, or with the error of its clip.
        """
        waiting = {(one.chunk.begin, one.chunk.frames): one for one in group if one.chunk}
        chunk, fps = next(one.chunk for one in waiting.values() if one.chunk), self.options.fps
        try:
            for place, frames in chunk.video.read_chunks([*waiting], size=chunk.size, fps=fps):
                one, wanted = waiting.pop(place), place[1]
                if len(frames) < wanted:
                    had = f"it has {len(frames)} frames now, and had {wanted}"
                    yield one, OSError(had)
                else:
                    yield one, frames
        except OSError as error:
            yield from ((one, error) for one in waiting.values())
        except (RuntimeError, MemoryError) as error:
            raise RuntimeError(f"{chunk.video.name} could not be read: {error!r}") from error

    def keep_pictures(self, done: Sequence[ClipChunk], store: Store) -> list[str]:
        """Keep the first frames of some clips as pictures, (H, W, 3) uint8. Returns their keys."""
        keys = []
        for chunk in done[:PICTURES] if self.first_frames is not None else ():
            keys.append(hash_of([RECIPE, PICTURE, chunk.entry.frame_key]))
            if keys[-1] not in store:
                store.put(keys[-1], {PICTURE: torch.from_numpy(np.array(self._frame(chunk, 0)))})
        return keys


class Workers:
    """Workers of a cluster that read and encode, each with encoders of its own.

    Args:
        load: loads the encoders in a worker, with the weights and dtypes that `cache` gets here.
        reads: files and folders that all machines must see.
    """

    def __init__(
        self, machines: Machines, load: Callable[[], Encoders], reads: Sequence[Path]
    ) -> None:
        self._machines, self._load, self._reads = machines, load, reads

    def map(
        self, kind: str, options: CacheOptions, items: Sequence[Any]
    ) -> Generator[Any, None, None]:
        """Yield the result of each item by one kind of work, in order.

        An item at which a worker died each time gives an OSError.

        Raises ValueError for an item that failed in another way, as it would here, and for a
        machine that does not see a folder of the clips: it would find each clip broken.
        """
        videos = items if kind == READING else []
        if kind == CLIPS:
            videos = [one.chunk.video for group in items for one in group]
        sources = (video.source for video in videos)
        folders = {path.parent: None for path in sources if isinstance(path, Path)}
        reads = [*self._reads, *folders]
        work = partial(_worker, self._load, options, kind)
        with closing(self._machines.map(work, items, ordered=True, reads=reads)) as found:
            for done in found:
                if done.failed is None:
                    yield _unpacked(done.result)
                elif done.is_given_up:
                    yield OSError(done.failed)
                else:
                    raise ValueError(f"machine {done.host}: {done.failed}")


def _worker(
    load: Callable[[], Encoders], options: CacheOptions, kind: str
) -> Callable[[Any], object]:
    """Return the work of one kind on an item, in a worker. Its models stay on their device."""
    if kind == READING:
        return partial(_look, options)
    run, held = Encoding(load(), options), ExitStack()
    return partial(_packed, run, held.enter_context(run.work(kind)), held)


def _look(options: CacheOptions, video: CaptionedVideo) -> ClipSurvey | None:
    try:
        return survey_clip(video, options, lambda key: None)
    except OSError:  # which the process that writes finds too
        return None


def _packed(
    run: Encoding,
    make: Callable[[list[Input]], Iterable[Made]],
    held: ExitStack,
    group: list[Input],
) -> list[tuple[str, bytes | OSError]]:
    """Make tensors as bytes, since tensors go by no process of another device."""
    packed = []
    for one, made in make(group):
        if not isinstance(made, OSError):
            made = safetensors.torch.save({name: run.stored(x) for name, x in made.items()})
        packed.append((one.key, made))
    return packed


def _unpacked(result: Any) -> Any:
    if not isinstance(result, list):
        return result
    load = safetensors.torch.load
    return [(key, load(made) if isinstance(made, bytes) else made) for key, made in result]
