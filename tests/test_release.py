"""What a release goes by: workflows, the tag, the address of the repository."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from typing import Any

import nbformat
import pytest
import yaml
from support.paths import ROOT

import gen_accel

WORKFLOWS = {path.stem: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}
# By its branch or tag of one major version, or by commit.
PINNED = re.compile(r"[\w.-]+/[\w./-]+@(v\d+|release/v\d+|[0-9a-f]{40})")
ADDRESS = re.compile(r"(?:github\.com|colab\.research\.google\.com/github)/([\w.-]+/gen_accel)\b")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

SPEC = importlib.util.spec_from_file_location("check_release", ROOT / ".ci" / "check_release.py")
assert SPEC is not None
assert SPEC.loader is not None
check_release = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_release)

every_workflow = pytest.mark.parametrize("name", sorted(WORKFLOWS))


def address() -> str:
    """OWNER/NAME of the repository, by pyproject.toml."""
    (found,) = {*ADDRESS.findall(PYPROJECT)}
    return found


def workflow(name: str) -> dict[str, Any]:
    held = yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))
    held["on"] = held.pop(True)  # YAML 1.1 reads the key as a boolean
    return held


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


def test_both_are_there():
    assert {*WORKFLOWS} == {"ci", "release"}


@every_workflow
def test_a_workflow_is_whole(name):
    held = workflow(name)
    assert held["permissions"] == {"contents": "read"}
    for job in held["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        assert {*job.get("needs", "").split()} <= {*held["jobs"]}
        for step in job["steps"]:
            assert len({"uses", "run"} & {*step}) == 1, step


@every_workflow
def test_actions_are_pinned(name):
    used = [step["uses"] for step in steps(name) if "uses" in step]
    assert used
    assert [one for one in used if not PINNED.fullmatch(one)] == []


@every_workflow
def test_what_it_runs_is_there(name):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for step in steps(name):
        for line in step.get("run", "").splitlines():
            program, *arguments = shlex.split(line)
            if program == "make":
                assert arguments[0] in targets, line
            elif program == ".venv/bin/python":
                assert arguments[:2] == ["-m", "pytest"], line
                assert all((ROOT / one).is_file() for one in arguments[2:]), line
            elif program == "gh":
                assert arguments[:2] == ["release", "create"], line
            else:
                assert os.access(ROOT / program, os.X_OK), line


def test_each_python_that_is_named_is_tested():
    named = re.findall(r"Python :: (3\.\d+)", PYPROJECT)
    assert workflow("ci")["jobs"]["test"]["strategy"]["matrix"]["python"] == named
    assert f'requires-python = ">={named[0]}"' in PYPROJECT


def test_a_tag_is_released():
    held = workflow("release")
    assert held["on"] == {"push": {"tags": ["v*"]}}
    assert {one: job.get("needs") for one, job in held["jobs"].items()} == {
        "build": None,
        "pypi": "build",
        "release": "pypi",
    }
    runs = [step.get("run", "") for step in held["jobs"]["build"]["steps"]]
    assert 'make dist RELEASE="$GITHUB_REF_NAME"' in runs
    assert "make quick" in runs


def test_rights_belong_to_the_jobs_that_need_them():
    jobs = workflow("release")["jobs"]
    assert {name: job.get("permissions") for name, job in jobs.items()} == {
        "build": None,
        "pypi": {"id-token": "write"},
        "release": {"contents": "write"},
    }
    assert jobs["pypi"]["environment"]["name"] == "pypi"
    assert "secrets." not in WORKFLOWS["release"].read_text()
    for step in (*steps("ci"), *steps("release")):
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False


def test_what_one_job_uploads_the_next_downloads():
    names = {
        step["uses"].partition("@")[0].rpartition("/")[2]: step["with"]["name"]
        for step in steps("release")
        if "-artifact@" in step.get("uses", "")
    }
    assert names == {"upload-artifact": "dist", "download-artifact": "dist"}


class TestTag:
    @pytest.fixture
    def ready(self, tmp_path):
        """A repository that may be released as 0.2.0."""
        (tmp_path / "gen_accel").mkdir()
        (tmp_path / "gen_accel" / "version.py").write_text('"""V."""\n\n__version__ = "0.2.0"\n')
        text = PYPROJECT.replace(address(), "you/gen_accel")
        (tmp_path / "pyproject.toml").write_text(text)
        (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.2.0\n\n- New.\n")
        return tmp_path

    def test_one_that_is_ready(self, ready):
        assert check_release.check("v0.2.0", ready) == []

    @pytest.mark.parametrize("tag", ["v0.2.1", "0.2.0", "v0.2.0rc1"])
    def test_another_version(self, ready, tag):
        (said,) = check_release.check(tag, ready)
        assert said.startswith(f"the tag is {tag}, gen_accel/version.py says 0.2.0")

    def test_a_version_in_between(self, ready):
        (ready / "gen_accel" / "version.py").write_text('__version__ = "0.2.0.dev0"\n')
        said = check_release.check("v0.2.0.dev0", ready)
        assert any("is a version in between" in one for one in said)

    def test_a_changelog_that_is_not_ready(self, ready):
        (ready / "CHANGELOG.md").write_text("## 0.2.0 (not released yet)\n")
        (said,) = check_release.check("v0.2.0", ready)
        assert said.startswith('CHANGELOG.md has no "## 0.2.0"')

    def test_a_placeholder(self, ready):
        text = (ready / "pyproject.toml").read_text()
        (ready / "pyproject.toml").write_text(text.replace("you/gen_accel", "OWNER/gen_accel"))
        (said,) = check_release.check("v0.2.0", ready)
        assert "placeholder" in said

    def test_the_files_here_are_read(self):
        said = check_release.check("v0.0.0")
        assert any(gen_accel.__version__ in one for one in said)


def holders() -> dict[str, set[str]]:
    """Files that hold the repository's address, and the addresses in each."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.cff"), *ROOT.glob("*.yml")]
    files += [*ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*.*"), ROOT / "Dockerfile"]
    files += [*WORKFLOWS.values()]
    files += [*ROOT.glob("integrations/**/*.md"), *ROOT.glob("integrations/**/*.toml")]
    found = {
        path.relative_to(ROOT).as_posix(): {*ADDRESS.findall(path.read_text("utf-8"))}
        for path in files
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def test_the_address_is_the_same_everywhere():
    pack = "integrations/comfyui/pyproject.toml", "integrations/comfyui/README.md"
    card = "integrations/hub_kernel/CARD.md"
    names = "pyproject.toml", "CITATION.cff", "docs/install.md", "notebooks/quickstart.ipynb"
    assert holders() == {name: {address()} for name in (*names, *pack, card)}


def test_the_badge_opens_the_quickstart():
    place = "blob/main/notebooks/quickstart.ipynb"
    badge = f"(https://colab.research.google.com/github/{address()}/{place})"
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    assert badge in notebook.cells[0].source
    assert badge in (ROOT / "docs" / "install.md").read_text()


def test_the_line_of_contributing_changes_every_address(tmp_path):
    if shutil.which("sed") is None:
        pytest.skip("needs sed")
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (line,) = re.findall(r"^sed -i (?:.*\\\n)*.*$", page, re.M)
    files = shlex.split(line.replace("\\\n", " "))[3:]
    assert {*holders()} == {*files}
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / name).read_text().replace(address(), "OWNER/gen_accel")
        (tmp_path / name).write_text(text)
    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True)
    for name in files:
        assert {*ADDRESS.findall((tmp_path / name).read_text())} == {"you/gen_accel"}


def test_the_notebook_installs_only_where_it_must():
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    called = []

    class Shell:
        def run_line_magic(self, name, line):
            called.append((name, shlex.split(line)))

    exec(first, {"get_ipython": Shell})
    assert called == []
    exec(first.replace('"gen_accel")', '"no_such_package")'), {"get_ipython": Shell})
    ((name, arguments),) = called
    assert name == "pip"
    assert arguments == ["install", "--quiet", "gen_accel[quality,video]"]
