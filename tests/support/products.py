"""What tests vary: every pair of values by day, every combination by night.

`NIGHTLY=1`, as `make nightly` sets it, gives the whole products.
"""

import os
from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

NIGHTLY = os.environ.get("NIGHTLY", "") not in ("", "0")


def pairs(*axes: Sequence[Any]) -> list[tuple]:
    """Rows with one value of each axis, in which any two values of two axes meet at least once.

    Greedy and always the same: a row at a time, the one with most pairs that are still to meet.
    """
    whole = list(product(*(range(len(axis)) for axis in axes)))
    rows = whole
    if not NIGHTLY:
        met = {row: {*combinations(enumerate(row), 2)} for row in whole}
        missing = set().union(*met.values())
        rows = []
        while missing:
            rows.append(max(whole, key=lambda row: len(met[row] & missing)))
            missing -= met[rows[-1]]
    return [tuple(axis[i] for axis, i in zip(axes, row, strict=True)) for row in rows]


def in_turns(first: Iterable[Any], *others: Sequence[Any]) -> list[tuple]:
    """Each value of `first` once, with the values of each other axis in turns."""
    if NIGHTLY:
        return list(product(first, *others))
    rows = []
    for i, value in enumerate(first):
        rows.append((value, *(axis[i % len(axis)] for axis in others)))
    return rows


def slow_after(count: int, rows: list[tuple]) -> list[Any]:
    """The rows, those after the first `count` marked as slow."""
    return [
        row if i < count else pytest.param(*row, marks=pytest.mark.slow)
        for i, row in enumerate(rows)
    ]
