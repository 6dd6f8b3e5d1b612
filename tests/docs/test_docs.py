"""The code of README and docs is run: Python in order, page by page, and each command line.

Hub names and `models/...` stand for a tiny saved Wan, heights and widths are cut, and a GPU is
left out. A block or line that cannot run here has `<!-- not run: the reason -->` on the line
before its fence: it is skipped with that reason, but its command lines are still parsed.
"""

import functools
import re
import shlex
import shutil
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers import DiffusionPipeline, WanPipeline
from PIL import Image
from support import finetuning as ft
from support import wan
from support.pages import PAGES, blocks, commands, name, spans
from support.paths import ROOT
from typer.testing import CliRunner

from gen_accel.cli import app
from gen_accel.demo.world import write_clips
from gen_accel.measure import write_video
from gen_accel.measure.clip_settings import ClipSettings
from gen_accel.registry import LEAST_STEPS, LEAST_TOKENS, too_small

# test_your_own_method.py runs the other one.
CODE = [page for page in PAGES if "```" in page.read_text() and page.name != "your_own.md"]
SIDE = 32  # pixels
SMALLER = {
    "quality=30": "quality=8",
    "torch.bfloat16": "torch.float32",
    "step=7": "step=1",
    "layer=3": "layer=1",
    '"num_frames": 33': '"num_frames": 21',
    '"num_frames": 81': '"num_frames": 21',
    "steps=30": "steps=2",
    "num_inference_steps=8": "num_inference_steps=2",
    '"num_inference_steps": 50': '"num_inference_steps": 3',
}
# Verbs whose lines are not run here, and why.
ELSEWHERE = {
    "assemble": "needs files of ComfyUI; test_single_file.py makes them",
    "train": "training takes hours; the tests in tests/lora train",
    "demo": "takes a minute; the tests in tests/cli run it",
    "tune": "takes minutes; the tests in tests/cli run it",
    "ui": "serves until it is ended; the tests in tests/ui use it",
    "serve": "serves until it is ended; the tests in tests/ui use it",
}
FROM_PICTURES = re.compile(r"Wan-AI/[\w.-]+(?:I2V|FLF2V)[\w.-]+-[Dd]iffusers")
NAMES = re.compile(r"(?:Wan-AI/[\w.-]+-Diffusers|models/(?:wan|comfy)|DIR_OR_REPO)")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def marks(arguments: list[str]) -> tuple[Any, ...]:
    """Marks of a command: plans of large models have tests of their own, as has FlexAttention."""
    compiles = "flex" in arguments  # by inductor, for as long as all other lines of a page
    return (pytest.mark.nightly,) if compiles or {"train", "--plan"} <= {*arguments} else ()


SHELL = [
    pytest.param(
        arguments,
        block.reason,
        id=f"{name(page)}:{block.line}: {' '.join(arguments)}",
        marks=marks(arguments),
    )
    for page in CODE
    for block in blocks(page)
    if block.language in ("", "bash", "sh", "console")
    for arguments in commands(block)
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with all that the pages name: models, LoRAs, pictures, prompts."""
    folder = tmp_path_factory.mktemp("docs")
    long = wan.transformer(rope_max_seq_len=128)
    wan.pipeline(transformer=long).save_pretrained(folder / "models" / "wan")
    wan.PIPELINES["image"]().save_pretrained(folder / "models" / "wan_i2v")
    fields = {"method": "radial", "settings": (), "stages": ("9:1",)}
    ft.train(ft.config(folder / "outputs" / "lora", **fields))
    ft.train(ft.config(folder / "outputs" / "demo_lora", **fields))
    images = {"adapter": "image_prompt", "method": "radial", "settings": (), "stages": ("9:1",)}
    ft.train(ft.config(folder / "images", **images))
    shutil.copytree(folder / "images" / "image_prompt", folder / "outputs/lora/image_prompt")
    for style in ("style", "motion"):
        shutil.copytree(folder / "outputs" / "lora" / "lora", folder / "loras" / style)
    for picture in ("cat", "asleep", "awake", "dog", "hat", "a", "b", "triangle", "IMAGE"):
        wan.picture(0).resize((SIDE, SIDE)).save(folder / f"{picture}.png")
    Image.new("L", (SIDE, SIDE), 255).save(folder / "left.png")
    (folder / "prompts.txt").write_text("a cat surfs\na dog surfs\n")
    noise = np.random.default_rng(0).integers(0, 256, (90, SIDE, SIDE, 3), dtype=np.uint8)
    for video in ("cat", "long", "sparse", "dense"):
        write_video(noise, folder / f"{video}.mp4", fps=16)
    (folder / "generate.yaml").write_text("model: models/wan\n")
    made = {"model": "models/wan", "prompt": ["a cat surfs"], "seed": 7}
    write_video(noise[:9], folder / "cat.mp4", fps=16, about=ClipSettings(made).about())
    (folder / "configs").symlink_to(ROOT / "configs")
    write_clips(folder / "outputs" / "few", frames=33, count=2)
    return folder


@pytest.fixture
def small(home, monkeypatch):
    """Work in that folder, with pipelines that take two steps and stay on the CPU."""
    monkeypatch.chdir(home)
    load, call = DiffusionPipeline.from_pretrained.__func__, WanPipeline.__call__

    def from_pretrained(kind, given, **options):
        return load(kind, NAMES.sub("models/wan", str(given)), **options)

    @functools.wraps(call)
    def called(self, *args, **options):
        options.setdefault("num_inference_steps", 2)
        options.setdefault("max_sequence_length", 16)
        return call(self, *args, **options)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(WanPipeline, "__call__", called)
    if not torch.cuda.is_available():
        move = DiffusionPipeline.to

        def stay(self, *where, **options):
            return self if where == ("cuda",) else move(self, *where, **options)

        monkeypatch.setattr(DiffusionPipeline, "to", stay)
    return home


LONG = ("tune.md",)  # pages whose code runs for half a minute


@pytest.mark.turns(3)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name(page), marks=pytest.mark.nightly if page.name in LONG else ())
        for page in CODE
    ],
)
def test_python(page, small, capsys):
    """One page in one namespace, so that a later block may use what an earlier one made."""
    names: dict = {"__name__": "__main__"}
    skipped = []
    found = [block for block in blocks(page) if block.language == "python"]
    if not found:
        pytest.skip("the page has no Python")
    for block in found:
        if block.reason:
            compile(block.text, f"{name(page)}:{block.line}", "exec")
            skipped.append(f"{name(page)}:{block.line}: {block.reason}")
            continue
        text = re.sub(r'\b((?:height|width)"?[=:] ?)\d+', rf"\g<1>{SIDE}", block.text)
        for stated, tiny in SMALLER.items():
            text = text.replace(stated, tiny)
        exec(compile("\n" * block.line + text, name(page), "exec"), names)
    if skipped:
        pytest.skip("; ".join(skipped))


def smaller(arguments: list[str]) -> list[str]:
    """The same on the tiny model, in two steps and without a GPU."""
    given = [
        NAMES.sub("models/wan", FROM_PICTURES.sub("models/wan_i2v", x)).replace(
            "window=9,12,12", "window=2,1,1"
        )
        for x in arguments
    ]
    if {"--out", "--json"} & {*given} and given[0] in ("generate", "metrics"):
        given.append("--overwrite")  # several lines of a page are of one name
    if given[0] != "generate":
        return given
    for flag, value in {
        "--height": SIDE,
        "--width": SIDE,
        "--steps": 2,
    }.items():
        if flag in given:
            given[given.index(flag) + 1] = str(value)
        elif "--from-latents" not in given:
            given += [flag, str(value)]
    if "--from-lora" in given:  # those of `home` are the tiny model's
        given[given.index("--model") + 1] = "models/wan"
    for flag in ("--device", "--dtype", "--offload"):
        if flag in given and not torch.cuda.is_available():
            at = given.index(flag)
            del given[at : at + 2]
    if "--frames" not in given and "--from-latents" not in given:
        given += ["--frames", "9"]
    elif "--frames" in given and "--extend" not in given:
        at = given.index("--frames") + 1
        given[at] = str(min(int(given[at]), 33))
    return given


@pytest.mark.parametrize(("arguments", "reason"), SHELL)
def test_all_flags_exist_and_take_such_values(arguments, reason):
    verb, *rest = arguments
    typer.main.get_command(app).commands[verb].make_context(verb, rest)


def test_verbs_and_flags_within_the_text_exist():
    known = typer.main.get_command(app).commands
    wrong = []
    for page in PAGES:
        for span in spans(page):
            verb, *rest = span.split()
            flags = {one.partition("=")[0] for one in rest if re.match(r"--\w", one)}
            if verb.startswith("-") or not verb.islower():  # of gen-accel itself, or VERB
                continue
            options = known[verb].params if verb in known else ()
            has = {flag for one in options for flag in (*one.opts, *one.secondary_opts, "--help")}
            wrong += [f"{name(page)}: {span}"] * (verb not in known or not flags <= has)
    assert wrong == []


@pytest.mark.parametrize(("arguments", "reason"), SHELL)
def test_command_line(arguments, reason, small):
    verb, *rest = arguments
    if verb in ELSEWHERE and not {"--dry-run", "--plan"} & {*rest}:
        reason = ELSEWHERE[verb]
    if reason:
        pytest.skip(reason)
    result = CliRunner().invoke(app, smaller(arguments))
    assert result.exit_code == 0, result.output


def test_what_was_wrong_once_is_found(small):
    """UltraViCo lays a gain over scores, which flex does not take."""
    line = "generate --model models/wan --prompt x --out x.mp4 --frames 161"
    wrong = [*shlex.split(line), "--extend", "riflex,ultravico", "--kernel", "flex"]
    assert CliRunner().invoke(app, smaller(wrong)).exit_code == 2


@pytest.mark.parametrize(
    "page", ["README.md", "docs/methods/choose.md", "docs/methods/piecewise.md"]
)
def test_too_few_steps_and_tokens_are_one_number(page):
    """What the pages advise is what the summary and the web page say."""
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    steps = re.findall(r"(?:fewer than|at least|below(?: about)?) ([\d,]+) steps", text)
    tokens = re.findall(
        r"(?:fewer than|below about|less than about) ([\d,]+) tokens", text.lower()
    )
    assert {*steps} == {str(LEAST_STEPS)}
    assert {*tokens} == (set() if "piecewise" in page else {f"{LEAST_TOKENS:,}"})
    assert f"{LEAST_TOKENS:,} tokens" in too_small(LEAST_TOKENS - 1, LEAST_STEPS)
    assert f"{LEAST_STEPS} steps" in too_small(LEAST_TOKENS, LEAST_STEPS - 1)
    assert too_small(LEAST_TOKENS, LEAST_STEPS) == ""
