"""Outputs: their names, what lies beside them, and what they may replace."""

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path

from gen_accel.paths import check_names, expanded

DONE = ".done.json"  # suffix of an output's record
# Suffix of the folder of a stream; in it the film, until it is whole, and what decides the chunks.
CHUNKS, FILM, ABOUT = ".stream", "film.mp4", "stream.json"

Named = Mapping[str, Sequence[Path]]  # paths by the option that names them


def check_places(outputs: Named, new: Named, inputs: Named, *, overwrite: bool) -> None:
    """Refuse outputs that would replace an input, one another, or what is there already.

    An output may not be an input, by whatever name or link, nor a folder around one; a file in a
    folder that is read is no output either. Two outputs may not be the same file, where names
    differ in case alone too, nor one within the other. What is there already stays, but for an
    empty file, unless `overwrite` is given.

    Args:
        outputs: files, and folders that are replaced whole.
        new: those among them that no earlier run may have left for this one to go on with.
        inputs: files and folders that are read; names of the hub, which are not there, are passed
            over.

    Raises:
        ValueError: two of the paths are in each other's way, or an output has a name that is too
            long.
        FileExistsError: an output is there already.
    """
    read: dict[object, str] = {}  # by file or folder, and by its path
    around: dict[Path, str] = {}  # by the folders around it
    for name, path in _each(inputs):
        if (place := _placed(path)).exists():
            read |= dict.fromkeys((_identity(place), place), f"{name} {path}")
            around |= dict.fromkeys(place.parents, f"{name} {path}")
    written: dict[object, str] = {}
    within: dict[Path, str] = {}
    for name, path in _each(outputs):
        place, label = _placed(path), f"{name} {path}"
        check_names(place)
        same: list[object] = [_folded(place), *([_identity(place)] if place.exists() else [])]
        for found in (read[key] for key in same if key in read):
            raise ValueError(f"{label} is read, as {found}: write to another file")
        if place in around:
            raise ValueError(
                f"{label} is the folder of {around[place]}, which is read: write somewhere else"
            )
        for other in (written[key] for key in same if key in written):
            raise ValueError(f"{other} and {label} are one file: give each output its own")
        for other in (*(written[up] for up in place.parents if up in written), within.get(place)):
            if other is not None:
                raise ValueError(f"{other} and {label} are within each other: part them")
        written |= dict.fromkeys((*same, place), label)
        within |= dict.fromkeys(place.parents, label)
    for name, path in _each(new):
        place = _placed(path)
        if not (any(place.iterdir()) if place.is_dir() else _holds_data(place)):
            continue
        for found in (read[up] for up in place.parents if up in read):
            raise ValueError(f"{name} {path} is in {found}, which is read: write somewhere else")
        if not overwrite:
            raise FileExistsError(
                f"{path} is there already: --overwrite replaces it, or give another {name}"
            )


def _each(places: Named) -> Iterator[tuple[str, Path]]:
    return ((name, path) for name, several in places.items() for path in several)


def _placed(path: Path) -> Path:
    """Resolve a path, with its links. A loop of links is left to whoever opens it."""
    return Path(os.path.realpath(expanded(path)))


def _identity(place: Path) -> tuple[int, int]:
    about = place.stat()
    return about.st_dev, about.st_ino


def _folded(path: Path) -> str:
    """Write a path as file systems compare it that know no case."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def _holds_data(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def numbered(path: Path, count: int) -> list[Path]:
    """Number a path: `clip-000.mp4` and so on."""
    return [path.with_name(f"{path.stem}-{i:03d}{path.suffix}") for i in range(count)]


def free_name(path: Path) -> Path:
    """Return `path`, or if that is there already, the next number that is free: `clip-2.mp4`."""
    others = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return next(one for one in chain([path], others) if not one.exists())


def record_of(target: Path) -> Path:
    """Path of the record beside `target`, see `pipelines.generation.prompt_list`."""
    return target.with_name(target.name + DONE)


def preview_of(target: Path) -> Path:
    """Path of the preview beside `target`, `clip.mp4` to `clip.preview.png`."""
    return target.with_name(f"{target.stem}.preview.png")


def comparison_files(target: Path) -> dict[str, Path]:
    """Paths of the dense video, both side by side, and the report, beside `target`."""
    dense, together = beside(target, "dense"), beside(target, "side_by_side")
    return {"dense": dense, "side by side": together, "report": report_of(target)}


def report_of(target: Path) -> Path:
    return target.with_name(f"{target.stem}.json")


def beside(target: Path, name: str) -> Path:
    """Insert a name, `clip.mp4` to `clip.name.mp4`; a folder of frames gets an .mp4 beside it."""
    suffix = target.suffix if target.suffix.lower() in (".mp4", ".gif") else ".mp4"
    return target.with_name(f"{target.stem}.{name}{suffix}")
