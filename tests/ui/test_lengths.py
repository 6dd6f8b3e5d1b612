"""The screen Longer, without a browser."""

import json
from pathlib import Path

import numpy as np
import pytest

from gen_accel import demo
from gen_accel.measure import write_video
from gen_accel.ui import lengths

ANSWER = {
    "techniques": [
        {"name": "riflex", "does": "Lower.", "refused": None, "effect": "33 latent frames"},
        {"name": "continuation", "does": "Chunks.", "refused": "no", "effect": None},
    ]
}
COURSE = {
    "colors": [[0.1, 0.2, 0.3], [0.2, 0.2, 0.1]],
    "contrasts": [0.5, 0.4],
    "similarity": [1.0, None],
}


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
    found = lengths.drift_table(COURSE)
    assert found["frame"] == [0] * 4 + [1] * 4
    assert found["of"] == [*lengths.CHANNELS] * 2
    assert found["drift"] == pytest.approx([0, 0, 0, 0, 0.1, 0, -0.2, -0.1])


def test_the_chart_of_loops_leaves_out_what_is_not_defined():
    course = COURSE | {"similarity": [1.0, 0.5, None, -0.5, 0.1, -3.0]}
    found = lengths.loop_table(course)
    assert found == {"frames apart": [1, 3, 4], "similarity": [0.5, -0.5, 0.1]}


def test_answers_are_read_by_technique():
    assert lengths.refused(ANSWER) == {"continuation": "no"}
    assert lengths.effects(ANSWER) == ["riflex: 33 latent frames"]
    assert lengths.does(ANSWER) == {"riflex": "Lower.", "continuation": "Chunks."}


def test_a_sheet_has_a_row_for_each_video(tmp_path):
    video = np.zeros((4, 32, 32, 3), np.uint8)
    file = write_video(video, tmp_path / "a.mp4", fps=8)
    one = lengths.sheet_of({"a": file}, count=3)
    two = lengths.sheet_of({"a": file, "b": file}, count=3)
    assert one.shape[1] == two.shape[1]
    assert two.shape[0] - one.shape[0] >= 32


def test_the_slider_goes_to_six_times_the_trained_length():
    assert lengths.longest(33) == 193
