"""Figures of costs: ranges, their words, and graphics cards by name. Imports no torch.

`cards.json` holds memory, dense bf16 peak without sparsity and with sums in fp32, bandwidth, and
the source of each; and the shares of a peak that programs reach.
"""

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gen_accel.parsing import shown
from gen_accel.registry import nearest_to

CARDS = Path(__file__).with_name("cards.json")
WIDTH = 80  # characters of a line


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


def duration(one: Range, least: float = 1.0) -> str:
    """Write seconds, many of them in minutes or hours; below `least` as that."""
    if one.high < least:
        return f"below {least:g} s"
    if one.low >= 2 * 3600:
        return span(one.times(1 / 3600), " h")
    return span(one.times(1 / 60), " min") if one.low >= 120 else span(one)


def wrapped(paragraphs: Iterable[str], width: int = WIDTH) -> list[str]:
    """Wrap paragraphs to lines of at most `width` characters, each two further in than its first
    or as far in as a table's row."""
    lines: list[str] = []
    for text in paragraphs:
        indent = " " * (len(text) - len(text.lstrip()))
        lines += textwrap.wrap(
            text, width, subsequent_indent=indent or "  ", break_on_hyphens=False
        ) or [""]
    return lines


def aligned(rows: Sequence[Sequence[str]], *, left: int = 0) -> list[str]:
    """Lines of a table, two spaces between columns; the first `left` columns are flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(wide) if i < left else cell.rjust(wide)
            for i, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


@dataclass(frozen=True)
class Card:
    """A graphics card.

    Args:
        key: its name on the command line.
        name: as its maker calls it.
        memory: bytes that a program may use: 10^9 for each GB. A card has 2^30 for each; the
            difference of 7 % is left to the driver and the allocator.
        flops: dense peak a second in bf16.
        bandwidth: bytes a second of its memory.
        source: address of the figures.
        kind: "small" for a card whose products are slow beside its memory; "" for the others.
    """

    key: str
    name: str
    memory: int
    flops: float
    bandwidth: float
    source: str
    kind: str = ""


def card_named(name: str) -> Card:
    """Look a card up; ValueError with the nearest names for an unknown one."""
    key = re.sub(r"[^a-z0-9-]", "", name.lower().removeprefix("nvidia").replace("_", "-"))
    key = _table()["aliases"].get(key, key)
    found = _table()["cards"].get(key)
    if found is None:
        raise ValueError(
            f"gpu must be one of {', '.join(card_names())}, got {shown(name)}"
            f"{nearest_to(name.lower(), card_names())}"
        )
    return Card(
        key=key,
        name=found["name"],
        memory=round(found["gb"] * 1e9),
        flops=found["tflops"] * 1e12,
        bandwidth=found["tbps"] * 1e12,
        source=found["source"],
        kind=found.get("kind", ""),
    )


def card_names() -> list[str]:
    return [*_table()["cards"]]


def share_of_peak(work: str, kind: str = "") -> Range:
    """Share of a card's peak that programs reach.

    Args:
        work: one of `KINDS` ("moved" is a share of the bandwidth), or "efficiency", the share of
            the ideal speed-up that sparse attention reaches.
        kind: of the card.
    """
    own = _table().get(kind, {})
    return Range(**own.get(work, _table()["ranges"][work]))


@cache
def _table() -> dict[str, Any]:
    return json.loads(CARDS.read_text(encoding="utf-8"))
