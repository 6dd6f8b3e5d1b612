"""A training's folder on the screen Train."""

import json
from pathlib import Path

import pytest

from gen_accel import demo
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.data.report import Bucket, CropLoss, Report

pytest.importorskip("gradio", reason='needs gradio: pip install "gen_accel[ui]"')

from gen_accel.ui.page import html
from gen_accel.ui.screens.train import (
    MOST_POINTS,
    address,
    changes_of,
    command_of,
    config_of_run,
    found_html,
    plan_html,
    samples_html,
    stands,
    state_of,
)

PROMPTS = ("a red square", "a <blue> circle")


@pytest.fixture
def config(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    return TrainConfig(out=str(out), stages=("33:2000",), validation_prompts=PROMPTS)


def write_metrics(config, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out_of(config) / "metrics.jsonl").write_text(text + '{"step": 7, "lo')


def out_of(config):
    return Path(config.out)


def checkpoint(config, step):
    folder = out_of(config) / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "config": {"rank": 3}}))


def sample(config, step, *names):
    folder = out_of(config) / "validation" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(b"film")


def test_a_folder_without_a_training(config):
    state = state_of(config)
    assert (state.done, state.saved, state.result, state.samples) == (0, None, None, [])
    assert stands(state, config) == f"Nothing was trained in {config.out} yet."
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        config_of_run(out_of(config))


def test_curves(config):
    steps = [{"step": i, "loss": 2.0 if i else 1.0, "learning_rate": 0.1} for i in range(3)]
    levels = {"0.25": 0.5, "0.75": 1.5}
    fixed = [
        {"after": i, "fixed_loss": 1.0 - i / 10, "levels": levels, "held_out": True}
        for i in (0, 2)
    ]
    write_metrics(config, [fixed[0], *steps, fixed[1]])
    state = state_of(config)
    assert state.done == 3
    assert state.is_held_out
    assert [p for p in state.loss if p[2] == "each step"] == [
        *((1, 1.0, "each step"), (2, 2.0, "each step"), (3, 2.0, "each step"))
    ]
    means = [value for _, value, line in state.loss if line == "running mean"]
    assert means == pytest.approx([1.0, 1.05, 1.0975])
    assert [p for p in state.fixed if p[2] == "mean"] == [(0, 1.0, "mean"), (2, 0.8, "mean")]
    assert (0, 0.5, "at noise 0.25") in state.fixed
    assert state.rate == [(i + 1, 0.1, "learning rate") for i in range(3)]


def test_long_curves_are_thinned(config):
    steps = [{"step": i, "loss": float(i), "learning_rate": float("nan")} for i in range(2000)]
    write_metrics(config, steps)
    state = state_of(config)
    assert {line for _, _, line in state.loss} == {"each step", "running mean"}
    assert len(state.loss) == 2 * MOST_POINTS
    assert max(step for step, _, _ in state.loss) == 2000
    assert state.rate == []


def test_where_it_stands(config):
    write_metrics(config, [{"step": i, "loss": 1.0, "learning_rate": 0.1} for i in range(6)])
    said = f"6 of 2000 steps are done in {config.out}"
    assert stands(state_of(config), config) == f"{said}; no checkpoint is there yet."
    checkpoint(config, 4)
    checkpoint(config, 6)
    assert stands(state_of(config), config) == f"{said}; Resume goes on after step 6."
    (out_of(config) / "lora").mkdir()
    assert stands(state_of(config), config) == f"{said}; the result is {config.out}/lora."
    assert config_of_run(out_of(config)) == {"rank": 3, "out": config.out}


def test_samples_the_newest_first(config):
    sample(config, 0, "00.mp4", "01.mp4", "00.frames.jpg")
    sample(config, 100, "00.mp4", "00.beside_start.mp4", "01.mp4")
    sample(config, 20, "01.mp4")
    found = [(video.parent.name, video.name, words) for video, words in state_of(config).samples]
    assert found == [
        ("step-000100", "00.beside_start.mp4", "step 100, beside step 0: a red square"),
        ("step-000100", "01.mp4", "step 100: a <blue> circle"),
        ("step-000020", "01.mp4", "step 20: a <blue> circle"),
        ("step-000000", "00.mp4", "step 0: a red square"),
        ("step-000000", "01.mp4", "step 0: a <blue> circle"),
    ]
    shown = samples_html(state_of(config).samples)
    assert shown.count("<video") == 5
    assert "step 100: a &lt;blue&gt; circle" in shown


def test_the_result(config):
    (out_of(config) / "report.html").write_text("page")
    place = address(state_of(config).report)
    told = html("result", place, "gen-accel generate <x>")
    assert f'href="{place}"' in told
    assert "gen-accel generate &lt;x&gt;" in told


def test_the_command_that_uses_a_lora():
    lora = demo.path().parent / "long_lora"
    config = TrainConfig(stages=("129:10",), height=96, width=96)
    said = command_of(config, state_of(config)._replace(result=lora))
    assert said.startswith("gen-accel generate --model demo --prompt ")
    assert f"--from-lora {lora}" in said
    assert "--frames 129" in said


PLAN = {
    "rows": {"weights": "weights", "block": "one block at work"},
    "stages": [
        {
            "size": {"frames": 81, "height": 480, "width": 832},
            "tokens": 32760,
            "memory": {
                **{"weights": 28_600_000_000, "adapter": 5_000_000_000, "kept": 14_300_000_000},
                **{"block": 12_100_000_000, "outside": 300_000_000},
                **{"host": 0, "total": 60_300_000_000},
            },
            "seconds": {"RTX 4090": {"low": 42.5, "high": 106.0}},
        }
    ],
    "verdicts": [
        {
            **{"device": "H100", "memory": 80e9, "peak": 60.3e9, "moment": "a step"},
            **{"fits": True, "advice": None, "hours": {"low": 1.0, "high": 2.5}},
        },
        {
            **{"device": "RTX 4090", "memory": 24e9, "peak": 60.3e9, "moment": "a step"},
            "fits": False,
            "advice": {
                "changes": [
                    {"option": "gradient_checkpointing offload", "saves": 12.3e9},
                    {"option": "blocks_to_swap 37", "saves": 24.6e9},
                ],
                **{"fits": True, "frames": 81},
            },
            "hours": {"low": 10.0, "high": 20.0},
        },
    ],
    "notes": ["scratch memory"],
}


def test_a_plan():
    shown = plan_html(PLAN)
    assert "does not fit</span>: 60.3 GB of 24.0 GB" in shown
    steps = (
        "gradient_checkpointing offload saves 12.3 GB",
        "blocks_to_swap 37 saves 24.6 GB",
    )
    assert "".join(f"<li>{one}</li>" for one in steps) in shown
    assert "<td>one block at work</td><td>12.1 GB</td>" in shown
    assert changes_of(PLAN) == {"gradient_checkpointing": "offload", "blocks_to_swap": "37"}
    assert changes_of({"verdicts": PLAN["verdicts"][:1]}) == {}


def test_a_report_of_clips(config):
    assert found_html(state_of(config).clips) == ""
    report = Report(
        out_of(config) / "cache",
        *(0, 0, 0, 0),
        left_out={f"{i}.mp4": "broken: it is empty" for i in range(12)},
        losses=[CropLoss("a.mp4", 0.25, 4, 20)],
        buckets=(Bucket(33, (96, 96), 2, 4.125),),
        videos=14,
    )
    report.write()
    shown = found_html(state_of(config).clips)
    assert "<b>2 to train on, 4.1 s, of 14 found.</b>" in shown
    assert "25% of the picture is cropped on average, and 4 of 20 frames are unused" in shown
    assert "7.mp4: broken: it is empty" in shown
    assert "and 4 more" in shown
