"""Lists of prompts: a record of finished prompts, and the division of the others over processes.

Beside each output lies a small record with the request it was made from and the hashes of its
files. A prompt is done if these files exist and the record matches the present request.
"""

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from gen_accel.io import file_sha256, folder_sha256, read_fields, typed
from gen_accel.measure import write_json
from gen_accel.paths import expanded
from gen_accel.pipelines.generation.config import GenerateConfig, Loading
from gen_accel.pipelines.generation.inputs import identity
from gen_accel.pipelines.generation.loading import find_device
from gen_accel.pipelines.generation.model_index import folder_of
from gen_accel.registry import needed_for

with needed_for("generating videos", extra="video"):
    from accelerate import PartialState
    from accelerate.utils import gather_object

DONE = ".done.json"  # suffix of an output's record


def numbered(path: Path, count: int) -> list[Path]:
    """Number a path: `clip-000.mp4` and so on."""
    return [path.with_name(f"{path.stem}-{i:03d}{path.suffix}") for i in range(count)]


def is_done(target: Path, asked: Mapping[str, Any], latents: Path | None = None) -> bool:
    """Whether all files of `target` are complete and were made from the request `asked`.

    Args:
        latents: file of latents that must be among the files.
    """
    record = record_of(target)
    try:
        found = read_fields(record)
        before, clip, files = (
            typed(found, part, dict, origin=record) for part in ("asked", "clip", "sha256")
        )
    except (FileNotFoundError, ValueError):  # a power cut may leave it empty
        return False
    if not files or (latents is not None and _beside(latents, target) not in files):
        return False
    # A value that the pipeline filled in then equals the same value given now.
    same = all(
        before.get(name) == value or (value is not None and clip.get(name) == value)
        for name, value in asked.items()
    )
    return same and all(
        value is not None and _sha256(record.parent / name) == value
        for name, value in files.items()
    )


def write_done(
    target: Path, asked: Mapping[str, Any], clip: Mapping[str, Any], files: Sequence[Path]
) -> None:
    """Write the record that `is_done` reads.

    Args:
        clip: the clip as generated, with all values filled.
        files: all files that were made for `target`.
    """
    hashes = {_beside(file, target): _sha256(file) for file in files}
    write_json(record_of(target), {"asked": asked, "clip": clip, "sha256": hashes})


def forget_done(target: Path) -> None:
    """Delete the record of `target`, before its files are written again."""
    record_of(target).unlink(missing_ok=True)


def what_is_done(targets: Sequence[Path], left: Sequence[int]) -> str:
    """Describe in a line the targets that are done, all but the numbers in `left`."""
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


def sources(config: GenerateConfig) -> dict[str, str | list[str] | None]:
    """Identify the model, dtype and LoRAs of a video, with files by more than their names."""
    return {
        "model": identity(folder_of(config.model)),
        "dtype": config.dtype,
        "loras": [_identity_of_lora(lora) for lora in config.loras],
        "from_lora": None if config.from_lora is None else identity(config.from_lora),
    }


class Share(NamedTuple):
    """Share of one process in a list.

    Args:
        numbers: numbers of its videos.
        state: state of the processes of `accelerate launch`; None for a single process.
    """

    numbers: Sequence[int]
    state: PartialState | None = None

    @classmethod
    def of(cls, left: Sequence[int], loading: Loading) -> "Share":
        """Take this process's part of the videos that are left, once all processes know them."""
        on_cpu = find_device(loading.device).type == "cpu"
        # Processes that finish early wait for the others' videos.
        state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
        state.wait_for_everyone()  # all read the records before one goes on
        return cls(left[state.process_index :: state.num_processes], state)

    @property
    def is_main_process(self) -> bool:
        return self.state is None or self.state.is_main_process

    @property
    def rank(self) -> str:
        """Prefix of the lines of a progress bar."""
        if self.state is None or self.state.num_processes == 1:
            return ""
        return f"{self.state.process_index}: "

    def device(self, asked: str) -> str:
        """Choose a device of this process's own, if there are several processes."""
        if self.state is None or self.state.num_processes == 1:
            return asked
        device = str(self.state.device)
        return device if asked in ("auto", device.partition(":")[0]) else asked

    def gathered(self, made: Mapping[int, Any]) -> list[Any]:
        """Gather the `Generated`s of all processes in the main process, in order.

        Returns an empty list in the other processes.

        Args:
            made: results of this process, by their numbers.
        """
        if self.state is None or self.state.num_processes == 1:
            return [*made.values()]
        everyones = dict(gather_object([(i, without_tensors(one)) for i, one in made.items()]))
        return [everyones[i] for i in sorted(everyones)] if self.is_main_process else []


def without_tensors(made: Any) -> Any:
    """Move the counts of a summary off their device, which other processes may not have."""
    for record in made.summary.records.values():
        record.settle()
    return made


def record_of(target: Path) -> Path:
    """Path of the record beside `target`."""
    return target.with_name(target.name + DONE)


def _beside(file: Path, target: Path) -> str:
    """Path of `file` relative to the folder of `target`, with both folders resolved."""
    return os.path.relpath(file.parent.resolve() / file.name, target.parent.resolve())


def _sha256(path: Path) -> str | None:
    """Hash a file, or all files in a folder with their names; None if there is neither."""
    if path.is_dir():
        return folder_sha256(sorted(file for file in path.iterdir() if file.is_file()))
    return file_sha256(path) if path.exists() else None


def _identity_of_lora(lora: str) -> str:
    """Identify a LoRA given as "folder:0.5", with its weight, unless the colon is in the name."""
    source, colon, weight = lora.rpartition(":")
    if not colon or expanded(lora).exists():
        return identity(lora)
    return f"{identity(source)}:{weight}"
