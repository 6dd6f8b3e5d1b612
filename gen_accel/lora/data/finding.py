"""Finding of captioned clips: folders, manifests, and data sets of Hugging Face."""

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from gen_accel.io import ENCODING, not_text, parse_json, read_text
from gen_accel.lora.data.clips import IMAGE_SUFFIXES, SUFFIXES, CaptionedVideo
from gen_accel.paths import expanded
from gen_accel.registry import needed_for

VIDEO_COLUMNS = ("video", "file_name", "path")

CAPTION_COLUMNS = ("caption", "text", "prompt")

IMAGE_COLUMN = "image"

TEACHER_COLUMN, TEACHER_SUFFIX = "teacher_caption", ".teacher.txt"

REPEATS_COLUMN = "repeats"

MASK_COLUMN, MASK_SUFFIX = "mask", ".mask"

NUMBERED = re.compile(r"(.+)\.(\d+)\.txt", re.DOTALL)  # clip.1.txt, a further caption of clip.mp4

SHOWN = 5  # most names listed in an error


def find_videos(
    data: str | Path,
    *,
    images: bool = False,
    pictures: Literal["no", "captioned", "all"] = "no",
    default_caption: str | None = None,
    masks: bool = False,
) -> list[CaptionedVideo]:
    """Find every captioned video of a data set, sorted by name.

    A clip may have several captions: a list in the column of a manifest that is JSON, or
    `clip.1.txt`, `clip.2.txt` and so on beside `clip.mp4`. A further one describes its image: the
    column teacher_caption of a manifest, or `clip.teacher.txt`. The column repeats of a manifest
    is `CaptionedVideo.repeats`. `data` is one of

    - a folder of videos, subfolders too, with `clip.txt` beside `clip.mp4`;
    - a manifest, `.jsonl` or `.csv`, with a column video, file_name or path, relative to the
      manifest, and a column caption, text or prompt;
    - a folder in the layout of Hugging Face's VideoFolder: `metadata.jsonl` or `metadata.csv`,
      beside the videos or one in each subfolder;
    - a folder that `save_to_disk` of Hugging Face's `datasets` wrote, which needs that library.

    Args:
        images: also look for the image prompt of each clip: the column image of a manifest, or
            `clip.png`, `.jpg`, `.jpeg` or `.webp` beside `clip.mp4`. A clip may have none.
        pictures: which pictures in a folder to find as clips of one frame; an image beside
            `clip.mp4` of the same name is none. A manifest names its own.
        default_caption: caption of clips without one; None refuses them.
        masks: also look for the mask of each clip: the column mask of a manifest, or
            `clip.mask.mp4`, or another film or picture of that name, beside `clip.mp4`. A clip may
            have none. Such a file without a caption of its own is never a clip.

    Raises:
        FileNotFoundError: nothing at `data`, or videos or images of a manifest are missing.
        ValueError: no videos, videos without a caption, or a manifest that cannot be understood.
        ImportError: `datasets` is needed and not installed.
    """
    data = expanded(data)
    found: Iterable[CaptionedVideo]
    if data.is_file():
        found = _of_manifest(data, data.parent, images, masks)
    elif not data.is_dir():
        raise FileNotFoundError(f"data must be a folder or a manifest, nothing is at {data}")
    elif any((data / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        if masks:
            raise ValueError(
                f"masks are read beside films and from manifests, and {data} is a folder of "
                "save_to_disk: leave masks out, or write a manifest"
            )
        found = _of_datasets(data, images)
    elif manifests := sorted(p for p in _files(data) if p.stem == "metadata"):
        found = (v for one in manifests for v in _of_manifest(one, data, images, masks))
    else:
        found = _of_folder(data, pictures)
    if default_caption is not None:
        found = (v if v.caption.strip() else replace(v, caption=default_caption) for v in found)
    if images:
        found = map(_pictured, found)
    videos = sorted(found, key=lambda video: video.name)
    if not videos:
        raise ValueError(f"no videos in {data}: none ends in {', '.join(SUFFIXES)}")
    silent = [video.name for video in videos if not video.caption.strip()]
    if silent:
        raise ValueError(
            f"{len(silent)} of {len(videos)} videos in {data} have no caption: {_some(silent)}; "
            "write clip.txt beside clip.mp4, or a column caption in the manifest"
        )
    if masks:
        videos = [_masked(video) for video in videos]
    for kind, name in {"videos": "source", "images": "image", "masks": "mask"}.items():
        paths = (getattr(video, name) for video in videos)
        lost = [str(path) for path in paths if isinstance(path, Path) and not path.is_file()]
        if lost:
            raise FileNotFoundError(f"{len(lost)} {kind} of {data} are not there: {_some(lost)}")
    return videos


def check_teacher_captions(videos: Sequence[CaptionedVideo]) -> None:
    """Refuse videos without a caption for the teacher, by a ValueError."""
    untaught = [video.name for video in videos if not video.teacher_caption]
    if untaught:
        raise ValueError(
            f"{len(untaught)} of {len(videos)} videos have no caption for the teacher: "
            f"{_some(untaught)}; write clip{TEACHER_SUFFIX} beside clip.mp4, or a column "
            f"{TEACHER_COLUMN} in the manifest"
        )


def _of_folder(
    folder: Path, pictures: Literal["no", "captioned", "all"]
) -> Iterator[CaptionedVideo]:
    """Find the videos of a folder, in the order of their names."""
    files = _without_masks(list(_names(folder)))
    films = [name for name in files if name.lower().endswith(SUFFIXES)]
    own = {os.path.splitext(name)[0] for name in films}
    stills = []
    if pictures != "no":
        stills = [
            name
            for name in files
            if name.lower().endswith(IMAGE_SUFFIXES) and os.path.splitext(name)[0] not in own
        ]
    if pictures == "all":
        _check_one_each(stills)
    own |= {os.path.splitext(name)[0] for name in stills}
    further = _numbered_texts(files, own)
    del files, own
    for name in sorted((*films, *stills)):
        path = folder / name
        texts = [folder / text for text in further.get(os.path.splitext(name)[0], ())]
        written = [path.with_suffix(".txt"), *texts]
        found = [read_text(text).strip() for text in written if text.is_file()]
        first, *more = [text for text in found if text] or [""]
        is_picture = path.suffix.lower() in IMAGE_SUFFIXES
        if is_picture and pictures == "captioned" and not first:
            continue
        second = path.with_suffix(TEACHER_SUFFIX)
        teacher = read_text(second).strip() if second.is_file() else ""
        made = CaptionedVideo(name, first, path, teacher_caption=teacher)
        yield replace(made, more_captions=tuple(more), is_picture=is_picture)


def _numbered_texts(files: Iterable[str], own: set[str]) -> dict[str, list[str]]:
    """Find the further captions: a clip's name without its suffix to clip.1.txt, clip.2.txt ...

    Args:
        own: clips without their suffixes; clip.1.txt is the only caption of clip.1.mp4.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for name in files:
        match = NUMBERED.fullmatch(name)
        if match and os.path.splitext(name)[0] not in own:
            found.setdefault(match[1], []).append((int(match[2]), name))
    return {clip: [name for _, name in sorted(texts)] for clip, texts in found.items()}


def _check_one_each(stills: Sequence[str]) -> None:
    """Refuse pictures that would share one caption, by a ValueError."""
    count = Counter(os.path.splitext(name)[0] for name in stills)
    alike = [name for name in stills if count[os.path.splitext(name)[0]] > 1]
    if alike:
        raise ValueError(
            f"pictures of one name would share one caption, got {_some(alike)}: rename them"
        )


def _pictured(video: CaptionedVideo) -> CaptionedVideo:
    """Add the image file beside the video, if the manifest names no image."""
    if video.image is not None or video.is_picture or not isinstance(video.source, Path):
        return video
    found = _beside(video.source.with_suffix(""), IMAGE_SUFFIXES)
    if len(found) > 1:
        names = ", ".join(image.name for image in found)
        raise ValueError(f"{video.name} must have one image beside it, got {names}")
    return replace(video, image=found[0]) if found else video


def _beside(stem: Path, ends: Sequence[str]) -> list[Path]:
    """Find the files called `stem` and one of `ends`, in small or capital letters."""
    cases = ((stem.with_name(stem.name + case) for case in (end, end.upper())) for end in ends)
    found = (next((path for path in each if path.is_file()), None) for each in cases)
    return [path for path in found if path is not None]


def _without_masks(files: list[str]) -> list[str]:
    """Leave out `clip.mask.mp4` beside a film or picture `clip`, unless it has a caption."""
    known = set(files)
    stems = {
        os.path.splitext(name)[0]
        for name in files
        if name.lower().endswith((*SUFFIXES, *IMAGE_SUFFIXES))
    }

    def is_mask(name: str) -> bool:
        stem, end = os.path.splitext(name)
        is_shown = end.lower() in (*SUFFIXES, *IMAGE_SUFFIXES)
        is_beside = stem.endswith(MASK_SUFFIX) and stem.removesuffix(MASK_SUFFIX) in stems
        return is_shown and is_beside and f"{stem}.txt" not in known

    return [name for name in files if not is_mask(name)]


def _masked(video: CaptionedVideo) -> CaptionedVideo:
    """Add the mask beside the video, if the manifest names none."""
    if video.mask is not None or not isinstance(video.source, Path):
        return video
    stem = video.source.with_suffix("")
    stem = stem.with_name(stem.name + MASK_SUFFIX)
    found = _beside(stem, (*SUFFIXES, *IMAGE_SUFFIXES))
    if len(found) > 1:
        names = ", ".join(mask.name for mask in found)
        raise ValueError(f"{video.name} must have one mask beside it, got {names}")
    return replace(video, mask=found[0]) if found else video


def _of_manifest(
    manifest: Path, root: Path, images: bool, masks: bool = False
) -> list[CaptionedVideo]:
    """Read the videos of a manifest; names are relative to `root`."""
    match manifest.suffix.lower():
        case ".jsonl":
            rows = _json_rows(manifest)
        case ".csv":
            rows = _csv_rows(manifest)
        case _:
            raise ValueError(f"{manifest} must be .jsonl or .csv to be read as a manifest")
    videos = []
    for line, row in rows:
        where = f"line {line} of {manifest}"
        file_name = _column(row, VIDEO_COLUMNS, where)
        if not file_name:
            raise ValueError(f"{where} names no video")
        path = manifest.parent / expanded(file_name)
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        image = None
        if images and row.get(IMAGE_COLUMN):
            image = manifest.parent / expanded(_column(row, (IMAGE_COLUMN,), where))
        mask = None
        if masks and row.get(MASK_COLUMN):
            mask = manifest.parent / expanded(_column(row, (MASK_COLUMN,), where))
        first, *more = _captions(row, where)
        teacher = _column(row, (TEACHER_COLUMN,), where) if TEACHER_COLUMN in row else ""
        videos.append(
            CaptionedVideo(
                name,
                first,
                path,
                image,
                teacher,
                tuple(more),
                _repeats(row.get(REPEATS_COLUMN), where),
                path.suffix.lower() in IMAGE_SUFFIXES,
                mask,
            )
        )
    return videos


def _captions(row: Any, where: str) -> list[str]:
    """Return the captions of a row, at least one, which may be empty."""
    name = next((name for name in CAPTION_COLUMNS if isinstance(row, dict) and name in row), "")
    if not isinstance(row.get(name) if name else None, list):
        return [_column(row, CAPTION_COLUMNS, where)]
    texts = [_column({name: text}, (name,), where) for text in row[name]]
    return [text for text in texts if text] or [""]


def _repeats(value: Any, where: str) -> int:
    """Read a row's number in the column repeats; without one it is 1."""
    if value is None or value == "":
        return 1
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and not (isinstance(value, str) and value.strip().isdecimal()):
        raise ValueError(f"{REPEATS_COLUMN} must be a whole number, {where} has {value!r}")
    if int(value) < 1:
        raise ValueError(f"{REPEATS_COLUMN} must be at least 1, {where} has {value}")
    return int(value)


def _csv_rows(manifest: Path) -> list[tuple[int, Any]]:
    try:
        with manifest.open(encoding=ENCODING, newline="") as file:
            return list(enumerate(csv.DictReader(file), 2))
    except csv.Error as error:
        raise ValueError(f"{manifest} is no table of text: {error}") from error
    except UnicodeDecodeError as error:
        raise not_text(manifest, error) from error


def _json_rows(manifest: Path) -> list[tuple[int, Any]]:
    rows = []
    for line, text in enumerate(read_text(manifest).split("\n"), 1):
        if text.strip():
            rows.append((line, parse_json(text, f"line {line} of {manifest}")))
    return rows


def _column(row: Any, names: tuple[str, ...], where: str) -> str:
    """Return the text in the first of the columns `names` that the row has."""
    name = next((name for name in names if isinstance(row, dict) and name in row), None)
    if name is None:
        raise ValueError(f"{where} has none of the columns {', '.join(names)}")
    value = "" if row[name] is None else row[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, {where} has {value!r}")
    return value.strip()


def _of_datasets(folder: Path, images: bool) -> list[CaptionedVideo]:
    with needed_for(f"{folder}, which was written by save_to_disk,", extra="data"):
        import datasets  # pyright: ignore[reportMissingImports]
    loaded: Any = datasets.load_from_disk(str(folder))
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    videos = []
    for split, rows in splits.items():
        video, caption = (
            _feature(rows.column_names, names, folder)
            for names in (VIDEO_COLUMNS, CAPTION_COLUMNS)
        )
        if type(rows.features[video]).__name__ == "Video":
            rows = rows.cast_column(video, datasets.Video(decode=False))
        pictured = images and IMAGE_COLUMN in rows.column_names
        if pictured and type(rows.features[IMAGE_COLUMN]).__name__ == "Image":
            rows = rows.cast_column(IMAGE_COLUMN, datasets.Image(decode=False))
        captions = rows[caption]
        taught = TEACHER_COLUMN in rows.column_names
        teachers = rows[TEACHER_COLUMN] if taught else [""] * len(captions)
        counted = REPEATS_COLUMN in rows.column_names
        counts = rows[REPEATS_COLUMN] if counted else [1] * len(captions)
        for i, (text, teacher) in enumerate(zip(captions, teachers, strict=True)):
            name = f"{split}/{i:06d}" if split else f"{i:06d}"
            first, *more = (
                [one for one in text if one] or [""] if isinstance(text, list) else [text]
            )
            source = _stored(rows, i, video, folder)
            has_image = pictured and rows[i][IMAGE_COLUMN] is not None
            image = _stored(rows, i, IMAGE_COLUMN, folder) if has_image else None
            repeats = _repeats(counts[i], f"row {i} of {folder}")
            given = first or "", source, image, teacher or "", tuple(more), repeats
            videos.append(CaptionedVideo(name, *given))
    return videos


def _feature(columns: list[str], names: tuple[str, ...], folder: Path) -> str:
    for name in names:
        if name in columns:
            return name
    raise ValueError(f"{folder} has none of the columns {', '.join(names)}, only {columns}")


def _stored(rows: Any, index: int, column: str, folder: Path) -> Path | Callable[[], bytes]:
    """Return a path if the row holds only a path, else a function that fetches the bytes."""
    value = rows[index][column]
    if isinstance(value, str):
        return folder / value
    if value.get("bytes") is not None:
        return lambda: rows[index][column]["bytes"]
    return folder / value["path"]


def _files(folder: Path) -> Iterator[Path]:
    """List the files below a folder, sorted, without hidden files and hidden folders."""
    return (folder / name for name in _names(folder))


def _names(folder: Path) -> list[str]:
    """Return the names of `_files`, relative to the folder, with slashes."""
    found = []
    for place, folders, files in os.walk(folder, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(place).relative_to(folder).as_posix()
        begin = "" if inside == "." else f"{inside}/"
        found += [
            f"{begin}{name}"
            for name in files
            if not name.startswith(".") and os.path.isfile(os.path.join(place, name))
        ]
    found.sort(key=lambda name: name.replace("/", "\0"))  # folder by folder
    return found


def _fail(error: OSError) -> None:
    """Raise what `os.walk` would pass over, so that no folder is left out unseen."""
    raise error


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
