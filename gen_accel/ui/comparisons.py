"""A comparison of `generate --compare` as a screen shows it: tables, frames and pictures.

All of it is read from the files that the run wrote: its report and its films.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gen_accel.demo.page import HEADLINES, TIMES
from gen_accel.json_files import read_fields, typed
from gen_accel.measure.clip_settings import read_settings
from gen_accel.measure.report import comparison_files, headline, report_of, write_report
from gen_accel.measure.video_io import read_stream, video_fps
from gen_accel.paths import expanded

FILM = ".mp4"  # what a browser plays
SHOWN = 384  # pixels: narrower frames are enlarged, pixel by pixel
SCALE = 64  # levels of 255: the difference that the brightest colour stands for
# Colours of a heat map, from no difference to `SCALE` and more.
RAMP = ((8, 10, 24), (44, 27, 110), (150, 38, 120), (236, 104, 52), (252, 244, 178))
LEGEND = 10  # pixels: height of the bar below a heat map
NUMBERS = ("dense_seconds", "sparse_seconds", "speedup")
NEEDED = {
    **dict.fromkeys(("prompt", "method", "kernel"), str),
    **dict.fromkeys(("steps", "frames", "height", "width", "tokens", "seed"), int),
    **dict.fromkeys((*NUMBERS, "psnr_db", "ssim"), float),
}


@dataclass(frozen=True)
class Compared:
    """A comparison that was opened.

    Args:
        report: as the file holds it.
        path: the report, `clip.json`.
        dense, sparse, together: the films `clip.dense.mp4`, `clip.mp4` and
            `clip.side_by_side.mp4`.
    """

    report: dict[str, Any]
    path: Path
    dense: Path
    sparse: Path
    together: Path

    @property
    def fps(self) -> float:
        return video_fps(self.sparse) or float(self.report.get("fps") or 16)


def comparisons_in(folder: Path) -> list[Path]:
    """Reports of the comparisons below a folder whose films are there, the newest first."""
    ending = f".dense{FILM}"
    reports = [
        report_of(file.with_name(file.name.removesuffix(ending) + FILM))
        for file in folder.rglob(f"*{ending}")
    ]
    there = [report for report in reports if report.is_file()]
    return sorted(there, key=lambda report: (report.stat().st_mtime, str(report)), reverse=True)


def open_comparison(path: str | Path) -> Compared:
    """Read a comparison by its report, or by the clip beside it.

    Raises:
        FileNotFoundError: a file of it is missing.
        ValueError: no report of `generate --compare`.
    """
    target = expanded(path).with_suffix(FILM)
    dense, together, report = comparison_files(target)
    if not report.is_file():
        raise FileNotFoundError(f"no comparison at {report}")
    held = read_fields(report)
    if not NEEDED.keys() <= held.keys():
        raise ValueError(f"{report} is no comparison: gen-accel generate --compare writes one")
    for name, kind in NEEDED.items():
        infinite = (str,) if name == "psnr_db" else ()  # JSON has no infinity
        typed(held, name, kind, *infinite, origin=report)
    for film in (target, dense, together):
        if not film.is_file():
            raise FileNotFoundError(f"the comparison {report} lacks a film: {film}")
    return Compared(held, report, dense, target, together)


def figures(report: Mapping[str, Any]) -> list[list[str]]:
    """Rows of figure, value and meaning, as the library words them."""
    rows = [[tile.name, tile.figure, tile.meaning] for tile in headline(_told(report))]
    return [*rows[:1], *_attention(report), *rows[1:], *_facts(report)]


def busy_words(report: Mapping[str, Any]) -> str:
    """Say that the machine was busy, in the library's words; "" where it was not."""
    busy = report.get("busy")
    if not busy:
        return ""
    return f"{busy[:1].upper()}{busy[1:]}, so that no speed-up is told."


def frame_of(film: Path, frame: int) -> np.ndarray:
    """Frame of a film by its number, (H, W, 3) uint8; ValueError for a number that it lacks."""
    before = 0
    for chunk in read_stream(film):
        if frame < before + len(chunk):
            return chunk[frame - before]
        before += len(chunk)
    raise ValueError(f"frame must be from 0 to {before - 1}, got {frame}")


def enlarged(frame: np.ndarray, width: int = SHOWN) -> np.ndarray:
    """Frame whose pixels became squares, so that it is about `width` pixels wide; wider ones are
    as they were."""
    factor = max(1, width // frame.shape[1])
    return frame.repeat(factor, 0).repeat(factor, 1)


def heat_map(dense: np.ndarray, sparse: np.ndarray) -> np.ndarray:
    """Colours of the mean difference over R, G and B of each pixel, with the scale below.

    Args:
        dense, sparse: (H, W, 3) uint8.

    Returns:
        (H', W', 3) uint8: dark where the two are equal, brightest from 64 of 255 levels on.
    """
    levels = np.abs(dense.astype(np.float32) - sparse.astype(np.float32)).mean(2)
    picture = enlarged(_coloured(levels / SCALE))
    across = np.linspace(0, 1, picture.shape[1])[None].repeat(LEGEND, 0)
    gap = np.full((LEGEND // 2, picture.shape[1], 3), 255, np.uint8)
    return np.concatenate([picture, gap, _coloured(across)])


def difference_words(dense: np.ndarray, sparse: np.ndarray, frame: int) -> str:
    """Say how far frames of one number lie apart."""
    levels = np.abs(dense.astype(np.int16) - sparse.astype(np.int16))
    if not levels.any():
        return f"Frame {frame} is equal in both clips."
    return (
        f"Frame {frame}: {levels.mean():.1f} of 255 levels apart on average, "
        f"{levels.max()} at most. The bar below the map runs from 0 levels, dark, to {SCALE} and "
        "more, bright."
    )


def chart_of(decibels: Sequence[float | str]) -> dict[str, list[float]]:
    """Columns of a chart of PSNR by frame, without frames that are equal.

    Args:
        decibels: as `gen-accel metrics --by-frame` writes them, infinite ones as words.
    """
    shown = [(i, float(x)) for i, x in enumerate(decibels) if math.isfinite(float(x))]
    return {"frame": [i for i, _ in shown], "PSNR (dB)": [x for _, x in shown]}


def farthest(decibels: Sequence[float | str]) -> int:
    """Number of the frame in which two clips differ most."""
    return int(np.argmin([float(x) for x in decibels]))


def mask_options(compared: Compared) -> dict[str, Any]:
    """Options of `gen-accel show` that draw what the method of a comparison keeps at its sizes.

    Raises ValueError for a report without settings, or of a method that has no words.
    """
    fields, report = read_settings(compared.path).fields, compared.report
    sizes = {name: report[name] for name in ("frames", "height", "width")}
    chosen = {name: fields[name] for name in ("method", "preset", "set") if name in fields}
    if not {"method", "preset"} & chosen.keys() or "model" not in fields:
        raise ValueError(f"{compared.path.name} does not say its method in words")
    if "preset" in chosen:
        chosen = {"preset": chosen["preset"]}
    return {**chosen, "model": fields["model"], **sizes}


def write_page(compared: Compared, path: Path, mask: Path | None = None) -> Path:
    """Write a comparison as one HTML file, films and picture within."""
    films = {
        "Dense attention left, sparse right": compared.together,
        "Dense attention": compared.dense,
        "Sparse attention": compared.sparse,
    }
    about = compared.report
    notes = [f"Sparse attention: {about['method']}", busy_words(about)]
    write_report(
        path,
        {name: value for name, value in _told(about).items() if name != "settings"},
        title=f"{about['prompt']}: dense and sparse attention",
        videos=films,
        pictures={} if mask is None else {"Which pairs of tokens the method keeps": mask},
        notes=[*filter(None, notes)],
    )
    return path


def _told(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report by the keys of `write_report`, without times that tell nothing."""
    shown = {HEADLINES.get(key, key): value for key, value in report.items()}
    shown["psnr"] = float(shown["psnr"])  # JSON has no infinity: it is "Infinity" there
    if report.get("busy"):
        shown |= {key: report["busy"] for key in TIMES if key in shown}
    return shown


def _attention(report: Mapping[str, Any]) -> list[list[str]]:
    """Row of attention alone, where it was timed."""
    spent = report.get("attention_seconds")
    if not isinstance(spent, dict) or not spent.get("sparse"):
        return []
    dense, sparse = spent["dense"], spent["sparse"]
    seconds = f"attention alone: {dense:.2f} s dense, {sparse:.2f} s sparse"
    told = "not told" if report.get("busy") else f"{dense / sparse:.3g}\N{MULTIPLICATION SIGN}"
    return [["Attention speed-up", told, seconds]]


def _facts(report: Mapping[str, Any]) -> list[list[str]]:
    """Rows of what was run."""
    share = report.get("attention_flops_share")
    work = [] if share is None else [["Attention's work", f"{share:.1%}", "of dense, all steps"]]
    seconds = f"{report['dense_seconds']:.2f} s dense, {report['sparse_seconds']:.2f} s sparse"
    size = f"{report['frames']} frames of {report['width']} x {report['height']} pixels"
    schedule = str(report.get("schedule", ""))
    return [
        *work,
        ["Denoising", seconds, f"{report['steps']} steps each, without decoding"],
        ["Tokens", f"{report['tokens']:,}", size],
        ["Method", report["method"].split("(")[0], f"{report['method']} {schedule}".strip()],
        ["Kernel", report["kernel"], "how it was computed; the answer does not depend on it"],
        ["Seed", str(report["seed"]), f"the same for both; prompt: {report['prompt']}"],
    ]


def _coloured(share: np.ndarray) -> np.ndarray:
    """(H, W) of 0 to 1 and more to (H, W, 3) uint8 of `RAMP`."""
    stops = np.linspace(0, 1, len(RAMP))
    channels = [np.interp(share, stops, [colour[i] for colour in RAMP]) for i in range(3)]
    return np.stack(channels, 2).round().astype(np.uint8)
