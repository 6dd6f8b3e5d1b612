"""Settings of a clip: what made it, kept as JSON in its file, so that it can be made again.

A file may come from anyone: whoever reads it takes no field that names a place to write to.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from gen_accel.io import fields_of, parse_json, plain, read_fields, typed
from gen_accel.measure.video_io import read_about
from gen_accel.parsing import shown
from gen_accel.paths import check_files, expanded
from gen_accel.version import __version__

KEY, KIND, VERSION = "gen_accel", "settings", 1
WHOLE = 64 << 20  # bytes of the largest file that a fingerprint reads as a whole
PART = 1 << 20  # bytes of each part that it reads of a larger one
MOST_FILES, MOST_READ = 1000, 512 << 20  # files with folders, and bytes, that it reads at most


@dataclass(frozen=True)
class ClipSettings:
    """Settings that made a clip.

    Args:
        fields: options of `gen-accel generate` by name, with all values filled.
        files: fingerprints of what they name, by option and name; None if there is none.
        made_by: versions of the packages.
        ran: what was chosen, such as kernels and the device's type.
        wordless: options whose values have no words on a command line, as Python describes them.
    """

    fields: dict[str, Any]
    files: dict[str, dict[str, str | None]] = field(default_factory=dict)
    made_by: dict[str, str | None] = field(default_factory=dict)
    ran: dict[str, object] = field(default_factory=dict)
    wordless: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        return {KEY: KIND, "version": VERSION, **plain(asdict(self))}

    def about(self) -> dict[str, str]:
        """Return the texts for `write_video(about=)`."""
        return {KEY: json.dumps(self.to_dict(), allow_nan=False)}


def read_settings(path: str | Path) -> ClipSettings:
    """Read the settings in a clip, in a picture, or in a .json file such as a comparison's report.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: the file cannot be read.
        ValueError: it carries no settings, or settings of a newer version.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        check_files("settings", path)
        data = read_fields(path)
        data = data if data.get(KEY) == KIND else data.get(KIND)
    else:
        text = read_about(path).get(KEY)
        data = None if text is None else fields_of(parse_json(text, path), path)
    if not isinstance(data, dict) or data.get(KEY) != KIND:
        raise ValueError(
            f"{path} carries no settings: it was made without them, or by another program"
        )
    version = typed(data, "version", int, origin=path)
    if version != VERSION:
        raise ValueError(
            f"{path} carries settings of version {version}, and gen_accel {__version__} reads "
            f"version {VERSION}: update gen_accel"
        )
    parts = {
        name: typed(data, name, dict, origin=path, default={})
        for name in ("files", "made_by", "ran", "wordless")
    }
    fields = typed(data, "fields", dict, origin=path)
    return ClipSettings(fields, **parts)


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that a clip depends on."""
    found: dict[str, str | None] = {"gen_accel": __version__}
    for name in ("torch", "diffusers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def fingerprint(*sources: str | Path) -> str | None:
    """Hash the names, sizes and bytes of files, and of all files in folders; of a file above
    `WHOLE`, only its beginning, middle and end. Of a hub repository: its commit in the hub's
    cache.

    Returns None if there is neither, or more than `MOST_FILES` files and folders, or `MOST_READ`
    bytes: a file of settings, which may come from anyone, can name any folder.
    """
    digest, left = hashlib.sha256(), MOST_READ
    for source in sources:
        path = expanded(source)
        if not path.exists():
            commit = _commit(str(source))
            if commit is None:
                return None
            digest.update(commit.encode())
        held, seen = [] if path.is_dir() else [path], 0
        for place, _, names in os.walk(path):
            held += [Path(place, name) for name in names]
            seen += 1 + len(names)
            if seen > MOST_FILES:
                return None
        for file in sorted(filter(os.path.isfile, held)):
            name = file.relative_to(path).as_posix() if path.is_dir() else ""
            size = file.stat().st_size
            whole = range(0, size, PART)
            parts = whole if size <= WHOLE else (0, (size - PART) // 2, size - PART)
            left -= min(size, PART * len(parts))
            if left < 0:
                return None
            digest.update(f"{name} {size} {_parts_sha256(file, parts)}\n".encode())
    return digest.hexdigest()


def _parts_sha256(file: Path, starts: Sequence[int]) -> str:
    """Hash the parts of a file that begin at `starts`."""
    digest = hashlib.sha256()
    with file.open("rb") as held:
        for start in starts:
            held.seek(start)
            digest.update(held.read(PART))
    return digest.hexdigest()


def _commit(repository: str) -> str | None:
    """Commit of a hub repository in the hub's cache; None if it is not there."""
    from huggingface_hub import constants

    folder = f"models--{repository.replace('/', '--')}"
    try:
        return (Path(constants.HF_HUB_CACHE) / folder / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return None


def other_versions(made_by: Mapping[str, object]) -> str:
    """Say which versions differ from the present, as "torch 2.10.0, here 2.9.1"; "" for none."""
    return "; ".join(
        f"{name} {shown(made_by[name]).strip(chr(39))}, here {now}"
        for name, now in versions().items()
        if made_by.get(name) not in (None, now)
    )
