"""Options of verbs as command lines, controls and places."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import yaml
from support.fake_worker import COMMAND

from gen_accel.parsing import members
from gen_accel.ui.files import READ, SOURCES, WRITTEN, Places
from gen_accel.ui.worker import arguments, command_line, command_of

pytest.importorskip("gradio", reason='needs gradio: pip install "gen_accel[ui]"')

import gradio

from gen_accel.cli.estimate import EstimateConfig
from gen_accel.cli.metrics import MetricsConfig
from gen_accel.lora.config import TrainConfig
from gen_accel.pipelines.generation.config import GenerateConfig
from gen_accel.ui.app import Server
from gen_accel.ui.form import Form
from gen_accel.ui.screens.generate import ELSEWHERE, RunForm

VERBS = ("generate", "train", "cache", "metrics", "tune", "estimate")


def test_options_come_to_the_arguments_of_a_command_line():
    options = {
        "model": "demo",
        "prompt": ["a cat", "-x"],
        "frames": 33,
        "seed": 0,  # the default
        "set": ["window=9,7,7"],
        "compare": True,
        "settings": False,
        "image": None,
    }
    assert arguments("generate", options) == [
        *("generate", "--model", "demo", "--prompt", "a cat", "--prompt=-x", "--frames", "33"),
        *("--set", "window=9,7,7", "--compare", "--no-settings"),
    ]
    assert arguments("metrics", {"videos": ["a.mp4", "b c.mp4"]})[1:] == ["a.mp4", "b c.mp4"]
    assert "'b c.mp4'" in command_line("metrics", {"videos": ["b c.mp4"]})


def test_arguments_are_what_a_config_file_of_the_same_options_gives(run, tmp_path):
    options = {"model": "demo", "prompt": ["a red square"], "dense_start": 0.2, "lora": ["a:0.5"]}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(options))
    ours = run(*arguments("generate", options), "--print-config").stdout
    assert ours == run("generate", "--config", tmp_path / "a.yaml", "--print-config").stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_that_names_a_file_has_a_place(verb):
    """So that a new one cannot read or write anywhere."""
    found = {
        name
        for name, one in command_of(verb).known.items()
        if any(part is Path or Path in get_args(part) for part in members(one.hint))
    }
    assert found - {*READ, *SOURCES, *WRITTEN} == set()


@pytest.fixture
def places(tmp_path):
    for name in ("out", "models/wan", "secret"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "secret" / "cat.png").write_bytes(b"")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "secret")
    models = [str(tmp_path / "models" / "wan"), "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    return Places(tmp_path / "out", allowed=["owner/name"], models=models)


@pytest.mark.parametrize(
    ("option", "path"),
    [
        ("image", "secret/cat.png"),
        ("image", "out/../secret/cat.png"),
        ("image", "out/link/cat.png"),
        ("image_prompt", ["secret/cat.png"]),
        ("out", "secret/new.mp4"),
        ("out", "out/link/new.mp4"),
        ("out", "models/wan/new.mp4"),
        ("out", "out"),
        ("json", "new.json"),
        ("model", "secret"),
        ("model", "models"),
        ("lora", ["secret:0.5"]),
        ("preset", "secret/preset.json"),
        ("from_settings", "secret/cat.png"),
    ],
)
def test_files_elsewhere_are_refused(places, tmp_path, option, path):
    several = isinstance(path, list)
    value = [str(tmp_path / one) for one in path] if several else str(tmp_path / path)
    with pytest.raises(ValueError, match=r"is not a file of this page|where this page writes to"):
        places.check("generate", {option: value})


@pytest.mark.parametrize("value", ["../secret", "~/.ssh", "/etc/passwd", "a/../../b"])
def test_a_source_is_no_path_in_disguise(places, value):
    with pytest.raises(ValueError, match="is not a file of this page"):
        places.check("generate", {"model": value})


@pytest.mark.parametrize(
    "options",
    [
        {"method": "os:system"},
        {"method": "reuse", "set": ["method=os:system"]},
        {"method": "reuse", "settings": ("every=2", "method=os:system")},
        {"settings": {"method": "os:system"}},
        {"optimizer": "os.path.Adam"},
        {"optimizer": "torch.optimizers.Adam"},
    ],
    ids=["method", "set", "settings", "mapping", "optimizer", "prefix"],
)
def test_code_is_refused(places, options):
    with pytest.raises(ValueError, match="is code to import"):
        places.check("generate", options)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "prodigyopt.Prodigy", "torch.optim.Adam"])
def test_known_optimizers_are_taken(places, name):
    places.check("train", {"optimizer": name})


def test_nothing_is_sent_to_another_server(places):
    with pytest.raises(ValueError, match="log_with wandb sends data to another server"):
        places.check("train", {"log_with": "wandb"})
    places.check("train", {"log_with": "tensorboard"})


@pytest.mark.parametrize(
    "options", [{"model": "other/name"}, {"lora": ["other/name:0.5"]}, {"image_encoder": "a/b"}]
)
def test_a_repository_that_was_not_named_is_refused(places, options):
    with pytest.raises(ValueError, match="is on the hub, and this page asks for no repository"):
        places.check("generate", options)
    places.any_on_hub = True  # as `ui --hub`
    places.check("generate", options)
    with pytest.raises(ValueError, match="is not a file of this page"):
        places.check("generate", {"model": "../other/name"})


def test_captions_are_edited_where_the_page_writes_or_was_allowed_to(tmp_path):
    for name in ("out", "clips", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "clips" / "link.txt").symlink_to(tmp_path / "model" / "a.txt")
    allowed, model = tmp_path / "clips", str(tmp_path / "model")
    places = Places(tmp_path / "out", allowed=[allowed], models=[model])
    for file in ("out/a.txt", "clips/b/a.txt"):
        assert places.editable(tmp_path / file) == tmp_path / file
    places.readable(tmp_path / "model" / "a.txt")
    for file in ("model/a.txt", "clips/link.txt"):
        with pytest.raises(ValueError, match="start it with --allow"):
            places.editable(tmp_path / file)


def test_own_files_names_and_texts_are_taken(places, tmp_path):
    options = {
        "model": str(tmp_path / "models" / "wan"),
        "out": str(tmp_path / "out" / "a" / "b.mp4"),
        "image": str(tmp_path / "out" / "cat.png"),
        "lora": ["owner/name:0.5"],
        "preset": "fast",
        "prompt": ["/etc/passwd is a file"],
        "validation_prompts": ["a/b is a text"],
        "method": "radial",
    }
    places.check("generate", options)
    places.check("generate", {"model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "json": None})
    places.check("generate", {"model": "demo"})
    places.check("generate", {"model": "wan 2.1 1.3b"})
    for name in ("Wan2.1-T2V-14B", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "wan 2.2", "minimax h3"):
        places.check("estimate", {"model": name})
        with pytest.raises(ValueError, match="is on the hub, and this page asks for no reposit"):
            places.check("generate", {"model": name})


@pytest.mark.parametrize(
    "config", [GenerateConfig, EstimateConfig, MetricsConfig, TrainConfig], ids=lambda x: x.VERB
)
def test_each_field_of_a_config_has_a_control(config):
    with gradio.Blocks():
        form = Form(config, "my")
        form.rest()
    assert form.parts.keys() == config.options().keys()
    shown = form.shown({})
    assert form.given(shown) == {}
    # A browser sends 0.0 as 0.
    whole = {part: int(x) for part, x in shown.items() if isinstance(x, float) and x == int(x)}
    assert form.given(shown | whole) == {}


def test_options_go_through_a_form_and_back():
    with gradio.Blocks():
        form = Form(GenerateConfig, "my")
        form.rest([name for name, one in form.fields.items() if one.accept])
    options = {
        "model": "demo",
        "prompt": ["a cat", "a dog"],
        "frames": 33,
        "lora": ["a:0.5", "b"],
        "extend": "riflex:k=4,fresh_noise",
        "dense_start": 0.25,
        "offload": "model",
        "compare": True,
    }
    assert form.given(form.shown(options)) == options


@pytest.mark.slow
def test_each_option_of_generate_has_a_control_or_another_place(tmp_path):
    """A new field of the config needs no line here."""
    given = {"models": ("demo",), "questions": None, "places": Places(tmp_path)}
    with gradio.Blocks(), gradio.Tab():
        form = RunForm(SimpleNamespace(tab=gradio.Textbox(), **given), "my", start={}, many=True)
    assert {*form.parts, *ELSEWHERE} == {*GenerateConfig.options()}
    assert not {*form.parts} & {*ELSEWHERE}


@pytest.mark.slow
def test_each_part_of_the_page_has_its_own_id(tmp_path, monkeypatch):
    pages = []
    monkeypatch.setattr(gradio, "mount_gradio_app", lambda app, page, **about: pages.append(page))
    with Server(tmp_path, command=COMMAND):
        ids = Counter(part.elem_id for part in pages[0].blocks.values() if part.elem_id)
    assert [name for name, count in ids.items() if count > 1] == []
