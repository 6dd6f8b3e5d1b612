"""The form of a training without a browser: its YAML, and what it refuses before the library."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import yaml
from support.clips import footage
from typer.testing import CliRunner

pytest.importorskip("gradio", reason='needs gradio: pip install "gen_accel[ui]"')

import gradio

from gen_accel.cli import app
from gen_accel.config import written
from gen_accel.lora.config import TrainConfig
from gen_accel.measure.video_io import write_video
from gen_accel.ui.files import Places
from gen_accel.ui.screens import train_form
from gen_accel.ui.screens.train_form import TrainForm


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
        made = TrainForm(SimpleNamespace(places=places, models=("demo",), tab=gradio.Textbox()))
        made.add("data")
        made.settings()
        yield made


def printed(*args):
    found = CliRunner().invoke(app, ["train", "--print-config", *args])
    assert found.exit_code == 0, found.output
    return found.stdout


def entered(form, **fields):
    """Values of the components after a person changed some fields."""
    held = form.shown({**form.start, **{k: v for k, v in fields.items() if k in form.fields}})
    return {**held, form.yaml: "", form.written: ""}


def test_every_field_has_a_control(form):
    assert form.parts.keys() == TrainConfig.options().keys()


def test_controls_speak_in_words(form):
    told = [
        f"{x.label} {x.info or ''} {getattr(x, 'placeholder', '')}" for x in form.parts.values()
    ]
    names = "|".join(name for name in form.fields if "_" in name)
    assert [x for x in told if re.search(rf"\b({names})\b|none:|--[a-z]", x)] == []
    assert form.parts["out"].value == "lora"
    assert form.parts["shuffle_tags"].placeholder == "all"


def test_an_error_speaks_of_the_controls(form):
    needs = "Steps between sample videos 30 needs Prompts of samples, got none"
    with pytest.raises(ValueError, match=needs):
        form.read(entered(form, validate_every=30))


def test_a_name_is_a_folder_of_trainings(form):
    read = form.read(entered(form) | {form.parts["out"]: "mine"})
    assert read.out == str(form.trainings / "mine")
    assert form.fill({"out": read.out})[form.parts["out"]] == "mine"
    for none in ("", " ", "."):
        with pytest.raises(ValueError, match=r"^give the training a name$"):
            form.checked(form.read(entered(form) | {form.parts["out"]: none}))


def test_a_preset_is_its_rule_and_found_again(form):
    assert entered(form)[form.attention.quality] == "balanced", "as on the other screens"
    for choice, own in train_form.ATTENTION.items():
        config = form.read(entered(form) | {form.attention.quality: choice})
        assert {name: written(getattr(config, name)) for name in own} == own
        shown = form.fill(vars(config))
        assert shown[form.attention.quality] == choice
        assert form.read(shown) == config


def test_a_missing_number_stays_missing(form):
    """Gradio's component for numbers makes it 0 as soon as its fold is opened."""
    part = form.parts["validation_frames"]
    assert not isinstance(part, gradio.Number)
    assert form.entered(entered(form))["validation_frames"] is None
    held = entered(form) | {part: part.preprocess("9")}
    assert form.config(form.entered(held)).validation_frames == 9
    with pytest.raises(ValueError, match="validation_frames must be int or none"):
        form.config(form.entered(held | {part: part.preprocess("nine")}))


def test_yaml_equals_print_config(form):
    flags = {"height": 96, "width": 96, "stages": "33:200", "out": form.start["out"]}
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert f"{form.yaml.value}\n" == printed("--model", "demo", *given)
    shown = form.write(form.config(form.entered(entered(form))))
    assert shown[form.yaml] == shown[form.written] == f"{form.yaml.value}\n"


FILLED = {
    "data": "clips",
    "stages": ["33:2", "65:4:position_interpolation"],
    "fps": 8,
    "learning_rate": "1e-4",
    "settings": ["block_q=32", "block_k=32"],
    "betas": [0.9, 0.95],
    "base": "fp8",
    "gradient_checkpointing": "on",
    "validation_prompts": ["a red square, then a blue one", "two\u00fc"],
    "log_with": "none",
    "weighting": "none",
    "dora": True,
    "trigger": "sks",
}


def test_a_yaml_fills_the_form_which_gives_it_back(form):
    shown = form.fill(form.fields_in(yaml.safe_dump(FILLED)))
    config = form.read(shown)
    assert config.validation_prompts == ("a red square, then a blue one", "two\u00fc")
    assert (config.log_with, config.base, config.learning_rate) == ("none", "fp8", 1e-4)
    assert form.write(config)[form.yaml] == shown[form.yaml]


def test_an_edited_yaml_is_what_counts(form):
    held = entered(form, rank=4)
    assert form.read(held).rank == 4
    assert form.read({**held, form.yaml: "rank: 9"}).rank == 9
    older = {**held, form.yaml: "rank: 3", form.written: "rank: 3\n"}  # an answer not yet there
    assert form.read(older).rank == 4


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rank": -1}, "rank must"),
        ({"rank": None}, "rank must be int, got None; such as rank: 128"),
        ({"stages": ["81"]}, "a stage is written frames:steps or frames:steps:rule"),
        ({"method": "radical"}, "did you mean 'radial'?"),
        ({"blocks_to_swap": 2}, "on or offload, which brings"),
    ],
    ids=["range", "empty", "stage", "name", "together"],
)
def test_what_the_library_refuses(form, fields, sentence):
    with pytest.raises(ValueError, match=re.escape(form.worded(sentence))):
        form.read(entered(form, **fields))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        form.fill(fields)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rank: [", "config.yaml is not YAML: "),
        ("just words", "config.yaml must hold fields as `name: value`, got 'just words'"),
        ("ranks: 3", "there is no field 'ranks'; did you mean 'rank'?"),
        ("fps: fast", "fps must be float or none, got 'fast'; such as fps: 16.0"),
    ],
)
def test_yaml_that_is_refused(form, text, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        form.read({**entered(form), form.yaml: text})


CODE = [
    {"method": "evil_of_page:X"},
    {"method": "reuse", "settings": ["method=evil_of_page:X"]},
    {"optimizer": "evil_of_page.X"},
]


@pytest.mark.parametrize("fields", CODE, ids=["method", "settings", "optimizer"])
def test_code_is_refused_before_it_is_imported(form, evil, fields):
    text = {**entered(form), form.yaml: json.dumps(fields)}
    for read in (
        lambda: form.read(entered(form, **fields)),
        lambda: form.read(text),
        lambda: form.fill(fields),
    ):
        with pytest.raises(ValueError, match="is code to import, which a page does not do"):
            read()
    assert not evil.exists()


def test_an_unforeseen_error_is_a_sentence_too(form, monkeypatch):
    def broken(values):
        raise RuntimeError("of a package")

    monkeypatch.setattr(train_form.TrainConfig, "read", broken)
    with pytest.raises(ValueError, match=r"^this cannot be checked: of a package"):
        form.read(entered(form))


@pytest.mark.slow
def test_a_model_elsewhere_is_refused_before_it_is_read(form):
    for name, words in (("/etc", "is not a file of this page"), ("other/name", "is on the hub")):
        with pytest.raises(ValueError, match=words):
            form.read(entered(form, model=name))


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


def test_a_folder_elsewhere_for_the_result_becomes_one_of_this_page(form):
    shown = form.fill({"out": "/data/loras/cats"})
    assert form.read(shown).out == str(form.trainings / "cats")


def test_no_event_of_the_form_waits_in_the_browser(form):
    events = [one for one in gradio.context.Context.root_block.fns.values() if one.targets]
    assert events
    assert {one.trigger_mode for one in events} <= {"multiple", "once"}
    assert all(one.queue for one in events if one.fn is not None)  # else the browser runs it
