"""A list of prompts: which of them are done, and how processes share the others.

Beside each output lies a small file with what it was made from and the hashes of its files. A
prompt is done when these files are there, and were made from what is asked for now.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from gen_accel.extras import needed_for
from gen_accel.files import file_sha256, folder_sha256
from gen_accel.json_files import read_fields, typed
from gen_accel.measure import write_json
from gen_accel.paths import expanded
from gen_accel.pipelines.generation.loading import Loading, find_device, folder_of

with needed_for("generating videos", extra="video"):
    from accelerate import PartialState
    from accelerate.utils import gather_object

DONE = ".done.json"  # behind the name of an output: what it was made from


def numbered(path: Path, count: int) -> list[Path]:
    """`clip-000.mp4` and so on."""
    return [path.with_name(f"{path.stem}-{i:03d}{path.suffix}") for i in range(count)]


def is_done(target: Path, asked: Mapping[str, Any], latents: Path | None = None) -> bool:
    """Whether all files of `target` are there whole, and were made from what is asked.

    A warning tells of files that an earlier version made, and knew by their size alone.

    Args:
        latents: that are to be among these files.
    """
    record = record_of(target)
    try:
        found = read_fields(record)
        by_size = "sha256" not in found
        kept = "bytes" if by_size else "sha256"
        before, clip, files = (
            typed(found, part, dict, origin=record) for part in ("asked", "clip", kept)
        )
    except (FileNotFoundError, ValueError):  # a power cut may leave it empty
        return False
    if not files or (latents is not None and _beside(latents, target) not in files):
        return False
    # What the pipeline filled in before is the same as its number given now.
    same = all(
        before.get(name) == value or (value is not None and clip.get(name) == value)
        for name, value in asked.items()
    )
    known = _bytes if by_size else _sha256
    if not same or not all(
        value is not None and known(record.parent / name) == value for name, value in files.items()
    ):
        return False
    if by_size:
        warnings.warn(
            f"{target} counts as done by its size alone, as an earlier version kept no hash: look "
            "at it, or make it again without resuming",
            stacklevel=2,
        )
    return True


def write_done(
    target: Path, asked: Mapping[str, Any], clip: Mapping[str, Any], files: Sequence[Path]
) -> None:
    """What `is_done` reads.

    Args:
        clip: as it was made, without gaps.
        files: all that was made for `target`.
    """
    hashes = {_beside(file, target): _sha256(file) for file in files}
    write_json(record_of(target), {"asked": asked, "clip": clip, "sha256": hashes})


def forget_done(target: Path) -> None:
    """Before its files are written again."""
    record_of(target).unlink(missing_ok=True)


def what_is_done(targets: Sequence[Path], left: Sequence[int]) -> str:
    """A line for all but the numbers that are left."""
    spans: list[list[Path]] = []
    for i, target in enumerate(targets):
        if i in left:
            continue
        if i > 0 and i - 1 not in left:
            spans[-1] = [spans[-1][0], target]
        else:
            spans.append([target])
    names = ", ".join(" to ".join(path.name for path in span) for span in spans)
    return f"{len(targets) - len(left)} of {len(targets)} are done already: {names}"


def sources(
    model: str | Path, loading: Loading, from_lora: str | Path | None
) -> dict[str, str | list[str] | None]:
    """What a video is made from: files told apart by more than their names."""
    return {
        "model": identity(folder_of(model)),
        "dtype": loading.dtype,
        "loras": [_identity_of_lora(lora) for lora in loading.loras],
        "from_lora": None if from_lora is None else identity(from_lora),
    }


def identity(source: Any) -> str:
    """Of files, a hash of their names, sizes and times; of a repository on the hub, its name."""
    path = expanded(source)
    if not path.exists():
        return str(source)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    about = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def pixels(image: Image.Image) -> str:
    """Of a picture, wherever it lies: its size and a hash."""
    return f"{image.width} x {image.height} {hashlib.sha256(image.tobytes()).hexdigest()}"


class Share(NamedTuple):
    """What one process makes of a list.

    Args:
        numbers: of its videos.
        state: of the processes of `accelerate launch`; None where this one is alone.
    """

    numbers: Sequence[int]
    state: PartialState | None = None

    @classmethod
    def of(cls, left: Sequence[int], loading: Loading) -> "Share":
        """This process's part of the videos that are left, once all processes know them."""
        on_cpu = find_device(loading.device).type == "cpu"
        # The first to be ready wait for the others' videos.
        state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
        state.wait_for_everyone()  # all have seen what is done before one goes on
        return cls(left[state.process_index :: state.num_processes], state)

    @property
    def is_main_process(self) -> bool:
        return self.state is None or self.state.is_main_process

    @property
    def rank(self) -> str:
        """Before the lines of a progress bar."""
        if self.state is None or self.state.num_processes == 1:
            return ""
        return f"{self.state.process_index}: "

    def loading(self, loading: Loading) -> Loading:
        """On a device of its own, where there are several processes."""
        if self.state is None or self.state.num_processes == 1:
            return loading
        device = str(self.state.device)
        is_open = loading.device in ("auto", device.partition(":")[0])
        return replace(loading, device=device) if is_open else loading

    def gathered(self, made: Mapping[int, Any]) -> list[Any]:
        """Of `Generated`s by their numbers, all processes' in order in the main process, and none
        in the others."""
        if self.state is None or self.state.num_processes == 1:
            return [*made.values()]
        everyones = dict(gather_object([(i, _without_tensors(one)) for i, one in made.items()]))
        return [everyones[i] for i in sorted(everyones)] if self.is_main_process else []


def _without_tensors(made: Any) -> Any:
    """Its records count on a device that may be another process's own."""
    for record in made.summary.records.values():
        record.settle()
    return made


def record_of(target: Path) -> Path:
    """The small file beside `target`."""
    return target.with_name(target.name + DONE)


def _beside(file: Path, target: Path) -> str:
    """The path of `file` from the folder of `target`, however both are written."""
    return os.path.relpath(file.parent.resolve() / file.name, target.parent.resolve())


def _sha256(path: Path) -> str | None:
    """Of a file, or of all files in a folder with their names; None where neither is."""
    if path.is_dir():
        return folder_sha256(sorted(file for file in path.iterdir() if file.is_file()))
    return file_sha256(path) if path.exists() else None


def _bytes(path: Path) -> int | None:
    """Of a file, or of all files in a folder; None where neither is."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir())
    return path.stat().st_size if path.exists() else None


def _identity_of_lora(lora: str) -> str:
    """Of "folder:0.5", where the colon is not a part of the name, with its weight."""
    source, colon, weight = lora.rpartition(":")
    if not colon or expanded(lora).exists():
        return identity(lora)
    return f"{identity(source)}:{weight}"
