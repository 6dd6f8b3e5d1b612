"""Graphics cards by name, with the figures of their makers' data sheets; imports no torch.

`cards.json` holds memory, dense bf16 peak without sparsity and with sums in fp32, bandwidth, and
the source of each; and the shares of a peak that programs reach.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gen_accel.measure.cost.figures import Range
from gen_accel.registry import nearest_to

FILE = Path(__file__).with_name("cards.json")


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
            f"gpu must be one of {', '.join(card_names())}, got {name!r}"
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
    return json.loads(FILE.read_text(encoding="utf-8"))
