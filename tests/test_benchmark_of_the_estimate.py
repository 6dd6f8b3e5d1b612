"""The table of docs/estimate.md, and the errors that estimates were found to have."""

import json

import pytest
from support.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "estimate.json"


@pytest.fixture
def rows():
    return json.loads(RESULTS.read_text())["rows"]


def test_the_table_is_made_from_the_results(from_benchmarks):
    benchmark = from_benchmarks("estimate")
    held = from_benchmarks("pages").table_in(benchmark.PAGE.read_text(), benchmark.MARK)
    assert held == benchmark.table(json.loads(RESULTS.read_text()))


def test_every_kind_of_model_was_held_to_a_run(rows):
    assert {row["model"] for row in rows} == {"wan", "hunyuan_video", "ltx"}


def test_dense_seconds_and_memory_were_near(rows):
    for row in rows:
        assert abs(row["seconds"]["error"]) < 0.2, row["model"]
        assert abs(row["memory_mb"]["error"]) < 0.1, row["model"]
