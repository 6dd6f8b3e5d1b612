"""Paths as users write them, and as file systems and ffmpeg take them; outputs, what lies beside
them, and what they may replace."""

import errno
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path

from gen_accel.parsing import MOST_SHOWN, shown
from gen_accel.served import DEMO, repository_of

VIDEO_SUFFIXES = (".mp4", ".gif", ".png", "")  # that are written
# Films that are found in folders; one that is named by itself may have any suffix.
FILM_SUFFIXES = (
    ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".vob", ".ts",
    ".mts", ".m2ts", ".mxf", ".wmv", ".3gp", ".flv", ".f4v", ".ogv",
)  # fmt: skip
WEIGHTS = (".safetensors", ".gguf")  # files that hold a model
INDEX, OF_BLOCKS = INDEXES = ("model_index.json", "modular_model_index.json")  # of pipelines
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
PART = re.compile(r"([a-z][a-z_0-9]*)=(.+)", re.DOTALL)
MOST_COMMENT = 1_000_000  # bytes of all comments of a GIF
LONGEST_NAME = 255  # bytes, if the file system does not say
DONE = ".done.json"  # suffix of an output's record
# Suffix of the folder of a stream; in it the film, until it is whole, and what decides the chunks.
CHUNKS, FILM, ABOUT = ".stream", "film.mp4", "stream.json"
BUNDLED_PRESETS = Path(__file__).parent / "presets"

Named = Mapping[str, Sequence[Path]]  # paths by the option that names them


def expanded(path: str | Path) -> Path:
    """Replace "~" or "~user" at the start of `path` by the folder that it stands for.

    Raises ValueError for a user who has no home here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path} is in the home of a user who is not known here") from None


def model_named(name: str | Path) -> str:
    """Resolve a model's name: "demo" is the embedded one, a folder of that name "./demo"; any name
    of a published model is its repository, unless there is a folder of that name."""
    if str(name) == DEMO:
        return str(Path(__file__).parent / "demo" / "model")
    found = repository_of(str(name))
    return str(name) if found != str(name) and expanded(name).exists() else found


def model_files(name: str | Path) -> list[Path]:
    """Return the folder of a model, and the single files that it links to; see `assemble`."""
    folder = expanded(model_named(name))
    return [folder, *(Path(os.path.realpath(link)) for link in folder.glob("*/original.*"))]


def adapter_named(name: str | Path) -> str:
    """Resolve the name of an image-prompt adapter, as `model_named` does."""
    return str(Path(__file__).parent / "demo" / "image_prompt") if str(name) == DEMO else str(name)


def check_files(what: str, *files: str | Path | None) -> None:
    """Raise FileNotFoundError for a file or folder that is given and not there, ValueError as
    `check_input`."""
    for file in files:
        if file is not None:
            check_input(file)
            if not expanded(file).exists():
                raise FileNotFoundError(f"no {what} at {file}")


def check_input(path: str | Path) -> None:
    """Refuse an input that is neither a file nor a folder on a disk, as reading it may never end.

    A path without anything there passes, for whoever opens it to name.

    Raises:
        ValueError: a pipe, socket or device, a file of /proc and its like, or a link to itself.
        OSError: the system does not say what is there.
    """
    try:
        about = expanded(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a link that leads to itself: give the file") from None
        raise OSError(error.errno, error.strerror, str(path)[:MOST_SHOWN]) from error
    if stat.S_ISDIR(about.st_mode) or (stat.S_ISREG(about.st_mode) and about.st_size):
        return
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    if stat.S_ISREG(about.st_mode):
        # File systems of the kernel, such as /proc, have no blocks, and files of no size.
        if not hasattr(os, "statvfs") or os.statvfs(expanded(path)).f_blocks:
            return
        kinds[stat.S_IFREG] = "a file of the system itself"
    kind = kinds.get(stat.S_IFMT(about.st_mode), "a device")
    raise ValueError(
        f"{path} is {kind}, whose end is not known: write what it holds to a file, and give that"
    )


def part_of(text: str) -> tuple[str | None, Path]:
    """Split "PART=FILE" of a file of weights, whose part may be left out."""
    found = None if expanded(text).exists() else PART.fullmatch(text)
    return (found[1], expanded(found[2])) if found else (None, expanded(text))


def check_no_pickle(path: Path) -> None:
    """Refuse a pickle, by its name, and say how the weights in it become safetensors."""
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which may run code as it is loaded: give the same weights as "
            ".safetensors, as ComfyUI's repositories have them, or write one by "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW), where a file "
            'of several models, as of Self-Forcing, needs ["generator_ema"] after load(...)'
        )


def weights_named(text: str | Path) -> tuple[str | None, Path]:
    """Split as `part_of`, and check the file.

    Raises:
        FileNotFoundError: no file there.
        ValueError: a pickle, another format, or a file that `check_input` refuses.
    """
    part, path = part_of(str(text))
    check_files("file of weights", path)
    check_no_pickle(path)
    if path.suffix not in WEIGHTS or not path.is_file():
        raise ValueError(f"{path} must be a file that ends in {' or '.join(WEIGHTS)}")
    return part, path


def check_comments(path: Path) -> None:
    """Refuse a GIF of long comments, which Pillow joins in a time that grows with their square.

    Raises:
        OSError: the file cannot be read.
        ValueError: its comments have over `MOST_COMMENT` bytes.
    """
    with path.open("rb") as file:
        head = file.read(13)
        if not head.startswith(b"GIF8") or len(head) < 13:
            return
        file.seek(3 << (head[10] & 7) + 1 if head[10] & 128 else 0, os.SEEK_CUR)
        told = 0
        while (kind := file.read(1)) in (b"!", b","):
            if kind == b",":
                frame = file.read(9)
                if len(frame) < 9:
                    return
                colours = 3 << (frame[8] & 7) + 1 if frame[8] & 128 else 0
                file.seek(colours + 1, os.SEEK_CUR)
            is_comment = kind == b"!" and file.read(1) == b"\xfe"
            while size := int.from_bytes(file.read(1), "big"):
                file.seek(size, os.SEEK_CUR)
                told += size * is_comment
                if told > MOST_COMMENT:
                    raise ValueError(
                        f"{path} holds comments of over {MOST_COMMENT:,} bytes: write it again "
                        "without them"
                    )


def check_picture(file: str | Path) -> None:
    """Raise ValueError for a file that is no picture."""
    from PIL import Image, UnidentifiedImageError

    path = expanded(file)
    check_input(path)
    if path.is_dir():
        raise ValueError(f"{file} must be a picture, but it is a folder")
    check_comments(path)
    try:
        with Image.open(path):
            pass
    except UnidentifiedImageError:
        raise ValueError(f"{file} is no image that Pillow knows") from None


def check_video_path(path: Path) -> None:
    """Raise ValueError or OSError for a video that cannot be written at `path`."""
    check_video_suffix(path)
    if path.suffix.lower() in (".png", ""):  # a folder, or one picture
        _check_place(path)
    else:
        check_output(path)


def check_output(path: Path | None, suffix: str = "") -> None:
    """Raise ValueError or OSError for a file that cannot be written at `path`.

    Args:
        suffix: the suffix that it must have.
    """
    if path is None:
        return
    if suffix and path.suffix.lower() != suffix:
        raise ValueError(f"{path} must end in {suffix}")
    if os.path.isdir(expanded(path)):
        raise ValueError(f"{path} must be a file, but it is a folder")
    _check_place(path)


def check_folder_path(what: str, path: str | Path | None) -> None:
    """Raise ValueError for a folder that cannot be made at `path`, as a file is there."""
    if path is None:
        return
    if os.path.isfile(expanded(path)):
        raise ValueError(f"{what} must be a folder, but {path} is a file")
    if not os.path.isdir(expanded(path)):
        _check_place(path)


def _check_place(path: str | Path) -> None:
    if not expanded(path).name:  # "/", or the folder that the program runs in
        raise ValueError(f"cannot write to {path} itself: name a file or folder in it")
    place = expanded(path).absolute()
    check_names(place)
    above = next(folder for folder in place.parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"cannot write to {path}: {above} is a file and no folder")
    check_replaceable(place)


def check_video_suffix(path: Path) -> None:
    """Raise ValueError for a suffix of no known video format."""
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise ValueError(
            f"{path} ends in {shown(path.suffix)}; choose .mp4, .gif, .png, "
            f"or no suffix for a folder of PNG frames"
        )


def for_ffmpeg(path: str | Path) -> str:
    """Prefix `path` for ffmpeg, which takes a name with a colon (13:30/a.mp4) for a protocol."""
    return f"file:{path}"


def real(path: Path) -> Path:
    """Target of a link at `path`, which need not exist yet; `path` itself if it is no link."""
    return path.resolve() if path.is_symlink() else path


def check_replaceable(path: Path) -> None:
    """Refuse a path that cannot be written, before work is spent on it.

    Raises:
        ValueError: a name that is too long for its folder, a device or pipe, or a path in /proc
            or /sys.
        OSError: a file is there that cannot be written.
    """
    if os.path.realpath(path).startswith(("/proc/", "/sys/")):
        raise ValueError(f"{path} is of the system itself, which keeps no files: write elsewhere")
    check_names(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):  # the folder is checked by whoever makes it
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{path} must be a file, but it is a device or a pipe")
    if stat.S_ISREG(mode) and not mode & 0o222:
        raise PermissionError(
            f"{path} is read-only: make it writable (chmod u+w), or write somewhere else"
        )


def check_names(path: Path) -> None:
    """Raise ValueError for a name in `path` that is too long for the folder that it lies in."""
    for one in (*reversed(path.parents), path):
        length, most = len(os.fsencode(one.name)), _longest_name(one.parent)
        if length > most:
            raise ValueError(
                f"the name {one.name[:20]}...{one.name[-16:]} has {length} bytes, and "
                f"{one.parent} takes at most {most}: shorten it"
            )


def _longest_name(folder: Path) -> int:
    """Longest file name in bytes; a missing folder counts as its nearest existing parent."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return LONGEST_NAME


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
        # As file systems compare paths that know no case.
        folded = unicodedata.normalize("NFC", str(place)).casefold()
        same: list[object] = [folded, *([_identity(place)] if place.exists() else [])]
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
        holds_data = place.is_file() and place.stat().st_size > 0
        if not (any(place.iterdir()) if place.is_dir() else holds_data):
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
    report = target.with_name(f"{target.stem}.json")
    return {"dense": dense, "side by side": together, "report": report}


def beside(target: Path, name: str) -> Path:
    """Insert a name, `clip.mp4` to `clip.name.mp4`; a folder of frames gets an .mp4 beside it."""
    suffix = target.suffix if target.suffix.lower() in (".mp4", ".gif") else ".mp4"
    return target.with_name(f"{target.stem}.{name}{suffix}")
