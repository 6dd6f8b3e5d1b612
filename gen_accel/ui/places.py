"""Which files a server reads and writes: those of its output folder, and folders it was given."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gen_accel.demo import NAME
from gen_accel.hub import parted
from gen_accel.names import FAMILIES, PRESETS, PUBLISHED
from gen_accel.paths import expanded

# Options that name files or folders which are read, of any verb that a page runs.
READ = (
    *("image", "last_image", "video", "prompts", "image_prompt", "image_mask", "image_negative"),
    *("from_latents", "from_settings", "from_lora", "config", "videos", "reference", "held_out"),
    *("data", "init_lora", "teacher_lora", "validation_images", "validation_prompts"),
)
# Options that name a model or adapter: a folder, a repository on the hub, or an embedded one.
SOURCES = ("model", "lora", "image_adapter", "image_encoder", "init_adapter", "preset")
# Options that name what is written.
WRITTEN = ("out", "json", "save_latents", "cache")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]*)?")


class Places:
    """The folders that a server may use.

    Args:
        folder: all is written there.
        read: further folders that may be read.
    """

    def __init__(self, folder: Path, read: Iterable[str | Path] = ()) -> None:
        self.folder = folder.resolve()
        self.read = tuple(expanded(one).resolve() for one in read)

    def check(self, verb: str, options: Mapping[str, Any]) -> None:
        """Raise ValueError for an option that names a file elsewhere, or code."""
        for name, value in options.items():
            for one in value if isinstance(value, list | tuple) else (value,):
                if isinstance(one, str | Path) and str(one):
                    self._check(verb, name, str(one))

    def readable(self, path: str | Path) -> Path:
        """Return a path with its links followed, if it may be read; raise ValueError else."""
        found = expanded(path).resolve()
        if not any(found.is_relative_to(one) for one in (self.folder, *self.read)):
            raise ValueError(
                f"{path} is not a file of this page: it reads {self._told()}; upload the file, or "
                "start the page with --allow FOLDER"
            )
        return found

    def writable(self, path: str | Path) -> Path:
        """Return a path with its links followed, if it may be written; raise ValueError else."""
        found = expanded(path).resolve()
        if not found.is_relative_to(self.folder) or found == self.folder:
            raise ValueError(f"{path} is not in {self.folder}, where this page writes to")
        return found

    def _check(self, verb: str, name: str, value: str) -> None:
        if name in WRITTEN:
            self.writable(value)
        elif name in READ:
            self.readable(value)
        elif name in SOURCES:
            self._check_source(name, parted(value)[0] if name == "lora" else value)
        elif name == "method" and ":" in value:
            raise ValueError(
                f"method {value} is code to import, which a page does not do: use the command line"
            )

    def _check_source(self, name: str, value: str) -> None:
        if value == NAME or (name == "preset" and value in PRESETS):
            return
        known = (*PUBLISHED, *FAMILIES)  # which `estimate` knows without files
        if name == "model" and value in known and not expanded(value).exists():
            return
        if expanded(value).exists() or not _REPOSITORY.fullmatch(value) or ".." in value:
            self.readable(value)

    def _told(self) -> str:
        return " and ".join(str(one) for one in (self.folder, *self.read))
