"""What a plain installation needs, what each extra adds, and the one place of the version."""

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_imports import FLOORS

import gen_accel
from gen_accel.registry import install, needed_for

PACKAGE = Path(gen_accel.__file__).parent
ROOT = PACKAGE.parent
CORE = ("diffusers", "filelock", "gen_accel", "numpy", "platformdirs", "safetensors", "torch")
# Of which diffusers brings Pillow and, by its hub, PyYAML, and uses pydantic where it is: only our
# own imports are blocked.
BROUGHT = ("PIL", "huggingface_hub", "pydantic", "tqdm", "yaml")
EXTRAS = (
    *("accelerate", "av", "datasets", "ftfy", "imageio_ffmpeg", "lightning_utilities"),
    *("cv2", "pycvvdp", "scipy", "fastapi", "gradio", "uvicorn"),
    *("matplotlib", "peft", "rich", "tensorboard", "torchmetrics", "torchvision"),
    *("transformers", "triton", "typer", "xformers"),
)

# A stand-in for an environment without the extras. They cannot be found, by diffusers either, and
# our modules may import the core and the standard library alone.
PRELUDE = f"""
import builtins, sys
from importlib.machinery import PathFinder

absent, foreign = {set(EXTRAS)}, {set(BROUGHT)}

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.partition(".")[0] in absent
        return None if missing else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
plain_import = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer, wanted = (globals or {{}}).get("__name__") or "", name.partition(".")[0]
    if importer.partition(".")[0] == "gen_accel" and wanted in foreign:
        raise ModuleNotFoundError(f"{{importer}} imports {{name}}", name=name)
    return plain_import(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        check=False,
    )


ATTACHED = """
import torch
from diffusers import WanTransformer3DModel
import gen_accel

torch.manual_seed(0)
model = WanTransformer3DModel(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4,
    out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
)
inputs = torch.randn(1, 4, 5, 8, 8), torch.tensor([10]), torch.randn(1, 6, 16)
stock = model(*inputs).sample
methods = {
    **gen_accel.METHODS,
    "neighborhood": lambda: gen_accel.Neighborhood(window=(-1, 3, 3)),
    "reuse": lambda: gen_accel.Reuse(residual=False),  # a residual has no gradient
}
for name, method in sorted(methods.items()):
    with gen_accel.attach(model, method()) as handle:
        model(*inputs).sample.sum().backward()
        assert len(handle.summary().to_dict()["layers"]) == 2
assert torch.equal(model(*inputs).sample, stock)
for name in gen_accel.__all__:
    getattr(gen_accel, name)
for kernel in (
    *("fa4", "flex", "gather", "native", "native.int8", "natten", "reference", "routed", "triton"),
    "xformers",
):
    __import__(f"gen_accel.kernels.{kernel}")
print("attached", sorted(gen_accel.METHODS))
"""


@pytest.mark.slow
def test_attach_needs_the_core_alone():
    done = run(ATTACHED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("attached")


def test_the_guard_of_these_tests_refuses():
    """Pillow by our own import, and what is no part of the core by any."""
    done = run("import gen_accel.measure.video_io")
    assert "gen_accel.measure.video_io imports PIL" in done.stderr
    assert "No module named 'peft'" in run("import peft").stderr


GENERATE = "generate --model demo --prompt red --frames 5 --method"
BASE = ("pydantic", "rich", "typer")
# The extras that are there, what is run, and the last line of stderr.
ONE_LINE = {
    "command": ((), "--help", f"error: gen-accel needs typer: {install('cli')}"),
    "generate": (
        BASE,
        f"{GENERATE} dense --out OUT.mp4",
        f"error: generating videos needs accelerate: {install('video')}",
    ),
    "film": (
        (*BASE, "accelerate"),
        f"{GENERATE} dense --out OUT.gif",
        f"error: reading or writing a video file needs av: {install('video')}",
    ),
    "compare": (
        (*BASE, "accelerate", "av"),
        f"{GENERATE} radial --compare --out OUT.mp4",
        f"error: comparing videos needs torchmetrics: {install('quality')}",
    ),
    "train": (
        BASE,
        "train --model demo --data . --dry-run",
        f"error: a LoRA needs peft: {install('train')}",
    ),
    "page": (
        BASE,
        "ui --port 0 --out OUT",
        f"error: the web page needs gradio: {install('ui')}",
    ),
    "picture": (
        BASE,
        "show radial --frames 4 --height 4 --width 4 --out OUT.png",
        f"error: a picture of a pattern needs matplotlib: {install('quality')}",
    ),
}

# Each in a copy of one process that has imported what takes long.
FORKED = """
import json, os, runpy
import torch, diffusers.pipelines.pipeline_utils
import gen_accel.pipelines.generation
foreign.clear()
everything = {*absent}
for name, (present, arguments, _) in json.loads(CASES).items():
    child = os.fork()
    if not child:
        absent.difference_update(present)
        words = os.open(f"{OUT}/{name}.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(words, 1), os.dup2(words, 2)
        sys.argv = ["gen-accel", *arguments.replace("OUT", f"{OUT}/made").split()]
        try:
            runpy.run_module("gen_accel", run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(bool(end.code))  # to take all apart that was imported takes a second
        except BaseException as error:
            print("Traceback", repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status), name
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    folder = tmp_path_factory.mktemp("words")
    done = run(f"OUT, CASES = {str(folder)!r}, {json.dumps(ONE_LINE)!r}" + FORKED)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_LINE)
def test_a_missing_package_is_named_with_its_command(name, words):
    said = (words / f"{name}.txt").read_text()
    assert said.splitlines()[-1:] == [ONE_LINE[name][-1]]
    assert "Traceback" not in said
    assert "starting" not in said
    assert [*words.glob("made*")] == []


def test_without_its_package_an_import_elsewhere_still_says_what_failed():
    with (
        pytest.raises(ModuleNotFoundError, match=r'^it needs no_such: .*".+\[video\]"$'),
        needed_for("it", extra="video"),
    ):
        import_module("no_such.part")


def optional() -> dict[str, list[str]]:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", one)[0].replace("-", "_").lower() for one in requirements}


IMPORT_NAMES = {"cvvdp": "pycvvdp", "opencv_python_headless": "cv2"}
IMPORT_NAMES |= {"pillow": "PIL", "pyyaml": "yaml", "scenedetect_headless": "scenedetect"}
# Used by name: by diffusers, which cleans prompts, by starlette, for forms, and by accelerate.
UNSEEN = {"ftfy", "python_multipart", "tensorboard"}


@cache
def imported() -> set[str]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.slow
def test_every_package_of_an_extra_is_imported():
    project = optional()
    assert names(project["dependencies"]) == {*CORE} - {"gen_accel"}
    for extra, requirements in project["optional-dependencies"].items():
        # combine is for users' own code, gpu for benchmarks and tests
        if extra in ("combine", "dev", "docs", "gpu", "xformers"):
            continue
        for name in names(requirements) - UNSEEN - {"gen_accel"}:
            assert IMPORT_NAMES.get(name, name) in imported(), f"{extra} has {name}"


def test_every_extra_that_is_named_exists():
    """In messages, README and docs: `pip install "gen_accel[video]"` and so on."""
    extras = set(optional()["optional-dependencies"])
    files = [*PACKAGE.rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    named = set()
    for file in files:
        text = file.read_text(encoding="utf-8")
        for found in re.findall(r"pip install \S*gen.accel\[([\w,]+)\]", text):
            named |= {*found.split(",")}
        named |= {*re.findall(r'needed_for\([^)]*extra="(\w+)"', text)}
        named |= {*re.findall(r"""\binstall\(["'](\w+)["']\)""", text)}
    assert {"video", "train", "cli", "quality"} <= named <= extras


def test_a_command_installs_from_where_gen_accel_came(monkeypatch, tmp_path):
    """Of a clone that it was installed from, editable or not, else by its name."""

    def told(held):
        one = SimpleNamespace(read_text=lambda name: held and json.dumps(held))
        monkeypatch.setattr(metadata, "distribution", lambda name: one)
        return install("ui")

    clone = {"url": tmp_path.as_uri(), "dir_info": {}}
    assert told(None) == told(clone) == 'pip install "gen_accel[ui]"'
    (tmp_path / "pyproject.toml").touch()
    assert told(clone) == f'pip install "{tmp_path}[ui]"'
    assert told({"url": clone["url"], "archive_info": {}}) == 'pip install "gen_accel[ui]"'
    monkeypatch.chdir(tmp_path)
    assert told(clone) == 'pip install ".[ui]"'


def test_the_version_stands_in_one_place():
    version = gen_accel.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|(a|b|rc)\d+)?", version)
    pattern = re.compile(rf"(?<![\w.]){re.escape(version)}(?![\w.])")
    files = [*ROOT.glob("*.toml"), *ROOT.glob("*.cff"), *PACKAGE.rglob("*.py")]
    holders = [file.name for file in files if pattern.search(file.read_text(encoding="utf-8"))]
    assert holders == ["version.py"]


def test_another_installed_version_is_not_shown(monkeypatch):
    from gen_accel.measure import machine

    monkeypatch.setattr(metadata, "version", lambda name: "9.9")
    assert machine.environment()["gen_accel"] == gen_accel.__version__
    assert machine.checks()[0].found == gen_accel.__version__


def test_the_linter_has_one_version():
    (ruff,) = [one for one in optional()["optional-dependencies"]["dev"] if "ruff" in one]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"rev: v{ruff.removeprefix('ruff==')}\n" in hooks


def test_types_are_told_to_checkers():
    assert (PACKAGE / "py.typed").read_bytes() == b""


def test_the_design_draws_the_floors_of_the_imports():
    page = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 150
    picture = page.partition("## Layers")[2].partition("```text\n")[2].partition("```")[0]
    floors = [line for line in picture.splitlines() if not line.startswith(" │")]
    drawn = [set(re.split(r"  +", line.strip())[0].split()) for line in floors]
    assert drawn == [{*parts} for parts in reversed(FLOORS)]
