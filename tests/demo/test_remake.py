"""The demo model and all that hangs on it, made again: in which order, and what goes on."""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.paths import ROOT

from gen_accel import demo
from gen_accel.lora.config import TrainConfig, read_config
from gen_accel.measure import write_video

sys.path.append(str(ROOT / "examples"))
from demo_model import pictures, remake
from demo_model.remake import STAGES, Stage, embed, weights_sha256


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Words of the commands that were run; `failing` holds a part of one that fails."""
    found = SimpleNamespace(words=[], failing=None)

    def run(words, *, cwd, env, check):
        assert (cwd, check) == (tmp_path, False)
        assert str(tmp_path / "examples") in env["PYTHONPATH"]
        found.words.append(words)
        return SimpleNamespace(returncode=int(found.failing in words))

    monkeypatch.setattr(remake.subprocess, "run", run)
    monkeypatch.setattr(remake, "ROOT", tmp_path)
    monkeypatch.setitem(STAGES, "clips", Stage(("python one --out {work}/a", "python two")))
    return found


def asked(monkeypatch, *names):
    monkeypatch.setattr(sys, "argv", ["remake", *names])
    remake.main()


def model(folder: Path, value: float) -> Path:
    (folder / "vae").mkdir(parents=True)
    save_file({"w": torch.full((2,), value)}, folder / "vae" / "model.safetensors")
    return folder


def test_a_stage_goes_on_where_a_command_failed(runs, monkeypatch):
    runs.failing = "two"
    with pytest.raises(SystemExit, match="clips failed with 1"):
        asked(monkeypatch, "clips")
    runs.failing = None
    asked(monkeypatch, "clips")
    assert [words[1] for words in runs.words] == ["one", "two", "two"]
    asked(monkeypatch, "clips")
    assert len(runs.words) == 3
    monkeypatch.setitem(STAGES, "clips", Stage(("python one --out {work}/a", "python three")))
    asked(monkeypatch, "clips")
    assert [words[1] for words in runs.words[3:]] == ["three"]


def test_a_stage_is_made_again_after_an_earlier_one(runs, monkeypatch, tmp_path):
    asked(monkeypatch, "cards")
    asked(monkeypatch, "clips", "cards")
    assert [words[1] for words in runs.words] == ["-m", "one", "two", "-m"]
    asked(monkeypatch, "clips", "cards")
    assert len(runs.words) == 4


def test_another_model_has_other_folders(runs, monkeypatch, tmp_path):
    models = [model(tmp_path / name, value) for name, value in (("one", 1.0), ("other", 2.0))]
    for folder in (*models, models[0]):
        monkeypatch.setattr(demo, "path", lambda folder=folder: folder)
        asked(monkeypatch, "clips")
    folders = [words[-1] for words in runs.words if words[1] == "one"]
    assert len({*folders}) == len(folders) == 2


def test_a_training_that_has_begun_goes_on(runs, monkeypatch, tmp_path):
    command = "python -m gen_accel train one.yaml --out out"
    monkeypatch.setitem(STAGES, "clips", Stage((command,)))
    (tmp_path / "out" / "checkpoints" / "step-100").mkdir(parents=True)
    asked(monkeypatch, "clips")
    assert runs.words == [[sys.executable, *command.split()[1:], "--resume"]]


def test_what_is_made_comes_into_the_package(runs, monkeypatch, tmp_path):
    package = model(tmp_path / "package", 1.0)
    (package / "score.json").write_text("{}")
    made = model(tmp_path / "made", 2.0)
    (made / "train.log").write_text("")
    before = weights_sha256(package)
    monkeypatch.setitem(STAGES, "clips", Stage((), "made", package))
    asked(monkeypatch, "clips")
    assert weights_sha256(package) == weights_sha256(made) != before
    assert sorted(file.name for file in package.iterdir()) == ["score.json", "vae"]
    (made / "vae" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no vae.model\.safetensors"):
        embed(made, package)
    assert weights_sha256(package) != before


def test_stages_run_in_the_order_of_the_list(runs, monkeypatch, capsys):
    asked(monkeypatch, "notebooks", "cards")
    assert [words[-1] for words in runs.words] == ["demo_model.cards", "notebooks/store.py"]
    with pytest.raises(SystemExit):
        asked(monkeypatch, "card")
    assert "there is no stage card: model, clips" in capsys.readouterr().err


def test_commands_name_files_and_options_that_are_there(capsys, monkeypatch):
    asked(monkeypatch, "--list")
    listed = capsys.readouterr().out.splitlines()
    assert [line for line in listed if not line.startswith(" ")] == [*STAGES]
    fields = TrainConfig.model_fields
    for words in (shlex.split(line) for line in listed if line.startswith(" ")):
        for word in words:
            if word.endswith((".py", ".yaml")) and not word.startswith("outputs"):
                assert (ROOT / word).exists(), word
        if "train" in words:
            [path] = [word for word in words if word.startswith(("configs/lora", "configs/image"))]
            read_config(ROOT / path)
            options = [word[2:].replace("-", "_") for word in words if word.startswith("--")]
            assert {*options} - {"config_file"} <= {*fields}
    assert all(stage.ships is None or stage.ships.is_dir() for stage in STAGES.values())


def test_pictures_are_those_of_the_demo(monkeypatch, tmp_path):
    film = np.zeros((24, 60, 100, 3), np.uint8)
    for i in range(24):
        film[i, 20:40, i : i + 30, 0] = 255
    write_video(film, tmp_path / "race", fps=16)
    sheet = tmp_path / "sheet.png"
    Image.fromarray(film[-1]).save(sheet)
    given = []

    def run(out, **options):
        given.append((out, options))
        return {}, {"race": tmp_path / "race", "contact sheet": sheet}

    monkeypatch.setattr(pictures.job, "run", run)
    for name in ("RACE", "PICTURED"):
        monkeypatch.setattr(pictures, name, tmp_path / getattr(pictures, name).name)
    monkeypatch.setattr(sys, "argv", ["pictures", "--work", str(tmp_path / "work")])
    pictures.main()
    assert [sorted(options) for _, options in given] == [[], ["image", "seed"]]
    assert (tmp_path / "image_prompt.png").read_bytes() == sheet.read_bytes()
    with Image.open(tmp_path / "race.gif") as made:
        assert (made.n_frames, made.size, made.info["loop"]) == (12, (435, 261), 0)
        assert made.info["duration"] == 120
        made.seek(11)
        assert made.convert("RGB").getpixel((170, 130)) == pytest.approx((255, 0, 0), abs=4)
