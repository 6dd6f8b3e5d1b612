"""Tables of figures in README and docs are what their result files say, and nothing is typed."""

import json

from support.paths import ROOT


def test_the_tables_are_made_from_the_results(from_benchmarks):
    made = from_benchmarks("study.page").tables()
    made[ROOT / "docs" / "longer_videos.md"] = from_benchmarks("study.longer").tables()
    made[ROOT / "docs" / "own_sparsity.md"] = from_benchmarks("own_sparsity").lines()
    made[ROOT / "docs" / "tune.md"] = from_benchmarks("study.tuned").lines()
    pages, few = from_benchmarks("pages"), from_benchmarks("few_steps")
    streams = from_benchmarks("streaming")
    made[streams.DOCS] = streams.table(pages.read_result("streaming"))
    judge, quality = from_benchmarks("judge"), from_benchmarks("quality")
    named = {"judge": (judge.DOCS, judge.table(pages.read_result("judge")))}
    named |= {name: (few.DOCS, few.table(pages.read_result(name))) for name in few.RUNS}
    for file in (ROOT / "benchmarks" / "suites").glob("*.yaml"):
        suite = quality.Suite.read(file, {})
        if suite.page is not None:
            told = quality.table(pages.read_result(f"quality_{file.stem}"))
            named[file.stem] = (ROOT / suite.page, told)
    for name, (path, lines) in named.items():
        assert pages.table_in(path.read_text("utf-8"), name) == "\n".join(lines), path
    for path, lines in made.items():
        assert pages.table_in(path.read_text("utf-8"), "results") == "\n".join(lines), path
    for name, (result, lines) in from_benchmarks("student_steps").TABLES.items():
        told = "\n".join(lines(pages.read_result(result)))
        assert pages.table_in(few.DOCS.read_text("utf-8"), name) == told, name


def test_what_is_calibrated_has_a_calibrated_peer_and_dense_beside_it(from_benchmarks):
    """What clips show is counted for each row, dense too: nearness to dense is not quality."""
    rows = [line.split(" | ") for line in from_benchmarks("study.front").table()]
    clips = [row for row in rows if row[-1].endswith(" of 6 |")]
    assert clips[0][0] == "| dense"
    calibrated = [row[0] for row in clips if row[0].endswith(", calibrated")]
    for name in ("Piecewise(0.2)", "PISA", "Sol-Attn"):
        assert any(name in row for row in calibrated), name
    assert all(" to " in row[-2] for row in clips[1:])


def test_the_demo_knows_how_far_right_clips_are_from_dense_ones(from_benchmarks):
    path = ROOT / "gen_accel" / "demo" / "long_lora_guided" / "score.json"
    score = json.loads(path.read_text())
    assert score == from_benchmarks("study.longer").demo_score()
    assert score["both"] == 43
    assert (score["psnr_worst_db"], score["psnr_best_db"]) == (14.8, 40.6)
