"""Clips of a training as its page shows them: what becomes of each, and captions to edit."""

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from gen_accel.files import replacing
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.data.clips import CaptionedVideo, Size, nearest_size
from gen_accel.lora.data.finding import NUMBERED, find_videos
from gen_accel.lora.data.masks import check_mask, mask_of
from gen_accel.lora.data.report import (
    UNUSED_PICTURE,
    Lost,
    Report,
    buckets_of,
    lost_picture,
    too_short,
    unused_frames,
    why_broken,
)
from gen_accel.lora.data.scenes import Chunk, Take
from gen_accel.lora.data.survey import ahead, scenes_in, survey
from gen_accel.paths import expanded
from gen_accel.text_files import read_text

SILENT = "\0"  # stands for a missing caption, and no caption file can hold it
THUMB = (128, 96)  # largest width and height of a thumbnail
MOST_THUMBS = 500  # kept in memory, some 4 kB each

About = dict[str, Any]  # what `survey` knows of a clip


class Row(NamedTuple):
    """A caption, with the clip that it is of.

    Args:
        name: of the clip; with its file, of a further caption.
        clip: name of the clip in its data.
        file: the caption's file; None if captions are not edited here.
        fate: what is trained on, or why the clip is left out.
    """

    name: str
    clip: str
    file: Path | None
    length: str
    size: str
    fate: str
    caption: str


@dataclass(frozen=True)
class Found:
    """Clips of a config's data.

    Args:
        report: as `cache` makes it, with nothing encoded.
        fixed: why captions cannot be edited here; None if they can.
        objections: reasons why a training would be refused, in words.
    """

    rows: tuple[Row, ...]
    videos: Mapping[str, CaptionedVideo]
    report: Report
    fixed: str | None
    objections: tuple[str, ...] = ()


class Clips:
    """Clips of the folders that a page shows, which are decoded once while they do not change.

    Args:
        readable: raises ValueError for a file that the page may not read.
    """

    def __init__(self, readable: Callable[[Path], object] = Path) -> None:
        self._readable = readable
        self._known: dict[tuple[object, ...], About] = {}
        self._thumbs: dict[tuple[object, ...], str] = {}

    def find(self, config: TrainConfig) -> Found:
        """Survey all clips as `gen-accel cache` does before it encodes the first.

        Raises ValueError and OSError as `find_videos` does, and ValueError for a clip or caption
        that the page may not read, before any is decoded. Missing captions are an objection.
        """
        videos = videos_of(config)
        check_readable(videos, self._readable)
        fixed = why_fixed(config.data or "")
        texts = {} if fixed else caption_files(videos)
        for path in (path for each in texts.values() for path, _ in each):
            self._readable(path)
        fates, rows = _Fates(config, is_causal(config.model)), []
        looks = ahead(partial(self._look, config), videos, config.workers)
        with closing(looks):
            for video, about in zip(videos, looks, strict=True):
                rows += _rows(video, fates.see(video, about), texts.get(video.name))
        objections = [*fates.objections()]
        if silent := [video.name for video in videos if not video.caption]:
            objections.append(
                f"{len(silent)} of {len(videos)} clips have no caption, as {silent[0]}: write "
                "one, or give default_caption"
            )
        known = {video.name: video for video in videos}
        return Found(tuple(rows), known, fates.report(len(videos)), fixed, tuple(objections))

    def thumbnail(self, video: CaptionedVideo) -> str:
        """Return the first frame as a data URL; "" for a clip that cannot be read."""
        key = _stamp(video)
        if key is None:
            return _thumbnail(video)
        if key not in self._thumbs:
            while len(self._thumbs) >= MOST_THUMBS:
                self._thumbs.pop(next(iter(self._thumbs)))
            self._thumbs[key] = _thumbnail(video)
        return self._thumbs[key]

    def _look(self, config: TrainConfig, video: CaptionedVideo) -> Iterator[About | OSError]:
        take, longest = take_of(config), max(stage.frames for stage in config.curriculum)
        try:
            about = self._surveyed(video, take, longest, config.fps)
            if config.masks and (film := mask_of(video)) is not None:
                found = self._surveyed(film, replace(take, scenes="off"), longest, config.fps)
                check_mask(found, about, is_picture=film.is_picture)
        except OSError as error:
            yield error
        else:
            yield about

    def _surveyed(
        self, video: CaptionedVideo, take: Take, longest: int, fps: float | None
    ) -> About:
        stamp = _stamp(video)
        if stamp is None:
            return survey(video, take, longest, fps)
        key = (*stamp, fps, video.is_picture)
        self._known[key] = survey(video, take, longest, fps, self._known.get(key))
        return self._known[key]


def videos_of(config: TrainConfig) -> Sequence[CaptionedVideo]:
    """Find the clips as `gen-accel cache` does. A missing caption is empty.

    Raises ValueError and OSError as `find_videos` does, and ValueError for a missing package.
    """
    if config.data is None:
        raise ValueError("data is not given: a folder of videos, a manifest or a datasets folder")
    try:
        found = find_videos(
            config.data,
            images=config.adapter == "image_prompt",
            pictures="all" if 1 in config.clip_lengths else "captioned",
            default_caption=config.default_caption or SILENT,
            masks=config.masks,
        )
    except ImportError as error:
        raise ValueError(str(error)) from error
    if config.default_caption:
        return found
    return [replace(one, caption="") if one.caption == SILENT else one for one in found]


def check_readable(videos: Sequence[CaptionedVideo], readable: Callable[[Path], object]) -> None:
    """Raise ValueError for a clip whose film, picture or mask may not be read.

    A manifest names any file, and a folder holds links.

    Args:
        readable: raises ValueError for such a file.
    """
    for video in videos:
        for path in (video.source, video.image, video.mask):
            if isinstance(path, Path):
                readable(path)


def why_fixed(data: str) -> str | None:
    """Say why captions of `data` are not edited here; None for a plain folder.

    The same places are looked at as by `find_videos`.
    """
    folder = expanded(data)
    if folder.is_file():
        return f"these captions lie in {data}: edit them there"
    for name in ("dataset_info.json", "dataset_dict.json"):
        if (folder / name).is_file():
            return f"{data} is a folder of save_to_disk ({name}): edit its captions by datasets"
    for path in sorted(folder.rglob("metadata.*")):
        inside = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in inside.parts):
            return f"these captions lie in {path}: edit them there"
    return None


def caption_files(videos: Sequence[CaptionedVideo]) -> dict[str, list[tuple[Path, str]]]:
    """Map the clips of a folder to the files of their captions, with the text of each.

    A clip without a caption has the file that `find_videos` will look for.
    """
    paths = {video.name: video.source for video in videos if isinstance(video.source, Path)}
    own = {path.with_suffix("") for path in paths.values()}
    further: dict[Path, list[tuple[int, Path]]] = {}
    for folder in {path.parent for path in paths.values()}:
        for text in folder.glob("*.txt"):
            match = NUMBERED.fullmatch(text.name)
            if match and text.with_suffix("") not in own:
                further.setdefault(folder / match[1], []).append((int(match[2]), text))
    found = {}
    for name, path in paths.items():
        stem, first = path.with_suffix(""), path.with_suffix(".txt")
        files = [first, *(text for _, text in sorted(further.get(stem, ())))]
        held = [(one, read_text(one).strip()) for one in files if one.is_file()]
        found[name] = [one for one in held if one[1]] or [(first, "")]
    return found


def save_captions(
    config: TrainConfig,
    edits: Mapping[Path, tuple[str, str]],
    editable: Callable[[Path], object] = Path,
) -> tuple[Path, ...]:
    """Write captions that were edited, each file whole or not at all.

    Args:
        edits: file to its text as it was shown, and as it is to be.
        editable: raises ValueError for a file that the page may not write.

    Returns:
        The files that were written.

    Raises:
        ValueError: a file that is no caption of the data, that `editable` refuses, or whose text
            is another one by now; nothing is written then.
        OSError: a folder that is gone, or a file that cannot be written.
    """
    fixed = why_fixed(config.data or "")
    if fixed is not None:
        raise ValueError(fixed)
    files = caption_files(videos_of(config)).values()
    known = {path: text for each in files for path, text in each}
    for path, (before, _) in edits.items():
        editable(path)
        if path not in known:
            raise ValueError(f"{path} is no caption of a clip in {config.data}: look again")
        if known[path] != before.strip():
            raise ValueError(
                f"{path} was changed meanwhile, to {known[path]!r}: look again, then edit it anew"
            )
    changed = [path for path, (before, after) in edits.items() if after.strip() != before.strip()]
    for path in changed:
        with replacing(path) as partial:
            partial.write_text(edits[path][1].strip() + "\n", encoding="utf-8")
    return tuple(changed)


def take_of(config: TrainConfig) -> Take:
    return Take(config.take, config.chunks, config.scenes)


def is_causal(model: str) -> bool:
    """Whether a shorter stage takes the beginning of a longer clip's latents."""
    from gen_accel.attention_processors.families import family_named, served_classes
    from gen_accel.lora.dry_run import transformer_class

    return bool(family_named(served_classes()[transformer_class(model)]).CAUSAL_VAE)


@dataclass
class _Fates:
    """Fate of each clip by the rules of `cache`, and the report of all."""

    config: TrainConfig
    causal: bool
    left_out: dict[str, str] = field(default_factory=dict)
    short: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    lost: list[Lost] = field(default_factory=list)
    chunks: list[tuple[int, Size, float | None]] = field(default_factory=list)
    longest: int = 0

    def __post_init__(self) -> None:
        self.frames = sorted({stage.frames for stage in self.config.curriculum})

    def see(self, video: CaptionedVideo, about: About | OSError) -> tuple[str, str, str]:
        """Return length, size and fate of a clip, in words."""
        if isinstance(about, OSError):
            self.broken[video.name] = str(about)
            self.left_out[video.name] = why_broken(str(about))
            return "", "", self.left_out[video.name]
        frames = about["frames"] if about["total"] is None else about["total"]
        lasts = f", {about['seconds']:.1f} s" if about["seconds"] else ""
        length = "a picture" if video.is_picture else f"{frames} frames{lasts}"
        size = "{} x {}".format(*about["size"])
        if video.is_picture and 1 not in self.config.clip_lengths:
            self.left_out[video.name] = UNUSED_PICTURE
            return length, size, f"left out: {UNUSED_PICTURE}"
        return length, size, self._trained(video, about)

    def report(self, videos: int) -> Report:
        config = self.config
        return Report(
            folder=Path(config.cache) if config.cache else Path(config.out) / "cache",
            encoded=0,
            kept=0,
            removed=0,
            texts=0,
            short=tuple(self.short),
            broken=self.broken,
            left_out=self.left_out,
            lost=self.lost,
            buckets=buckets_of(self.chunks),
            videos=videos,
        )

    def objections(self) -> Iterator[str]:
        """Lengths and sizes that no clip fills, for which `cache` refuses the data."""
        for frames in self.frames:
            if frames > self.longest:
                yield (
                    f"no clip fills the stage of {frames} frames: the longest has {self.longest}; "
                    "take shorter stages, or longer clips"
                )
        filled = {size for _, size, _ in self.chunks}
        sizes = self.config.clip_sizes
        for height, width in sizes if filled and len(sizes) > 1 else ():
            if (height, width) not in filled:
                yield f"no clip goes to size {height}x{width}: leave it out of sizes"

    def _trained(self, video: CaptionedVideo, about: About) -> str:
        config, take = self.config, take_of(self.config)
        lengths = [1] if video.is_picture else self.frames
        scenes = [(0, 1)] if video.is_picture else scenes_in(about, take)
        longest = max(end - begin for begin, end in scenes)
        self.longest = max(self.longest, longest)
        if longest < lengths[0]:
            reason = too_short(longest, config.fps, lengths[0], len(scenes))
            self.short.append(video.name)
            self.left_out[video.name] = reason
            return reason
        for begin, end in scenes:
            if end - begin < lengths[0]:
                name = f"{video.name}, frames {begin} to {end - 1}"
                self.left_out[name] = too_short(end - begin, config.fps, lengths[0])
        size = nearest_size(config.clip_sizes, tuple(about["size"]))
        digest = video.sha256() if config.take == "random" else ""
        kept = []
        for begin, most in take.of(digest, scenes, lengths):
            fitting = [length for length in lengths if length <= most]
            kept += [Chunk(begin, x) for x in (fitting[-1:] if self.causal else fitting)]
        for chunk in kept:
            self.chunks.append((chunk.frames, size, self._seconds(video, about, chunk.frames)))
        picture = lost_picture(tuple(about["size"]), size)
        lost = Lost(video.name, picture, unused_frames(about["total"], kept), about["total"])
        self.lost.append(lost)
        counted = [
            f"{frames} frame{'s' if frames > 1 else ''}" + (f" {n} times" if n > 1 else "")
            for frames, n in Counter(chunk.frames for chunk in kept).items()
        ]
        words = f"trains: {' and '.join(counted)} of {size[0]} x {size[1]}"
        said = str(lost).removeprefix(f"{video.name}: ")
        return f"{words}; {said}" if lost.is_worth_saying else words

    def _seconds(self, video: CaptionedVideo, about: About, frames: int) -> float | None:
        if video.is_picture:
            return None
        if self.config.fps is not None:
            return frames / self.config.fps
        total, seconds = about["total"], about["seconds"]
        return frames * seconds / total if seconds and total else None


def _rows(
    video: CaptionedVideo,
    fate: tuple[str, str, str],
    files: Sequence[tuple[Path, str]] | None,
) -> Iterator[Row]:
    """A row for each caption of a clip.

    Args:
        fate: length, size and fate of the clip.
        files: of its captions; None if they are not edited here.
    """
    clip = video.name
    held: Sequence[tuple[Path | None, str]] = files or [
        (None, text) for text in (video.caption, *video.more_captions)
    ]
    for number, (file, text) in enumerate(held):
        if number == 0:
            yield Row(clip, clip, file, *fate, text)
        else:
            name = f"{clip}, {file.name}" if file is not None else f"{clip}, caption {number + 1}"
            yield Row(name, clip, file, "", "", "a further caption", text)


def _stamp(video: CaptionedVideo) -> tuple[object, ...] | None:
    """Return values that change with a clip's file; None for a clip that is no file."""
    if not isinstance(video.source, Path):
        return None
    try:
        about = video.source.stat()
    except OSError:
        return None
    return str(video.source), about.st_size, about.st_mtime_ns


def _thumbnail(video: CaptionedVideo) -> str:
    try:
        with video.playing(None) as pictures:
            image = Image.fromarray(next(pictures))
    except (OSError, StopIteration):
        return ""
    image.thumbnail(THUMB)
    held = io.BytesIO()
    image.save(held, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
