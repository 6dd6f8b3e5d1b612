"""Curves of a training as shapes of an SVG, which a page stretches to its width.

Coordinates lie in a box of `BOX` x `BOX`, from the upper left. Labels are no part of the drawing:
each has its place in per cent, so that text keeps its size on a narrow screen.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

BOX = 1000
MOST_POINTS = 400  # of a line; more are drawn as the least and the greatest of each part
TICKS = 4
INSIDE = 0.98  # share of a faint line's points that the range is made for

Point = tuple[float, float]


class Line(NamedTuple):
    """A curve over steps.

    Args:
        style: class of the page's style sheet: "faint", "main", "fixed" or "level-0" and so on.
        is_dotted: mark each point.
    """

    name: str
    points: Sequence[Point]
    style: str
    is_dotted: bool = False


class Drawn(NamedTuple):
    """A curve in the box.

    Args:
        path: data of an SVG path.
        dots: places of the points, in per cent.
    """

    name: str
    style: str
    path: str
    dots: list[Point]


class Tick(NamedTuple):
    """A label on an axis.

    Args:
        place: per cent, from the left or from the top.
    """

    place: float
    label: str


class Band(NamedTuple):
    """A stage on the axis of steps, in per cent."""

    left: float
    width: float
    label: str


class Chart(NamedTuple):
    """A drawing with its labels.

    Args:
        start: per cent from the top, of a dashed line at the first value of `mark`.
    """

    title: str
    unit: str
    lines: list[Drawn]
    across: list[Tick]
    up: list[Tick]
    bands: list[Band]
    start: float | None


def draw_chart(
    title: str,
    lines: Sequence[Line],
    *,
    steps: int,
    stages: Sequence[tuple[int, str]],
    unit: str = "",
    from_zero: bool = False,
    mark: Line | None = None,
) -> Chart | None:
    """Draw lines over one range; None where no line has a finite point.

    Args:
        steps: end of the axis.
        stages: first step and label of each stage.
        from_zero: begin the range at 0.
        mark: the line whose first value is marked.
    """
    kept = [one._replace(points=_finite(one.points)) for one in lines]
    kept = [one for one in kept if one.points]
    if not kept:
        return None
    low, high = _range(kept, from_zero)
    width = max(steps, 1)
    drawn = [_drawn(one, width, low, high) for one in kept]
    first = _finite(mark.points)[:1] if mark is not None else []
    return Chart(
        title=title,
        unit=unit,
        lines=drawn,
        across=[Tick(100 * x / width, f"{x:g}") for x in _ticks(0, width) if x == int(x)],
        up=[Tick(100 * (high - y) / (high - low), _number(y)) for y in _ticks(low, high)],
        bands=_bands(stages, width),
        start=100 * (high - first[0][1]) / (high - low) if first else None,
    )


def running_mean(values: Sequence[float], decay: float) -> list[float]:
    """Average with exponential decay, begun with the first value."""
    means: list[float] = []
    for value in values:
        before = means[-1] if means else value
        means.append(decay * before + (1 - decay) * value if math.isfinite(value) else before)
    return means


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[1])]


def _range(lines: Sequence[Line], from_zero: bool) -> Point:
    """Least and greatest value shown, with a margin; rare peaks of a faint line are cut off."""
    values: list[float] = []
    for one in lines:
        own = sorted(y for _, y in one.points)
        if one.style == "faint":
            cut = int(len(own) * (1 - INSIDE) / 2)
            own = own[cut : len(own) - cut]
        values += [own[0], own[-1]]
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    if high == low:
        pad = abs(high) * 0.5 or 1.0
        return (low if from_zero else low - pad), high + pad
    pad = 0.06 * (high - low)
    return (low if from_zero and low == 0 else low - pad), high + pad


def _drawn(line: Line, width: float, low: float, high: float) -> Drawn:
    def place(point: Point, size: float) -> Point:
        x, y = point
        inside = min(max((high - y) / (high - low), 0.0), 1.0)
        return size * min(x / width, 1.0), size * inside

    shown = _thinned(line.points)
    corners = [place(point, BOX) for point in shown]
    path = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(corners))
    dots = [place(point, 100) for point in shown] if line.is_dotted or len(shown) == 1 else []
    return Drawn(line.name, line.style, path, dots)


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most about `MOST_POINTS` points, with the least and the greatest of each part."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    shown: list[Point] = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        shown += sorted(ends)
    return shown


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, about `TICKS` of them."""
    rough = (high - low) / TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next((power * x for x in (1, 2, 5, 10) if power * x >= rough), 10 * power)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [step * i for i in range(first, last + 1)]


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{round(value, 10):g}"


def _bands(stages: Sequence[tuple[int, str]], width: float) -> list[Band]:
    bands = []
    for i, (first, label) in enumerate(stages):
        end = stages[i + 1][0] if i + 1 < len(stages) else width
        if first < width:
            place, size = 100 * first / width, 100 * (min(end, width) - first) / width
            bands.append(Band(place, size, label))
    return bands
