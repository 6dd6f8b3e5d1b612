"""VBench's prompts, and the names that VBench expects for videos of them.

The 946 prompts of Huang et al., 2024, https://arxiv.org/abs/2311.17982, are in
`vbench_prompts.json`, under VBench's licence, Apache-2.0; 944 of them differ.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from gen_accel.files import replacing
from gen_accel.names import nearest_to

DIMENSIONS = (  # in VBench's order
    *("subject_consistency", "background_consistency", "temporal_flickering"),
    *("motion_smoothness", "dynamic_degree", "aesthetic_quality", "imaging_quality"),
    *("object_class", "multiple_objects", "human_action", "color", "spatial_relationship"),
    *("scene", "temporal_style", "appearance_style", "overall_consistency"),
)
PROMPTS = Path(__file__).with_name("vbench_prompts.json")
VIDEOS_OF_A_PROMPT = 5  # that VBench asks for; 25 for temporal flickering


def prompt_of(path: str | Path) -> str:
    """Prompt that the name of a video states, "PROMPT-0.mp4", as VBench reads it."""
    return re.sub(r"-\d+$", "", Path(path).stem)


def dimensions_of(prompt: str) -> tuple[str, ...]:
    """Dimensions that VBench asks of a prompt; none for a prompt that is not VBench's."""
    return tuple(name for name in DIMENSIONS if prompt in _by_dimension()[name])


def vbench_prompts(dimensions: Iterable[str] = (), *, count: int | None = None) -> list[str]:
    """VBench's prompts, each once, in its order.

    Args:
        dimensions: of `DIMENSIONS`; without, all.
        count: so many of them, spread evenly over the list.

    Raises:
        ValueError: a dimension that is not VBench's, or count that is not 1 to the number there.
    """
    dimensions = [*dimensions]
    for name in dimensions:
        check_dimension(name)
    chosen = {*dimensions} or {*DIMENSIONS}
    prompts = [*dict.fromkeys(text for text, named in _entries() if chosen & {*named})]
    if count is None:
        return prompts
    if not 1 <= count <= len(prompts):
        raise ValueError(f"count must be 1 to {len(prompts)}, the prompts there, got {count}")
    return [prompts[i * len(prompts) // count] for i in range(count)]


def vbench_names(prompts: Iterable[str]) -> list[str]:
    """Names without suffix that VBench expects for the videos of a list of prompts: "PROMPT-0" for
    the first of a prompt, "PROMPT-1" for the next of the same."""
    seen: dict[str, int] = {}
    names = []
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, -1) + 1
        names.append(f"{prompt}-{seen[prompt]}")
    return names


def check_dimension(name: str) -> None:
    """Raise ValueError, with the nearest name, for a dimension that is not VBench's."""
    if name not in DIMENSIONS:
        raise ValueError(
            f"dimension must be one of {', '.join(DIMENSIONS)}, got {name!r}"
            f"{nearest_to(name, DIMENSIONS)}"
        )


def place_videos(prompts: Sequence[str], videos: Sequence[Path], folder: Path) -> list[Path]:
    """Put videos into a folder under the names that VBench expects, as hard links where the file
    system has them, else as copies.

    Args:
        prompts, videos: one video for each prompt, in order; a video that is not there is left
            out.

    Returns:
        The files in `folder`.

    Raises:
        FileNotFoundError: none of the videos is there.
        ValueError: a video that is a folder of frames, which VBench does not read, or a prompt
            that cannot be the name of a file.
        OSError: the folder cannot be written.
    """
    there = [
        (video, name)
        for video, name in zip(videos, vbench_names(prompts), strict=True)
        if video.exists()
    ]
    if not there:
        raise FileNotFoundError(f"none of the {len(videos)} videos is there, such as {videos[0]}")
    for video, name in there:
        if video.is_dir():
            raise ValueError(f"{video} must be a file, which VBench reads, but it is a folder")
        if Path(name).name != name:
            raise ValueError(f"a prompt of VBench is the name of a file, got {name[:-2]!r}")
    placed = []
    for video, name in there:
        target = folder / f"{name}{video.suffix}"
        with replacing(target) as partial:
            try:
                os.link(video, partial)
            except OSError:
                shutil.copyfile(video, partial)
        placed.append(target)
    return placed


@cache
def _entries() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Prompts with their dimensions, in VBench's order."""
    held = json.loads(PROMPTS.read_text(encoding="utf-8"))
    return tuple(
        (text, tuple(part["dimensions"])) for part in held["parts"] for text in part["prompts"]
    )


@cache
def _by_dimension() -> dict[str, frozenset[str]]:
    return {
        name: frozenset(text for text, named in _entries() if name in named) for name in DIMENSIONS
    }
