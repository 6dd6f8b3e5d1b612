"""A training's folder on the screen Train."""

import json
from pathlib import Path

import pytest

from gen_accel.lora.config import TrainConfig
from gen_accel.lora.data.report import Bucket, CropLoss, Report

pytest.importorskip("gradio", reason='needs gradio: pip install "gen_accel[ui]"')

from gen_accel.ui.page import html
from gen_accel.ui.screens.train import (
    MOST_POINTS,
    address,
    changes_of,
    clips_told,
    config_of_run,
    curves,
)


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def write_metrics(out, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / "metrics.jsonl").write_text(text + '{"step": 7, "lo')


def test_a_folder_without_a_training(out):
    assert curves(out) == [[], [], []]
    assert address(out / "report.html", out.parent) == html("report", "") == ""
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        config_of_run(out)


def test_curves(out):
    steps = [{"step": i, "loss": 2.0 if i else 1.0, "learning_rate": 0.1} for i in range(3)]
    levels = {"0.25": 0.5, "0.75": 1.5}
    fixed = [{"after": i, "fixed_loss": 1.0 - i / 10, "levels": levels} for i in (0, 2)]
    write_metrics(out, [fixed[0], *steps, fixed[1]])
    loss, at_fixed_noise, rate = curves(out)
    assert [p for p in loss if p[2] == "each step"] == [
        *((1, 1.0, "each step"), (2, 2.0, "each step"), (3, 2.0, "each step"))
    ]
    means = [value for _, value, line in loss if line == "running mean"]
    assert means == pytest.approx([1.0, 1.05, 1.0975])
    assert [p for p in at_fixed_noise if p[2] == "mean"] == [(0, 1.0, "mean"), (2, 0.8, "mean")]
    assert (0, 0.5, "0.25") in at_fixed_noise
    assert rate == [(i + 1, 0.1, "learning rate") for i in range(3)]


def test_long_curves_are_thinned(out):
    steps = [{"step": i, "loss": float(i), "learning_rate": float("nan")} for i in range(2000)]
    write_metrics(out, steps)
    loss, _, rate = curves(out)
    assert {line for _, _, line in loss} == {"each step", "running mean"}
    assert len(loss) == 2 * MOST_POINTS
    assert max(step for step, _, _ in loss) == 2000
    assert rate == []


def test_the_config_of_a_run_is_in_its_newest_checkpoint(out):
    for step in (4, 6):
        folder = out / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step, "config": {"rank": step}}))
    assert config_of_run(out) == {"rank": 6, "out": str(out)}


def test_the_report_of_a_run_is_shown(out):
    (out / "report.html").write_text("page")
    place = address(out / "report.html", out.parent)
    assert place.startswith("trainings/out/report.html?")
    assert address(out / "report.html", out / "page") == ""
    assert html("report", place).count(f'"{place}"') == 2


PLAN = {
    "verdicts": [
        {"device": "H100", "fits": True, "advice": None},
        {
            **{"device": "RTX 4090", "fits": False},
            "advice": {
                "changes": [
                    {"option": "gradient_checkpointing offload", "saves": 12.3e9},
                    {"option": "blocks_to_swap 37", "saves": 24.6e9},
                ],
                **{"fits": True, "frames": 81},
            },
        },
    ],
}


def test_what_a_plan_advises():
    assert changes_of(PLAN) == {"gradient_checkpointing": "offload", "blocks_to_swap": "37"}
    assert changes_of({"verdicts": PLAN["verdicts"][:1]}) == {}


def test_what_becomes_of_the_clips(out):
    config = TrainConfig(out=str(out))
    assert clips_told(config) == []
    report = Report(
        Path(config.out) / "cache",
        *(0, 0, 0, 0),
        left_out={f"{i}.mp4": "broken: it is empty" for i in range(12)},
        losses=[CropLoss("a.mp4", 0.25, 4, 20)],
        buckets=(Bucket(33, (96, 96), 2, 4.125),),
        videos=14,
    )
    report.write()
    told = clips_told(config)
    assert told[:3] == [
        "2 to train on, of 14 found",
        "25% of the picture is cropped on average",
        "4 of 20 frames are unused",
    ]
    assert told[-2:] == ["left out: 7.mp4, broken: it is empty", "and 4 more"]
