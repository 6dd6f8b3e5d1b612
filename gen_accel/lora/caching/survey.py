"""Survey of the clips of a cache: the chunks that are encoded."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.lora.caching.encoders import factors_of, hash_of
from gen_accel.lora.caching.index import Packed, Table
from gen_accel.lora.caching.inputs import MASK, TEXT
from gen_accel.lora.caching.jobs import READING, Job, Looked, Spread, Unknown
from gen_accel.lora.caching.options import Options
from gen_accel.lora.caching.shards import Known, Shards, file_key, remembered_sha256
from gen_accel.lora.data.clips import CaptionedVideo, nearest_size, open_image
from gen_accel.lora.data.masks import check_mask, mask_of
from gen_accel.lora.data.report import UNUSED_PICTURE, too_short, unfilled_length, unfilled_size
from gen_accel.lora.data.survey import ahead, clip_key, scenes_in, survey

if TYPE_CHECKING:
    from rich.progress import Progress


class Survey(Options):
    """Survey of all clips, before the first is encoded."""

    def read(
        self, videos: Sequence[CaptionedVideo], shards: Shards, bar: "Progress"
    ) -> Packed[Job]:
        """Survey all clips. Returns the jobs to have in the cache."""
        jobs = Packed(lambda row: Job(videos[row[0]], *row[1:])._replace(number=row[0]))
        clips, longest = Table(), 0
        died: dict[str, OSError] = {}
        if self.spread is not None:
            died = self._remember(self.spread, videos, shards, bar)
        looks = ahead(partial(self._look, shards, died), enumerate(videos), self.workers)
        with closing(looks):
            for number, found in bar.track(looks, total=len(videos), description="reading"):
                video = videos[number]
                if isinstance(found, OSError):
                    self._note(video.name, found)
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
    ) -> Iterator[tuple[int, "Looked | OSError | None"]]:
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

    def _looked(self, video: CaptionedVideo, shards: "Shards | Unknown") -> Looked:
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
        return Looked(digest, clip, about, picture, mask, hashed, surveyed)

    def _jobs(self, video: CaptionedVideo, looked: Looked) -> list[Job]:
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
            for length in fitting[-1:] if self.encoders.family.training.causal_vae else fitting:
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
                jobs.append(Job(video, length, size, *keys, begin, texts, about, source, mask))
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
                scenes = self.take.scenes == "cut"
                raise ValueError(unfilled_length(length, self.fps, clips, longest, scenes=scenes))

    def _check_sizes(self, jobs: Packed[Job]) -> None:
        """Refuse one of several sizes that no clip goes to."""
        filled = {job.size for job in jobs}
        for size in self.sizes:
            if len(self.sizes) > 1 and filled and size not in filled:
                raise ValueError(unfilled_size(size, filled))


def _digest(video: CaptionedVideo, memo: Known) -> tuple[str, str | None]:
    """Do as `remembered_sha256`; what is no file is hashed anew."""
    if isinstance(video.source, Path):
        return remembered_sha256(video.source, memo)
    return video.sha256(), None


def mask_key(digest: str, factors: tuple[int, int], store: str, *clip: Any) -> str:
    """Name a mask's tensor.

    Args:
        digest: hash of the mask's bytes.
        factors: frames and pixels of a latent, in time and in space.
        clip: what decides the frames of the clip and their size.
    """
    return hash_of([MASK, store, digest, factors, *clip])
