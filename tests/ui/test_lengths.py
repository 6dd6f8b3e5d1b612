"""The screen Longer, without a browser."""

import json
from pathlib import Path

import pytest

from gen_accel import demo
from gen_accel.ui.screens import longer as lengths


def test_the_embedded_loras_are_found_with_what_they_hold():
    found = lengths.long_loras([Path(demo.__file__).parent])
    assert {Path(place).name for _, place in found} == {"long_lora", "long_lora_guided"}
    for words, place in found:
        held = json.loads((Path(place) / "gen_accel.json").read_text())
        assert words.endswith(f"{held['frames']} frames, {', '.join(held['techniques'])}")


def test_other_files_are_no_loras_for_longer_video(tmp_path):
    for name, text in {"a": "{", "b": "[]", "c": '{"techniques": []}', "d": "{}"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "gen_accel.json").write_text(text)
        (tmp_path / name / "lora.safetensors").touch()
    assert lengths.long_loras([tmp_path, tmp_path / "nope"]) == []


def test_drift_counts_from_the_first_frame():
    found = lengths.drift_table([[0.1, 0.2, 0.3], [0.2, 0.2, 0.1]], [0.5, 0.4])
    assert found["frame"] == [0] * 4 + [1] * 4
    assert found["of"] == [*lengths.CHANNELS] * 2
    assert found["drift"] == pytest.approx([0, 0, 0, 0, 0.1, 0, -0.2, -0.1])


def test_the_chart_of_loops_leaves_out_what_is_not_defined():
    found = lengths.loop_table([1.0, 0.5, None, -1.3, 0.1, -3.0])
    assert found == {"frames apart": [1, 3, 4], "similarity": [0.5, -1.0, 0.1]}
