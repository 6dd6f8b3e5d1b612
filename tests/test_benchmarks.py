"""The benchmarks of whole steps and of the demo model, at toy size, where no time counts."""

import argparse
import json
import shutil
from typing import Any

import diffusers
import pytest
import torch
from support.paths import ROOT

from gen_accel import VideoShape
from gen_accel.measure import write_json

METHODS = ["Radial", "Neighborhood", "BlockMixture", "SparseLinear"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipeline(monkeypatch, from_benchmarks):
    return from_benchmarks("pipeline")


def options(**changed: Any) -> argparse.Namespace:
    given = {"device": torch.device("cpu"), "methods": METHODS, "dtype": "bf16", "rounds": 1}
    return argparse.Namespace(**(given | {"seed": 0, "compile": False} | changed))


def toy(pipeline: Any, family: str) -> Any:
    return pipeline.small(next(p for p in pipeline.CUDA_PROBLEMS if p.family == family))


@pytest.mark.turns(5)
@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "cogvideox", "ltx", "mochi", "flux"])
def test_every_family_runs_dense_and_by_every_method(pipeline, family):
    problem = toy(pipeline, family)
    rows = list(pipeline.measure(problem, options()))
    names = METHODS[1:] if problem.grid[0] == 1 else METHODS
    assert [row["method"].split("(")[0] for row in rows] == names
    frames, height, width = problem.grid
    for row in rows:
        assert 0 < row["density"] < 1
        assert row["tokens"] - frames * height * width in (0, problem.text)
        assert 0 < row["dense_attention_s"] < row["dense_s"]
        assert 0 < row["attention_s"] < row["s"]
        assert min(row["speedup"], 1) <= row["run_speedup"] <= max(row["speedup"], 1)


def test_what_fails_parity_is_not_timed(pipeline, monkeypatch):
    def fails(video: VideoShape, method: Any, *args: Any, **kwargs: Any) -> None:
        if type(method).__name__ == "Radial":
            raise ValueError("errs by 1")

    monkeypatch.setattr(pipeline, "check_parity", fails)
    methods = ["Radial", "Neighborhood"]
    radial, window = pipeline.measure(toy(pipeline, "wan"), options(methods=methods))
    assert radial["refused"] == "errs by 1"
    assert "s" not in radial
    assert window["s"] > 0


@pytest.mark.turns(3)
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Wan 2.1 1.3B, 480 x 832, 81 frames", 1.42e9),
        ("CogVideoX 5B, 480 x 720, 49 frames", 5.57e9),
        ("LTX-Video 2B, 704 x 1216, 161 frames", 1.92e9),
        ("FLUX.1, 1024 x 1024", 11.9e9),
    ],
)
def test_models_of_full_depth_are_as_large_as_the_published_ones(pipeline, name, parameters):
    problem = next(p for p in pipeline.CUDA_PROBLEMS if p.name == name)
    with torch.device("meta"):
        model = getattr(diffusers, pipeline.CLASSES[problem.family])(**problem.config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)


def test_a_run_keeps_the_rows_of_other_models_of_the_same_machine(pipeline, tmp_path):
    path, head = tmp_path / "pipeline_cpu.json", {"device": "this", "rounds": 3}
    problem = pipeline.CPU_PROBLEMS[0]
    rows = [{"model": problem.name}, {"model": "another"}]
    assert pipeline.others(path, head, problem) == []
    write_json(path, head | {"rows": rows})
    assert pipeline.others(path, head, problem) == [{"model": "another"}]
    assert pipeline.others(path, head | {"device": "that"}, problem) == []


def test_results_become_a_table_of_the_page(pipeline, tmp_path, monkeypatch):
    page = tmp_path / "performance.md"
    shutil.copy(pipeline.PAGE, page)
    before = page.read_text(encoding="utf-8").split("<!-- results -->")[0]
    monkeypatch.setattr(pipeline, "PAGE", page)
    monkeypatch.setattr(pipeline, "RESULTS", tmp_path)
    row = next(pipeline.measure(toy(pipeline, "wan"), options(methods=["Radial"])))
    head = {"device": "a machine", "threads": 1, "torch": "2", "dtype": "bf16", "rounds": 1}
    refused = {key: row[key] for key in ("model", "layers", "depth", "tokens")}
    refused |= {"method": "Other()", "refused": "errs by 1"}
    report = head | {"compile": False, "rows": [row, refused]}
    write_json(tmp_path / "pipeline_cpu.json", report)
    pipeline.write_page()
    written = page.read_text(encoding="utf-8")
    assert written.startswith(before)
    table = [line for line in written.removeprefix(before).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "| `Radial()` |" in table[2]
    assert "refused: errs by 1" in table[3]


@pytest.mark.nightly
def test_a_training_step_is_measured(from_benchmarks, monkeypatch, tmp_path, capsys):
    training = from_benchmarks("training")
    out = tmp_path / "a.json"
    line = ["training.py", "--times", "1", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*line, "--beside", "sparse_linear:critical=0.2"])
    training.main()
    report = json.loads(out.read_text())
    assert report["worst_gradient_error"] < training.TOLERANCE[torch.bfloat16]
    (row,) = report["rows"]
    assert (row["tokens"], row["latent_frames"]) == (1296, 9)
    assert min(row["dense_ms"], row["sparse_ms"], row["attention_sparse_ms"]) > 0
    assert row["beside_ms"]["sparse_linear:critical=0.2"] > 0
    assert "of the ideal" in capsys.readouterr().out


@pytest.mark.nightly
def test_longer_videos_are_made_and_scored(from_benchmarks, monkeypatch, tmp_path):
    longer = from_benchmarks("longer_videos")
    scales = []
    clips = longer.clips
    monkeypatch.setattr(longer, "clips", lambda *a: (scales.append(a[-1]), clips(*a))[1])
    out = tmp_path / "a.json"
    lora = str(ROOT / "gen_accel" / "demo" / "long_lora")
    line = ["longer_videos.py", "--lora", lora, "--frames", "37", "--steps", "1", "--prompts", "1"]
    line += ["--settings", "dense", "dense, unguided", "radial + LoRA", "--timed", "1"]
    monkeypatch.setattr("sys.argv", [*line, "--work", str(tmp_path), "--out", str(out)])
    longer.main()
    report = json.loads(out.read_text())
    assert {n: one["guidance_scale"] for n, one in report["settings"].items()} == {
        "dense": 3.0,
        "dense, unguided": 1.0,
        "radial + LoRA": 1.0,
    }
    assert scales == [3.0, 1.0, 1.0] * 2
    assert all(one["clips"] == 1 for one in report["settings"].values())
    assert report["settings"]["dense"]["speedup"] == 1.0


@pytest.mark.slow
def test_a_cache_of_many_clips_is_measured(from_benchmarks, monkeypatch, tmp_path):
    from gen_accel.attention_processors.families import family_named

    wan = family_named("wan")
    measures = from_benchmarks("cache")
    monkeypatch.setattr(measures, "STEPS", 20)
    with monkeypatch.context() as patch:
        for name in ("encode_video", "encode_prompt"):
            patch.setattr(wan, name, getattr(wan, name))  # which the benchmark replaces
        rows = [measures.many(count, str(tmp_path)) for count in (3, 40)]
    assert [row["clips"] for row in rows] == [3, 40]
    for row in rows:
        assert (row["first"]["encoded"], row["first"]["kept"]) == (row["clips"], 0)
        assert (row["second"]["encoded"], row["second"]["kept"]) == (0, row["clips"])
        assert all(row[name]["peak_mib"] > 100 for name in ("first", "second", "training"))
    made = measures.stores(argparse.Namespace(count=2, large=1, frames=5), tmp_path)
    assert [one["count"] for one in made] == [2, 1]
    given = {**made[1], "out": str(tmp_path / "out"), "workers": 1}
    row = measures.clips(**given)
    assert row["cpu_seconds"] > 0
    read = [measures.reading(**made[0], pool=pool, workers=1) for pool in ("none", "thread")]
    page = tmp_path / "cache.md"
    shutil.copy(measures.PAGE, page)
    monkeypatch.setattr(measures, "PAGE", page)
    monkeypatch.setattr(measures, "RESULTS", tmp_path)
    for name, found in (("many", rows), ("clips", [row]), ("reading", read)):
        measures.write(f"cache_{name}_here", found)
    measures.write_page()
    written = page.read_text(encoding="utf-8")
    tables = [line for line in written.splitlines() if line.startswith("| ")]
    assert any(line.startswith("| 40 | ") for line in tables)
    assert "| 720 x 1280 | 1 | " in written
    assert "| 96 x 96 | 1 thread | " in written
