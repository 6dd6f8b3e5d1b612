"""Finding of captioned clips: folders, manifests, files of prompts, data sets of Hugging Face."""

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from gen_accel.io import ENCODING, MOST_TEXT, named, not_text, parse_json, read_lines, read_text
from gen_accel.lora.data.clips import (
    IMAGE_SUFFIXES,
    UNLESS,
    CaptionedVideo,
    ClipRule,
    Dataset,
    refuse_parts,
    repeated,
)
from gen_accel.parsing import shown
from gen_accel.paths import FILM_SUFFIXES, check_input, expanded
from gen_accel.pipelines.generation.config import parts_of, read_prompts
from gen_accel.registry import needed_for

VIDEO_COLUMNS = ("video", "file_name", "path")
CAPTION_COLUMNS = ("caption", "text", "prompt")
IMAGE_COLUMN, REPEATS_COLUMN = "image", "repeats"
TEACHER_COLUMN, TEACHER_SUFFIX = "teacher_caption", ".teacher.txt"
SHOWN_SUFFIXES = (*FILM_SUFFIXES, *IMAGE_SUFFIXES)
Beside = Literal["image", "mask", "control"]  # columns of a manifest, fields of a clip
# Ends of the names of files beside a clip, such as clip.mask.png, by what they are.
ENDS: dict[Beside, tuple[str, ...]] = {
    "image": IMAGE_SUFFIXES,
    "mask": tuple(f".mask{end}" for end in SHOWN_SUFFIXES),
    "control": tuple(f".control{end}" for end in FILM_SUFFIXES),
}
TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".yaml", ".yml", ".md")  # beside clips
NUMBERED = re.compile(r"(.+)\.(\d+)\.txt", re.DOTALL)  # clip.1.txt, a further caption of clip.mp4

SHOWN = 5  # most names listed in an error
MOST_FAULTS = 10  # most faults listed in an error

Pictures = Literal["no", "captioned", "all"]
Data = str | Path | Sequence[Dataset] | Sequence[CaptionedVideo]
Row = dict[str, Any]  # of a manifest or a data set, by its columns
Faults = list[Exception]  # what is wrong with the clips, as errors of one sentence


def find_videos(
    data: Data,
    *,
    images: bool = False,
    pictures: Pictures = "no",
    default_caption: str | None = None,
    masks: bool = False,
    controls: bool = False,
    teacher: bool = False,
    repeats: Sequence[str] = (),
    changing: bool = True,
    rule: ClipRule | None = None,
    needed: str | None = UNLESS,
) -> list[CaptionedVideo]:
    """Find every captioned video of a data set, sorted by name, or of several sets in their order.

    A clip may have several captions: a list in the column of a manifest that is JSON, or
    `clip.1.txt`, `clip.2.txt` and so on beside `clip.mp4`. One of several lines that all begin
    with a frame, as "48: a cat sleeps", changes with time. A further one describes its image: the
    column teacher_caption of a manifest, or `clip.teacher.txt`. The column repeats of a manifest
    is `CaptionedVideo.repeats`. `data` is one of

    - a folder of videos, subfolders too, with `clip.txt` beside `clip.mp4`;
    - a manifest, `.jsonl` or `.csv`, with a column video, file_name or path, relative to the
      manifest, and a column caption, text or prompt; without a video, a row is a prompt;
    - a text file, `.txt`, with a prompt on each line;
    - a folder in the layout of Hugging Face's VideoFolder: `metadata.jsonl` or `metadata.csv`,
      beside the videos or one in each subfolder;
    - a folder that `save_to_disk` of Hugging Face's `datasets` wrote, which needs that library;
    - the videos themselves, which are checked and keep their order;
    - several data sets, each with settings of its own. The names of their clips then begin with
      the name of the set's folder or manifest.

    Args:
        images: also look for the image prompt of each clip: the column image of a manifest, or
            `clip.png`, `.jpg`, `.jpeg` or `.webp` beside `clip.mp4`. A clip may have none.
        pictures: which pictures in a folder to find as clips of one frame; an image beside
            `clip.mp4` of the same name is none. A manifest names its own.
        default_caption: caption of clips without one; None refuses them.
        masks: also look for the mask of each clip: the column mask of a manifest, or
            `clip.mask.mp4`, or another film or picture of that name, beside `clip.mp4`. A clip may
            have none, but not all. Such a file without a caption of its own is never a clip.
        controls: also look for the control film of each clip, which all must have: the column
            control, or `clip.control.mp4`, or another film of that name, beside `clip.mp4`.
        teacher: whether each clip needs a caption for the teacher.
        repeats: see `repeated`.
        changing: whether captions may change with time.
        rule: what data sets take that do not say otherwise; needed for data sets alone. With one,
            a prompt is there once for each of its sizes.
        needed: why clips are needed, see `why_clips`; None takes prompts without a clip.

    Raises:
        FileNotFoundError: nothing at `data`, or videos or images of a manifest are missing.
        ValueError: no videos, captions that are missing, empty or not UTF-8, prompts where clips
            are needed, or a manifest that cannot be understood. One error names all faults.
        ImportError: `datasets` is needed and not installed.
    """
    asked: dict[Beside, bool] = {"image": images, "mask": masks, "control": controls}
    beside: list[Beside] = [what for what, is_asked in asked.items() if is_asked]
    videos, sets, faults = list[CaptionedVideo](), list[Dataset](), Faults()
    if isinstance(data, str | Path):
        sets = [Dataset(data=str(data))]
    else:
        videos = [one for one in data if isinstance(one, CaptionedVideo)]
        sets = [one for one in data if isinstance(one, Dataset)]
        if not data:
            raise ValueError("data holds no videos")
        data = ", ".join(one.data for one in sets) or "data"
    for prefix, one in zip(_prefixes(sets), sets, strict=True):
        caption = default_caption if one.default_caption is None else one.default_caption
        try:
            own = None if rule is None else one.rule(rule)
            for video in _listed(one.data, pictures, caption, beside, faults):
                times = video.repeats * one.repeats
                name = f"{prefix}{video.name}"
                videos.append(replace(video, name=name, repeats=times, rule=own))
        except (OSError, ValueError) as error:
            faults.append(error)
    try:
        if not changing:
            refuse_parts(videos)
        refuse_prompts(videos, needed)
        videos = repeated(videos, repeats) if videos else videos
    except ValueError as error:
        faults.append(error)
    films = [video for video in videos if not video.is_prompt]
    if masks and films and all(video.mask is None for video in films):
        fault = (
            f"masks is on, and no clip of {data} has one: put clip.mask.mp4 beside clip.mp4, or a "
            "column mask into the manifest"
        )
        faults.append(ValueError(fault))
    bare = [video.name for video in films if controls and video.control is None]
    if bare:
        fault = (
            f"{len(bare)} of {len(videos)} videos of {data} have no control film, which condition "
            f"control needs: {named(bare, SHOWN)}; put clip.control.mp4 beside clip.mp4, or a "
            "column control into the manifest"
        )
        faults.append(ValueError(fault))
    taught = [video for video in videos if pictures == "all" or not video.is_picture]
    untaught = [video.name for video in taught if teacher and not video.teacher_caption]
    if untaught:
        fault = (
            f"{len(untaught)} of {len(taught)} videos have no caption for the teacher: "
            f"{named(untaught, SHOWN)}; write clip{TEACHER_SUFFIX} beside clip.mp4, or a column "
            f"{TEACHER_COLUMN} in the manifest"
        )
        faults.append(ValueError(fault))
    if len(faults) > 1:
        told = named((f"({i}) {fault}" for i, fault in enumerate(faults, 1)), MOST_FAULTS)
        raise ValueError(f"{len(faults)} faults of the clips in {data}: {told}")
    for fault in faults:
        raise fault
    return [one for video in videos for one in _of_each_size(video, rule)]


def refuse_prompts(videos: Sequence[CaptionedVideo], needed: str | None) -> None:
    """Raise ValueError for prompts without a clip, if clips are needed; see `why_clips`."""
    bare = [video.name for video in videos if video.is_prompt]
    if bare and needed is not None:
        raise ValueError(
            f"{len(bare)} of {len(videos)} captions have no clip, as {shown(bare[0])}: give each "
            f"one, in a manifest as the column video; clips are needed {needed}"
        )


def _of_each_size(video: CaptionedVideo, rule: ClipRule | None) -> list[CaptionedVideo]:
    """Return a clip as it is, and a prompt once for each size."""
    own = video.rule or rule
    if own is None or not video.is_prompt:
        return [video]
    return [replace(video, rule=replace(own, sizes=(size,))) for size in own.sizes]


def _prefixes(sets: Sequence[Dataset]) -> list[str]:
    """Choose what the names of each set's clips begin with; nothing for a single set."""
    if len(sets) < 2:
        return [""] * len(sets)
    found: dict[str, str] = {}  # by the set's path
    for one in sets:
        place = expanded(one.data)
        name = place.stem if place.is_file() else place.name
        taken, number = {*found.values()}, 1
        while (label := name if number == 1 else f"{name}-{number}") in taken:
            number += 1
        found.setdefault(one.data, label)
    return [f"{found[one.data]}/" for one in sets]


def _listed(
    data: str | Path,
    pictures: Pictures,
    default_caption: str | None,
    beside: Sequence[Beside],
    faults: Faults,
) -> list[CaptionedVideo]:
    """List the videos of a data set, and add what is wrong with them to `faults`."""
    data, before = expanded(data), len(faults)
    found: Iterable[CaptionedVideo]
    if data.is_file() and data.suffix.lower() == ".txt":
        found = [CaptionedVideo(prompt, prompt, None) for prompt in read_prompts(data)]
    elif data.is_file():
        found = _of_manifest(data, data.parent, beside, faults)
    elif not data.is_dir():
        raise FileNotFoundError(
            f"data must be a folder, a manifest or a file of prompts, nothing is at {data}"
        )
    elif any((data / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        for what in beside:
            if what != "image":
                raise ValueError(
                    f"{what}s are read beside films and from manifests, and {data} is a folder of "
                    f"save_to_disk: leave {what}s out, or write a manifest"
                )
        found = _of_datasets(data, "image" in beside, faults)
    elif manifests := sorted(p for p in map(data.joinpath, _names(data)) if p.stem == "metadata"):
        found = (v for one in manifests for v in _of_manifest(one, data, beside, faults))
    else:
        found = _of_folder(data, pictures, faults)
    if default_caption is not None:
        found = (v if v.caption.strip() else replace(v, caption=default_caption) for v in found)
    videos = sorted(found, key=lambda video: video.name)
    for place, video in enumerate(videos):
        try:
            videos[place] = _in_parts(video)
        except ValueError as error:
            faults.append(error)
    if not videos and len(faults) == before:
        others = [*not_taken(data)]
        holds = f", and it holds {named(others, SHOWN)}" if others else ""
        raise ValueError(f"no videos in {data}: none ends in {', '.join(FILM_SUFFIXES)}{holds}")
    silent = [_silent(video) for video in videos if not video.caption.strip()]
    if silent:
        fault = (
            f"{len(silent)} of {len(videos)} videos in {data} have no caption: "
            f"{named(silent, SHOWN)}; write clip.txt beside clip.mp4, or a column caption in the "
            "manifest"
        )
        faults.append(ValueError(fault))
    for what in beside:
        videos = [_with_beside(video, what) for video in videos]
    for name in ("source", *ENDS):
        paths = (getattr(video, name) for video in videos)
        lost = [str(path) for path in paths if isinstance(path, Path) and not path.is_file()]
        if lost:
            kind = "videos" if name == "source" else f"{name}s"
            fault = f"{len(lost)} {kind} of {data} are not there: {named(lost, SHOWN)}"
            faults.append(FileNotFoundError(fault))
    return videos


def _silent(video: CaptionedVideo) -> str:
    """Name a clip without a caption, and its empty file of text, if there is one."""
    text = video.source.with_suffix(".txt") if isinstance(video.source, Path) else None
    return video.name if text is None or not text.is_file() else f"{video.name} (an empty .txt)"


def not_taken(data: Data) -> dict[str, str]:
    """List the files of folders that are no film, picture or text by their suffix, by name with
    the reason; none of a manifest, a folder of `save_to_disk`, or videos."""
    if not isinstance(data, str | Path):
        sets = [one for one in data if isinstance(one, Dataset)]
        each = zip(_prefixes(sets), map(not_taken, (one.data for one in sets)), strict=True)
        return {f"{prefix}{name}": why for prefix, some in each for name, why in some.items()}
    folder = expanded(data)
    names = [] if folder.is_file() else [*_names(folder)]
    others = ("dataset_info.json", "dataset_dict.json")
    if any(name in others or Path(name).stem == "metadata" for name in names):
        return {}
    known = (*SHOWN_SUFFIXES, *TEXT_SUFFIXES)
    left = (name for name in names if not name.lower().endswith(known))
    return {name: f"no film, as it ends in {Path(name).suffix!r}" for name in left}


def _of_folder(folder: Path, pictures: Pictures, faults: Faults) -> Iterator[CaptionedVideo]:
    """Find the videos of a folder, in the order of their names."""
    files = _without_beside(list(_names(folder)))
    films = [name for name in files if name.lower().endswith(FILM_SUFFIXES)]
    own = {os.path.splitext(name)[0] for name in films}
    stills = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    stills = [s for s in stills if pictures != "no" and os.path.splitext(s)[0] not in own]
    if pictures == "all":
        count = Counter(os.path.splitext(name)[0] for name in stills)
        alike = [name for name in stills if count[os.path.splitext(name)[0]] > 1]
        if alike:
            raise ValueError(
                f"pictures of one name would share one caption, got {named(alike, SHOWN)}: rename "
                "them"
            )
    own |= {os.path.splitext(name)[0] for name in stills}
    further: dict[str, list[tuple[int, str]]] = {}  # clip to clip.1.txt, clip.2.txt ...
    for name in files:
        match = NUMBERED.fullmatch(name)
        if match and os.path.splitext(name)[0] not in own:  # else the caption of clip.1.mp4
            further.setdefault(match[1], []).append((int(match[2]), name))
    for name in sorted((*films, *stills)):
        path = folder / name
        texts = [folder / text for _, text in sorted(further.get(os.path.splitext(name)[0], ()))]
        second, held = path.with_suffix(TEACHER_SUFFIX), dict[Path, str]()
        for text in (path.with_suffix(".txt"), *texts, second):
            if text.is_file():
                try:
                    held[text] = read_text(text).strip()
                except (OSError, ValueError) as error:
                    faults.append(error)
                    held[text] = "unread"  # and so not said to be missing too
        teacher = held.pop(second, "")
        first, *more = [text for text in held.values() if text] or [""]
        is_picture = path.suffix.lower() in IMAGE_SUFFIXES
        if is_picture and pictures == "captioned" and not first:
            continue
        yield CaptionedVideo(
            name,
            first,
            path,
            teacher_caption=teacher,
            more_captions=tuple(more),
            is_picture=is_picture,
        )


def _in_parts(video: CaptionedVideo) -> CaptionedVideo:
    """Cut a caption that changes with time into its parts."""
    try:
        parts = parts_of(video.caption)
    except ValueError as error:
        raise ValueError(f"the caption of {video.name}: {error}") from error
    if len(parts) == 1:
        return video
    if video.more_captions:
        raise ValueError(
            f"the caption of {video.name} changes with time, and it has "
            f"{len(video.more_captions)} more: write one of them"
        )
    first, *more = parts.values()
    return replace(video, caption=first, more_captions=tuple(more), starts=tuple(parts))


def _with_beside(video: CaptionedVideo, what: Beside) -> CaptionedVideo:
    """Add the image, mask or control beside the video, unless the manifest names one."""
    if getattr(video, what) is not None or not isinstance(video.source, Path):
        return video
    if what == "image" and video.is_picture:
        return video
    stem, found = video.source.with_suffix(""), []
    for end in ENDS[what]:  # in small or capital letters
        paths = [stem.with_name(stem.name + case) for case in (end, end.upper())]
        found += [path for path in paths if path.is_file()][:1]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{video.name} must have one {what} beside it, got {names}")
    return replace(video, **{what: found[0] if found else None})


def _without_beside(files: list[str]) -> list[str]:
    """Leave out `clip.mask.mp4` and `clip.control.mp4` beside a film or picture `clip`, unless
    they have a caption."""
    known, stems = set(files), set[str]()
    for name in files:
        if name.lower().endswith(SHOWN_SUFFIXES):
            stems.add(os.path.splitext(name)[0])

    def is_beside(name: str) -> bool:
        stem, end = os.path.splitext(name)
        clip, what = os.path.splitext(stem)
        ends = (*ENDS["mask"], *ENDS["control"])
        return clip in stems and what + end.lower() in ends and f"{stem}.txt" not in known

    return [name for name in files if not is_beside(name)]


def _of_manifest(
    manifest: Path, root: Path, asked: Sequence[Beside], faults: Faults
) -> Iterator[CaptionedVideo]:
    """Read the videos of a manifest; names are relative to `root`."""
    rows: Iterable[tuple[str, Any]]
    match manifest.suffix.lower():
        case ".jsonl":
            rows = ((i, x) for i, x in read_lines(manifest) if x.strip())
        case ".csv":
            rows = _csv_rows(manifest)
        case _:
            raise ValueError(f"{manifest} must be .jsonl or .csv to be read as a manifest")
    for where, told in rows:
        try:
            row = parse_json(told, where) if isinstance(told, str) else told
            if _is_prompt(row):
                video = _of_row(row, where, "", None)
                yield replace(video, name=video.caption or where)
                continue
            file_name = _column(row, VIDEO_COLUMNS, where)
            if not file_name:
                raise ValueError(f"{where} names no video")
            path = manifest.parent / expanded(file_name)
            beside = {}
            for column in asked:
                if row.get(column):
                    beside[column] = manifest.parent / expanded(_column(row, (column,), where))
            name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
            video = _of_row(row, where, name, path)
        except ValueError as error:
            faults.append(error)
            continue
        yield replace(video, is_picture=path.suffix.lower() in IMAGE_SUFFIXES, **beside)


def _is_prompt(row: object) -> bool:
    """Whether a row of a manifest has a caption and no video."""
    if not isinstance(row, dict) or any(row.get(name) for name in VIDEO_COLUMNS):
        return False
    return any(row.get(name) for name in CAPTION_COLUMNS)


def _of_row(
    row: Row, where: str, name: str, source: Path | Callable[[], bytes] | None
) -> CaptionedVideo:
    """Read the columns of texts and numbers, which manifests and data sets share."""
    first, *more = _captions(row, where)
    teacher = _column(row, (TEACHER_COLUMN,), where) if TEACHER_COLUMN in row else ""
    return CaptionedVideo(
        name,
        first,
        source,
        teacher_caption=teacher,
        more_captions=tuple(more),
        repeats=_repeats(row.get(REPEATS_COLUMN), where),
    )


def _captions(row: Row, where: str) -> list[str]:
    """Return the captions of a row, at least one, which may be empty."""
    name = next((name for name in CAPTION_COLUMNS if isinstance(row, dict) and name in row), "")
    if not isinstance(row.get(name) if name else None, list):
        return [_column(row, CAPTION_COLUMNS, where)]
    texts = [_column({name: text}, (name,), where) for text in row[name]]
    return [text for text in texts if text] or [""]


def _repeats(value: object, where: str) -> int:
    """Read a row's number in the column repeats; without one it is 1."""
    if value is None or value == "":
        return 1
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{REPEATS_COLUMN} must be a whole number, {where} has {shown(value)}")
    if value < 1:
        raise ValueError(f"{REPEATS_COLUMN} must be at least 1, {where} has {value}")
    return value


def _csv_rows(manifest: Path) -> list[tuple[str, Row]]:
    check_input(manifest)
    try:
        with manifest.open(encoding=ENCODING, newline="") as file:
            lines = iter(lambda: file.readline(MOST_TEXT), "")
            rows = enumerate(csv.DictReader(lines), 2)
            return [(f"line {number} of {manifest}", row) for number, row in rows]
    except csv.Error as error:
        raise ValueError(f"{manifest} is no table of text: {error}") from error
    except UnicodeDecodeError as error:
        raise not_text(manifest, error) from error


def _column(row: Row, names: tuple[str, ...], where: str) -> str:
    """Return the text in the first of the columns `names` that the row has."""
    name = next((name for name in names if isinstance(row, dict) and name in row), None)
    if name is None:
        raise ValueError(f"{where} has none of the columns {', '.join(names)}")
    value = "" if row[name] is None else row[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, {where} has {shown(value)}")
    return value.strip()


def _of_datasets(folder: Path, images: bool, faults: Faults) -> Iterator[CaptionedVideo]:
    with needed_for(f"{folder}, which was written by save_to_disk,", extra="data"):
        import datasets  # pyright: ignore[reportMissingImports]
    loaded: Any = datasets.load_from_disk(str(folder))
    splits: Any = loaded if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    for split, rows in splits.items():
        columns = rows.column_names
        for names in (VIDEO_COLUMNS, CAPTION_COLUMNS):
            if not any(name in columns for name in names):
                listed = ", ".join(names)
                raise ValueError(f"{folder} has none of the columns {listed}, only {columns}")
        video = next(name for name in VIDEO_COLUMNS if name in columns)
        kinds = {video: datasets.Video, IMAGE_COLUMN: datasets.Image}
        for column, kind in kinds.items():
            if column in columns and type(rows.features[column]) is kind:
                rows = rows.cast_column(column, kind(decode=False))
        for i, row in enumerate(rows):
            name = f"{split}/{i:06d}" if split else f"{i:06d}"
            source = _stored(rows, i, video, row[video], folder)
            try:
                found = _of_row(row, f"row {i} of {folder}", name, source)
            except ValueError as error:
                faults.append(error)
                continue
            if images and (image := row.get(IMAGE_COLUMN)) is not None:
                found = replace(found, image=_stored(rows, i, IMAGE_COLUMN, image, folder))
            yield found


def _stored(
    rows: Any, index: int, column: str, value: str | Row, folder: Path
) -> Path | Callable[[], bytes]:
    """Return a path if the row holds only a path, else a function that fetches the bytes."""
    if isinstance(value, str):
        return folder / value
    if value.get("bytes") is not None:
        return lambda: rows[index][column]["bytes"]
    return folder / value["path"]


def _names(folder: Path) -> list[str]:
    """List the files below a folder, sorted, without hidden files and hidden folders; relative to
    the folder, with slashes."""
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
