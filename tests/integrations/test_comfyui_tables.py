"""The tables of docs/comfyui.md, and the figures of a real ComfyUI in them."""

import json

import pytest


@pytest.fixture
def benchmark(from_benchmarks):
    return from_benchmarks("comfyui")


@pytest.fixture
def results(benchmark):
    return json.loads(benchmark.RESULTS.read_text())


def test_the_tables_are_made_from_the_results(benchmark, results):
    page = benchmark.PAGE.read_text()
    assert page == benchmark.page_with(page, results)


def test_each_case_has_a_row(benchmark, results):
    assert {*benchmark.MODELS} == {*results["models"]}
    assert {*benchmark.NODES} == {*results["nodes"]}


def test_what_is_all_kept_was_exact(results):
    assert all(row["all_kept"] < 2e-6 for row in results["models"].values())
    assert all(row["sparse"] == row["calls"] for row in results["models"].values())
