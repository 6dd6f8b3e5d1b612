"""The table of docs/cache_and_sparse.md."""

import json

import pytest


def test_the_table_is_made_from_the_results(from_benchmarks):
    pytest.importorskip("cache_dit")
    benchmark = from_benchmarks("cache_and_sparse")
    held = from_benchmarks("pages").table_in(benchmark.PAGE.read_text("utf-8"), "results")
    report = json.loads((benchmark.RESULTS / "cache_and_sparse.json").read_text())
    assert held == "\n".join(benchmark.table(report, "cache_and_sparse"))
    for row in report["rows"]:
        row["shown"] = [{"right": True}, {"right": False}]
    rows = [line for line in benchmark.table(report, "x") if line.startswith("| ")]
    assert [row.split(" | ")[-1] for row in rows] == ["right clips |", *["1 of 2 |"] * 6]
