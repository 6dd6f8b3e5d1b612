"""One parser of values by type hint, for command lines and YAML."""

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from gen_accel import Neighborhood, Piecewise, Radial, Reuse, Schedule, VideoShape
from gen_accel.parsing import (
    Count,
    Finite,
    Share,
    brief,
    check_options,
    convert,
    shown,
    written_type,
)
from gen_accel.pipelines.generation.sampling import Clip

Axes = tuple[int, int, int]


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3),
        ("1e-4", float, 1e-4),
        ("inf", float, math.inf),
        ("3,8,8", Axes, (3, 8, 8)),
        ("(3, 8, 8)", Axes, (3, 8, 8)),
        ("1,2", tuple[float, ...], (1.0, 2.0)),
        ("", tuple[int, ...], ()),
        ("yes,off,1", tuple[bool, bool, bool], (True, False, True)),
        ("none", int | None, None),
        ("4", int | None, 4),
        ("4", Axes | int, 4),
        ("3,8,8;4,4,4", tuple[Axes, ...], ((3, 8, 8), (4, 4, 4))),
        ("3,8,8", Axes | tuple[Axes, ...], (3, 8, 8)),
        ("None", str | None, None),
        ("2d", Literal["1d", "2d"], "2d"),
        ("2", Literal[1, 2], 2),
        ("a, b", str, "a, b"),
    ],
)
def test_text(text, hint, value):
    assert convert(text, hint, is_text=True) == value


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("3.0", int),
        ("many", int),
        ("3,8", Axes),
        ("3,8,x", Axes),
        ("3,8,8;4,4", tuple[Axes, ...]),
        ("maybe", bool),
        ("3d", Literal["1d", "2d"]),
        ("x", int | None),
        ("3", list[int]),
    ],
)
def test_text_of_another_type(text, hint):
    with pytest.raises((TypeError, ValueError)):
        convert(text, hint, is_text=True)


@pytest.mark.parametrize(
    ("given", "hint", "value"),
    [
        ("1e-4", float, 1e-4),
        (5, float, 5.0),
        (5.0, int, 5),
        ("1e3", int, 1000),
        (5, str, "5"),
        ("a cat, a dog", tuple[str, ...], ("a cat, a dog",)),  # one prompt
        ([1, "2"], tuple[int, ...], (1, 2)),
        (False, Literal["no", "bf16"], "no"),  # as YAML reads no
        (None, int | None, None),
        ("none", int | None, None),
        (True, bool, True),
    ],
)
def test_values_of_yaml(given, hint, value):
    made = convert(given, hint)
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("yes", bool),
        (1, bool),
        (True, int),
        (True, float),
        (True, str),
        (2.5, int),
        (math.nan, int),
        ([1], str),
        ([1, 2], tuple[float, float, float]),
        ({}, float),
        (None, int),
    ],
)
def test_other_values_of_yaml(given, hint):
    with pytest.raises((TypeError, ValueError)):
        convert(given, hint)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Axes, "int,int,int"),
        (int | None, "int or none"),
        (Literal["1d", "2d"], "one of 1d, 2d"),
        (tuple[str, ...], "any number of str, with commas between"),
        (tuple[Axes, ...], "any number of int,int,int, with semicolons between"),
        (bool, "true/false"),
    ],
)
def test_types_in_words(hint, words):
    assert written_type(hint) == words


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (Radial, {"block": 1.5}, "block of Radial must be int, got 1.5"),
        (Radial, {"decay_factor": "a"}, "decay_factor of Radial must be float, got 'a'"),
        (Radial, {"sink": 1}, "sink of Radial must be true/false, got 1"),
        (Neighborhood, {"window": (3.5, 3, 3)}, "got (3.5, 3, 3); such as window=(-1, 8, 8)"),
        (Neighborhood, {"window": 3}, "window of Neighborhood must be int,int,int, got 3"),
        (Schedule, {"dense_steps": 1.5}, "dense_steps of Schedule must be int, got 1.5"),
        (Schedule, {"dense_layers": "2"}, "dense_layers of Schedule must be int or any number"),
        (Clip, {"frames": 2.5}, "frames must be int or none, got 2.5"),
        (VideoShape, {"frames": 5, "height": 7.5, "width": 6}, "must be whole numbers, got"),
        (VideoShape, {"frames": math.nan, "height": 1, "width": 1}, "must be whole numbers"),
    ],
    ids=str,
)
def test_fields_of_another_type_are_refused_when_they_are_given(kind, given, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        kind(**given)


def test_a_call_is_written_without_defaults():
    assert brief(Radial()) == "Radial()"
    assert brief(Reuse(Piecewise(0.2, band=1), every=4)) == (
        "Reuse(method=Piecewise(critical=0.2, band=1), every=4)"
    )
    assert brief(Piecewise()) == "Piecewise(critical=0.2)", "nothing else says the density"
    assert brief(Piecewise(select="threshold")) == "Piecewise(select='threshold')"
    assert brief("a b") == "a b"


def test_what_is_shown_is_cut_before_it_is_made():
    nested = ["x"] * 9
    for _ in range(40):  # 10^38 items
        nested = [nested] * 9
    for value in (nested, {"a": nested}, "x" * 10**7, [*range(10**6)], 10**5000, -(10**5000)):
        assert len(shown(value)) < 210
    assert shown([1, "a", {"b": (2.5, None)}]) == "[1, 'a', {'b': (2.5, None)}]"
    assert shown(10**5000) == "a number of about 5,001 digits, which is too large"
    assert shown("a" * 300) == f"'{'a' * 97}...{'a' * 98}'"


def test_numbers_of_numpy_are_numbers():
    assert Radial(block=np.int64(64)).block == 64
    assert Schedule(dense_start=np.float32(0.5)).dense_start == 0.5
    assert Neighborhood(window=(np.int32(3), 3, 3)).window == (3, 3, 3)


@dataclass
class Options:
    share: Share = 0.5
    tau: Finite | None = None
    box: tuple[Count, Count] | Literal["auto"] = "auto"
    kind: Literal["a", "b"] = "a"

    def __post_init__(self):
        check_options(self)


def test_options_within_their_limits_are_taken_and_lists_become_tuples():
    made = Options(1, -3.5, [2, 3], "b")
    assert made.box == (2, 3)
    assert Options(box=range(1, 3)).box == (1, 2)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"share": 0.0}, r"^share must be in \(0, 1\], got 0.0$"),
        ({"share": math.nan}, r"^share must be in \(0, 1\], got nan$"),
        ({"share": "x"}, "^share of Options must be float, got 'x'"),
        ({"tau": math.inf}, "^tau must be finite, got inf$"),
        ({"box": (2, 0)}, r"^box must be at least 1, got \(2, 0\)$"),
        ({"box": (2,)}, "^box of Options must be"),
        ({"kind": "c"}, r"^kind must be one of \('a', 'b'\), got 'c'$"),
    ],
)
def test_options_outside_their_types_and_limits_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        Options(**options)
