"""Clips of a training on disk, and captions that are edited."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from gen_accel.io import read_text, replacing
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.data.clips import CaptionedVideo
from gen_accel.lora.data.finding import NUMBERED, find_videos, not_taken
from gen_accel.lora.data.report import why_broken
from gen_accel.paths import expanded
from gen_accel.ui.thumbnails import encoded

SILENT = "\0"  # stands for a missing caption, and no caption file can hold it
THUMB = (128, 96)  # largest width and height of a thumbnail


class Row(NamedTuple):
    """A caption, with the clip that it is of.

    Args:
        name: of the clip; with its file, of a further caption.
        clip: name of the clip in its data.
        file: the caption's file; None if captions are not edited here.
    """

    name: str
    clip: str
    file: Path | None
    caption: str


@dataclass(frozen=True)
class Found:
    """Clips of a config's data.

    Args:
        fixed: why captions cannot be edited here; None if they can.
        others: names of files in the folder that are no clips.
    """

    rows: tuple[Row, ...]
    videos: Mapping[str, CaptionedVideo]
    fixed: str | None
    others: tuple[str, ...] = ()

    @property
    def silent(self) -> list[str]:
        """Names of clips without a caption."""
        return [name for name, video in self.videos.items() if not video.caption]


def find_clips(config: TrainConfig, readable: Callable[[Path], object] = Path) -> Found:
    """List the clips of a config's data, with their captions.

    Raises ValueError and OSError as `find_videos` does, and ValueError for a clip or caption that
    the page may not read, before any is opened.

    Args:
        readable: raises ValueError for a file that the page may not read.
    """
    videos = videos_of(config)
    check_readable(videos, readable)
    fixed = why_fixed(config.data or "")
    texts = {} if fixed else caption_files(videos)
    for path in (path for each in texts.values() for path, _ in each):
        readable(path)
    rows: list[Row] = []
    for video in videos:
        held: Sequence[tuple[Path | None, str]] = texts.get(video.name) or [
            (None, text) for text in (video.caption, *video.more_captions)
        ]
        for number, (file, text) in enumerate(held):
            more = f"caption {number + 1}" if file is None else file.name
            name = video.name if number == 0 else f"{video.name}, {more}"
            rows.append(Row(name, video.name, file, text))
    others = tuple(not_taken(config.data or ""))
    return Found(tuple(rows), {video.name: video for video in videos}, fixed, others)


def size_of(video: CaptionedVideo) -> str:
    """Write the length and size of a clip, or why it cannot be read."""
    if video.is_prompt:
        return "a prompt alone"
    try:
        converted: list[str] = []
        _, (height, width) = video.survey(frames=1, fps=None, tell=converted.append)
        frames, seconds = (1, None) if video.is_picture else video.extent()
    except OSError as error:
        return why_broken(str(error))
    length = "a picture" if video.is_picture else f"{frames} frames"
    size = f"{length}{f', {seconds:.1f} s' if seconds else ''}, {height} x {width}"
    return "; ".join([size, *converted])


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
            controls=config.condition == "control",
            needed=config.why_clips,
        )
    except ImportError as error:
        raise ValueError(str(error)) from error
    if config.default_caption:
        return found
    return [replace(one, caption="") if one.caption == SILENT else one for one in found]


def check_readable(videos: Sequence[CaptionedVideo], readable: Callable[[Path], object]) -> None:
    """Raise ValueError for a clip whose film, picture, mask or control may not be read.

    A manifest names any file, and a folder holds links.

    Args:
        readable: raises ValueError for such a file.
    """
    for video in videos:
        for path in (video.source, video.image, video.mask, video.control):
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
                f"{path} was changed meanwhile, to {known[path]!r}: look again, then edit it"
            )
    changed = [path for path, (before, after) in edits.items() if after.strip() != before.strip()]
    for path in changed:
        with replacing(path) as partial:
            partial.write_text(edits[path][1].strip() + "\n", encoding="utf-8")
    return tuple(changed)


def thumbnail(video: CaptionedVideo) -> str:
    """Return the first frame as a data URL; "" for a prompt and a clip that cannot be read."""
    if video.is_prompt:
        return ""
    try:
        with video.playing(None) as pictures:
            image = Image.fromarray(next(pictures))
    except (OSError, StopIteration):
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(encoded(image, THUMB)).decode()}"
