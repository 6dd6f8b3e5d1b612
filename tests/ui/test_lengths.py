"""The screen Longer, without a browser."""

import json
from pathlib import Path

import numpy as np
import pytest

from gen_accel import demo
from gen_accel.measure import write_video
from gen_accel.ui.screens import longer as lengths


def test_settings_go_to_the_techniques_that_are_chosen_in_their_order():
    chosen = ["fresh_noise", "riflex"]
    found = lengths.with_settings(chosen, " fresh_noise:shift=22, riflex:k=4 ")
    assert found == ["riflex:k=4", "fresh_noise:shift=22"]
    assert lengths.with_settings(chosen, "") == ["riflex", "fresh_noise"]


@pytest.mark.parametrize("settings", ["continuation:overlap=2", "riflex", "nope"])
def test_settings_of_what_is_not_chosen_are_refused(settings):
    with pytest.raises(ValueError, match="settings are of techniques that are chosen"):
        lengths.with_settings(["riflex"], settings)


def test_the_embedded_loras_are_found_with_what_they_hold():
    found = lengths.loras_in([Path(demo.__file__).parent])
    assert {one.folder.name for one in found} == {"long_lora", "long_lora_guided"}
    for one in found:
        held = json.loads((one.folder / "gen_accel.json").read_text())
        assert [*one.techniques] == held["techniques"]
        assert one.trained_frames == demo.TRAINED_FRAMES
        assert one.holds_guidance is (held["teacher_guidance"] > 1)
        assert str(held["frames"]) in one.words


def test_other_files_are_no_loras_for_longer_video(tmp_path):
    for name, text in {"a": "{", "b": "[]", "c": '{"techniques": []}', "d": "{}"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / lengths.CONFIG).write_text(text)
        (tmp_path / name / lengths.WEIGHTS).touch()
    assert lengths.loras_in([tmp_path, tmp_path / "nope"]) == []


def test_drift_counts_from_the_first_frame():
    found = lengths.drift_table([[0.1, 0.2, 0.3], [0.2, 0.2, 0.1]], [0.5, 0.4])
    assert found["frame"] == [0] * 4 + [1] * 4
    assert found["of"] == [*lengths.CHANNELS] * 2
    assert found["drift"] == pytest.approx([0, 0, 0, 0, 0.1, 0, -0.2, -0.1])


def test_the_chart_of_loops_leaves_out_what_is_not_defined():
    found = lengths.loop_table([1.0, 0.5, None, -0.5, 0.1, -3.0])
    assert found == {"frames apart": [1, 3, 4], "similarity": [0.5, -0.5, 0.1]}


def test_a_sheet_has_the_frames_of_a_video_in_a_row(tmp_path):
    file = write_video(np.zeros((4, 32, 32, 3), np.uint8), tmp_path / "a.mp4", fps=8)
    one, two = (lengths.sheet_of(file, "a", count=count) for count in (2, 3))
    assert one.shape[0] == two.shape[0]
    assert two.shape[1] - one.shape[1] >= 32
