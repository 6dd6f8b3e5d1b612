"""Report of a run: `report.json` for programs, `report.html` for people."""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gen_accel.files import replacing
from gen_accel.moved import signpost

if not TYPE_CHECKING:
    __getattr__ = signpost("measure.report")

MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".gif": "image/gif",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
}
LONG_LIST = 8  # entries; longer lists of numbers are summed up

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --line: #e5e4e0; --ink: #1b1b1d; --faint: #696970;
  --accent: #0b6b5d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121214; --card: #1a1a1d; --line: #2d2d32; --ink: #ececee; --faint: #9c9ca6;
    --accent: #5ccdb8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1168px; margin: 0 auto; padding: 28px 24px 80px; }
h1 {
  margin: 0 0 20px; font-size: clamp(1.35rem, 3vw, 1.8rem); font-weight: 650;
  line-height: 1.25; letter-spacing: -0.02em; overflow-wrap: anywhere;
}
h2 { margin: 56px 0 16px; font-size: 1.15rem; font-weight: 650; }
figure { margin: 0; }
figure video, figure img {
  display: block; width: 100%; height: auto; border-radius: 10px; background: #121214;
}
figcaption { margin-top: 8px; color: var(--faint); font-size: 0.9rem; }
.first { display: flex; flex-wrap: wrap; gap: 20px; }
.first figure { flex: 3 1 560px; min-width: 0; }
.first video, .first img { max-height: calc(100vh - 160px); object-fit: contain; }
.tiles { flex: 1 1 270px; display: grid; gap: 12px; margin: 0; align-content: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 165px), 1fr)); }
.tile {
  display: flex; flex-direction: column; padding: 12px 18px; border: 1px solid var(--line);
  border-radius: 10px; background: var(--card);
}
.tile dt { color: var(--faint); font-size: 0.9rem; }
.tile dd { margin: 0; }
.tile .figure {
  color: var(--accent); font-size: 2.1rem; font-weight: 650; line-height: 1.25;
  letter-spacing: -0.03em; font-variant-numeric: tabular-nums; white-space: nowrap;
}
.tile .plain { color: var(--ink); }
.tile .meaning { color: var(--faint); font-size: 0.85rem; line-height: 1.4; }
.more { display: grid; gap: 24px; margin-top: 28px;
  grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); }
.pictures { display: grid; gap: 32px; }
.pictures figure { min-width: 0; }
.pictures .wide { overflow-x: auto; }
.pictures .wide img { min-width: 760px; }
@media (max-width: 640px) {
  main { padding: 20px 16px 64px; }
  .first video, .first .wide, .pictures .wide { width: 100vw; margin: 0 -16px; }
  .first video, .first img, .pictures img { border-radius: 0; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile { padding: 10px 14px; }
  .tile .figure { font-size: 1.7rem; }
}
.notes p { max-width: 70ch; margin: 0 0 10px; overflow-wrap: anywhere; }
table { width: 100%; border-collapse: collapse; font-size: 0.92rem; }
th, td { padding: 7px 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; font-weight: 400; }
tbody th { width: 44%; padding-right: 24px; color: var(--faint); }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
tr.group th { padding-top: 24px; color: var(--ink); font-weight: 650; }
"""


def write_report(
    path: str | Path,
    report: Mapping[str, Any],
    *,
    title: str,
    videos: Mapping[str, Path],
    pictures: Mapping[str, Path],
    notes: Sequence[str],
) -> None:
    """Write one self-contained HTML file: no script, and nothing is fetched.

    In this order: the first video beside the headline figures, the other videos, notes, pictures,
    the whole report, the environment.

    Args:
        report: nested dicts. Keys named `speedup` (a factor, or words why there is none),
            `density` (a share, 0 to 1, of the pairs where attention is sparse), `psnr` (dB),
            `ssim`, `vmaf` with `vmaf_lowest`, and `cvvdp_jod` at any depth, the least deep first,
            become the headline figures. Numbers whose key, or whose parent's key, ends in
            `seconds` are times. `environment`, at the top, comes last.
        title: the heading, such as the prompt or the method.
        videos: caption to .mp4, .webm or .gif; the first is shown large.
        pictures: caption to .png, .jpg or .gif.
        notes: explanations for a newcomer, a paragraph each.

    Raises:
        ValueError: a video or picture of another type.
        OSError: one of them cannot be read, or `path` cannot be written.
    """
    figures = [_figure(caption, file) for caption, file in videos.items()]
    rest = {key: value for key, value in report.items() if key != "environment"}
    tiles = "".join(_tile(*tile) for tile in _headline(rest))
    paragraphs = "".join(f"<p>{escape(note)}</p>\n" for note in notes)
    shown = "".join(_figure(caption, file) for caption, file in pictures.items())
    first = "".join(figures[:1]) + (f'<dl class="tiles">{tiles}</dl>' if tiles else "")
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="first">{first}</div>' if first else "",
        f'<div class="more">{"".join(figures[1:])}</div>' if figures[1:] else "",
        _section("In plain words", f'<div class="notes">{paragraphs}</div>' if notes else ""),
        _section("Pictures", f'<div class="pictures">{shown}</div>' if shown else ""),
        _section("Everything that was measured", _table(rest)),
        _section("Environment", _table(report.get("environment", {}))),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )
    with replacing(Path(path)) as partial:
        partial.write_text(page, encoding="utf-8")


def _headline(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, figure, meaning) of each headline figure that `report` holds."""
    found: dict[str, float] = {}
    for keys, value in sorted(_flatten(report), key=lambda entry: len(entry[0])):
        if _is_number(value) and not math.isnan(value):
            found.setdefault(keys[-1], value)
    if isinstance(report.get("speedup"), str):
        yield "Speed-up", "not told", report["speedup"]
    elif "speedup" in found:
        figure = f"{found['speedup']:.3g}\N{MULTIPLICATION SIGN}"
        if found["speedup"] < 1:
            yield "Slower", figure, "the speed of dense attention"
        else:
            yield "Speed-up", figure, "as fast as dense attention"
    if "density" in found:
        yield (
            "Density, sparse steps",
            f"{100 * found['density']:.3g} %",
            "of the token pairs are computed; the other steps and layers are dense",
        )
    if "psnr" in found:
        decibels = found["psnr"]
        figure = f"{decibels:.1f} dB" if math.isfinite(decibels) else "∞ dB"
        yield "PSNR", figure, "against the dense video: higher is closer, ∞ is identical"
    if "ssim" in found:
        yield "SSIM", f"{found['ssim']:.3f}", "against the dense video: 1 is identical"
    if "vmaf" in found:
        meaning = "of 100, against the dense video"
        if "vmaf_lowest" in found:
            meaning += f"; {found['vmaf_lowest']:.0f} in its worst frame"
        yield "VMAF", f"{found['vmaf']:.0f}", meaning
    if "cvvdp_jod" in found:
        meaning = "of 10, against the dense video: 10 where no difference can be seen"
        yield "ColorVideoVDP", f"{found['cvvdp_jod']:.1f} JOD", meaning


def _tile(name: str, figure: str, meaning: str) -> str:
    kind = "figure plain" if name == "Slower" or figure == "not told" else "figure"
    return (
        f'<div class="tile"><dt>{name}</dt><dd class="{kind}">{escape(figure)}</dd>'
        f'<dd class="meaning">{escape(meaning)}</dd></div>\n'
    )


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{heading}</h2>\n{content}\n</section>" if content else ""


def _figure(caption: str, file: str | Path) -> str:
    media_type = MEDIA_TYPES.get(Path(file).suffix.lower())
    if media_type is None:
        raise ValueError(f"{file} must be one of {', '.join(MEDIA_TYPES)} to go into a report")
    data = f"data:{media_type};base64,{base64.b64encode(Path(file).read_bytes()).decode()}"
    text = escape(caption)
    if media_type.startswith("video"):
        shown = (
            f'<video src="{data}" aria-label="{text}" autoplay loop muted playsinline controls>'
            "</video>"
        )
    else:
        shown = f'<div class="wide" tabindex="0"><img src="{data}" alt="{text}"></div>'
    return f"<figure>{shown}<figcaption>{text}</figcaption></figure>\n"


def _table(report: Mapping[str, Any]) -> str:
    """A row for each value; each dict at the top is a group of rows with a heading."""
    single = {key: value for key, value in report.items() if not isinstance(value, Mapping)}
    groups = {key: value for key, value in report.items() if isinstance(value, Mapping) and value}
    rows = [_table_row(keys, keys, value) for keys, value in _flatten(single)]
    for name, group in groups.items():
        rows.append(f'<tr class="group"><th colspan="2">{_words([str(name)])}</th></tr>\n')
        rows += [_table_row(keys, [str(name), *keys], value) for keys, value in _flatten(group)]
    return f"<table>\n<tbody>\n{''.join(rows)}</tbody>\n</table>" if rows else ""


def _table_row(label: list[str], keys: list[str], value: Any) -> str:
    written = escape(_written(keys, value))
    return f'<tr><th scope="row">{_words(label)}</th><td>{written}</td></tr>\n'


def _words(keys: list[str]) -> str:
    return escape(" · ".join(keys).replace("_", " "))


def _flatten(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    """(keys, value) of every leaf; a list is one leaf unless it holds dicts."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, (*keys, str(key)))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            yield from _flatten(item, (*keys, str(i + 1)))
    else:
        yield list(keys), value


def _written(keys: list[str], value: Any) -> str:
    if isinstance(value, list | tuple):
        if len(value) > LONG_LIST and all(_is_number(item) for item in value):
            low, high, mean = min(value), max(value), sum(value) / len(value)
            low, high, mean = (_written(keys, number) for number in (low, high, mean))
            return f"{len(value)} values from {low} to {high}, mean {mean}"
        return ", ".join(_written(keys, item) for item in value)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_number(value) and math.isfinite(value):
        if any(key.endswith("seconds") for key in keys[-2:]):
            return _seconds(value)
        return str(value) if isinstance(value, int) else f"{value:.4g}"
    return "∞" if value == math.inf else str(value)


def _seconds(value: float) -> str:
    """Format seconds with three digits, or with all digits before the point."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{digits}f} s"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
