"""Paths as users write them, and as file systems and ffmpeg take them."""

import os
import stat
from pathlib import Path

VIDEO_SUFFIXES = (".mp4", ".gif", ".png", "")
LONGEST_NAME = 255  # bytes, where the file system does not say


def expanded(path: str | Path) -> Path:
    """Replace "~" or "~user" at the start of `path` by the folder that it stands for.

    Raises ValueError for a user who has no home here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path} is in the home of a user who is not known here") from None


def check_video_suffix(path: Path) -> None:
    """Raise ValueError for a suffix of no known video format."""
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise ValueError(
            f"{path} ends in {path.suffix!r}; choose .mp4, .gif, .png, "
            f"or no suffix for a folder of PNG frames"
        )


def for_ffmpeg(path: str | Path) -> str:
    """Prefix `path` for ffmpeg, which takes a name with a colon (13:30/a.mp4) for a protocol."""
    return f"file:{path}"


def real(path: Path) -> Path:
    """Target of a link at `path`, which need not exist yet; `path` itself where it is no link."""
    return path.resolve() if path.is_symlink() else path


def check_replaceable(path: Path) -> None:
    """Refuse a path that cannot be written, before work is spent on it.

    Raises:
        ValueError: a name that is too long for its folder, or a device or pipe.
        OSError: a file is there that cannot be written.
    """
    length, most = len(os.fsencode(path.name)), _longest_name(path.parent)
    if length > most:
        raise ValueError(
            f"the name {path.name[:20]}...{path.suffix} has {length} bytes, and {path.parent} "
            f"takes at most {most}: shorten it"
        )
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


def _longest_name(folder: Path) -> int:
    """Longest file name in bytes; a missing folder counts as its nearest existing parent."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return LONGEST_NAME
