"""Inputs that are no files on a disk: refused at once, by name, whichever verb opens them."""

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from PIL import Image

from gen_accel import demo
from gen_accel.paths import check_input

PROMPT = ("--prompt", "a red square moves right")
GENERATE = ("generate", "--model", "demo", *PROMPT)
PICTURE = ("--image-prompt", "{}", "--image-adapter", "demo")
SIZE = ("--frames", "9", "--height", "48", "--width", "48")
TUNE = ("tune", "--model", "demo", *SIZE, "--steps", "2", "--quality", "20", "--out", "b.json")
# Command lines with {} in the place of the file.
OPENED = {
    "a.yaml": [("generate", "--config", "{}"), ("train", "{}"), ("cache", "{}")],
    "a.txt": [("generate", "--model", "demo", "--prompts", "{}"), (*TUNE, "--prompts", "{}")],
    "a.png": [
        (*GENERATE, "--image", "{}"),
        (*GENERATE, "--last-image", "{}"),
        (*GENERATE, *PICTURE),
        (*GENERATE, "--image-mask", "{}", *PICTURE),
        (*GENERATE, "--image-negative", "{}", *PICTURE),
        ("generate", "--from-settings", "{}"),
        ("demo", "--image-prompt", "{}"),
        ("metrics", "{}"),
    ],
    "a.mp4": [
        (*GENERATE, "--video", "{}"),
        ("generate", "--from-settings", "{}"),
        ("metrics", "{}"),
        ("metrics", "--reference", "{}", "{}"),
    ],
    "a.gif": [("generate", "--from-settings", "{}")],
    "a.json": [
        (*GENERATE, "--preset", "{}"),
        ("show", "--preset", "{}"),
        (*TUNE, "--prompts", "b.txt", "--preset", "{}"),
        ("generate", "--from-settings", "{}"),
    ],
    "a.safetensors": [
        (*GENERATE, "--lora", "{}"),
        (*GENERATE, "--from-lora", "{}"),
        (*GENERATE, "--image-adapter", "{}", "--image-prompt", "b.png"),
        ("generate", "--model", "demo", "--from-latents", "{}"),
        ("export", "{}", "--out", "b.safetensors"),
        ("push", "{}", "a/b"),
        ("assemble", "{}", "--base", "demo", "--out", "out"),
    ],
    "a": [
        ("generate", "--model", "{}", *PROMPT),
        ("generate", "--from-settings", "{}"),
        (*GENERATE, "--image-encoder", "{}", "--image-prompt", "b.png"),
        ("estimate", "--model", "{}", *SIZE),
        ("train", "--model", "demo", "--init-lora", "{}"),
        ("train", "--model", "demo", "--data", "{}"),
        ("train", "--model", "demo", "--validation-prompts", "a", "--validation-images", "{}"),
    ],
}


@pytest.fixture(autouse=True)
def ends():
    """A read that waits for ever is an error."""

    def late(number, frame):
        pytest.fail("it waits for what never comes")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def kernel(path: Path) -> None:
    path.symlink_to("/proc/self/status")


def loop(path: Path) -> None:
    path.symlink_to(path)


KINDS = {
    pipe: "is a pipe, whose end",
    bound: "is a socket, whose end",
    device: "is a device, whose end",
    kernel: "is a file of the system itself, whose end",
    loop: "is a link that leads to itself",
}


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_what_never_ends_is_told(tmp_path, make):
    make(tmp_path / "it")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/it {KINDS[make]}"):
        check_input(tmp_path / "it")


@pytest.mark.parametrize("name", OPENED)
def test_no_verb_waits_for_a_pipe(refused, tmp_path, monkeypatch, no_loading, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(name)
    Path("b.txt").write_text("a red square moves right\n")
    for args in OPENED[name]:
        assert f"{name} is a pipe" in refused(*(arg.format(name) for arg in args)), args


def test_nor_one_inside_of_a_model(refused, tmp_path, no_loading):
    model = tmp_path / "model"
    shutil.copytree(demo.path(), model)
    (model / "transformer" / "config.json").unlink()
    os.mkfifo(model / "transformer" / "config.json")
    line = refused("generate", "--model", model, *PROMPT)
    assert f"{model}/transformer/config.json is a pipe" in line


def test_a_gif_of_long_comments_is_refused_at_once(tmp_path, refused):
    """Pillow took 43 s of such a file of 16 MB."""
    path = tmp_path / "a.gif"
    Image.new("P", (8, 8)).save(path, save_all=True, append_images=[Image.new("P", (8, 8), 3)])
    check_input(path)
    plain = path.read_bytes()
    colours = 3 << (plain[10] & 7) + 1 if plain[10] & 128 else 0
    comment = b"!\xfe" + (b"\xff" + b"a" * 255) * 5000 + b"\0"
    path.write_bytes(plain[: 13 + colours] + comment + plain[13 + colours :])
    for line in ((*GENERATE, "--image", path), ("generate", "--from-settings", path)):
        assert "a.gif holds comments of over 1,000,000 bytes" in refused(*line)
