"""The model of what a rest costs, and the centre that it chooses."""

import re

import pytest
import torch
from support.paths import ROOT

from gen_accel.kernels import rest_cost
from gen_accel.kernels.rest_cost import CARDS, Problem, Work
from gen_accel.kernels.triton import configs

GOAL = Problem(heads=12, tokens=32_768, dim=128)


def test_products_and_bytes_are_those_of_the_kernels():
    """Counted by hand, for two heads of 512 tokens: 4 query blocks and 8 key blocks."""
    problem = Problem(heads=2, tokens=512, dim=16)
    assert rest_cost.pooled_bytes(problem) == 2 * (2 * 4 * 8 * 16) * 2
    (one,) = rest_cost.kept(problem, 0.25)
    assert one.flops == 2 * 2 * (2 * 512 * 128 * 16)
    *means, columns = rest_cost.around_keys(problem)
    assert [work.flops for work in means] == [0, 0]
    assert columns.flops == 2 * 2 * (2 * 512 * 8 * 16)
    assert columns.cache == 2 * 4 * (2 * 8 * 16 * 2)  # keys and values, once a query block
    pairs = rest_cost.pooled_bytes(problem)
    _, pool, columns = rest_cost.around_queries(problem, cached=pairs // 2)
    assert pool.flops == 3 * 2 * (2 * 4 * 512 * 16)
    assert pool.cache == 2 * (2 * 512 * 16 * 2) + pairs
    assert (pool.launches, columns.launches) == (2, 2)
    more = rest_cost.second_order(problem)
    assert sum(work.memory for work in more) == (2 + 3) * (2 * 512 * 16 * 2)
    assert sum(work.cache for work in more) == (2 + 6) * (2 * 512 * 16 * 2) + pairs / 2
    assert sum(work.launches for work in more) == 2 + 13


def test_a_kernel_takes_the_longest_of_what_it_does():
    card = rest_cost.Card(flops=10.0, memory=5.0, cache=2.0, start=1.0)
    assert rest_cost.seconds([Work(20, 5, 1), Work(0, 0, 8, launches=3)], card) == 2 + 1 + 4 + 3


def test_mean_queries_are_for_plans_that_keep_enough(monkeypatch):
    device = torch.device("cpu")
    for arch in (*CARDS, "interpreted"):
        monkeypatch.setattr(configs, "architecture", lambda device, arch=arch: arch)
        even = rest_cost.even_density(GOAL, arch)
        assert 0.01 < even < 0.2
        assert rest_cost.centre_of(GOAL, even * 1.01, device) == "query"
        assert rest_cost.centre_of(GOAL, even * 0.99, device) == "key"
        # Of shorter query blocks there are more, each with a pooling of its own.
        assert rest_cost.even_density(GOAL._replace(block_q=64), arch) > even


@pytest.mark.parametrize("arch", CARDS)
def test_the_page_has_what_the_model_says(arch):
    card, cached = CARDS[arch], configs.CACHED[arch]
    works = rest_cost.kept(GOAL, 0.1), rest_cost.around_keys(GOAL)
    works += (rest_cost.around_queries(GOAL, cached),)
    figures = [f"{1e3 * rest_cost.seconds(work, card):.2f}" for work in works]
    figures.append(f"{rest_cost.even_density(GOAL, arch):.2f}")
    page = (ROOT / "docs/gpu.md").read_text()
    [row] = re.findall(rf"^\|[^|]*{arch}[^|]*\|([\d. |]+)\|$", page, re.MULTILINE)
    assert [cell.strip() for cell in row.split("|")[:4]] == figures


def test_the_page_has_what_the_second_order_takes():
    more = 1e3 * rest_cost.seconds(rest_cost.second_order(GOAL), CARDS["sm_90"])
    launches = sum(work.launches for work in rest_cost.curve(GOAL))
    page = (ROOT / "docs/gpu.md").read_text()
    assert f"takes {more:.2f} ms more on an H100" in page
    assert f"[{launches} launches]" in page
