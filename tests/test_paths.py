"""Paths as users write them: homes, colons, long names, links, what may not be written."""

from pathlib import Path

import pytest

from gen_accel.io import read_json, replacing, write_json
from gen_accel.paths import check_replaceable, check_video_suffix, expanded, for_ffmpeg


def test_a_home_is_expanded_and_an_unknown_user_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/clip.gif") == tmp_path / "clip.gif"
    with pytest.raises(ValueError, match=r"^~nosuchuser/x is in the home of a user"):
        expanded("~nosuchuser/x")


def test_ffmpeg_is_told_a_file():
    assert for_ffmpeg("13:30/clip.mp4") == "file:13:30/clip.mp4"


def test_a_name_that_is_too_long_is_refused_before_its_folder_is_there(tmp_path):
    check_replaceable(tmp_path / "new" / ("a" * 251 + ".mp4"))
    with pytest.raises(ValueError, match=r"has 256 bytes, and .* takes at most 255: shorten it"):
        check_replaceable(tmp_path / "new" / ("a" * 252 + ".mp4"))


def test_what_is_read_only_or_no_file_is_not_replaced(tmp_path):
    path = tmp_path / "kept.json"
    path.write_text("kept")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match=r"kept\.json is read-only: make it writable"):
        write_json(path, {})
    assert path.read_text() == "kept"
    with pytest.raises(ValueError, match="a device or a pipe"), replacing(Path("/dev/null")):
        pytest.fail("nothing is written")


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    target = tmp_path / "disk" / "real.json"
    target.parent.mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(target)  # which is not there yet
    for value in (1, 2):
        write_json(link, value)
        assert link.is_symlink()
        assert read_json(target) == value
    assert [p.name for p in target.parent.iterdir()] == ["real.json"]


def test_names_that_are_no_text_go_through_json(tmp_path):
    write_json(tmp_path / "a.json", {"file": "clip\udcff.mp4"})
    assert read_json(tmp_path / "a.json") == {"file": "clip\udcff.mp4"}


def test_unknown_suffixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in '\.avi'; choose \.mp4"):
        check_video_suffix(tmp_path / "clip.avi")
