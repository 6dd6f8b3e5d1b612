"""The demo's page, written after each part of the run, so that one that is cut off leaves what it
finished."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gen_accel.demo.words import words_of
from gen_accel.measure import write_json, write_report, write_video

HEADLINES = {"psnr_db": "psnr"}  # what `write_report` calls it
TIMES = ("speedup", "total_speedup", "attention_speedup", "speedup_of_steps")


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
            next_part: what is made next; None where the run is finished.
        """
        self.add("page", self._files["page"])
        self.add("report", self._files["report"])
        ends = [] if next_part is None else [_unfinished(next_part)]
        shown = {HEADLINES.get(key, key): value for key, value in report.items()}
        if report.get("busy"):
            shown |= {key: report["busy"] for key in TIMES if key in shown}
        write_report(
            self.made["page"],
            shown,
            title=self._title,
            videos={text: self.made[name] for name, text in VIDEOS.items() if name in self.made},
            pictures={text: self.made[n] for n, text in PICTURES.items() if n in self.made},
            notes=[*ends, *(notes(report) if "psnr_db" in report else ())],
        )
        write_json(self.made["report"], {**report, "finished": next_part is None})


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


def _unfinished(part: str) -> str:
    return (
        f"This page is not finished: {part} was still to come when it was written. If nothing "
        "runs any more, the run was cut off, and `gen-accel demo` begins anew."
    )


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


def notes(report: Mapping[str, Any]) -> Sequence[str]:
    """The report in plain words."""
    dense, sparse = report["dense_seconds"], report["sparse_seconds"]
    found = [
        f"{verdict(report)} A detector reads that off the pixels.",
        "A video model compares every token, a small patch of a few frames, with every other. "
        f"Here that is {report['tokens']:,} tokens, and so {report['tokens'] ** 2:,} pairs in "
        f"each layer at each step. {report['method'].split('(')[0]} attention leaves many of them "
        "out. The same model made the same prompt from the same noise twice, dense and sparse.",
    ]
    turns = (
        f"Both took turns, a step of dense attention and a step of sparse. The {report['steps']} "
        f"steps took {dense:.1f} s dense and {sparse:.1f} s sparse"
    )
    if report["busy"]:
        found.append(f"{turns}. {report['busy'].capitalize()}, so that no speed-up is told.")
    else:
        spread = report["speedup_of_steps"]
        found.append(
            f"{turns}, {_times(report['speedup'])}; single steps from {spread['least']:.2f} to "
            f"{spread['most']:.2f} times. Decoding took another "
            f"{report['dense_decode_seconds']:.1f} and {report['sparse_decode_seconds']:.1f} s, "
            f"so that the whole was {_times(report['total_speedup'])}. A step of each ran before "
            "the clocks started."
        )
    if report["density"] is None:
        found.append("The schedule kept every step dense, so that both clips are the same.")
    else:
        found.append(
            f"Density {report['density']:.3f} is the share of pairs that were computed where "
            "attention was sparse. Over all steps and layers "
            f"{report['attention_flops_share']:.0%} of the attention's work was done."
        )
    if report["attention_seconds"] is not None:
        spent = report["attention_seconds"]
        found.append(
            f"Attention alone took {spent['dense']:.1f} s of the dense run and "
            f"{spent['sparse']:.1f} s of the sparse one. What else a step does sets the limit."
        )
    found.append(
        "PSNR and SSIM compare the sparse clip with the dense one, pixel by pixel. They say how "
        "close the two are, not how good either is. Above 30 dB, differences are hard to see."
    )
    if "vmaf" in report:
        found.append(
            "VMAF was trained on what people said of films of 1920 x 1080 pixels. It ranks toys "
            "too, but what a score means there is not known, and it depends on the size that "
            f"frames are seen at, here {report.get('enlarged', 1)} times their own."
        )
    return [*found, *_of_lora(report)]


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times as fast{', and so slower' if ratio < 1 else ''}"


def _of_lora(report: Mapping[str, Any]) -> list[str]:
    if "lora" not in report:
        return []
    about = report["lora"]
    found = [
        f"The model was trained on {about['trained_frames']} frames, and made {report['frames']} "
        f"with a LoRA for longer videos, which {about['config']} trained."
    ]
    if about["trained_through_the_same"]:
        found.append("The LoRA was trained through the same sparse attention.")
    if "without_lora" in report:
        found.append(f"Without the LoRA the model showed: {report['without_lora']['shows']}.")
    if about["prompt_was_chosen"]:
        score = about["score"]
        found.append(
            "This prompt was chosen among the ones that dense attention gets right. Of "
            f"{score['clips']} prompts that the LoRA was not trained on, dense attention gets "
            f"{score['dense']} right, sparse attention {score['sparse']}, and the model without "
            f"the LoRA {score['without']}. The mean PSNR of sparse to dense clips is "
            f"{score['psnr_db']:.1f} dB there: with noise drawn anew at each step, small "
            "differences can grow to another place or time of the same motion."
        )
    return found
