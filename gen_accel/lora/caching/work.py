"""Encoding of captions, clips, images, first frames and masks that a cache lacks."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gen_accel.lora.caching.chunks import (
    CAPTIONS,
    CLIPS,
    FIRST_FRAMES,
    IMAGES,
    MASKS,
    READING,
    SHOWN_CAPTIONS,
    ClipChunk,
    Survey,
)
from gen_accel.lora.caching.encoders import factors_of, hash_of
from gen_accel.lora.caching.inputs import MASK
from gen_accel.lora.caching.latents import IMAGE, LATENTS, PICTURE, RECIPE, TEXTS_AT_ONCE
from gen_accel.lora.caching.preview import Preview
from gen_accel.lora.caching.store import EmptyStore, Rows, Store
from gen_accel.lora.data.clips import open_image
from gen_accel.lora.data.masks import read_mask
from gen_accel.lora.data.survey import ahead

if TYPE_CHECKING:
    from gen_accel.pipelines.generation.progress import Progress

PICTURES = 8  # first frames that are kept as pictures, to sample validation videos from

Item = TypeVar("Item")
Chunks = Iterable[ClipChunk]
Tensors = dict[str, Tensor]


class Encoding(Survey):
    """Encoding of the chunks that the survey found, in this process or by workers."""

    def encode_texts(self, chunks: Chunks, store: Store, bar: "Progress") -> int:
        """Encode all captions that the store lacks. Returns their number."""
        if self.first_frames is not None and self.first_frames.reads_prompts:
            return self._encode_shown_texts(chunks, store, bar)

        def keyed() -> Iterator[tuple[str, str]]:
            for chunk in chunks:
                yield from zip(chunk.text_keys, chunk.texts, strict=True)
            yield self.text_key(""), ""
            for chunk in chunks if self.teacher else ():
                if chunk.teacher_key:
                    yield chunk.teacher_key, chunk.video.teacher_caption

        count = sum(1 for _ in lacking(keyed(), store))
        parts, total = (
            _in_parts(lacking(keyed(), store), TEXTS_AT_ONCE),
            -(-count // TEXTS_AT_ONCE),
        )
        with closing(self._each_made(CAPTIONS, parts, needed=count > 0)) as found:
            for part, made in bar.track(found, total=total, description="captions"):
                if isinstance(made, OSError):  # the workers died at it
                    raise ValueError(f"captions could not be encoded: {made}")
                for (key, text), tensors in zip(part, made, strict=True):
                    try:
                        self._put(key, tensors, store, f"the text {text!r}")
                    except OSError as error:  # no clip's fault, which could be left out
                        raise ValueError(
                            f"{error}; float32 can what the text encoder made"
                        ) from None
        return count

    def _encode_shown_texts(self, chunks: Chunks, store: Store, bar: "Progress") -> int:
        """Encode each caption with the first frame of its clip."""

        def keyed() -> Iterator[tuple[str, tuple[str, ClipChunk | None]]]:
            yield self.text_key(""), ("", None)
            for chunk in chunks:
                for key, text in zip(chunk.text_keys, chunk.texts, strict=True):
                    yield key, (text, chunk)

        count = sum(1 for _ in lacking(keyed(), store))
        texts = lacking(keyed(), store)
        with closing(self._each_made(SHOWN_CAPTIONS, texts, needed=count > 0)) as found:
            for (key, (_, chunk)), made in bar.track(found, total=count, description="captions"):
                try:
                    self._put(key, made, store, "its caption")
                except OSError as error:
                    if chunk is None:
                        raise
                    self.leave_out(chunk.video.name, error)
        return count

    def encode_images(self, chunks: Chunks, store: Store, bar: "Progress") -> int | None:
        """Encode all images that the store lacks. Returns their number, None without images."""
        if self.images is None:
            return None
        images, nothing = self.images, self.image_key("nothing")
        if nothing not in store:
            with images.at_work(self.encoders.device):
                store.put(nothing, {IMAGE: self.stored(images.nothing())})
        return self._encode(chunks, lambda chunk: chunk.image_key, store, bar, IMAGES, "its image")

    def encode_first_frames(self, chunks: Chunks, store: Store, bar: "Progress") -> None:
        """Encode all first frames that the store lacks."""
        if self.first_frames is not None:
            words = FIRST_FRAMES, "its first frame"
            self._encode(chunks, lambda chunk: chunk.frame_key, store, bar, *words)

    def keep_masks(self, chunks: Chunks, store: Store, bar: "Progress") -> None:
        """Keep all masks that the store lacks, on the latents' grid."""
        if self.masks:
            self._encode(chunks, lambda chunk: chunk.mask_key, store, bar, MASKS, "its mask")

    def _encode(
        self,
        chunks: Chunks,
        key_of: Callable[[ClipChunk], str | None],
        store: Store,
        bar: "Progress",
        title: str,
        what: str,
    ) -> int:
        """Make the tensors that the store lacks, and note the clips whose cannot be made.

        Args:
            key_of: key of a chunk's tensors; None if it has none.
            title: kind of work, see `work`.
            what: the tensors of a chunk, in words.

        Returns the number of keys that the store lacked.
        """

        def keyed() -> Iterator[tuple[str, ClipChunk]]:
            named = ((key_of(chunk), chunk) for chunk in chunks)
            return lacking(((key, chunk) for key, chunk in named if key is not None), store)

        count = sum(1 for _ in keyed())
        with closing(self._each_made(title, keyed())) as found:
            for (key, chunk), made in bar.track(found, total=count, description=title):
                try:
                    self._put(key, made, store, what)
                except OSError as error:
                    self.leave_out(chunk.video.name, error)
        return count

    def keep_pictures(self, done: Chunks, store: Store) -> dict[str, Any]:
        """Keep the first frames of some clips as pictures, (H, W, 3) uint8.

        Returns the manifest's fields of the first frames.
        """
        if self.first_frames is None:
            return {}
        keys = []
        for chunk in islice(done, PICTURES):
            keys.append(hash_of([RECIPE, PICTURE, chunk.frame_key]))
            if keys[-1] not in store:
                image = torch.from_numpy(np.array(self._first_frame(chunk)))
                store.put(keys[-1], {PICTURE: image})
        return {"condition": self.condition, "pictures": keys}

    def encode_clips(
        self, chunks: Rows[ClipChunk], store: Store, bar: "Progress", preview: Preview
    ) -> set[str]:
        """Encode all latents that the store lacks. Returns their keys."""
        new = {chunk.latent_key for chunk in chunks if chunk.latent_key not in store}
        new_chunks = (
            chunk for _, chunk in lacking(((one.latent_key, one) for one in chunks), store)
        )
        clips = (list(group) for _, group in groupby(new_chunks, lambda c: (c.number, c.size)))
        failed: list[tuple[ClipChunk, OSError]] = []
        with closing(self._encoded(clips, preview.see)) as encoded:
            for chunk, made in bar.track(encoded, total=len(new), description="clips"):
                try:
                    self._put(chunk.latent_key, made, store, "its latents")
                except OSError as error:
                    if self.on_broken == "stop":
                        self.leave_out(chunk.video.name, error)  # which raises
                    failed.append((chunk, error))
        if failed:
            held = {chunk.number for chunk in chunks if chunk.latent_key in store}
            for chunk, error in failed:
                name = chunk.name if chunk.number in held else chunk.video.name
                self.leave_out(name, error)
        return new

    def _encoded(
        self, clips: Iterable[list[ClipChunk]], see: Callable[[ClipChunk, np.ndarray], None]
    ) -> Generator[tuple[ClipChunk, Tensors | OSError], None, None]:
        """Read and encode chunks, those of a clip together, in order.

        Args:
            see: takes the frames of each chunk that is read in this process.
        """
        if self.executor is not None:
            for chunks, made in self._each_made(CLIPS, clips):
                if isinstance(made, OSError):
                    yield from ((chunk, made) for chunk in chunks)
                    continue
                by_place = {(chunk.begin, chunk.frames): chunk for chunk in chunks}
                yield from ((by_place[place], one) for place, one in made)
            return
        with self.work(CLIPS), closing(ahead(self._read, clips, self.workers)) as read:
            for chunk, frames in read:
                if not isinstance(frames, OSError):
                    see(chunk, frames)
                yield chunk, self._latents(frames)

    def _put(self, key: str, made: Tensors | OSError, store: Store, what: str) -> None:
        """Store tensors. Raises what came in their place, and OSError for values that the stored
        dtype cannot hold."""
        if isinstance(made, OSError):
            raise made
        stored = {name: self.stored(x) for name, x in made.items()}
        if not all(x.isfinite().all() for x in stored.values()):
            raise OSError(f"store {self.store!r} cannot hold {what}")
        store.put(key, stored)

    def _each_made(
        self, title: str, items: Iterable[Item], *, needed: bool = True
    ) -> Generator[tuple[Item, Any], None, None]:
        """Yield each item with what was made of it, in order, here or by workers; see `work`.

        Args:
            needed: whether there are items.
        """
        if self.executor is not None:
            held = [*items]
            yield from zip(held, self.executor.map(self, title, held), strict=True)
            return
        with self.work(title, needed=needed) as make:
            for item in items:
                yield item, make(item)

    @contextmanager
    def work(self, title: str, *, needed: bool = True) -> Iterator[Callable[[Any], Any]]:
        """Ready the models for one kind of work. Yields a function that does it for one item.

        The function returns the OSError of a clip that cannot be read.
        """
        encoders = self.encoders
        with ExitStack() as stack:
            if title == CAPTIONS:
                parts = encoders.family.training.text_parts
                stack.enter_context(encoders.at_work(*parts, needed=needed))
            elif title == SHOWN_CAPTIONS:
                stack.enter_context(encoders.at_work("text_encoder", needed=needed))
            elif title == FIRST_FRAMES and self.first_frames is not None:
                stack.enter_context(self.first_frames.at_work())
            elif title == IMAGES and self.images is not None:
                stack.enter_context(self.images.at_work(encoders.device))
            elif title == CLIPS:
                stack.enter_context(encoders.at_work("vae"))
            yield partial(self._make, title)

    def _make(self, title: str, item: Any) -> Any:
        if title == CAPTIONS:
            family, pipe = self.encoders.family, self.encoders.pipe
            found = family.encode_prompt(pipe, [text for _, text in item], self.max_tokens)
            return [{name: x[i] for name, x in found.items()} for i in range(len(item))]
        if title == CLIPS:
            read = self._read(item)
            return [((c.begin, c.frames), self._latents(frames)) for c, frames in read]
        if title == READING:
            try:
                return self.look(item, EmptyStore())
            except OSError:  # which the process that writes finds too
                return None
        try:
            if title == SHOWN_CAPTIONS:
                text, chunk = item[1]
                image = None if chunk is None else self._first_frame(chunk)
                assert self.first_frames is not None
                return self.first_frames.prompt(text, image)
            return self._beside(title, item[1])
        except OSError as error:
            return error

    def _beside(self, title: str, chunk: ClipChunk) -> Tensors:
        """Make the tensors of a chunk other than its latents and texts."""
        if title == FIRST_FRAMES:
            assert self.first_frames is not None
            return self.first_frames(self._first_frame(chunk), chunk.frames)
        if title == IMAGES:
            assert self.images is not None
            return {IMAGE: self.images(self._image_prompt(chunk))}
        factors, begin = factors_of(self.encoders.pipe), chunk.begin
        mask = read_mask(
            chunk.video, factors, frames=chunk.frames, size=chunk.size, fps=self.fps, begin=begin
        )
        return {MASK: mask}

    def _image_prompt(self, chunk: ClipChunk) -> Image.Image:
        """Return the clip's own image, or the middle frame of the chunk."""
        if chunk.video.image is not None:
            return open_image(chunk.video.image_bytes(), chunk.video.image_name)
        return self._frame(chunk, chunk.begin + chunk.frames // 2)

    def _first_frame(self, chunk: ClipChunk) -> Image.Image:
        return self._frame(chunk, chunk.begin)

    def _frame(self, chunk: ClipChunk, place: int) -> Image.Image:
        frames = chunk.video.read(frames=1, size=chunk.size, fps=self.fps, begin=place)
        return Image.fromarray(frames[-1])

    def _latents(self, frames: np.ndarray | OSError) -> Tensors | OSError:
        """Encode frames, (F, H, W, 3) uint8, as (1, 3, F, H, W) in [-1, 1]."""
        if isinstance(frames, OSError):
            return frames
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        return {LATENTS: self.encoders.family.encode_video(self.encoders.pipe, pixels)[0]}

    def frames_of(self, chunk: ClipChunk) -> np.ndarray | None:
        """Read the frames of a chunk, (F, H, W, 3) uint8; None if that fails."""
        [(_, frames)] = self._read([chunk])
        return None if isinstance(frames, OSError) else frames

    def _read(
        self, chunks: Sequence[ClipChunk]
    ) -> Iterator[tuple[ClipChunk, np.ndarray | OSError]]:
        """Read chunks of one clip, which is decoded once.

        Yields each chunk with its frames, (F, H, W, 3) uint8, or with the error of its clip.
        """
        waiting = {(chunk.begin, chunk.frames): chunk for chunk in chunks}
        video, size = chunks[0].video, chunks[0].size
        try:
            for place, frames in video.read_chunks(list(waiting), size=size, fps=self.fps):
                chunk = waiting.pop(place)
                if len(frames) < chunk.frames:
                    had = f"it has {len(frames)} frames now, and had {chunk.frames}"
                    yield chunk, OSError(had)
                else:
                    yield chunk, frames
        except OSError as error:
            yield from ((chunk, error) for chunk in waiting.values())
        except (RuntimeError, MemoryError) as error:
            raise RuntimeError(f"{video.name} could not be read: {error!r}") from error


def lacking(keyed: Iterable[tuple[str, Item]], store: Store) -> Iterator[tuple[str, Item]]:
    """Leave out what the store has, and all but the first of each key."""
    seen: set[str] = set()
    for key, item in keyed:
        if key not in seen and key not in store:
            seen.add(key)
            yield key, item


def _in_parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
