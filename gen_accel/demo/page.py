"""The demo's page, written after each part of the run, so that one that is cut off leaves what it
finished."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gen_accel.demo.words import words_of
from gen_accel.measure import write_json, write_report, write_video
from gen_accel.measure.report import template, without_times

UNKNOWN = "none of the shapes of the demo's world"  # what an image shows
VIDEOS = {
    "side by side": "Dense attention left, sparse right",
    "race": "Both denoisings on one clock: the first frame after each step, then the clip",
    "without LoRA": "The same prompt and seed without the LoRA, and with it",
    "dense": "Dense attention",
    "sparse": "Sparse attention",
}
PICTURES = {
    "mask": "Which key blocks each query block sees, and what one token sees",
    "contact sheet": "The same moments of both clips",
}


class Page:
    """Page and files of a run of the demo, as far as it has come.

    Args:
        files: where the parts go, by what they are; "page" and "report" among them.
        fps: of the videos.

    Attributes:
        made: the files that are there, of this run alone.
    """

    def __init__(self, files: Mapping[str, Path], title: str, fps: float) -> None:
        self.made: dict[str, Path] = {}
        self._files, self._title, self._fps = files, title, fps

    def path(self, name: str) -> Path:
        return self._files[name]

    def add_video(self, name: str, pixels: np.ndarray) -> None:
        self.add(name, write_video(pixels, self._files[name], fps=self._fps))

    def add(self, name: str, path: Path) -> None:
        self.made[name] = path

    def write(self, report: Mapping[str, Any], *, next_part: str | None = None) -> None:
        """Write the page and the report.

        Args:
            next_part: what is made next; None if the run is finished.
        """
        self.made |= {name: self._files[name] for name in ("page", "report")}
        told = notes(report) if "psnr_db" in report else []
        if next_part is not None:
            told.insert(
                0,
                f"This page is not finished: {next_part} was still to come when it was written. "
                "If nothing runs any more, the run was cut off, and `gen-accel demo` begins anew.",
            )
        write_report(
            self.made["page"],
            without_times(report),
            title=self._title,
            videos={text: self.made[name] for name, text in VIDEOS.items() if name in self.made},
            pictures={text: self.made[n] for n, text in PICTURES.items() if n in self.made},
            notes=told,
        )
        write_json(self.made["report"], {**report, "finished": next_part is None})


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
