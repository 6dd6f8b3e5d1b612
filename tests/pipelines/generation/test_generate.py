"""Prompts as they are read, and kept, whatever characters they hold."""

import pytest

from gen_accel.pipelines.generation.config import read_prompts
from gen_accel.pipelines.generation.prompt_list import is_done, write_record


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
def test_each_line_is_a_prompt_and_nothing_else_cuts(tmp_path, mark):
    text = "a cat\r\n\r\n a\u2028b\u0085c\x0bd\x0ce \nthe last"
    (tmp_path / "prompts.txt").write_bytes(mark + text.encode())
    found = read_prompts(tmp_path / "prompts.txt")
    assert found == ["a cat", "a\u2028b\u0085c\x0bd\x0ce", "the last"]


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt is not UTF-8 text, from byte 2 \(0xf6\)"):
        read_prompts(tmp_path / "prompts.txt")


def test_a_prompt_that_is_not_utf_8_counts_as_done(tmp_path):
    """A shell may give one; its bytes that are no text are surrogates then."""
    target, asked = tmp_path / "clip.gif", {"prompt": "a \udcff"}
    target.write_bytes(b"whole")
    write_record(target, asked, {"seed": 0}, [target])
    assert is_done(target, asked)
    assert not is_done(target, {"prompt": "a"})
