"""Survey of all clips, and encoding of the captions, clips, images, given frames and masks that a
cache lacks.

This process makes the tensors, or workers of Ray make them and this process writes what they send.
"""

import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
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
from gen_accel.lora.caching.chunks import CacheOptions, ClipChunk, ClipSurvey, survey_clip
from gen_accel.lora.caching.encoders import Encoders, factors_of, hash_of
from gen_accel.lora.caching.inputs import (
    CONTROL,
    FRAME_MODELS,
    LAST_FRAME,
    MASK,
    TEXT,
    GivenFrames,
    film_beside,
    read_mask,
)
from gen_accel.lora.caching.latents import (
    IMAGE,
    LAST_PICTURE,
    LATENTS,
    PICTURE,
    RECIPE,
    SOUND,
    Entry,
)
from gen_accel.lora.caching.store import Store, file_key
from gen_accel.lora.data.clips import CaptionedVideo, ClipRule, Size, nearest_size, open_image
from gen_accel.lora.data.report import UNUSED_PICTURE, lost_picture, too_short, why_broken
from gen_accel.lora.data.survey import ahead, refuse_unfilled, scenes_in
from gen_accel.parsing import shown
from gen_accel.pipelines.generation.loading import DTYPES

if TYPE_CHECKING:
    from gen_accel.pipelines.generation.progress import Progress

# Kinds of work in their order, which are the titles of their bars too.
READING = "reading"
CAPTIONS, SHOWN_CAPTIONS, IMAGES = "captions", "captions of first frames", "images"
GIVEN_FRAMES, MASKS, SOUNDS, CLIPS = "given frames", "masks", "sound", "clips"
WHAT = {  # tensors of a chunk, in words
    CAPTIONS: "its caption",
    SHOWN_CAPTIONS: "its caption",
    IMAGES: "its image",
    GIVEN_FRAMES: "its given frames or control",
    MASKS: "its mask",
    SOUNDS: "its sound",
    CLIPS: "its latents",
}
KEYS = {  # of an entry
    IMAGES: "image_key",
    GIVEN_FRAMES: "frame_key",
    MASKS: "mask_key",
    SOUNDS: "sound_key",
    CLIPS: "latent_key",
}
NOTHING = "nothing"  # in the key of the features for no image
TEXTS_AT_ONCE = 8
PICTURES = 8  # first frames that are kept as pictures, to sample validation videos from
STAND_IN = "the stand-in for no image"

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


class Encoding:
    """Survey of all clips, the keys of their tensors, and the making of those that a cache lacks.

    Args:
        encoders: the model without its transformer's weights.
        executor: workers that read and encode; None: this process does.

    Attributes:
        causal: whether the latents of a chunk serve all shorter lengths too.
        broken: reason of each clip that could not be read or encoded, by its name.
        short: names of clips with fewer frames than the shortest length.
        left_out: reason of each clip and scene that is not trained on, by its name.
        converted: how frames differ from the stored ones, by the name of the clip.
        unread: keys of latents that another training of the clips would read, and this does not.
    """

    def __init__(
        self, encoders: Encoders, options: CacheOptions, executor: "Workers | None" = None
    ) -> None:
        self.encoders, self.options, self.executor = encoders, options, executor
        self.broken: dict[str, str] = {}
        self.short: list[str] = []
        self.left_out: dict[str, str] = {}
        self.converted: dict[str, str] = {}
        self.unread: list[str] = []
        self._common = [RECIPE, options.store]
        # A shorter chunk has another last frame.
        self.causal = encoders.family.training.causal_vae and options.condition != LAST_FRAME
        self.given_frames = None
        if options.condition not in (None, TEXT):
            about = self._common, options.max_tokens, options.condition
            self.given_frames = GivenFrames(encoders, *about)

    def hash_models(self) -> None:
        """Hash the encoders, which all keys depend on."""
        common, encoders, images = self._common, self.encoders, self.options.images
        self._vae = hash_of([*common, *encoders.states("vae")])
        texts = encoders.states(*encoders.family.training.text_parts, "tokenizer")
        heard = ["heard"] if self.options.sound else []
        self._text = hash_of([*common, self.options.max_tokens, *texts, *heard])
        self._sound = hash_of([*common, *encoders.states("audio_vae")]) if heard else ""
        self._image = None if images is None else hash_of([*common, images.state()])

    def text_key(self, caption: str, *clip: object) -> str:
        key = hash_of([self._text, caption])
        return key if self.given_frames is None else self.given_frames.text_key(key, *clip)

    def image_key(self, *image: object) -> str:
        return hash_of([self._image, *image])

    def leave_out(self, name: str, error: OSError) -> None:
        """Note a clip, or a chunk of one, as broken. Raises OSError if none may be."""
        if self.options.on_broken == "stop":
            raise OSError(f"{name} is broken: {error}") from error
        self.broken[name] = str(error)
        self.left_out[name] = why_broken(str(error))

    # Survey

    def find_chunks(
        self, videos: Sequence[CaptionedVideo], store: Store, bar: "Progress"
    ) -> list[ClipChunk]:
        """Survey all clips. Returns the chunks to have in the cache, by clip, then the prompts."""
        prompts = [chunk for video in videos if video.is_prompt for chunk in self._prompts(video)]
        rules = [self.options.rule_of(video) for video in videos]
        videos = [video for video in videos if not video.is_prompt]
        chunks: list[ClipChunk] = []
        count, longest = 0, max((chunk.frames for chunk in prompts), default=0)
        look = partial(self._survey_one, store, self._read_by_workers(videos, store, bar))
        with closing(ahead(look, videos, self.options.workers)) as surveys:
            for video, found in bar.track(surveys, total=len(videos), description=READING):
                if isinstance(found, OSError):
                    self.leave_out(video.name, found)
                    continue
                if found is None:
                    self.left_out[video.name] = UNUSED_PICTURE
                    continue
                count += 1
                if converted := found.about.get("converted"):
                    self.converted[video.name] = "; ".join(converted)
                for key, fact in found.facts:
                    store.remember(key, fact)
                scenes = [(0, 1)]
                if not video.is_picture:
                    scenes = scenes_in(found.about, self.options.rule_of(video).take)
                if late := self._late_caption(video, found):
                    self.leave_out(video.name, OSError(late))
                    continue
                longest = max(longest, *(end - begin for begin, end in scenes))
                self._leave_out_scenes(video, scenes)
                chunks += self._chunks_of(video, found, scenes)
        chunks += prompts
        if not count and not prompts:
            reason = next(iter((self.broken or self.left_out).values()))
            raise ValueError(f"no clip could be read: {reason}")
        refuse_unfilled(
            self.options.frames,
            [*{size: None for rule in rules for size in rule.sizes}],
            self.options.fps,
            clips=count,
            longest=longest,
            filled={chunk.size for chunk in chunks},
            scenes=any(rule.take.scenes == "cut" for rule in rules),
        )
        store.commit()
        return chunks

    def _read_by_workers(
        self, videos: Sequence[CaptionedVideo], store: Store, bar: "Progress"
    ) -> dict[str, OSError]:
        """Let workers, if there are any, read the clips that the store does not know.

        Clips that they cannot read are left to this process, which finds the same fault. Returns
        the errors of clips that ended their workers, by name: this process must not open them.
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
        with closing(self.executor.map(READING, self.options, new, new)) as found:
            tracked = bar.track(found, total=len(new), description=READING)
            for video, surveyed in zip(new, tracked, strict=True):
                if isinstance(surveyed, OSError):
                    died[video.name] = surveyed
                for key, fact in surveyed.facts if isinstance(surveyed, ClipSurvey) else ():
                    store.remember(key, fact)
        return died

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
        options, rule = self.options, self.options.rule_of(video)
        size = nearest_size(rule.sizes, found.about["size"])
        lost = lost_picture(found.about["size"], size)
        total, lasts, rate = found.about["total"], found.about["seconds"], options.fps
        if rate is None and total and lasts:
            rate = total / lasts
        lengths = (1,) if video.is_picture else rule.frames
        for begin, longest in rule.take.of(scenes, lengths):
            fitting = [length for length in lengths if length <= longest]
            for length in fitting[-1:] if self.causal else fitting:
                at = ["picture"] if video.is_picture else [begin] if begin else []
                fps = None if video.is_picture else options.fps
                place: list[object] = [found.digest, fps, length, size, *at]
                image_key, frame_key, mask_key = found.image, None, None
                if options.images is not None and image_key is None:
                    image_key = self.image_key(*place)
                if self.given_frames is not None:
                    control = found.beside.get("control")
                    frame_key = self.given_frames.key(
                        *([] if control is None else [control]), *place
                    )
                if (mask := found.beside.get("mask")) is not None:
                    coding, space = factors_of(self.encoders.pipe, self.encoders.family)
                    factors = coding.frames, space
                    mask_key = hash_of([MASK, options.store, mask, factors, *place])
                latent_key, source = hash_of([self._vae, *place]), ""
                if options.needs_clips:
                    source = hash_of([self._vae, *place[:2], *place[3:]])
                else:
                    self.unread.append(latent_key)
                texts, starts = _said_in(video, rule, begin, length)
                entry = self._entry(
                    video,
                    size,
                    length,
                    texts,
                    [self.text_key(text, *place) for text in texts],
                    starts=starts,
                    latent_key=latent_key if options.needs_clips else None,
                    image_key=image_key,
                    teacher_key=self.text_key(video.teacher_caption) if options.teacher else None,
                    frame_key=frame_key,
                    begin=begin or None,
                    is_picture=video.is_picture or None,
                    mask_key=mask_key,
                    sound_key=hash_of([self._sound, *place]) if found.has_sound else None,
                )
                seconds = None if video.is_picture or rate is None else length / rate
                yield ClipChunk(video, size, entry, texts, source, seconds, total, lost)

    def _prompts(self, video: CaptionedVideo) -> Iterator[ClipChunk]:
        """Make the chunks of a prompt: of its size, each length that the model is shown."""
        rule = self.options.rule_of(video)
        [size] = rule.sizes
        for length in rule.frames[-1:] if self.causal else rule.frames:
            texts, starts = _said_in(video, rule, 0, length)
            keys = [self.text_key(text) for text in texts]
            entry = self._entry(video, size, length, texts, keys, starts=starts)
            yield ClipChunk(video, size, entry, texts, "", None, None, 0.0)

    def _entry(
        self,
        video: CaptionedVideo,
        size: Size,
        length: int,
        texts: Sequence[str],
        keys: Sequence[str],
        **more: Any,
    ) -> Entry:
        """Make an entry of a size and length in pixels.

        Args:
            keys: of the texts.
            more: further fields.
        """
        coding, space = factors_of(self.encoders.pipe, self.encoders.family)
        return Entry(
            name=video.name,
            caption=texts[0],
            frames=coding.latents_of(length),
            height=size[0] // space,
            width=size[1] // space,
            pixel_frames=length,
            text_key=keys[0],
            text_keys=tuple(keys) if len(keys) > 1 else None,
            repeats=video.repeats if video.repeats > 1 else None,
            **more,
        )

    def _late_caption(self, video: CaptionedVideo, found: ClipSurvey) -> str:
        """Say that a caption changes after the end of its clip; nothing if it does not."""
        frames, lasts, fps = found.about["total"], found.about["seconds"], self.options.fps
        if fps is not None and lasts:
            frames = math.ceil(lasts * fps)
        if video.starts is None or not frames or video.starts[-1] < frames:
            return ""
        return f"its caption changes at frame {video.starts[-1]}, its last is {frames - 1}"

    def _leave_out_scenes(self, video: CaptionedVideo, scenes: Sequence[tuple[int, int]]) -> None:
        """Note a clip, or those of its scenes, that fill no length."""
        lengths = self.options.rule_of(video).frames
        fps, shortest = self.options.fps, 1 if video.is_picture else lengths[0]
        longest = max(end - begin for begin, end in scenes)
        if longest < shortest:
            self.short.append(video.name)
            self.left_out[video.name] = too_short(longest, fps, shortest, len(scenes))
            return
        for begin, end in scenes:
            if end - begin < shortest:
                name = f"{video.name}, frames {begin} to {end - 1}"
                self.left_out[name] = too_short(end - begin, fps, shortest)

    # Encoding

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
                    what = WHAT[kind]
                    if one.chunk is None:
                        what = f"the text {shown(one.text)}" if kind != IMAGES else STAND_IN
                    if not isinstance(made, OSError):
                        stored = {name: self.stored(x) for name, x in made.items()}
                        if all(x.isfinite().all() for x in stored.values()):
                            store.put(one.key, stored)
                            continue
                        fault = OSError(f"store {self.options.store!r} cannot hold {what}")
                        if one.chunk is None:  # no clip's fault, which could be left out
                            maker = "image" if kind == IMAGES else "text"
                            raise ValueError(f"{fault}; float32 can what the {maker} encoder made")
                    elif one.chunk is None:
                        raise ValueError(f"{what} could not be encoded: {made}")
                    else:
                        fault = made
                    if self.options.on_broken == "stop":
                        self.leave_out(one.chunk.video.name, fault)  # which raises
                    failed.append((one.chunk, fault))
        broken = {chunk.name for chunk, _ in failed}
        whole = {chunk.video for chunk in chunks if chunk.name not in broken}
        for chunk, error in failed:
            self.leave_out(chunk.name if chunk.video in whole else chunk.video.name, error)
        return new

    def _lacking(self, kind: str, chunks: Sequence[ClipChunk], store: Store) -> list[list[Input]]:
        """Find the inputs of one kind of work that the store lacks, those made together in one
        list."""
        is_shown = self.given_frames is not None and self.given_frames.reads_prompts
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
            found.setdefault(one.key, one)
        new = [one for key, one in found.items() if key not in store]
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
        if self.executor is None:
            with self.ready(kind):
                yield from self.make(kind, groups, see)
            return
        videos = [one.chunk.video for group in groups for one in group if one.chunk]
        videos = videos if kind == CLIPS else []
        with closing(self.executor.map(kind, self.options, groups, videos)) as sent:
            for group, made in zip(groups, sent, strict=True):
                inputs = {one.key: one for one in group}
                if isinstance(made, OSError):  # the workers died at it
                    made = dict.fromkeys(inputs, made)
                assert isinstance(made, dict)
                yield from ((inputs[key], one) for key, one in made.items())

    @contextmanager
    def ready(self, kind: str) -> Iterator[None]:
        """Keep the models for one kind of work on the device inside the context."""
        encoders, images = self.encoders, self.options.images
        parts = {
            CAPTIONS: encoders.family.training.text_parts,
            SHOWN_CAPTIONS: ("text_encoder",),
            GIVEN_FRAMES: FRAME_MODELS,
            SOUNDS: ("audio_vae",),
            CLIPS: ("vae",),
        }
        with ExitStack() as stack:
            stack.enter_context(encoders.at_work(*parts.get(kind, ())))
            if kind == IMAGES and images is not None:
                stack.enter_context(images.at_work(encoders.device))
            yield

    def make(
        self,
        kind: str,
        groups: list[list[Input]],
        see: Callable[[ClipChunk, np.ndarray], None] | None = None,
    ) -> Iterator[Made]:
        """Make the tensors of some groups, or find the errors of their clips.

        Args:
            see: takes the frames of each chunk.
        """
        if kind == CLIPS:
            with closing(ahead(self._read, groups, self.options.workers)) as read:
                for one, frames in read:
                    if not isinstance(frames, OSError) and one.chunk and see is not None:
                        see(one.chunk, frames)
                    yield one, self._latents(frames)
        for group in groups if kind == CAPTIONS else ():
            texts, length = [one.text for one in group], self.options.max_tokens
            family = self.encoders.family
            encode = family.encode_heard_prompt if self.options.sound else family.encode_prompt
            found = encode(self.encoders.pipe, texts, length)
            for i, one in enumerate(group):
                yield one, {name: x[i] for name, x in found.items()}
        for [one] in groups if kind not in (CLIPS, CAPTIONS) else ():
            try:
                yield one, self._beside(kind, one.chunk, one.text)
            except OSError as error:
                yield one, error

    def stored(self, x: Tensor) -> Tensor:
        """Convert a tensor to its form in the shards."""
        return x.to("cpu", DTYPES[self.options.store] if x.is_floating_point() else x.dtype)

    def _beside(self, kind: str, chunk: ClipChunk | None, text: str) -> Tensors:
        """Make the tensors of a chunk other than its latents and plain captions."""
        images, given_frames = self.options.images, self.given_frames
        if kind == SHOWN_CAPTIONS and given_frames is not None:
            return given_frames.prompt(text, () if chunk is None else self._given(chunk))
        if kind == IMAGES and images is not None and chunk is None:
            return {IMAGE: images.nothing()}
        assert chunk is not None
        if kind == IMAGES and images is not None:
            if chunk.video.image is None:
                image = self._frame(chunk, chunk.frames // 2)
            else:
                image = open_image(chunk.video.image_bytes(), chunk.video.image_name)
            return {IMAGE: images(image)}
        if kind == GIVEN_FRAMES and given_frames is not None:
            if given_frames.condition == CONTROL:
                return given_frames.control(self._control(chunk))
            return given_frames(self._given(chunk), chunk.frames)
        if kind == SOUNDS:
            return {SOUND: self._heard(chunk)}
        mask = read_mask(
            chunk.video,
            factors_of(self.encoders.pipe, self.encoders.family),
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

    def _given(self, chunk: ClipChunk) -> list[Image.Image]:
        """Read the first frame of a chunk, and the last one under condition last_frame."""
        has_last = self.options.condition == LAST_FRAME
        places = (0, chunk.frames - 1) if has_last else (0,)
        return [self._frame(chunk, place) for place in places]

    def _heard(self, chunk: ClipChunk) -> Tensor:
        """Encode the sound of a chunk, (tokens, D)."""
        family, pipe, fps = self.encoders.family, self.encoders.pipe, self.options.fps
        assert fps is not None, "with sound"
        rate, seconds = family.sound_rate(pipe), chunk.frames / fps
        sound = chunk.video.sound(chunk.begin / fps, seconds, rate)
        if sound is None:
            raise OSError("it has no sound now, and had some")
        tokens = family.sound_tokens(self.encoders.transformer.config, chunk.frames, fps)
        return family.encode_sound(pipe, torch.from_numpy(sound))[:tokens]

    def _control(self, chunk: ClipChunk) -> np.ndarray:
        """Read the control film of a chunk, (F, H, W, 3) uint8."""
        film, wanted = film_beside(chunk.video, "control"), chunk.frames
        assert film is not None
        about = {"size": chunk.size, "fps": self.options.fps, "begin": chunk.begin}
        frames = film.read(frames=wanted, **about)
        if len(frames) < wanted:
            raise OSError(
                f"its control has {len(frames)} frames from there on, and needs {wanted}"
            )
        return frames

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
        """Keep the given frames of some clips as pictures, (H, W, 3) uint8. Returns their keys."""
        if self.given_frames is None or self.given_frames.condition == CONTROL:
            return []
        names, keys = (PICTURE, LAST_PICTURE), []
        for chunk in done[:PICTURES]:
            keys.append(hash_of([RECIPE, PICTURE, chunk.entry.frame_key]))
            if keys[-1] not in store:
                frames = zip(names, self._given(chunk), strict=False)
                store.put(keys[-1], {name: torch.from_numpy(np.array(x)) for name, x in frames})
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
        self,
        kind: str,
        options: CacheOptions,
        items: Sequence[CaptionedVideo | list[Input]],
        videos: Sequence[CaptionedVideo] = (),
    ) -> Generator[ClipSurvey | dict[str, Tensors | OSError] | OSError | None, None, None]:
        """Yield the result of each item by one kind of work, in order.

        An item at which a worker died each time gives an OSError.

        Args:
            videos: clips that the workers open.

        Raises ValueError for an item that failed in another way, as it would here, and for a
        machine that does not see a folder of the clips: it would find each clip broken.
        """
        sources = (video.source for video in videos)
        folders = {path.parent: None for path in sources if isinstance(path, Path)}
        reads = [*self._reads, *folders]
        work = partial(_worker, self._load, options, kind)
        with closing(self._machines.map(work, items, ordered=True, reads=reads)) as found:
            for done in found:
                if done.failed is None:
                    result = done.result
                    if isinstance(result, dict):
                        load = safetensors.torch.load
                        made = result.items()
                        result = {k: load(x) if isinstance(x, bytes) else x for k, x in made}
                    yield result
                elif done.is_given_up:
                    yield OSError(done.failed)
                else:
                    raise ValueError(f"machine {done.host}: {done.failed}")


def _worker(load: Callable[[], Encoders], options: CacheOptions, kind: str) -> Callable:
    """Return the work of one kind on an item, in a worker. Its models stay on their device."""
    if kind == READING:
        return partial(_look, options)
    run, held = Encoding(load(), options), ExitStack()
    held.enter_context(run.ready(kind))
    return partial(_packed, run, kind, held)


def _look(options: CacheOptions, video: CaptionedVideo) -> ClipSurvey | None:
    try:
        return survey_clip(video, options, lambda key: None)
    except OSError:  # which the process that writes finds too
        return None


def _packed(
    run: Encoding, kind: str, held: ExitStack, group: list[Input]
) -> dict[str, bytes | OSError]:
    """Make tensors as bytes, since tensors go by no process of another device."""
    packed = {}
    for one, made in run.make(kind, [group]):
        if not isinstance(made, OSError):
            made = safetensors.torch.save({name: run.stored(x) for name, x in made.items()})
        packed[one.key] = made
    return packed


def _said_in(
    video: CaptionedVideo, rule: ClipRule, begin: int, length: int
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Return the texts of some frames of a clip; of a caption that changes there, also the frames
    from which they hold, counted from the first of these."""
    texts = rule.captions.of(video)
    if video.starts is None:
        return texts, None
    ends = (*video.starts[1:], begin + length)
    held = {
        max(0, start - begin): text
        for start, end, text in zip(video.starts, ends, texts, strict=True)
        if end > begin and start < begin + length
    }
    return (*held.values(),), (*held,) if len(held) > 1 else None
