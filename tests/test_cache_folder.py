"""Where files of this user lie, and whether others may have written them."""

import json
import os

import pytest

from gen_accel import io
from gen_accel.kernels.triton import tuned
from gen_accel.measure import machine
from gen_accel.measure.cost import rates

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")


@pytest.mark.parametrize("named", ["plant", "./plant", "../plant", "~nosuchuser/x", ""])
def test_a_relative_cache_folder_is_ignored(named, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    assert io.cache_folder() == tmp_path / ".cache/gen_accel"


@pytest.mark.parametrize("named", ["/var/x"])
def test_an_absolute_cache_folder_counts(named, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    assert io.cache_folder().is_absolute()
    assert io.cache_folder().parts[-2:] == ("x", "gen_accel")


def test_the_cache_folder_is_for_its_owner_to_write(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = os.umask(0)
    try:
        assert io.make_cache_folder().stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (0o755, None),
        (0o644, None),
        (0o664, "may be written by its group: chmod go-w"),
        (0o606, "may be written by every user: chmod go-w"),
        (0o777, "may be written by every user: chmod go-w"),
    ],
)
def test_who_may_write(mode, words, tmp_path):
    tmp_path.chmod(mode)
    found = io.distrust(tmp_path.stat(), tmp_path)
    assert found == words or words in found


@as_root
def test_who_owns(tmp_path):
    os.chown(tmp_path, NOBODY, NOBODY)
    found = io.distrust(tmp_path.stat(), tmp_path)
    assert found == f"{tmp_path} belongs to user {NOBODY}, not to 0 or root: remove it"


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_was_measured_is_read_where_others_cannot_write(what, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = rates.efficiency_file()
    for path, read, known in (
        (tuned.path(), lambda: tuned.read.__wrapped__(), {"a": [1]}),
        (cached, lambda: machine._read(cached), {"a": 0.5}),
    ):
        io.make_cache_folder().chmod(0o755)
        path.write_text(json.dumps(known))
        path.chmod(0o644)
        assert read() == known
        (path if what == "file" else path.parent).chmod(0o777)
        assert read() == {}
