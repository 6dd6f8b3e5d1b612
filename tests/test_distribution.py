"""What is published: sdist and wheel, and the wheel where nothing of the repository is near."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from support.fresh import away
from support.paths import ROOT

import gen_accel

PACKAGE = Path(gen_accel.__file__).parent
MOST_BYTES = 16_000_000  # of the wheel, most of which are the demo's weights
BESIDE = {
    *("CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"),
    *("PKG-INFO", "hatch_build.py", "pyproject.toml"),
}
NEEDED = (  # by its kind
    "py.typed",
    "demo/model/model_index.json",
    "demo/long_lora_guided/pytorch_lora_weights.safetensors",
    "demo/image_prompt/image_prompt.safetensors",
    "presets/demo-balanced.json",
    "kernels/native/attention.cpp",
    "kernels/native/common.h",
)


def sources() -> set[str]:
    """All files of the package, of any kind."""
    return {
        f"gen_accel/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_is_to_hold_the_package_alone():
    wheel = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    chosen = {one.distribution_path for one in wheel.recurse_included_files()}
    assert chosen == sources()
    assert {f"gen_accel/{name}" for name in NEEDED} <= chosen


def test_the_weight_of_the_package():
    """Weights hardly compress, so that the files bound the wheel."""
    assert sum((ROOT / name).stat().st_size for name in sources()) < 1.5 * MOST_BYTES


def test_python_reads_the_readme_as_pypi_does():
    render = pytest.importorskip("readme_renderer.markdown").render
    page = render((ROOT / "README.md").read_text(encoding="utf-8"))
    assert page is not None
    assert ">gen_accel<" in page.partition("</h1>")[0]
    assert "<table>" in page


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """An sdist, and the wheel that was built from it; without a network."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, text=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(file.read(name).decode())


@pytest.mark.slow
class TestBuilt:
    def test_the_wheel_holds_the_package_alone(self, built):
        with ZipFile(built["wheel"]) as file:
            names = {name for name in file.namelist() if ".dist-info/" not in name}
        assert names == sources()

    def test_the_sdist_holds_what_builds_it(self, built):
        with tarfile.open(built["sdist"]) as file:
            names = {name.partition("/")[2] for name in file.getnames()}
        package = {name for name in names if name.startswith("gen_accel/")}
        assert package == sources()
        assert names - package == BESIDE | {".gitignore"}

    def test_its_size(self, built):
        sizes = {name: path.stat().st_size for name, path in built.items()}
        assert 1_000_000 < sizes["wheel"] < MOST_BYTES
        assert sizes["sdist"] < MOST_BYTES

    def test_its_metadata(self, built):
        render = pytest.importorskip("readme_renderer.markdown").render
        told = metadata(built["wheel"])
        assert told["Name"] == "gen_accel"
        assert told["Version"] == gen_accel.__version__
        assert told["License-Expression"] == "Apache-2.0"
        assert told["Description-Content-Type"] == "text/markdown"
        page = render(told.get_payload())
        assert page is not None
        targets = re.findall(r'(?:src|href)="([^"]*)"', page)
        assert any(target.endswith("docs/race.gif") for target in targets)
        assert [one for one in targets if not re.match(r"https?:|#", one)] == []
        plain = {one for one in told.get_all("Requires-Dist", []) if "extra" not in one}
        assert {one.partition(">")[0] for one in plain} == {
            *("diffusers", "filelock", "numpy", "platformdirs", "safetensors", "torch")
        }

    def test_classifiers_are_known(self, built):
        known = pytest.importorskip("trove_classifiers").classifiers
        assert {*metadata(built["wheel"]).get_all("Classifier", [])} <= known


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """A new environment with the wheel, which finds all other packages where they are.

    Of that folder no `.pth` file is read, which would lead back to the repository.
    """
    place = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    options = ["--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*install, *options, str(built["wheel"])], check=True, capture_output=True)
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True)
    beside = Path(own.stdout.strip()) / "others.pth"
    beside.write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return python


@pytest.mark.slow
class TestInstalled:
    def test_the_command(self, installed, tmp_path):
        script = installed.with_name("gen-accel")
        assert away(script, tmp_path, "--version").out == f"gen-accel {gen_accel.__version__}"
        assert away(script, tmp_path, "push", "--help").out.startswith("Usage: gen-accel push")

    def test_the_package_is_the_installed_one(self, installed, tmp_path):
        code = "import gen_accel; print(gen_accel.__file__)"
        found = Path(away(installed, tmp_path, "-c", code).out)
        assert found.is_relative_to(installed.parent.parent)

    def test_the_demo_model_runs(self, installed, tmp_path):
        code = """if True:
            import gen_accel, torch
            from diffusers import WanPipeline
            from gen_accel.kernels.native import build
            pipe = WanPipeline.from_pretrained(gen_accel.demo.path())
            with gen_accel.attach(pipe, gen_accel.Radial()):
                size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 1}
                video = pipe("a red square moves left", **size, output_type="np").frames[0]
            print(video.shape, gen_accel.demo.path())"""
        said = away(installed, tmp_path, "-c", code)
        assert said.err == []  # of packages that diffusers imports
        shape, _, place = said.out.rpartition(" ")
        assert shape.endswith("(9, 32, 32, 3)")
        assert Path(place).is_relative_to(installed.parent.parent)
