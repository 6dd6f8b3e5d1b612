"""Lists of prompts: a record of finished prompts, and the division of the others over processes.

Beside each output lies a small record with the request it is made from and, at the end, the hashes
of its files. A prompt is done if these files exist and the record matches the present request.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from gen_accel.attention_processors.attached.records import Summary
from gen_accel.io import contents_sha256, read_fields, typed
from gen_accel.measure import write_json
from gen_accel.paths import record_of
from gen_accel.pipelines.generation.loading import find_device
from gen_accel.registry import needed_for

with needed_for("generating videos", extra="video"):
    from accelerate import PartialState
    from accelerate.utils import gather_object


@dataclass(frozen=True)
class Generated:
    """Result of one prompt.

    Args:
        files: written files, by their kind.
        seconds: time from the prompt to the file; in a comparison, to the pixels.
        extension: effect of each long-video technique, a line each.
        report: report of the comparison; None without.
        image: description of the image prompt; empty without.
        cached: how many steps a cache skipped, in words; empty without.
    """

    prompt: str
    seed: int
    files: dict[str, Path]
    seconds: float
    summary: Summary
    extension: str = ""
    report: dict[str, Any] | None = None
    image: str = ""
    cached: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return prompt, seed, files, seconds and density, and the parts that are there of the
        rest, as JSON holds them."""
        parts = {"extension": self.extension, "image_prompt": self.image, "cache": self.cached}
        parts |= {"report": self.report}
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "files": {kind: str(path) for kind, path in self.files.items()},
            "seconds": self.seconds,
            "density": self.summary.density,
            **{name: part for name, part in parts.items() if part},
        }


def is_done(target: Path, asked: Mapping[str, object], latents: Path | None = None) -> bool:
    """Whether all files of `target` are complete and were made from the request `asked`.

    Args:
        latents: file of latents that must be among the files.
    """
    files = _hashes(target, asked)
    if not files or (latents is not None and _beside(latents, target) not in files):
        return False
    return all(
        (path := target.parent / name).exists() and contents_sha256(path) == value
        for name, value in files.items()
    )


def is_own(path: Path, target: Path, asked: Mapping[str, object]) -> bool:
    """Whether the request `asked` may write `path` for `target`: nothing is there, or this request
    wrote it, before it was cut off or as it still is."""
    if not path.exists():
        return True
    files = _hashes(target, asked)
    return files is not None and (
        not files or files.get(_beside(path, target)) == contents_sha256(path)
    )


def _hashes(target: Path, asked: Mapping[str, object]) -> dict[str, object] | None:
    """Hashes of the files beside the record of `target`; empty if it was begun, and None if it is
    of another request, or there is none."""
    record = record_of(target)
    try:
        found = read_fields(record)
        before, clip, files = (
            typed(found, part, dict, origin=record) for part in ("asked", "clip", "sha256")
        )
    except (FileNotFoundError, ValueError):  # a power cut may leave it empty
        return None
    # A value that the pipeline filled in then equals the same value given now.
    same = all(
        before.get(name) == value or (value is not None and clip.get(name) == value)
        for name, value in asked.items()
    )
    return files if same else None


def write_record(
    target: Path,
    asked: Mapping[str, object],
    clip: Mapping[str, object] | None = None,
    files: Sequence[Path] = (),
) -> None:
    """Write the record that `is_done` reads; without files, that `target` was begun.

    Args:
        clip: the clip as generated, with all values filled.
        files: all files that were made for `target`.
    """
    hashes = {_beside(file, target): contents_sha256(file) for file in files}
    write_json(record_of(target), {"asked": asked, "clip": clip or {}, "sha256": hashes})


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


class Share(NamedTuple):
    """Share of one process in a list.

    Args:
        numbers: numbers of its videos.
        state: state of the processes of `accelerate launch`; None for a single process.
    """

    numbers: Sequence[int]
    state: PartialState | None = None

    @classmethod
    def of(cls, left: Sequence[int], device: str) -> "Share":
        """Take this process's part of the videos that are left, once all processes know them."""
        on_cpu = find_device(device).type == "cpu"
        # Processes that finish early wait for the others' videos.
        state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
        if state.num_processes == 1:
            return cls(left)
        state.wait_for_everyone()  # all read the records before one goes on
        return cls(left[state.process_index :: state.num_processes], state)

    @property
    def is_main_process(self) -> bool:
        return self.state is None or self.state.is_main_process

    @property
    def rank(self) -> str:
        """Prefix of the lines of a progress bar."""
        return "" if self.state is None else f"{self.state.process_index}: "

    def device(self, asked: str) -> str:
        """Choose a device of this process's own, if there are several processes."""
        own = asked if self.state is None else str(self.state.device)
        return own if asked in ("auto", own.partition(":")[0]) else asked

    def gathered(self, made: Mapping[int, Generated]) -> list[Generated]:
        """Gather the results of all processes in the main process, in order.

        Returns an empty list in the other processes.

        Args:
            made: results of this process, by their numbers.
        """
        if self.state is None:
            return [*made.values()]
        everyones = dict(gather_object([(i, without_tensors(one)) for i, one in made.items()]))
        return [everyones[i] for i in sorted(everyones)] if self.is_main_process else []


def without_tensors(made: Generated) -> Generated:
    """Move the counts of a summary off their device, which other processes may not have."""
    for record in made.summary.records.values():
        record.settle()
    return made


def _beside(file: Path, target: Path) -> str:
    """Path of `file` relative to the folder of `target`, with both folders resolved."""
    return os.path.relpath(file.parent.resolve() / file.name, target.parent.resolve())
