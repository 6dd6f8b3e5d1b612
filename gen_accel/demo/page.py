"""The demo's page, written after each part of the run, so that one that is cut off leaves what it
finished."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gen_accel.demo import words_of
from gen_accel.measure import write_json, write_report, write_video
from gen_accel.measure.report import template, without_times

UNKNOWN = "none of the shapes of the demo's world"  # what an image shows
PARTS = {  # file and caption, in the order of the page
    "side by side": ("side_by_side.mp4", "Dense attention left, sparse right"),
    "race": (
        "race.mp4",
        "Both clips, then their denoisings on one clock: the frame after each step, then the clip",
    ),
    "without LoRA": ("without_lora.mp4", "The same prompt and seed without the LoRA, and with it"),
    "dense": ("dense.mp4", "Dense attention"),
    "sparse": ("sparse.mp4", "Sparse attention"),
    "mask": ("mask.png", "Which key blocks each query block sees, and what one token sees"),
    "contact sheet": ("contact_sheet.png", "The same moments of both clips"),
}
REPORTS = ("report.html", "report.json")


class RunPage:
    """Page and files of a run of the demo, as far as it has come.

    Args:
        folder: where they go.
        fps: of the videos.

    Attributes:
        files: the file of each part.
        made: the files that are there, of this run alone, by what they are.
    """

    def __init__(self, folder: Path, title: str, fps: float) -> None:
        self.made: dict[str, Path] = {}
        self._folder, self._title, self._fps = folder, title, fps
        self.files = {part: folder / file for part, (file, _) in PARTS.items()}

    def add(self, part: str, pixels: np.ndarray | None = None) -> None:
        """Write frames, (F, H, W, 3) uint8, to the file of a part; None: it is written."""
        if pixels is not None:
            write_video(pixels, self.files[part], fps=self._fps)
        self.made[part] = self.files[part]

    def write(self, report: Mapping[str, Any], *, next_part: str | None = None) -> None:
        """Write the page and the report.

        Args:
            next_part: what is made next; None if the run is finished.
        """
        page, data = (self._folder / name for name in REPORTS)
        shown = {part: text for part, (_, text) in PARTS.items() if part in self.made}
        told = notes(report) if "psnr_db" in report else []
        if next_part is not None:
            told.insert(
                0,
                f"This page is not finished: {next_part} was still to come when it was written. "
                "If nothing runs any more, the run was cut off: start `gen-accel demo` again.",
            )
        write_report(
            page,
            without_times(report),
            title=self._title,
            videos={t: self.made[p] for p, t in shown.items() if self.made[p].suffix == ".mp4"},
            pictures={t: self.made[p] for p, t in shown.items() if self.made[p].suffix == ".png"},
            notes=told,
        )
        write_json(data, {**report, "finished": next_part is None})
        self.made |= {"page": page, "report": data}


def verdict(report: Mapping[str, Any]) -> str:
    """Say whether both clips do what the caption says, in all words that it has."""
    seen, asked = report["detector"], report["prompt"]
    words = {*words_of(asked)} - {"something"}
    right = [name for name in ("dense", "sparse") if words <= {*words_of(seen[name]["shows"])}]
    if len(right) == 2:
        return f"Both clips show what was asked for: {asked}."
    told = f"Asked for was {asked!r}. Dense: {seen['dense']['shows']}. "
    told += f"Sparse: {seen['sparse']['shows']}."
    return told if not right else f"{told} Only {right[0]} attention got it right."


def notes(report: Mapping[str, Any]) -> list[str]:
    """The report in plain words, a paragraph each."""
    seen = report["detector"]
    image = seen.get("image", UNKNOWN)
    follow = [name for name in ("dense", "sparse") if seen[name]["shows"].startswith(image)]
    page = template(Path(__file__).with_name("notes.txt.j2"), extra="video")
    text = page.render(r=report, verdict=verdict(report), unknown=UNKNOWN, follow=follow)
    return [" ".join(one.split()) for one in text.split("\n\n") if one.strip()]
