"""Settings in pairs: what a suite makes once, how it scores, and what differs for certain."""

import json
import math
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from gen_accel import demo
from gen_accel.demo import world
from gen_accel.measure import write_video

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from demo_model.judge import scored_scenes
from demo_model.scenes import Scene, draw

# How the names of result files begin whose figures are times, bytes or counts.
OF_NO_MODEL = (
    *("cache_clips", "cache_many", "cache_reading", "comfyui", "cpu", "estimate", "judge"),
    *("methods_random", "overhead", "own_sparsity", "pipeline", "plan", "rest", "scaling"),
    "train",
)
SUITE = """
prompts: held_out
clips: 3
seed: 5
fields: {frames: 24, height: 96, width: 96, steps: $steps}
beside: dense
settings:
  dense: {method: dense}
  drawn right: {method: radial}
  of one colour: {method: piecewise, against: drawn right}
"""


def drawn(scene, seed, frames=24):
    if isinstance(scene, Scene):
        return draw(scene, frames=frames, seed=seed, size=96).video.numpy()
    g = torch.Generator().manual_seed(seed)
    video = world.render([scene], frames=frames, size=96, generator=g)[0]
    return ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


@pytest.fixture
def quality(from_benchmarks, monkeypatch):
    """The benchmark, with clips that are drawn: all of "piecewise" without their colour."""
    module = from_benchmarks("quality")
    module.calls = []

    def generate(model, prompts, *, out, method, seed, **fields):
        module.calls.append((method, seed, prompts[0], fields))
        scenes = (*world.SCENES, *scored_scenes(10))
        scene = next(one for one in scenes if one.caption == prompts[0])
        video = drawn(scene, seed, fields["frames"])
        if method == "piecewise":
            video = video.mean(axis=3, keepdims=True).astype(np.uint8).repeat(3, axis=3)
        write_video(video, out, fps=world.FPS)
        density = None if method == "dense" else 0.25
        summary = SimpleNamespace(density=density, steps=(), records={})
        return [SimpleNamespace(seconds=1.0, summary=summary)]

    monkeypatch.setattr(module, "generate", generate)
    return module


def suite(quality, tmp_path, text=SUITE, **values):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    return quality.Suite.read(path, {"steps": "4"} | values)


def test_all_settings_share_prompts_seeds_and_noise_and_are_made_once(quality, tmp_path):
    one = suite(quality, tmp_path)
    rows = dict(quality.made(one, tmp_path / "work"))
    asked = {}
    for method, seed, prompt, fields in quality.calls:
        asked.setdefault(method, []).append((seed, prompt))
        assert fields["steps"] == 4
    assert len({*map(tuple, asked.values())}) == 1
    assert len(quality.calls) == 9
    assert [row["right"] for row in rows["drawn right"]] == [True] * 3
    assert [row["right"] for row in rows["of one colour"]] == [False] * 3
    assert all(math.isinf(float(row["psnr_db"])) for row in rows["drawn right"])
    assert "psnr_db" not in rows["dense"][0]
    assert (rows["dense"][0]["density"], rows["drawn right"][0]["density"]) == (1.0, 0.25)
    again = dict(quality.made(one, tmp_path / "work"))
    assert again == rows
    assert len(quality.calls) == 9
    list(quality.made(suite(quality, tmp_path, steps="5"), tmp_path / "work"))
    assert len(quality.calls) == 18, "other fields are other clips"


def test_a_part_of_the_settings_comes_with_what_it_is_set_against(quality, tmp_path):
    found = dict(quality.made(suite(quality, tmp_path), tmp_path / "work", ["colour"]))
    assert [*found] == ["dense", "drawn right", "of one colour"]
    quality.calls.clear()
    found = dict(quality.made(suite(quality, tmp_path), tmp_path / "other", ["right"]))
    assert [*found] == ["dense", "drawn right"]


def test_the_table_tells_what_differs_in_pairs(quality, tmp_path):
    one = suite(quality, tmp_path)
    runs = dict(quality.made(one, tmp_path / "work"))
    against = {name: one.role(name, "against") for name in one.settings}
    report = {"clips": 3, "device": "CPU", "threads": 1, "runs": runs, "against": against}
    lines = quality.table(report)
    [line] = [line for line in lines if line.startswith("| against drawn right")]
    assert "-100.00 % (t -inf), -100.00 to -100.00" in line
    assert any(line.startswith("| drawn right | 0.25 |") and "3 of 3" in line for line in lines)


def test_a_difference_is_that_of_the_textbook(quality):
    g = np.random.default_rng(1)
    before, change = g.normal(30, 3, 48), g.normal(0.5, 1, 48)
    found = quality.Difference.of(before + change, before)
    assert found.mean == pytest.approx(change.mean())
    assert found.worst == pytest.approx(change.min())
    assert found.t == pytest.approx(stats.ttest_rel(before + change, before).statistic)
    known = stats.bootstrap((change,), np.mean, method="percentile", rng=2)
    assert found.low == pytest.approx(known.confidence_interval.low, abs=0.02)
    assert found.high == pytest.approx(known.confidence_interval.high, abs=0.02)
    assert quality.Difference.of([math.inf, 1.0], [2.0, 1.0]) is None


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("held_out", "all", "prompts are scored or several or held_out, got all"),
        ("beside: dense", "beside: stock", "beside of the suite is stock, which is no setting"),
        ("against: drawn", "against: painted", "against of of one colour is painted right"),
    ],
)
def test_a_suite_that_names_what_is_not_there_is_refused(quality, tmp_path, old, new, told):
    with pytest.raises(ValueError, match=told):
        suite(quality, tmp_path, SUITE.replace(old, new))


@pytest.mark.parametrize("frames", [1, 33])
def test_scenes_of_several_objects_have_a_judge_of_their_own(quality, tmp_path, frames):
    text = SUITE.replace("held_out", "several").replace("frames: 24", f"frames: {frames}")
    rows = dict(quality.made(suite(quality, tmp_path, text), tmp_path / "work"))
    unseen = [scene.is_held_out for scene in scored_scenes(3)]
    assert 0 < sum(unseen) < 3
    for i, row in enumerate(rows["drawn right"]):
        assert (row["right"], row["strict"], row["number"]) == (True, True, True)
        assert row.get("unseen") == (True if unseen[i] else None)
    for row in rows["of one colour"]:
        assert "color" in row["faults"]
        assert not row["right"]


def test_clips_of_other_weights_are_made_again(quality, tmp_path, monkeypatch):
    one = suite(quality, tmp_path)
    for weights, made in (("one", 9), ("one", 9), ("other", 18)):
        monkeypatch.setattr(quality, "weights_of", lambda model, weights=weights: weights)
        list(quality.made(one, tmp_path / "work"))
        assert len(quality.calls) == made


def test_results_are_of_the_weights_that_are_here(quality, from_benchmarks):
    pages, others = from_benchmarks("pages"), []
    suites = {one.stem: quality.Suite.read(one, {}) for one in (quality.HERE / "suites").iterdir()}
    models = {f"quality_{name}": suite.model for name, suite in suites.items()}
    for path in pages.RESULTS.glob("*.json"):
        known = pages.read_result(path.stem).get("weights")
        if path.stem.startswith(OF_NO_MODEL):
            assert known is None, path.stem
        elif known != pages.weights_of(models.get(path.stem, demo.NAME)):
            others.append(path.stem)
    assert not others, f"made with other models than the ones here: {', '.join(others)}"
    assert {*models} <= {path.stem for path in pages.RESULTS.glob("*.json")}


def test_figures_of_another_model_are_not_gone_on_with(from_benchmarks, tmp_path):
    pages, path = from_benchmarks("pages"), tmp_path / "streaming.json"
    report = pages.begun(path, {"runs": {}})
    assert report == {"runs": {}, "weights": pages.weights_of()}
    path.write_text(json.dumps(report | {"runs": {"dense": 1}}))
    assert pages.begun(path, {"runs": {}})["runs"] == {"dense": 1}
    path.write_text(json.dumps(report | {"weights": "other"}))
    with pytest.raises(SystemExit, match="has figures of another demo model"):
        pages.begun(path, {"runs": {}})


def test_the_suites_that_are_here_are_whole(quality, from_benchmarks):
    for path in (quality.HERE / "suites").glob("*.yaml"):
        assert quality.Suite.read(path, {}).scenes
    few = from_benchmarks("few_steps")
    for frames, steps in chain(*few.RUNS.values()):
        found = few.suite(frames, steps)
        assert found.beside == next(iter(found.settings)) == "dense"


def test_a_part_of_a_suite_replaces_neither_its_result_nor_its_table(
    quality, tmp_path, monkeypatch
):
    page = tmp_path / "page.md"
    page.write_text("<!-- suite -->\n\n<!-- /suite -->")
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.replace("$steps", "4") + f"page: {page}\n")
    for name in ("quality", "pages"):
        module = quality if name == "quality" else sys.modules["pages"]
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    command = ["quality.py", str(path), "--work", str(tmp_path / "work")]
    for part in (["--clips", "2"], ["--settings", "right"]):
        monkeypatch.setattr(sys, "argv", command + part)
        quality.main()
        assert (tmp_path / "work" / "suite.json").exists()
        assert not (tmp_path / "results").exists()
        assert "| density |" not in page.read_text()
    monkeypatch.setattr(sys, "argv", command)
    quality.main()
    assert (tmp_path / "results" / "quality_suite.json").exists()
    assert "| density |" in page.read_text()
