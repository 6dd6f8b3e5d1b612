"""Places that a server uses: its output folder and folders it was given. Code is refused."""

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from gen_accel.demo import NAME
from gen_accel.hub import parted
from gen_accel.paths import expanded, model_named
from gen_accel.registry import PRESETS
from gen_accel.served import row_of

# Options that name files or folders which are read, of any verb that a page runs.
READ = (
    *("image", "last_image", "video", "prompts", "image_prompt", "image_mask", "image_negative"),
    *("from_latents", "from_settings", "from_lora", "config", "videos", "reference", "held_out"),
    *("data", "init_lora", "teacher_lora", "validation_images", "validation_last_images"),
    "validation_controls",
)
# Options that name a model or adapter: a folder, a repository on the hub, or an embedded one.
SOURCES = ("model", "lora", "image_adapter", "image_encoder", "init_adapter", "preset")
KNOWING = ("estimate", "show")  # verbs that know published models without their files
# Options that name what is written.
WRITTEN = ("out", "json", "save_latents", "cache")
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(/[\w./-]*)?")
# Packages whose optimizers a page may name: all others are code that it does not import.
OPTIMIZERS = (
    *("torch.optim", "bitsandbytes.optim", "torchao.optim", "transformers.optimization"),
    *("prodigyopt", "schedulefree", "pytorch_optimizer", "lion_pytorch", "dadaptation"),
)
UPLOADS = "uploads"  # in the output folder: what browsers sent, and what the page shows
TRACKERS = ("tensorboard", "none")  # which send nothing to another machine


class Places:
    """The folders that a server may use.

    Args:
        folder: all but captions is written there.
        read: further folders that may be read.
        allowed: further folders that may be read, and in which captions may be edited; names on
            the hub too.
        models: folders that may be read, and names on the hub.
        any_on_hub: whether any repository on the hub may be named and is fetched.
    """

    def __init__(
        self,
        folder: Path,
        read: Iterable[str | Path] = (),
        *,
        allowed: Iterable[str | Path] = (),
        models: Iterable[str] = (),
        any_on_hub: bool = False,
    ) -> None:
        self.any_on_hub = any_on_hub
        self.folder = folder.resolve()
        named = [*map(str, allowed), *models]
        self.hub = tuple(
            one
            for one in map(model_named, named)
            if _REPOSITORY.fullmatch(one) and not expanded(one).exists()
        )
        self.edited = tuple(expanded(one).resolve() for one in map(str, allowed))
        local = [one for one in models if expanded(one).exists()]
        self.read = (*(expanded(one).resolve() for one in (*local, *read)), *self.edited)

    def check(self, verb: str, options: Mapping[str, object]) -> None:
        """Raise ValueError for an option that names a file elsewhere, code, or another server."""
        no_code(options)
        for name, value in options.items():
            for one in value if isinstance(value, list | tuple) else (value,):
                if isinstance(one, str | Path) and str(one):
                    self._check(verb, name, str(one))

    def check_sources(self, options: Mapping[str, object]) -> None:
        """Raise ValueError for code, and for a model or adapter from elsewhere.

        Files that are only written or read later may still be any.
        """
        no_code(options)
        for name in SOURCES:
            value = options.get(name)
            if isinstance(value, str) and value:
                self._check(KNOWING[0], name, value)

    def readable(self, path: str | Path) -> Path:
        """Return a path with its links followed, if it may be read; raise ValueError else."""
        found = expanded(path).resolve()
        if not any(found.is_relative_to(one) for one in (self.folder, *self.read)):
            raise ValueError(
                f"{path} is not a file of this page: it reads its own folder, its models and what "
                "--allow names; upload the file, or start the page with --allow FOLDER"
            )
        return found

    def writable(self, path: str | Path) -> Path:
        """Return a path with its links followed, if it may be written; raise ValueError else."""
        found = expanded(path).resolve()
        if not found.is_relative_to(self.folder) or found == self.folder:
            raise ValueError(f"{path} is not in {self.folder}, where this page writes to")
        return found

    def editable(self, path: str | Path) -> Path:
        """Return a caption's path, links followed, if it may be edited; ValueError else."""
        found = expanded(path).resolve()
        if not any(found.is_relative_to(one) for one in (self.folder, *self.edited)):
            raise ValueError(
                f"{path} is not in a folder whose captions this page edits: start it with --allow "
                f"{found.parent}"
            )
        return found

    def _check(self, verb: str, name: str, value: str) -> None:
        if name in WRITTEN:
            self.writable(value)
        elif name in READ:
            self.readable(value)
        elif name in SOURCES:
            is_known = name == "model" and row_of(value) is not None
            if is_known and verb in KNOWING and not expanded(value).exists():
                return  # its configs are in the package
            self._check_source(name, parted(value)[0] if name == "lora" else value)
        elif name == "log_with" and value not in TRACKERS:
            raise ValueError(
                f"log_with {value} sends data to another server, which a page does not do: give "
                f"{' or '.join(TRACKERS)}, or use the command line"
            )

    def _check_source(self, name: str, value: str) -> None:
        if value == NAME or (name == "preset" and value in PRESETS):
            return
        if name == "model":
            value = model_named(value)
        found = _REPOSITORY.fullmatch(value)
        if expanded(value).exists() or found is None or ".." in value:
            self.readable(value)
        elif not self.any_on_hub and not {value, found[1]} & {*self.hub}:
            raise ValueError(
                f"{name} {value} is on the hub, and this page asks for no repository but those "
                f"that it was started with: --model {found[1]} or --allow {found[1]}; all: --hub"
            )


def clear_uploads(folder: Path, used: Iterable[object], *, seconds: float, most: int) -> None:
    """Remove files that have lain in a folder for longer, then the oldest, until few are left.

    Args:
        used: values; files that one of their texts names, or the folder of, stay.
        seconds: that a file stays.
        most: bytes that are left, if the files that stay have no more.
    """
    named = {Path(text) for text in _texts([*used])}
    kept = [path for path in named if path.is_relative_to(folder) and path != folder]
    found: list[tuple[float, int, Path]] = []
    for place, _, names in os.walk(folder):  # which passes over folders that go meanwhile
        for path in (Path(place, name) for name in names):
            with suppress(OSError):  # it is gone
                about = path.lstat()
                found.append((about.st_ctime, about.st_size, path))
    total, now = sum(size for _, size, _ in found), time.time()
    for when, size, path in sorted(found):
        if total <= most and now - when < seconds:
            break
        if not any(path.is_relative_to(one) for one in kept):
            with suppress(OSError):
                path.unlink()
                total -= size
                if path.parent != folder:
                    path.parent.rmdir()


def no_code(values: Mapping[str, object]) -> None:
    """Raise ValueError for an option whose value names code to import.

    Call it before the library sees the values: it imports what a method or optimizer names.
    """
    for name, value in values.items():
        for text in _texts(value):
            if name in ("method", "set", "settings") and ":" in text:
                is_code = True
            else:
                home = text.rpartition(".")[0]
                known = any(f"{home}.".startswith(f"{one}.") for one in OPTIMIZERS)
                is_code = name == "optimizer" and bool(home) and not known
            if is_code:
                raise ValueError(
                    f"{name} {text} is code to import, which a page does not do: use the command "
                    "line"
                )


def _texts(value: object) -> Iterator[str]:
    """All texts in a value, as YAML may hold them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts([*pair])
    elif isinstance(value, list | tuple | set):
        for one in value:
            yield from _texts(one)
