"""Text of files: one encoding, and a byte that is none is told with its file."""

import pytest

from gen_accel.io import read_text


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
def test_lines_end_in_one_way_and_a_mark_is_left_out(tmp_path, mark):
    (tmp_path / "a.txt").write_bytes(mark + "ä\r\nb\u2028c\rd\n".encode())
    assert read_text(tmp_path / "a.txt") == "ä\nb\u2028c\nd\n"


@pytest.mark.parametrize(
    ("data", "place"),
    [(b"ab\xffc", r"byte 2 \(0xff\)"), ("ä".encode("utf-16"), r"byte 0 \(0xff\)")],
    ids=["Latin", "UTF-16"],
)
def test_another_encoding_is_told_with_the_file(tmp_path, data, place):
    (tmp_path / "a.txt").write_bytes(data)
    said = rf"^{tmp_path}/a\.txt is not UTF-8 text, from {place} on: save it as UTF-8$"
    with pytest.raises(ValueError, match=said):
        read_text(tmp_path / "a.txt")
