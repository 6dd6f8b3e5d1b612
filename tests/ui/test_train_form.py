"""The form of a training without a browser: what it refuses before the library sees it."""

import json
import sys
from types import SimpleNamespace

import gradio
import pytest
from support.clips import footage

from gen_accel.lora.config import TrainConfig
from gen_accel.measure.video_io import write_video
from gen_accel.ui.files import Places
from gen_accel.ui.train_fields import all_values, config_of, starting_values, write_yaml
from gen_accel.ui.train_form import Form


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module in the current folder that leaves a file where it is imported."""
    mark = tmp_path / "imported"
    (tmp_path / "evil_of_page.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass X: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield mark
    sys.modules.pop("evil_of_page", None)


@pytest.fixture
def form(tmp_path):
    (tmp_path / "page").mkdir()
    places = Places(tmp_path / "page", models=["demo"])
    with gradio.Blocks():
        made = Form(SimpleNamespace(places=places, models=("demo",), tab=gradio.Textbox()))
        made.add("data")
        made.settings()
        yield made


CODE = [
    {"method": "evil_of_page:X"},
    {"method": "reuse", "settings": ["method=evil_of_page:X"]},
    {"optimizer": "evil_of_page.X"},
]


@pytest.mark.parametrize("fields", CODE, ids=["method", "settings", "optimizer"])
def test_code_is_refused_before_it_is_imported(form, evil, fields):
    written = write_yaml(all_values(fields))
    assert written.config is None
    assert "is code to import, which a page does not do" in written.objection
    for read in (config_of, form.fill):
        with pytest.raises(ValueError, match="is code to import"):
            read(json.dumps(fields))
    assert not evil.exists()


def test_an_unforeseen_error_is_a_sentence_too(monkeypatch):
    def broken(self):
        raise RuntimeError("of a package")

    monkeypatch.setattr(TrainConfig, "__post_init__", broken)
    written = write_yaml(starting_values("demo", None))
    assert written.objection == "this cannot be checked: RuntimeError: of a package"


def test_a_model_elsewhere_is_refused_before_it_is_read(form):
    for name, words in (("/etc", "is not a file of this page"), ("other/name", "is on the hub")):
        said = form.fill_with({**form.start, "model": name})[0]
        assert words in said


def test_the_words_of_a_config_are_text(form, monkeypatch):
    from gen_accel.ui import train_form

    monkeypatch.setattr(train_form, "in_words", lambda config: "<script>alert(1)</script>")
    assert "<script>" not in form.fill_with(form.start)[1]


def test_a_manifest_names_no_file_elsewhere(form, tmp_path):
    write_video(footage(9, 48, 48), tmp_path / "secret.mp4", fps=16)
    manifest = tmp_path / "page" / "clips.jsonl"
    given = {"out": str(form.trainings / "one"), "data": str(manifest), "stages": ("9:1",)}
    config = TrainConfig(height=48, width=48, device="cpu", **given)
    for name in (str(tmp_path / "secret.mp4"), "../secret.mp4", "link.mp4"):
        manifest.write_text(json.dumps({"file_name": name, "text": "a film"}))
        if name == "link.mp4":
            (tmp_path / "page" / name).symlink_to(tmp_path / "secret.mp4")
        with pytest.raises(ValueError, match="is not a file of this page"):
            form.checked(config)
    manifest.write_text(json.dumps({"file_name": "own.mp4", "text": "a film"}))
    write_video(footage(9, 48, 48), tmp_path / "page" / "own.mp4", fps=16)
    assert form.checked(config) is config


def values_of(form, text, agreed, **fields):
    shown = form.fill_with({**form.start, **fields})[4:]
    return [text, agreed, *shown]


def test_an_older_answer_is_written_anew_and_an_edited_text_is_not(form):
    older, newer = (form.fill_with({**form.start, "rank": n})[2].strip() for n in (3, 4))
    present = values_of(form, older, [older], rank=4)
    _, _, text, agreed = form.settled(*present)
    assert text.strip() == newer
    assert agreed == [older, newer]
    for text, agreed in ((newer, [older, newer]), ("rank: 9", [older, newer])):
        untold = form.settled(text, agreed, *present[2:])
        assert untold == [gradio.skip()] * 4


def test_no_event_of_the_form_waits_in_the_browser(form):
    events = [one for one in gradio.context.Context.root_block.fns.values() if one.targets]
    assert events
    assert {one.trigger_mode for one in events} <= {"multiple", "once"}
    assert all(one.queue for one in events if one.fn is not None)  # else the browser runs it
