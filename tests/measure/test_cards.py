"""The table of cards, and the published seconds that estimates for them are held to."""

import json
from pathlib import Path

import pytest
import torch

from gen_accel import Dense
from gen_accel.measure.cost.figures import card_named, card_names, share_of_peak
from gen_accel.measure.cost.forecast import forecast
from gen_accel.measure.cost.rates import KINDS, rates_of_card

PUBLISHED = json.loads((Path(__file__).parent / "published_seconds.json").read_text())["runs"]


def test_cards_are_whole():
    for name in card_names():
        card = card_named(name)
        assert 10e9 < card.memory < 300e9
        assert 50e12 < card.flops < 3e15
        assert 0.5e12 < card.bandwidth < 10e12
        assert card.source.startswith("https://")
        rates = rates_of_card(card)
        for kind in KINDS:
            bounds = getattr(rates, kind)
            assert 0 < bounds.low < bounds.high
            assert bounds.high <= (card.bandwidth if kind == "moved" else card.flops)
            assert bounds.source


@pytest.mark.parametrize(
    ("said", "key"),
    [("H100", "h100"), ("RTX 4090", "4090"), ("mi300", "mi300x"), ("A100_40", "a100-40")],
)
def test_cards_are_found_however_they_are_written(said, key):
    assert card_named(said).key == key


def test_another_card_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"gpu must be one of h100, .* got '4091'; did you mean"):
        card_named("4091")


def test_cards_of_slow_products_reach_more_of_their_peak():
    assert share_of_peak("products", "small").low > share_of_peak("products").low
    assert share_of_peak("moved", "small") == share_of_peak("moved")


def test_published_runs_have_sources():
    assert len(PUBLISHED) >= 15
    for run in PUBLISHED:
        assert run["source"].startswith("https://")
        assert run["says"]


@pytest.mark.nightly
def test_most_published_seconds_lie_in_the_estimated_range():
    """A figure that is published as "about" or in whole minutes may be off by a tenth."""
    inside, outside = [], []
    for run in PUBLISHED:
        found = forecast(
            run["model"],
            Dense(),
            gpu=run["gpu"],
            height=run["height"],
            width=run["width"],
            num_frames=run["frames"],
            steps=run["steps"],
        )
        assert found.dtype == torch.bfloat16
        total, slack = found.total(found.dense), 0.1 * run["rounded"]
        hit = total.low * (1 - slack) <= run["seconds"] <= total.high * (1 + slack)
        row = run["gpu"], run["model"], run["seconds"], round(total.low), round(total.high)
        (inside if hit else outside).append(row)
        assert total.high < 2.6 * total.low, "a range so wide says nothing"
    assert len(outside) <= len(PUBLISHED) // 10, outside
