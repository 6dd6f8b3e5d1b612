"""JSON of files: each refusal names the file, and a field with its type."""

import re

import pytest

from gen_accel.io import fields_of, parse_json, read_fields, read_json, typed


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is no JSON from line 1, column 1 on"),
        (b"{'a': 1}", "is no JSON from line 1, column 2 on"),
        (b"[" * 100_000, "is nested too deep"),
        (b'"\xff"', "is not UTF-8 text"),
        (b"[]", "must hold names with values, got []"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, data, words):
    path = tmp_path / "state.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_fields(path)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_whole_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, None]}
    assert parse_json("3", "it") == 3
    assert fields_of({}, "it") == {}


@pytest.mark.parametrize(
    ("value", "kinds", "fits"),
    [
        (1, (int,), True),
        (1, (float,), True),
        (True, (int,), False),
        (1.5, (int,), False),
        (None, (str, type(None)), True),
        ([], (dict,), False),
        ("a" * 500, (dict,), False),
    ],
)
def test_fields_are_of_their_types(value, kinds, fits):
    if fits:
        assert typed({"a": value}, "a", *kinds, origin="f.json") == value
        return
    with pytest.raises(ValueError, match=r"^a in f\.json must be .*, got ") as caught:
        typed({"a": value}, "a", *kinds, origin="f.json")
    assert len(str(caught.value)) < 300


def test_a_field_that_lacks_is_named_or_has_a_default():
    with pytest.raises(ValueError, match=r"^f\.json has no step$"):
        typed({}, "step", int, origin="f.json")
    assert typed({}, "step", int, origin="f.json", default=None) is None
