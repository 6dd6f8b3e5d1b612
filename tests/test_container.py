"""The Dockerfile, as far as it can be looked into and run without Docker."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch

import pytest
from support.paths import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """Each instruction and its arguments, on one line."""
    lines = [line for line in TEXT.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def of(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def defaults() -> dict[str, str]:
    return dict(rest.split("=", 1) for rest in of("ARG"))


def copied() -> list[str]:
    """Sources in the repository."""
    found = []
    for rest in of("COPY"):
        words = shlex.split(rest)
        assert not words[0].startswith("--from")
        found += words[:-1]
    return found


def is_sent(name: str) -> bool:
    """Whether .dockerignore lets a path through; the last line that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!").removeprefix("**/")
        if fnmatch(name, pattern) or fnmatch(name.partition("/")[0], pattern):
            sent = line.startswith("!")
    return sent


def test_every_instruction_is_known():
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in instructions()} == known


def test_each_stage_has_a_base():
    assert defaults()["BASE"] == "python:3.12-slim-bookworm"
    assert "Python :: 3.12" in PYPROJECT
    stages = [re.fullmatch(r"(\S+) AS (\w+)", rest) for rest in of("FROM")]
    bases = {stage[2]: stage[1] for stage in stages if stage}
    assert bases == {
        "build": "${BASE}",
        "cpu": "${BASE}",
        "cuda": "${BASE}",
        "run": "${DEVICE}",
    }
    assert defaults()["DEVICE"] in bases


def test_what_is_copied_is_there_and_sent():
    assert copied()
    for name in copied():
        assert (ROOT / name).exists(), name
        assert is_sent(name), name
    for name in ("tests", "outputs", ".git", ".venv", "notebooks", "benchmarks"):
        assert not is_sent(name), name


def test_its_extras_are_there():
    extras = re.findall(r"^(\w+) = \[", PYPROJECT.partition("optional-dependencies]")[2], re.M)
    assert {*defaults()["EXTRAS"].split(",")} <= {*extras}


def test_it_runs_the_command_as_a_plain_user():
    (entry,), (command,), (user,) = of("ENTRYPOINT"), of("CMD"), of("USER")
    assert json.loads(entry) == ["gen-accel"]
    assert 'gen-accel = "gen_accel.__main__:main"' in PYPROJECT
    assert json.loads(command) == ["--help"]
    assert user != "0"
    assert any(f"useradd --uid {user}" in rest for rest in of("RUN"))
    words = [word for word, _ in instructions()]
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")


def test_caches_lie_in_the_volume():
    (volume,) = of("VOLUME")
    places = re.findall(r"\b(?:HOME|\w+_HOME|\w+_DIR)=(\S+)", " ".join(of("ENV")))
    assert len(places) == 5
    assert all(place.startswith(volume) for place in places)
    assert any(f"mkdir --mode 1777 {volume} " in rest for rest in of("RUN"))


@pytest.mark.slow
def test_the_wheel_is_built_of_what_is_copied(tmp_path):
    """The line of the stage `build`, without a network."""
    pytest.importorskip("hatchling")
    for name in copied():
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (line,) = [rest for rest in of("RUN") if "pip wheel" in rest]
    _, *arguments = shlex.split(line[line.index("python -m pip") :])
    arguments[arguments.index("/wheels")] = str(tmp_path / "wheels")
    offline = ["--no-build-isolation", "--no-index"]
    command = [sys.executable, *arguments, *offline]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").iterdir()
    (install,) = [rest for rest in of("RUN") if "$EXTRAS" in rest]
    said = install[install.index("echo ") : install.index(")")].replace(
        "/wheels", str(wheel.parent)
    )
    found = subprocess.run(["sh", "-c", said], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(wheel)


def test_the_docs_name_its_arguments():
    page = (ROOT / "docs" / "install.md").read_text()
    assert "--build-arg DEVICE=cuda" in page
    assert "--gpus all" in page
    assert {*re.findall(r"--build-arg (\w+)=", page + TEXT)} <= {*defaults()}
