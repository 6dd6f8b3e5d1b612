"""Outputs: none replaces an input, another output, or what is there already."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import gen_accel
from gen_accel.cli import app
from gen_accel.lora import export
from gen_accel.measure import write_video
from gen_accel.parsing import members
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.tuning.config import TuneConfig
from gen_accel.pipelines.tuning.tune_model import tune_model
from gen_accel.ui.worker import commands

TOKENS = ("--frames", "5", "--height", "12", "--width", "12")
DEMO = ("generate", "--model", "demo", "--prompt", "a red circle moves left slowly")
ESTIMATE = ("estimate", "--model", "demo", "--frames", "9", "--height", "48", "--width", "48")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with files of each kind that verbs read."""
    for name in ("v.mp4", "w.mp4", "frames"):
        write_video(np.zeros((2, 16, 16, 3), np.uint8), tmp_path / name, fps=8)
    Image.new("RGB", (8, 8)).save(tmp_path / "r.png")
    (tmp_path / "p.txt").write_text("a red circle moves left slowly\n")
    (tmp_path / "c.yaml").write_text("model: demo\nprompt: a red circle moves left slowly\n")
    lora = Path(gen_accel.__file__).parent / "demo" / "long_lora"
    shutil.copytree(lora, tmp_path / "lora")
    preset = Path(gen_accel.__file__).parent / "presets" / "demo-fast.json"
    shutil.copy(preset, tmp_path / "p.json")
    shutil.copy(preset.with_suffix(".safetensors"), tmp_path)
    (tmp_path / "demo-fast.safetensors").rename(tmp_path / "p.safetensors")
    fields = {"model": "demo", "prompt": ["a red circle moves left slowly"]}
    settings = {"gen_accel": "settings", "version": 1, "made_by": {}, "fields": fields}
    (tmp_path / "s.json").write_text(json.dumps(settings | {"files": {}, "wordless": {}}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


WEIGHTS = "lora/pytorch_lora_weights.safetensors"
ON_INPUTS = {
    "a clip": ("metrics", "v.mp4", "--json", "v.mp4"),
    "the reference": ("metrics", "v.mp4", "--reference", "w.mp4", "--json", "w.mp4"),
    "./": ("metrics", "v.mp4", "--json", "./frames/../v.mp4"),
    "a link": ("metrics", "v.mp4", "--json", "link.json"),
    "a hard link": ("metrics", "v.mp4", "--json", "hard.json"),
    "a linked folder": ("metrics", "v.mp4", "--json", "here/v.mp4"),
    "a frame of a clip": ("metrics", "frames", "--json", "frames/0000.png"),
    "the folder of a clip": (*DEMO, "--video", "frames/0000.png", "--out", "frames"),
    "the file of prompts": (*DEMO[:3], "--prompts", "p.txt", "--json", "p.txt"),
    "an image prompt": (
        *(*DEMO, "--image-prompt", "r.png", "--image-adapter", "demo", "--json", "r.png"),
    ),
    "the config": ("generate", "--config", "c.yaml", "--json", "c.yaml"),
    "the weights of a LoRA": (*DEMO, "--lora", "lora:0.5", "--json", WEIGHTS),
    "a trained LoRA": ("export", "lora", "--out", WEIGHTS),
    "the profile of a preset": ("show", "--preset", "p.json", "--json", "p.safetensors"),
    "its own preset": ("show", "--preset", "p.json", "--json", "p.json"),
    "the preset to solve": ("tune", "--preset", "p.json", "--quality", "25", "--out", "p.json"),
    "a clip made again": ("generate", "--from-settings", "s.json", "--json", "s.json"),
    "the LoRA to start from": ("train", "--out", ".", "--init-lora", "lora", "--data", "frames"),
    "clips": ("train", "--out", ".", "--data", "lora"),
    "a file of a model": ("estimate", "--model", "model", "--json", "p.safetensors"),
    "an image of the demo": ("demo", "--image-prompt", "r.png", "--out", "."),
}


@pytest.mark.parametrize("line", ON_INPUTS.values(), ids=ON_INPUTS)
def test_an_input_is_never_an_output(folder, line):
    (folder / "link.json").symlink_to("v.mp4")
    os.link(folder / "v.mp4", folder / "hard.json")
    (folder / "model" / "transformer").mkdir(parents=True)
    (folder / "model/transformer/original.safetensors").symlink_to(folder / "p.safetensors")
    (folder / "here").symlink_to(".")
    if line[0] == "demo":
        shutil.copy("r.png", "mask.png")
        line = [*line[:2], "mask.png", *line[3:]]
    before = contents(folder)
    result = CliRunner().invoke(app, [*line, "--overwrite"])
    assert result.exit_code == 2, result.output
    assert "which is read" in result.output or "is read, as" in result.output, result.output
    assert contents(folder) == before


TOGETHER = {
    "one file": (*DEMO, "--save-latents", "x.safetensors", "--json", "x.safetensors"),
    "a clip and figures": (*DEMO, "--out", "o.gif", "--json", "o.gif"),
    "the report of a comparison": (*DEMO, "--compare", "--out", "o.gif", "--json", "o.json"),
    "other case": (*DEMO, "--out", "o.gif", "--json", "O.GIF"),
    "one in the other": (*DEMO, "--out", "new", "--json", "new/o.json"),
    "numbered": (*DEMO, "--prompt", "x", "--out", "o.png", "--json", "o-001.png"),
    "a profile": (
        *("tune", "--model", "demo", "--prompts", "p.txt", "--out", "t.json"),
        *("--json", "t.safetensors"),
    ),
}


@pytest.mark.parametrize("line", TOGETHER.values(), ids=TOGETHER)
def test_each_output_has_a_file_of_its_own(folder, line):
    before = contents(folder)
    result = CliRunner().invoke(app, [*line])
    assert result.exit_code == 2, result.output
    assert "one file" in result.output or "within each other" in result.output
    assert contents(folder) == before


def test_what_is_there_stays_unless_asked(folder):
    line = [*ESTIMATE, "--json", "e.json"]
    (folder / "e.json").touch()  # as mktemp makes it
    for more, code in (((), 0), ((), 2), (("--overwrite",), 0)):
        result = CliRunner().invoke(app, [*line, *more])
        assert result.exit_code == code, result.output
    (folder / "e.json").write_text("mine")
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert "e.json is there already: --overwrite replaces it" in result.output
    assert (folder / "e.json").read_text() == "mine"


@pytest.mark.parametrize(
    "line",
    [
        (*DEMO, "--out", "v.mp4"),
        (*DEMO, "--out", "frames"),
        (*DEMO, "--out", "new.mp4", "--json", "v.mp4"),
        (*DEMO, "--compare", "--out", "p.gif"),
        ("show", "radial", *TOKENS, "--out", "r.png"),
        ("export", "lora", "--out", "p.safetensors"),
        ("tune", "--model", "demo", "--prompts", "p.txt", "--out", "p.json"),
        ("demo", "--out", "shown"),
        ("doctor", "--json", "p.json"),
        ("train", "--out", ".", "--data", "set"),
    ],
    ids=" ".join,
)
def test_each_verb_refuses_what_is_there(folder, line):
    (folder / "shown").mkdir()
    (folder / "shown" / "report.html").write_text("mine")
    (folder / "set").mkdir()
    shutil.copy("v.mp4", "set")
    (folder / "set" / "v.txt").write_text("a red circle\n")
    before = contents(folder)
    result = CliRunner().invoke(app, [*line])
    assert result.exit_code == 2, result.output
    assert "is there already" in result.output
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ((*DEMO, "--compare", "--out", "x" * 246 + ".mp4"), "xxxx.dense.mp4 has 256 bytes"),
        ((*DEMO, "--preview", "1", "--out", "x" * 246 + ".mp4"), "preview.png has 258 bytes"),
        ((*ESTIMATE, "--json", "x" * 256 + "/e.json"), "xxxxx has 256 bytes"),
    ],
)
def test_a_name_that_is_too_long_is_refused_before_any_work(folder, line, name):
    result = CliRunner().invoke(app, [*line])
    assert result.exit_code == 2, result.output
    assert name in (told := " ".join(result.output.split())), told
    assert "takes at most 255: shorten it" in told


def test_a_plan_writes_no_video(folder):
    result = CliRunner().invoke(app, [*DEMO, "--out", "v.mp4", "--plan"])
    assert result.exit_code == 0, result.output


def test_figures_of_clips_may_lie_beside_them(folder):
    (folder / "clips").mkdir()
    shutil.copy("v.mp4", "clips")
    for more in ((), ("--overwrite",)):
        result = CliRunner().invoke(
            app, ["metrics", "clips", "--json", "clips/metrics.json", *more]
        )
        assert result.exit_code == 0, result.output
    assert json.loads((folder / "clips" / "metrics.json").read_text())["frames"] == 2


def test_python_refuses_too(folder):
    with pytest.raises(FileExistsError, match=r"v\.mp4 is there already"):
        generate("demo", ["a red circle moves left slowly"], out="v.mp4")
    before = contents(folder)
    with pytest.raises(ValueError, match=r"is in source lora, which is read"):
        export("lora", WEIGHTS, overwrite=True)
    shutil.copy(WEIGHTS, "there.safetensors")
    with pytest.raises(FileExistsError, match=r"there\.safetensors is there already"):
        export("lora", "there.safetensors")
    config = TuneConfig.read({}, {"model": "demo", "prompts": "p.txt", "out": "p.json"})
    with pytest.raises(FileExistsError, match=r"p\.json is there already"):
        tune_model(config)
    assert contents(folder) == {
        **before,
        str(folder / "there.safetensors"): before[str(folder / WEIGHTS)],
    }


def test_each_path_is_read_or_written():
    """A new option that names a file is checked without another word."""
    for verb, command in commands().commands.items():
        for name, one in command.known.items():
            if Path in members(one.hint):
                assert (one.reads is None) == one.writes, f"{verb} {name}"
