"""The table of docs/cache_and_sparse.md."""

import importlib
import json

import pytest
from support.paths import ROOT


def test_the_table_is_made_from_the_results(monkeypatch):
    pytest.importorskip("cache_dit")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("cache_and_sparse")
    page = benchmark.PAGE.read_text(encoding="utf-8")
    held = page.partition("<!-- results -->")[2].partition("<!-- /results -->")[0]
    report = json.loads((benchmark.RESULTS / "cache_and_sparse.json").read_text())
    assert held == "\n" + "\n".join(benchmark.table(report, "cache_and_sparse")) + "\n"
