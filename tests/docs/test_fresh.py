"""README as a newcomer meets it: in an environment of exactly the extras that it names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.fresh import away
from support.pages import blocks, commands
from support.paths import ROOT

README = ROOT / "README.md"
OURS = re.compile(r"(loading|denoising|step|decoding|warning:|measuring) ?")  # how our lines begin
VERBS = (
    "list",
    "models",
    "doctor",
    "estimate --model demo",
    "generate --model demo --prompt red --plan",
    "show radial --model demo",
)
# The snippet on the demo, on a CPU, in fewer steps.
SMALLER = {
    '"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"': "gen_accel.demo.path()",
    '.to("cuda")': "",
    "torch.bfloat16": "torch.float32",
    '"height": 480, "width": 832, "num_frames": 81': '"height": 96, "width": 96, "num_frames": 33',
    '"num_inference_steps": 50': '"num_inference_steps": 5',
    "a cat surfs on a wave at sunset": "a red circle moves left",
    "a cat surfs": "a red circle moves left",
}

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """Python of a new environment, by README's own line."""
    [extras] = re.findall(r'^pip install "\.(\[[\w,]+\])"', README.read_text(), re.M)
    place = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = place / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"{ROOT}{extras}"], check=True)
    return python


def local() -> list[list[str]]:
    """README's command lines that download nothing, with their words."""
    found = [line for block in blocks(README) for line in commands(block)]
    return [line for line in found if not any("Wan-AI/" in word for word in line)]


def test_the_command_lines(fresh, tmp_path):
    said = {
        line[0]: away(fresh.with_name("gen-accel"), tmp_path, *line, seconds=900)
        for line in local()
    }
    assert {*said} == {"estimate", "generate"}
    for one in said.values():
        assert [line for line in one.err if not OURS.match(line)] == []
    clip = said["generate"]  # README: a clip of 33 frames in half a minute
    assert "denoising 0/20, 1,296 tokens" in clip.err
    assert re.search(r"left slowly  \(seed 0, \d+\.\d s\)", clip.out)
    assert len([*tmp_path.rglob("*.mp4")]) == 1
    plan = said["estimate"].out  # README: seconds and GB on a card, and what a method saves
    assert "RTX 4090" in plan
    assert re.search(r"in all +\d.* (?:min|h) ", plan)
    assert "GB" in plan
    assert "speed-up" in plan


def test_the_snippet(fresh, tmp_path):
    [block] = [one for one in blocks(README) if one.language == "python"]
    code = block.text
    for stated, small in SMALLER.items():
        assert stated in code
        code = code.replace(stated, small)
    said = away(fresh, tmp_path, "-c", code, seconds=900)
    assert said.err == []
    assert "steps 1-4" in said.out  # the first fifth of the steps is dense
    assert (tmp_path / "cat.mp4").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_says_our_words_alone(fresh, tmp_path, verb):
    said = away(fresh.with_name("gen-accel"), tmp_path, *verb.split())
    assert said.out
    assert [line for line in said.err if not OURS.match(line)] == []
