"""What a family's file may hold, and what is said of one that holds something else."""

import copy
import importlib.util
import pickle
import re
from pathlib import Path

import pytest

from gen_accel.attention_processors import families
from gen_accel.attention_processors.families import FAMILIES, family_named, wan
from gen_accel.attention_processors.families.contract import PARTS, USES, Family, load

FOLDER = Path(families.__file__).parent
LTX = (FOLDER / "ltx.py").read_text()


@pytest.fixture
def written(tmp_path):
    """The family in a file of the given source."""

    def write(source: str) -> Family:
        path = tmp_path / "mine.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("mine", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return load("mine", module)

    return write


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_the_contract(name):
    family = family_named(name)
    assert family.name == name
    for part in PARTS:
        getattr(family, part)  # is there, or has a default


def test_every_file_is_in_the_list():
    shared = {"__init__", "contract", "given", "layers", "rotary"}
    assert {path.stem for path in FOLDER.glob("*.py")} - shared == set(FAMILIES)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("TIMESTEP_RISES = True", "TIMESTEP_RISES is no part of a family; .* TIMESTEPS_RISE;"),
        ("TIMESTEPS_RISE: bool = 1", "TIMESTEPS_RISE must be True or False, got int 1"),
        ("def no_frame(transformer): ...", "no_frame is no part of a family; .* no_frames;"),
        ("longset = video_shape", "longset is no part of a family; .* longest;"),
        ("ZZZ = 1", "ZZZ is no part of a family; helpers begin with _"),
        ("A, FPSS = 1, 2", "FPSS is no part of a family; the nearest is FPS;"),
        ("FPS = '16'", "FPS must be a number, got str '16'"),
        ("FPS = True", "FPS must be a number, got bool True"),
        ("TEMPORAL_FACTOR = 4.0", "TEMPORAL_FACTOR must be a whole number, got float 4.0"),
        ("longest = 5", "longest must be a function, got int 5"),
        ("KIND = 'movie'", "KIND must be one of 'video', 'frames', 'image', got 'movie'"),
        ("GUIDANCE = 'both'", "GUIDANCE must be one of 'batched', 'sequential', got 'both'"),
        ("CLASSES = 'LTXVideo'", "CLASSES must be a tuple, got str 'LTXVideo'"),
        ("CLASSES = (1,)", "CLASSES must be a tuple, each a string, got"),
        (
            "LORA_TARGETS = {'attention': 'to_q'}",
            "LORA_TARGETS must be a mapping, each a tuple, got 'to_q' among them",
        ),
        ("MODELS = None", "MODELS must be a string, got None"),
        ("del timestep", "timestep is missing: "),
        ("del MODELS", "MODELS is missing: the published models"),
    ],
)
def test_what_is_not_in_the_contract_is_refused(written, line, said):
    with pytest.raises(ValueError, match=f"family mine: {said}"):
        written(f"{LTX}\n{line}\n")


def test_all_that_is_wrong_is_said_at_once(written):
    with pytest.raises(ValueError, match="no part") as error:
        written(f"{LTX}\nFSP = 24\nFPS = 'x'\ndel ORDER\n")
    said = str(error.value).splitlines()
    assert len(said) == 3
    assert all(line.startswith("family mine: ") for line in said)


def test_helpers_imports_and_classes_are_no_parts(written):
    family = written(
        f"{LTX}\nfrom math import pi as PI\nfrom math import prod\n"
        "_BASE = 3\nclass Rotary: ...\ndef _helper(): ...\n"
    )
    assert family.MODELS == "LTX-Video"


def test_what_is_left_out_has_its_default(written):
    family = written(f"{LTX}\ndel FPS, TRAINED_FRAMES, predict\n")
    assert family.TIMESTEPS_RISE is False
    assert family.FPS == 16
    assert family.before is not None
    assert (family.longest, family.text_lengths, family.TRAINED_FRAMES) == (None, None, None)
    assert family.fps(None) == 16
    assert family.trained_frames(None) is None
    assert not family.serves("training")
    assert family.serves("longer video")


def test_a_default_may_follow_another_part(written):
    family = written(f"{LTX}\nFPS = 24\nTRAINED_FRAMES = 161\n")
    assert (family.fps(None), family.trained_frames(None)) == (24, 161)


def test_parts_are_read_from_the_file_each_time(monkeypatch):
    monkeypatch.setattr(wan, "FPS", 12)
    assert family_named("wan").FPS == 12


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_is_the_same_family(again):
    assert again(family_named("wan")) is family_named("wan")


def test_uses_name_parts():
    assert all(part in PARTS for parts in USES.values() for part in parts)


def test_every_part_is_explained():
    assert all(part.meaning for part in PARTS.values())


def test_nobody_asks_a_family_what_it_has():
    """Parts are there: no `getattr` with a default, nor `hasattr`, hides a misspelt one."""
    package = FOLDER.parents[1]
    asked = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"(hasattr\(|getattr\()(self\.)?_?famil", line)
    ]
    assert not asked
