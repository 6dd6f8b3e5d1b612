"""Report of a run: `report.json` for programs, `report.html` for people."""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import numpy as np

from gen_accel.io import replacing
from gen_accel.registry import needed_for

if TYPE_CHECKING:
    from jinja2 import Template

MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
}
LONG_LIST = 8  # entries; longer lists of numbers are summed up

TEMPLATE = "report.html.j2"  # beside this module
TIMES = (  # of a comparison
    *("speedup", "speedup_alike", "total_speedup", "attention_speedup", "speedup_of_steps"),
)


class Tile(NamedTuple):
    """A headline figure with what it says; a plain one is no success."""

    name: str
    figure: str
    meaning: str

    @property
    def is_plain(self) -> bool:
        return self.name == "Slower" or self.figure == "not shown"


class Medium(NamedTuple):
    """A video or picture with its bytes, as a data URL."""

    caption: str
    data: str
    is_video: bool


class Group(NamedTuple):
    """Rows of label and value, below a heading unless `name` is None."""

    name: str | None
    rows: list[tuple[str, str]]


def write_report(
    path: str | Path,
    report: Mapping[str, object],
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
            `density` (a share, 0 to 1, of the pairs where attention is sparse), `psnr` or
            `psnr_db`, `ssim`, `vmaf` with `vmaf_lowest`, and `cvvdp_jod` at any depth, the least
            deep first, become the headline figures. Numbers whose key, or whose parent's key, ends
            in `seconds` are times. `environment`, at the top, comes last.
        title: the heading, such as the prompt or the method.
        videos: caption to .mp4, .webm or .gif; the first is shown large.
        pictures: caption to .png, .jpg or .gif.
        notes: explanations for a newcomer, a paragraph each.

    Raises:
        ValueError: a video or picture of another type.
        OSError: one of them cannot be read, or `path` cannot be written.
    """
    rest = {key: value for key, value in report.items() if key != "environment"}
    environment = report.get("environment")
    page = template(Path(__file__).with_name(TEMPLATE), extra="video").render(
        title=title,
        tiles=[*headline(rest)],
        videos=[_medium(caption, file) for caption, file in videos.items()],
        notes=notes,
        pictures=[_medium(caption, file) for caption, file in pictures.items()],
        measured=_groups(rest),
        environment=_groups(environment if isinstance(environment, Mapping) else {}),
    )
    with replacing(Path(path)) as partial:
        partial.write_text(page, encoding="utf-8")


def without_times(report: Mapping[str, object]) -> dict[str, object]:
    """Replace the speed-ups of a comparison by the words of its `busy`, if others used the
    processor meanwhile."""
    busy = {key: report["busy"] for key in TIMES if key in report} if report.get("busy") else {}
    return {**report, **busy}


@cache
def template(path: Path, *, extra: str) -> "Template":
    """Load a template, in which a name that is not given is an error; values in HTML are escaped.

    Args:
        extra: of pyproject.toml, which brings jinja2.
    """
    with needed_for("a report", extra=extra):
        import jinja2
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        undefined=jinja2.StrictUndefined,
        autoescape=path.suffixes[-2:-1] == [".html"],
        trim_blocks=True,
        keep_trailing_newline=True,
    ).get_template(path.name)


def headline(report: Mapping[str, object]) -> Iterator[Tile]:
    """Headline figures that a report holds, by the keys that `write_report` names."""
    found: dict[str, float] = {}
    for keys, value in sorted(_flatten(report), key=lambda entry: len(entry[0])):
        if _is_number(value) and not math.isnan(value):
            found.setdefault(keys[-1], value)
    if isinstance(busy := report.get("speedup"), str):
        yield Tile("Speed-up", "not shown", busy)
    elif "speedup" in found:
        figure = f"{found['speedup']:.3g}\N{MULTIPLICATION SIGN}"
        if found["speedup"] < 1:
            yield Tile("Slower", figure, "the speed of dense attention")
        else:
            yield Tile("Speed-up", figure, "as fast as dense attention")
    if "density" in found:
        yield Tile(
            "Density, sparse steps",
            f"{100 * found['density']:.3g} %",
            "of the token pairs are computed; the other steps and layers are dense",
        )
    decibels = found.get("psnr", found.get("psnr_db"))
    if decibels is not None:
        figure = f"{decibels:.1f} dB" if math.isfinite(decibels) else "∞ dB"
        yield Tile("PSNR", figure, "against the dense video: higher is closer, ∞ is identical")
    if "ssim" in found:
        yield Tile("SSIM", f"{found['ssim']:.3f}", "against the dense video: 1 is identical")
    if "vmaf" in found:
        meaning = "of 100, against the dense video"
        if "vmaf_lowest" in found:
            meaning += f"; {found['vmaf_lowest']:.0f} in its worst frame"
        yield Tile("VMAF", f"{found['vmaf']:.0f}", meaning)
    if "cvvdp_jod" in found:
        meaning = "of 10, against the dense video: 10 where no difference can be seen"
        yield Tile("ColorVideoVDP", f"{found['cvvdp_jod']:.1f} JOD", meaning)


def _medium(caption: str, file: str | Path) -> Medium:
    media_type = MEDIA_TYPES.get(Path(file).suffix.lower())
    if media_type is None:
        raise ValueError(f"{file} must be one of {', '.join(MEDIA_TYPES)} to go into a report")
    data = f"data:{media_type};base64,{base64.b64encode(Path(file).read_bytes()).decode()}"
    return Medium(caption, data, media_type.startswith("video"))


def _groups(report: Mapping[str, object]) -> list[Group]:
    """A row for each value; each dict at the top is a group of rows with a heading."""
    single = {key: value for key, value in report.items() if not isinstance(value, Mapping)}
    alone = [(_words(keys), _written(keys, value)) for keys, value in _flatten(single)]
    groups = [Group(None, alone)] if alone else []
    for name, group in report.items():
        if isinstance(group, Mapping) and group:
            rows = [
                (_words(keys), _written([str(name), *keys], value))
                for keys, value in _flatten(group)
            ]
            groups.append(Group(_words([str(name)]), rows))
    return groups


def _words(keys: list[str]) -> str:
    return " · ".join(keys).replace("_", " ")


def _flatten(value: object, keys: tuple[str, ...] = ()) -> Iterator[tuple[list[str], object]]:
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


def _written(keys: list[str], value: object) -> str:
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


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
