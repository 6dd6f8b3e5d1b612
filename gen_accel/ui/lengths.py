"""Data of the screen Longer: techniques with their reasons, and a video over time."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gen_accel.cli.metrics import motion_rows
from gen_accel.json_files import read_fields
from gen_accel.measure.sheets import contact_sheet
from gen_accel.measure.video_io import read_stream
from gen_accel.names import TECHNIQUES, split_technique

WEIGHTS, CONFIG = "pytorch_lora_weights.safetensors", "gen_accel.json"  # of a trained LoRA
SHEET = 9  # frames of a contact sheet
MOST_TIMES = 6  # of the trained length, that the slider goes to
CHANNELS = ("red", "green", "blue", "contrast")


@dataclass(frozen=True)
class Held:
    """A LoRA of `gen-accel train` that holds techniques for longer video.

    Args:
        techniques: with their settings.
        trained_frames: of the model that it was trained on.
        frames: of the longest clips that it saw.
    """

    folder: Path
    techniques: tuple[str, ...]
    trained_frames: int
    frames: int
    holds_guidance: bool

    @property
    def words(self) -> str:
        guided = ", without guidance" if self.holds_guidance else ""
        place = self.folder.parent.name if self.folder.name == "lora" else self.folder.name
        return f"{place}: {self.frames} frames, {', '.join(self.techniques)}{guided}"


def longest(trained: int) -> int:
    """The most frames of the slider: six times as many as a model was trained at."""
    return (trained - 1) * MOST_TIMES + 1


def with_settings(chosen: Iterable[str], settings: str) -> list[str]:
    """Give settings, as in "fresh_noise:shift=22,riflex:k=4", to the chosen techniques, in the
    order of `TECHNIQUES`.

    Raises ValueError for settings of a technique that is not chosen.
    """
    names, given = {*chosen}, {}
    for part in filter(None, (one.strip() for one in settings.split(","))):
        name, values = split_technique(part)
        if name not in names or not values:
            raise ValueError(
                "settings are of techniques that are chosen, as in fresh_noise:shift=22, got "
                f"{part!r}"
            )
        given[name] = part
    return [given.get(name, name) for name in TECHNIQUES if name in names]


def loras_in(folders: Iterable[Path]) -> list[Held]:
    """LoRAs below folders that were trained here and hold techniques for longer video."""
    found = {}
    for folder in folders:
        for file in sorted(folder.rglob(CONFIG)):
            if (file.parent / WEIGHTS).is_file() and (held := _held(file)) is not None:
                found[held.folder] = held
    return [*found.values()]


def _held(file: Path) -> Held | None:
    try:
        data = read_fields(file)
    except (OSError, ValueError):
        return None  # of another program
    techniques, trained = data.get("techniques"), data.get("trained_frames")
    frames, guidance = data.get("frames"), data.get("teacher_guidance", 1.0)
    if not (isinstance(techniques, list) and techniques):
        return None
    if not (isinstance(trained, int) and isinstance(frames, int)):
        return None
    guided = isinstance(guidance, int | float) and guidance > 1
    return Held(file.parent, tuple(map(str, techniques)), trained, frames, guided)


def drift_table(course: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Columns of a chart: how far colours and contrast lie from the first frame's, by frame.

    Args:
        course: `by_frame` of `gen-accel metrics --by-frame`.
    """
    looks = [
        (*colors, contrast)
        for colors, contrast in zip(course["colors"], course["contrasts"], strict=True)
    ]
    return {
        "frame": [i for i in range(len(looks)) for _ in CHANNELS],
        "drift": [x - start for row in looks for x, start in zip(row, looks[0], strict=True)],
        "of": [name for _ in looks for name in CHANNELS],
    }


def loop_table(course: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Columns of a chart: how alike frames are that lie so many frames apart, from 1 to two thirds
    of the clip, as far as a loop is looked for."""
    lags = course["similarity"][: 2 * len(course["similarity"]) // 3 + 1]
    seen = [(lag, x) for lag, x in enumerate(lags) if lag and x is not None]
    return {"frames apart": [lag for lag, _ in seen], "similarity": [x for _, x in seen]}


def motion_words(found: Mapping[str, Any], trained: int | None) -> list[list[str]]:
    """Rows of what a video does over time, and what it means.

    Args:
        found: what `gen-accel metrics --json` writes of one video.
        trained: the lag that the similarity was asked at; None: none was.
    """
    meaning = {
        "loop score": "0: never returns, 1: repeats itself exactly",
        "colour drift": "0: colours stay as they were",
        "contrast drift": "0: contrast stays as it was",
        "dynamic degree": "share of the time in which something moves",
        "flicker": "1: each frame is like the one before",
        "similarity": f"of frames {trained} apart, as far as it was trained: 1 is the same again",
    }
    return [[name, value, meaning.get(name, "")] for name, value in motion_rows(found).items()]


def sheet_of(videos: Mapping[str, Path], count: int = SHEET) -> np.ndarray:
    """Frames of videos, evenly spaced, a row for each; see `contact_sheet`."""
    pixels = [np.concatenate([*read_stream(file)]) for file in videos.values()]
    return contact_sheet(pixels, [*videos], count=count)


def refused(answer: Mapping[str, Any]) -> dict[str, str]:
    """Map techniques that cannot be chosen to the reasons, from `gen-accel techniques --json`."""
    return {one["name"]: one["refused"] for one in answer["techniques"] if one["refused"]}


def effects(answer: Mapping[str, Any]) -> list[str]:
    """Say what the chosen techniques do, a line each."""
    found = answer["techniques"]
    return [f"{one['name']}: {one['effect']}" for one in found if one["effect"]]


def does(answer: Mapping[str, Any]) -> dict[str, str]:
    """Map techniques to what each does."""
    return {one["name"]: one["does"] for one in answer["techniques"]}
