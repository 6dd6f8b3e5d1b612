"""What a family may hold, and what is said of one that holds something else."""

import copy
import pickle
import re
from pathlib import Path

import pytest

import gen_accel
from gen_accel.attention_processors.families import FAMILIES, Family, family_named
from gen_accel.attention_processors.families.base import USES


def own(**parts):
    return type("Mine", (Family,), parts)("mine")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_what_it_is(name):
    family = family_named(name)
    assert family.name == name
    assert family.models
    assert family.order
    assert family.classes
    assert all(isinstance(family.serves(use), bool) for use in USES)
    assert tuple(family.presets) == (*FAMILIES[name].published,)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("no_frame", "Mine.no_frame is no part of a family: did you mean 'no_frames'?"),
        ("longset", "did you mean 'longest'?"),
        ("lora_target", "did you mean 'lora_targets'?"),
        ("ZZZ", "Mine.ZZZ is no part of a family: helpers begin with _"),
    ],
)
def test_what_is_no_part_is_refused(part, said):
    with pytest.raises(TypeError, match=re.escape(said)):
        own(**{part: None})


def test_helpers_and_parts_of_a_base_are_allowed():
    assert own(_helper=1, models="Mine").models == "Mine"


def test_what_is_left_out_has_its_default():
    family = own(models="Mine")
    assert (family.sizes.fps, family.attention.rising, family.longest(None)) == (16, False, None)
    assert not any(family.serves(use) for use in USES)
    assert family.no_frames(None, {}) is None
    for ask in (
        lambda: family.predict(None, None, None, {}),
        lambda: family.temporal_frequencies(None),
    ):
        with pytest.raises(ValueError, match="Mine"):
            ask()


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_is_the_same_family(again):
    made = again(family_named("wan"))
    assert (type(made), made.name) == (type(family_named("wan")), "wan")


def test_nobody_asks_a_family_what_it_has():
    """Parts are there: no `getattr` with a default, nor `hasattr`, hides a misspelt one."""
    package = Path(gen_accel.__file__).parent
    asked = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"(hasattr\(|getattr\()(self\.)?_?famil", line)
    ]
    assert not asked
