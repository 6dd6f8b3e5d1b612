"""Tests of the choice of a test's cases for a day."""

from types import SimpleNamespace

import pytest
from support import products


class Item(SimpleNamespace):
    __hash__ = object.__hash__


@pytest.mark.parametrize(("count", "turns"), [(9, 3), (7, 3), (2, 3), (1, 3), (5, None)])
@pytest.mark.parametrize("is_quick", [False, True])
def test_every_case_has_its_day_and_no_day_is_without_one(monkeypatch, count, turns, is_quick):
    mark = None if turns is None else SimpleNamespace(args=(turns,))
    about = {
        "parent": "a file",
        "originalname": "test",
        "name": "test",
        "get_closest_marker": lambda _: mark,
    }
    items = [Item(**about) for _ in range(count)]
    monkeypatch.setattr(products, "QUICK", is_quick)
    ran = set()
    for day in range(max(turns or 1, count)):
        monkeypatch.setattr(products, "TURN", day)
        today = {*items} - products.out_of_turn(items)
        assert today
        assert today == {*items} - products.out_of_turn(items)
        ran |= today
    assert ran == {*items}
    if turns is None and not is_quick:
        assert not products.out_of_turn(items)
