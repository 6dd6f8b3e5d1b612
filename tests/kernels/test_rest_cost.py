"""The model of what a rest costs, and the centre that it chooses."""

import json
import re
from statistics import fmean

import pytest
import torch
from support.paths import ROOT

from gen_accel.kernels import rest_cost
from gen_accel.kernels.rest_cost import CARDS, KernelWork, Orders, Problem
from gen_accel.kernels.triton import configs

GOAL = Problem(heads=12, tokens=32_768, dim=128)
ORDERS = [Orders("zeroth"), Orders("first"), Orders("first", "first"), Orders("second")]


def test_products_and_bytes_are_those_of_the_kernels():
    """Counted by hand, for two heads of 512 tokens: 4 query blocks and 8 key blocks."""
    problem = Problem(heads=2, tokens=512, dim=16)
    assert rest_cost.pooled_bytes(problem) == 2 * (2 * 4 * 8 * 16) * 2
    (one,) = rest_cost.kept(problem, 0.25)
    assert one.flops == 2 * 2 * (2 * 512 * 128 * 16)
    *means, columns = rest_cost.around_keys(problem)
    assert [work.flops for work in means] == [0, 0, 0]
    assert columns.flops == 2 * 2 * (2 * 512 * 8 * 16)
    assert columns.cache == 2 * 4 * (2 * 8 * 16 * 2)  # keys and values, once a query block
    pairs = rest_cost.pooled_bytes(problem)
    *_, pool, columns = rest_cost.around_queries(problem, rest_cost.Pooling())
    assert pool.flops == 3 * 2 * (2 * 4 * 512 * 16)
    assert pool.cache == 2 * (2 * 512 * 16 * 2) + pairs
    assert (pool.launches, columns.launches) == (1, 0)
    *_, own, other = rest_cost.around_queries(problem, rest_cost.Pooling(cached=False))
    assert own.memory - pool.memory == other.memory - columns.memory == pairs
    slope, total, add = rest_cost.first_order(problem)
    assert slope.flops == add.flops == 2 * (2 * 512 * 16 * 16)
    one, parts = 2 * 512 * 16 * 2, 2 * 4 * 16 * 16 * 4  # of 128 tokens each
    assert (slope.memory, slope.cache) == (2 * one + parts, 3 * one + parts)
    assert (total.memory, total.launches) == (parts, 2)
    assert (add.memory, add.cache, add.launches) == (0, 4 * (2 * 16 * 16 * 2), 0)
    more = rest_cost.second_order(problem)
    assert sum(work.memory for work in more) == 2 * (2 * 512 * 16 * 2)
    assert sum(work.cache for work in more) == 2 * (2 * 512 * 16 * 2) + pairs / 2
    assert sum(work.launches for work in more) == 4 - (1 + 1 + 3)


def test_a_kernel_takes_the_longest_of_what_it_does():
    card = rest_cost.KernelRates(flops=10.0, memory=5.0, cache=2.0, start=1.0)
    assert (
        rest_cost.seconds([KernelWork(20, 5, 1), KernelWork(0, 0, 8, launches=3)], card)
        == 2 + 1 + 4 + 3
    )


@pytest.mark.parametrize("orders", ORDERS)
def test_mean_queries_are_for_plans_that_keep_enough(orders, monkeypatch):
    device = torch.device("cpu")
    for arch in (*CARDS, "interpreted"):
        monkeypatch.setattr(configs, "architecture", lambda device, arch=arch: arch)
        even = rest_cost.even_density(GOAL, arch, orders)
        assert 0.01 < even < 0.3
        assert rest_cost.centre_of(GOAL, even * 1.01, device, orders) == "query"
        assert rest_cost.centre_of(GOAL, even * 0.99, device, orders) == "key"
        # Of shorter query blocks there are more, each with a pooling of its own.
        dearer = [rest_cost.dearer(GOAL._replace(block_q=x), arch, orders) for x in (64, 128)]
        assert dearer[0] > dearer[1]


def test_an_order_that_both_centres_have_makes_neither_dearer():
    for arch in CARDS:
        both = rest_cost.dearer(GOAL, arch, Orders("first", "first"))
        assert both == pytest.approx(rest_cost.dearer(GOAL, arch, Orders("zeroth")))
        assert both < rest_cost.dearer(GOAL, arch, Orders("first"))


def test_mean_queries_are_worth_what_clips_say():
    """Density of PISA, between those measured, at which its clips are as near as Piecewise's."""
    path = ROOT / "benchmarks/results/methods_clips_129.json"
    found = {
        one["setting"]: [fmean(row[key] for row in one["rows"]) for key in ("density", "psnr_db")]
        for one in json.loads(path.read_text())["settings"]
    }
    (ours, wanted), low, high = (found[x] for x in ("Piecewise 0.1", "PISA 0.1", "PISA 0.2"))
    share = (wanted - low[1]) / (high[1] - low[1])
    assert 0 < share < 1
    assert rest_cost.WORTH["second"] <= (low[0] + share * (high[0] - low[0])) / ours


def modelled(arch, density=0.1):
    """Columns of the tables of the page: kept keys, both centres, and what either order adds."""
    queries = rest_cost.around_queries(GOAL, rest_cost.pooling(GOAL, arch))
    more = rest_cost.first_order(GOAL), rest_cost.second_order(GOAL)
    return rest_cost.kept(GOAL, density), rest_cost.around_keys(GOAL), queries, *more


def row_of_the_page(name):
    """Cells of the row that begins so, or that names an architecture."""
    page = (ROOT / "docs/gpu.md").read_text()
    [row] = re.findall(rf"^\|[^|]*{name}[^|]*\|([-\d. |]+)\|$", page, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


@pytest.mark.parametrize("arch", CARDS)
def test_the_page_has_what_the_model_says(arch):
    works = modelled(arch)
    figures = [f"{1e3 * rest_cost.seconds(work, CARDS[arch]):.2f}" for work in works]
    figures.append(f"{rest_cost.even_density(GOAL, arch):.2f}")
    assert row_of_the_page(arch) == figures


@pytest.mark.parametrize(
    ("name", "field", "unit", "digits"),
    [
        ("operations", "flops", 1e9, 0),
        ("from and to memory", "memory", 1e9, 2),
        ("through the cache", "cache", 1e9, 2),
        ("launches", "launches", 1, 0),
    ],
)
def test_the_page_has_the_work_that_the_model_counts(name, field, unit, digits):
    sums = (sum(getattr(work, field) for work in works) / unit for works in modelled("sm_90"))
    assert row_of_the_page(name) == [f"{x:.{digits}f}" for x in sums]


def test_the_page_has_what_is_said_of_the_second_order():
    launches = sum(work.launches for work in rest_cost.facts(GOAL))
    page = " ".join((ROOT / "docs/gpu.md").read_text().split())
    assert f"[{launches} launches]" in page
    assert f"needs at least {rest_cost.WORTH['second']} times the density" in page
