"""Figures of costs, between two bounds, and their words; imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Two bounds and their source, in words."""

    low: float
    high: float
    source: str

    def times(self, factor: float) -> "Range":
        return Range(factor * self.low, factor * self.high, self.source)

    def pair(self, factor: float = 1) -> list[float]:
        return [self.low * factor, self.high * factor]


def span(one: Range, unit: str = " s") -> str:
    """Write a range as 41-66 s."""
    low, high = number(one.low), number(one.high)
    return f"{low}{unit}" if low == high else f"{low}-{high}{unit}"


def number(value: float) -> str:
    """Write a figure with three digits at most, large ones with commas."""
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"


def duration(one: Range) -> str:
    """Write seconds, many of them in minutes or hours; below 0.01 s as that."""
    if one.high < 0.01:
        return "below 0.01 s"
    if one.low >= 2 * 3600:
        return span(one.times(1 / 3600), " h")
    return span(one.times(1 / 60), " min") if one.low >= 120 else span(one)
