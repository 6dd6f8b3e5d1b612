"""What tests vary: every pair of values by day, every combination by night.

`NIGHTLY=1`, as `make nightly` sets it, gives the whole products. A test that is marked `turns(n)`
runs one in n of its cases by day, other ones each day: `TEST_TURN` is the number of the day.
`QUICK=1`, as `make quick` sets it, runs a few cases of every test, in turns too.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import date
from itertools import combinations, product
from typing import Any

import pytest

NIGHTLY = os.environ.get("NIGHTLY", "") not in ("", "0")
QUICK = os.environ.get("QUICK", "") not in ("", "0")
FEW = 4  # cases of a test that `QUICK` runs, about
# The processes of one run take it from the first, past midnight too.
TURN = int(os.environ.setdefault("TEST_TURN", str(date.today().toordinal())))


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


def out_of_turn(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Cases that run on another day; never all of a test."""
    cases: defaultdict[object, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.parent, getattr(item, "originalname", item.name)].append(item)
    late: set[pytest.Item] = set()
    for number, own in enumerate(cases.values()):
        turns = own[0].get_closest_marker("turns")
        every = 1 if turns is None else turns.args[0]
        if QUICK:
            every = max(every, -(-len(own) // FEW))
        every = min(every, len(own))
        late.update(one for i, one in enumerate(own) if (i + TURN + number) % every)
    return late


def asked(request: pytest.FixtureRequest, name: str = "name") -> set[Any]:
    """Values of a parameter in the cases of this file that run: what a fixture has to prepare."""
    calls = (
        getattr(item, "callspec", None)
        for item in request.session.items
        if item.path == request.path
    )
    return {call.params[name] for call in calls if call is not None and name in call.params}
