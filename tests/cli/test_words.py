"""Words of the command line: one line for a refusal, another for a fault of the program."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from torch import nn
from typer.testing import CliRunner

from gen_accel import METHODS, registry
from gen_accel.cli import app, inventory
from gen_accel.measure.cost.model import presets
from gen_accel.pipelines.generation import loading, model_index
from gen_accel.pipelines.long_video import _CLASSES
from gen_accel.served import PUBLISHED

TO_SHOW = "--frames 1 --height 1 --width 1"
# Refused with neither torch nor diffusers there to be imported, all in one process.
EARLY = {
    "demo --device nope": "device must be auto",
    "demo --method nope": "method must be one of",
    "demo --model /nope": "no folder at /nope",
    "demo --image-prompt /nope": "no image at /nope",
    "demo --prompt x": "does not know 'x'",
    "generate --model demo --prompt x": "does not know 'x'",
    "demo --out FILE": "out must be a folder, but FILE is a file",
    "estimate --model /nope TO_SHOW": "no folder at /nope",
    "estimate --model Wan2.1-T2V-1.3 TO_SHOW": "did you mean 'Wan2.1-T2V-1.3B'?",
    "estimate --model minimx-h3": "did you mean 'MiniMax-H3'?",
    "estimate --model flux": "no published model of FluxTransformer2DModel is known by name",
    "show radial --model sana": "SanaTransformer2DModel cannot be served: its self-attention",
    "generate --model chroma --prompt a": "ChromaTransformer2DModel cannot be served: its",
    "generate --model hunyuanvideo1.6 --prompt a": "did you mean 'HunyuanVideo-1.5'?",
    "tune --model sana --prompts FILE --out a.json": "SanaTransformer2DModel cannot be served",
    "estimate --model wan --method nope TO_SHOW": "method must be one of",
    "generate --model /nope --prompt a": "no folder at /nope",
    "generate --model demo --prompt a --out a.xyz": "ends in '.xyz'; choose .mp4",
    "generate --model demo --prompt a --out FILE/a.png": "a.png: FILE is a file and no folder",
    "generate --model demo --prompt a --kernel nope": "kernel must be 'auto' or one of",
    "generate --model demo --prompt a --dense-kernel nope": "dense_kernel must be 'auto' or one",
    "generate --model demo --prompt a --method radail": "did you mean 'radial'?",
    "generate --model demo --prompt a --dtype nope": "dtype must be one of auto",
    "generate --model demo --prompt a --device nope": "device must be auto",
    "generate --model demo --prompt a --offload nope": "offload must be one of",
    "generate --model demo --prompt a --extend nope": "technique must be one of riflex",
    "generate --model demo --prompt a --extend nope:k=1": "got 'nope:k=1'",
    "generate --model demo --prompt a --lora /nope:0.5": "no LoRA at /nope,",
    "generate --model demo --prompt a --from-lora /nope": "no LoRA at /nope",
    "generate --model demo --prompts /nope": "no file of prompts at /nope",
    "generate --model demo --prompt a --save-latents a.txt": "must end in .safetensors",
    "generate --model demo --from-latents /nope": "no file of latents at /nope",
    "generate --model demo --prompt a --image-prompt /nope": "no image at /nope",
    "generate --model demo --prompt a --image-mask /nope": "no image at /nope",
    "generate --model demo --prompt a --image-negative /nope": "no image at /nope",
    "generate --model demo --prompt a --image-adapter /nope": "no adapter at /nope",
    "generate --model demo --prompt a --image-encoder /nope": "no image encoder at /nope",
    "push /nope me/mine": "no folder at /nope",
    "export /nope --out a.safetensors": "no folder at /nope",
    "export . --out a.pt": "a.pt must end in .safetensors",
    "export . --out a.safetensors --format kohya": "format must be one of comfyui, got 'kohya'",
    "push": "give DIR: Folder lora or image_prompt",
    "push .": "give REPO: OWNER/NAME",
    "export --out a.safetensors": "give DIR: Folder lora of a training",
    "export .": "out is not given: --out FILE",
    "assemble": "out is not given: --out DIR",
    "assemble --out a": "give FILE: a file of weights",
    "assemble /nope.safetensors --out a": "no file of weights at /nope.safetensors",
    "models --json /": "/ must be a file, but it is a folder",
    "serve --port 70000": "port must be from 0 to 65535, got 70000",
    "push . mine": "the repository must be OWNER/NAME, got 'mine'",
    "generate --model ~nosuchuser/a --prompt a": "a user who is not known here",
    "generate --model demo --prompt a --preset /nope.json": "no preset at /nope.json",
    "generate --model demo --prompt a --preset fast --method radial": "the place of --method",
    "estimate --model wan TO_SHOW --preset FILE": "is no JSON",
    "demo --preset balancd": "did you mean 'balanced'?",
    "show TO_SHOW --preset /nope": "no preset at /nope",
    "tune --out a.json": "give --model and --prompts",
    "tune --preset /nope.json --steps 5 --out a.json": "no preset at /nope.json",
    "tune --model demo --prompts /nope --out a.json": "no file of prompts at /nope",
    "tune --model demo --prompts FILE --out a.txt": "must end in .json",
    "tune --model demo --prompts FILE --objective nope --out a.json": "objective must be one of",
    "show nope TO_SHOW": "method must be one of",
    "show radial TO_SHOW --out a.txt": "must end in .png",
    "show radial TO_SHOW --width=x": "width must be int or none, got 'x'",
    "show radial TO_SHOW --token 1": "token must be int,int,int or none, got '1'",
    "simulate neighborhood": "No such command 'simulate'",
    "help generate": "No such command 'help'; see ",
    "generate red": "(red); values follow their options, as --prompt TEXT; see ",
    "estimate --model wan TO_SHOW --bound": "--bound is for the method neighborhood",
    "metrics /nope.mp4": "no video at /nope.mp4",
    "metrics FILE /nope.mp4": "no video at /nope.mp4",
    "metrics FILE --json /": "/ must be a file, but it is a folder",
    "metrics tests": "tests holds neither PNG frames named like 0000.png nor videos, which end in",
    "metrics FILE FILE FILE": "got 3 videos: give --reference FILE to compare them with it",
    "metrics FILE --reference /nope.mp4": "no video at /nope.mp4",
    "metrics FILE FILE --metrics vmav": "got 'vmav'; did you mean 'vmaf'?",
    "metrics FILE --metrics vmaf": "compares with a reference: give two videos",
    "metrics FILE FILE --lag 3": "without a reference, got 3",
    "metrics FILE --fps 0": "fps must be from 0.01 to 1000",
    "generate --model demo --prompt red --metrics vmaf": "metrics go with compare",
    "generate --model demo --prompt red --compare --metrics nope": "metrics beside PSNR and SSIM",
    "metrics FILE --by-frame": "--by-frame writes each frame's figures to --json FILE",
    "show --extend nope": "technique must be one of",
    "show --extend all --model /nope": "/nope",
    "show --extend all --frames 9": "are of a model: add --model",
    "show --extend all --model demo --frames 0": "frames must be at least 1, got 0",
    "train /nope.yaml": "/nope.yaml",
    "cache /nope.yaml": "/nope.yaml",
    "train tests": "tests is a folder, and a config is a YAML file; a folder of clips is --data",
    "cache --data /nope": "data: there is nothing at /nope",
    "train --dry-run --method nope": "method must be one of",
    "train --plan --method nope": "method must be one of",
    "train --plan --model Wan2.1-T2V-1.3": "did you mean 'Wan2.1-T2V-1.3B'?",
    "train --plan --gpu 409": "gpu must be one of",
    "train --plan --json /": "/ must be a file, but it is a folder",
    "train --plan --dry-run": "--plan trains nothing: leave --dry-run out",
    "train --gpu 4090": "--gpu 4090 is for --plan",
}
# Whatever these verbs take besides is refused too where it is FILE/nope: no number, no name, and
# nowhere to read or write.
GIVEN = {
    "demo": "",
    "estimate": "--model wan TO_SHOW",
    "generate": "--model demo --prompt a",
    "show": "radial TO_SHOW --out a.png",
    "tune": "--model demo --prompts FILE --out a.json",
    "metrics": "FILE",
    "train": "",
    "cache": "--data .",
}
# Free text, or words that only a class of the library can judge.
FREE = {
    *("trigger", "prefix", "default_caption", "optimizer_settings"),
    *(
        "prompt",
        "negative_prompt",
        "settings",
        "set",
        "dense_layers",
        "targets",
        "validation_prompts",
    ),
    *("window", "stride", "dilation", "is_causal", "optimizer_settings"),
    *("trigger", "prefix", "default_caption"),
    "from_latents",  # goes without a prompt, as above
}

# Options that are as many as others.
BESIDE = {
    "validation_images": "--validation-prompts a",
    "validation_last_images": "--validation-prompts a --validation-images FILE",
    "validation_controls": "--validation-prompts a --condition control",
}


def with_nope() -> list[str]:
    verbs: Any = typer.main.get_command(app)
    return [
        f"{verb} {given} {BESIDE.get(option.name, '')} {option.opts[0]} FILE/nope"
        for verb, given in GIVEN.items()
        for option in verbs.commands[verb].params
        if option.param_type_name == "option" and not option.is_flag and option.name not in FREE
    ]


@pytest.mark.slow
def test_what_can_be_seen_at_once_is_refused_before_torch_is_imported(tmp_path):
    file = tmp_path / "file"
    file.touch()
    asked = EARLY | dict.fromkeys(with_nope(), "FILE/nope")
    assert len(asked) > 150
    clips = tmp_path / "clips"
    clips.mkdir()
    for name, caption in {"a": "a".encode("utf-16"), "b": b" ", "c": b"\xf6", "d": b"d"}.items():
        (clips / name).with_suffix(".mp4").touch()
        (clips / name).with_suffix(".txt").write_bytes(caption)
    for verb in ("train", "cache"):
        line = f"{verb} --model demo --data {clips} --repeats zz=3 --out {tmp_path / verb}"
        asked[line] = f"4 faults of the clips in {clips}: (1) {clips}/a.txt is not UTF-8"
    weights = tmp_path / "a.safetensors"
    weights.touch()
    for line in (f"generate --model {weights} --prompt a", f"estimate --model {weights}"):
        asked[line] = f"{weights} is a file of weights: make a model of it and of the files of its"
    commands = [line.replace("FILE", str(file)).replace("TO_SHOW", TO_SHOW) for line in asked]
    program = f"""
import sys
sys.modules.update(torch=None, diffusers=None, transformers=None)
from functools import cache
from typer import testing
from gen_accel.cli import app
testing._get_command = cache(testing._get_command)  # made once
for line in {commands!r}:
    done = testing.CliRunner().invoke(app, line.split())
    print(done.exit_code, done.stderr.strip().replace(chr(10), " // "))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace(str(file), "FILE").splitlines()
    wrong = [
        f"{command}: {said}"
        for said, (command, words) in zip(lines, asked.items(), strict=True)
        if not said.startswith("2 error: ") or "//" in said or words not in said
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "verb",
    [
        "demo",
        "generate",
        "tune",
        "show",
        "estimate",
        "metrics",
        "push",
        "export",
        "assemble",
        "ui",
        "serve",
    ],
)
def test_a_verb_prints_the_schema_of_its_config(run, verb):
    schema = json.loads(run(verb, "--print-schema").stdout)
    assert schema["title"] == f"gen-accel {verb}"
    assert all(one["description"] for one in schema["properties"].values())


def test_the_names_known_early_are_those_that_there_are():
    assert [*METHODS] == [*registry.METHODS]
    assert tuple(_CLASSES) == registry.TECHNIQUES
    assert tuple(presets()) == PUBLISHED


def failing(monkeypatch, error):
    """The exit code and lines on stderr of a verb that fails with `error`."""

    def fail():
        raise error

    monkeypatch.setattr(inventory, "methods", fail)
    done = CliRunner().invoke(app, ["list"])
    return done.exit_code, done.stderr.strip().splitlines()


@pytest.mark.parametrize(
    "error",
    [AttributeError("x has\nno y"), KeyError("a"), RecursionError(), ZeroDivisionError("by 0")],
    ids=lambda error: type(error).__name__,
)
def test_a_fault_of_the_program_is_one_line_with_a_file(monkeypatch, tmp_path, error):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, [line] = failing(monkeypatch, error)
    assert code == 1
    assert line.startswith("error: a fault of gen-accel, please report it with ")
    [file] = re.findall(r"with (\S+\.txt), where it arose: ", line)
    text = Path(file).read_text(encoding="utf-8")
    assert "Traceback" in text
    assert type(error).__name__ in text
    assert type(error).__name__ in line


def test_a_fault_is_said_too_where_no_file_can_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    code, [line] = failing(monkeypatch, KeyError("a"))
    assert code == 1
    said = "KeyError: 'a'; --traceback before the verb shows where"
    assert line == f"error: a fault of gen-accel: {said}"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            MemoryError("no room for 7 TiB"),
            "error: out of memory: no room for 7 TiB",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate"),
            "error: out of memory: ",
        ),
        (ValueError("a\nb"), "error: a b"),
        (ValueError("a " * 5000), "error: a a "),
        (OSError(), "error: OSError"),
    ],
    ids=["numpy", "torch", "lines", "long", "silent"],
)
def test_what_is_known_is_one_line(monkeypatch, error, words):
    code, [line] = failing(monkeypatch, error)
    assert code == 2
    assert line.startswith(words)
    assert len(line) < 1000


def test_a_long_error_keeps_its_advice_at_the_end(monkeypatch):
    error = ValueError(f"f.json holds {'n' * 5000}; take another")
    _, [line] = failing(monkeypatch, error)
    assert line.startswith("error: f.json holds nnn")
    assert " ... " in line
    assert line.endswith("nnn; take another")


def test_a_repository_out_of_reach_names_the_cache_and_the_command(refused, monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise OSError("no network\nand much more")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.chdir(tmp_path)
    line = refused("generate", "--model", "me/mine", "--prompt", "a", "--out", "a.mp4")
    assert "me/mine is not in the hub's cache, /" in line
    assert "(no network): run `hf download me/mine` where there is a network" in line


def test_what_a_library_says_of_files_is_cut_short(tmp_path):
    said = "Error(s) in loading state_dict:\n" + "\tsize mismatch for a: 1 and 2\n" * 97
    refused = pytest.raises(ValueError, match=r"^lora cannot be loaded: Error\(s\) in")
    with refused as caught, model_index.one_line("lora"):
        raise RuntimeError(said)
    assert len(str(caught.value)) < 500
    missing = pytest.raises(OSError, match=r"^lora cannot be loaded: FileNotFoundError$")
    with missing, model_index.one_line("lora"):
        raise FileNotFoundError


def test_a_model_that_lacks_weights_is_refused():
    part = nn.Linear(2, 2, device="meta")
    pipe = SimpleNamespace(components={"transformer": part, "scheduler": None})
    with pytest.raises(ValueError, match=r"^transformer of half lacks 2 of its weights, such as"):
        loading._check_complete(pipe, "half")
