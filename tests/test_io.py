"""Files that appear whole or not at all, and refusals that name the file and the field."""

import errno
import os
import re
import signal
import stat
import sys
import time

import pytest
import torch
from support.full_disk import file_limit

from gen_accel import io
from gen_accel.io import (
    NoRoom,
    clear_partial,
    fields_of,
    parse_json,
    read_fields,
    read_json,
    read_lines,
    read_tensors,
    read_text,
    replacing,
    save_tensors,
    typed,
    write_json,
)

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def child(work):
    """How a process that does `work` ended: its status, as of `os.waitstatus_to_exitcode`."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def half(path, kind):
    """Be ended while `path` is half written."""

    def write():
        with replacing(path) as partial:
            partial.mkdir() if path.suffix == "" else partial.write_text("half")
            os.kill(os.getpid(), kind)

    return write


@forks
@pytest.mark.parametrize("kind", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_nothing_half_written(tmp_path, kind):
    (tmp_path / "a.txt").write_text("before")
    number = getattr(signal, kind)
    assert child(half(tmp_path / "a.txt", number)) == -number
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"


@forks
def test_what_a_killed_process_left_goes_with_the_next_of_the_same_name(tmp_path):
    for name in ("a.txt", "b.txt", "folder"):
        assert child(half(tmp_path / name, signal.SIGKILL)) == -signal.SIGKILL
    assert len(names(tmp_path)) == 6  # each with its lock
    with replacing(tmp_path / "a.txt") as partial:  # whose process lives
        partial.write_text("whole")
        with replacing(tmp_path / "folder") as other:
            other.mkdir()
        live = partial.name
        assert live in names(tmp_path)
    left = names(tmp_path)
    assert left[2:] == ["a.txt", "folder"]
    assert all(name.startswith(".partial-") for name in left[:2])  # of b.txt


@forks
def test_a_folder_that_was_put_aside_comes_back(tmp_path):
    """A kill between two renames: the new folder is lost, the earlier one is not."""
    path = tmp_path / "lora"
    path.mkdir()
    (path / "weights").write_text("before")

    def write():
        with replacing(path) as partial:
            partial.mkdir()
            io._exchange = lambda one, other: False  # as if the system has no such call
            os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)

    assert child(write) == -signal.SIGKILL
    assert not path.exists()
    clear_partial(tmp_path)
    with pytest.raises(ZeroDivisionError), replacing(path):
        _ = 1 / 0
    assert names(tmp_path) == ["lora"]
    assert (path / "weights").read_text() == "before"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a system call of Linux")
def test_a_folder_takes_the_place_of_another_at_once(tmp_path, monkeypatch):
    path = tmp_path / "lora"
    path.mkdir()
    (path / "weights").write_text("before")
    monkeypatch.setattr(os, "replace", None)
    monkeypatch.setattr(type(path), "rename", None)
    with replacing(path) as partial:
        partial.mkdir()
        (partial / "weights").write_text("after")
    assert names(tmp_path) == ["lora"]
    assert (path / "weights").read_text() == "after"


@forks
def test_what_is_being_written_stays(tmp_path):
    """Also if another process looks before anything but its lock is there."""
    assert child(half(tmp_path / "dead.txt", signal.SIGKILL)) == -signal.SIGKILL
    with replacing(tmp_path / "live.txt") as partial:
        pid = os.fork()
        if pid == 0:
            clear_partial(tmp_path)
            os._exit(0)
        os.waitpid(pid, 0)
        assert names(tmp_path) == [partial.name.replace(".txt", ".lock")]
        partial.write_text("whole")
        clear_partial(tmp_path)
        assert partial.exists()
    assert names(tmp_path) == ["live.txt"]


def test_names_are_short_enough_for_every_name_there_is(tmp_path):
    for name in ("x" * 255, "x." + "y" * 253):
        with replacing(tmp_path / name) as partial:
            partial.touch()
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("write", ["tensors", "bytes", "nested"])
def test_no_room_is_told_by_the_name_of_the_file(tmp_path, write):
    path = tmp_path / "step-000004"
    path.mkdir()
    tensors = {"x": torch.zeros(500_000)}

    def full():
        with file_limit(100_000), replacing(path / "x.safetensors", needs=2_000_000) as partial:
            if write == "tensors":
                save_tensors(tensors, partial)
            elif write == "bytes":
                partial.write_bytes(bytes(2_000_000))
            else:
                partial.mkdir()
                save_tensors(tensors, partial / "y")

    with pytest.raises(NoRoom) as caught:
        full()
    place = path / "x.safetensors" / ("y" if write == "nested" else "")
    assert str(caught.value) == (
        f"no room for {place}, which needs 2.0 MB: file too large; what was there before is "
        "still there"
    )
    assert caught.value.errno == errno.EFBIG
    assert names(path) == []


def test_equal_tensors_are_equal_files(tmp_path):
    """Whatever the order, which the writer of safetensors draws for each file."""
    tensors = {"b": torch.arange(5.0), "a": torch.ones(3, dtype=torch.bfloat16)}
    metadata = {
        f"{i}": text for i, text in enumerate(["x", '"\\\n\0\x7f', "\u2028\U0001f600", "", "{}"])
    }
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for path in paths:
        save_tensors(tensors, path, metadata)
        metadata = dict(reversed(metadata.items()))
    assert len({path.read_bytes() for path in paths}) == 1
    found, about = read_tensors(paths[0])
    assert about == metadata
    assert all(torch.equal(found[name], x) for name, x in tensors.items())
    plain = tmp_path / "plain.safetensors"
    save_tensors(tensors, plain)
    assert paths[0].read_bytes()[-26:] == plain.read_bytes()[-26:]


def test_a_file_has_the_mode_of_any_other(tmp_path):
    (tmp_path / "plain").touch()
    write_json(tmp_path / "a.json", {})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is no JSON from line 1, column 1 on"),
        (b"{'a': 1}", "is no JSON from line 1, column 2 on"),
        (b"[" * 100_000, "is nested too deep"),
        (b'"\xff"', "is not UTF-8 text"),
        (b"[]", "must hold names with values, got []"),
        (b"[" * 500 + b"]" * 500, "is nested too deep"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "is nested too deep"),
        (b"1" * 400, "got a number of about 400 digits, which is too large"),
        (b"1" * 4400, "holds a number of too many digits to be read"),
        (b"[" + b"[]," * 300_000 + b"[]]", "got [[], [], [], [], [], [], [], [], ...]"),
        (b'"' + b"x" * 5_000_000 + b'"', "holds more than 4 MB of text"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, data, words):
    path = tmp_path / "state.json"
    path.write_bytes(data)
    started = time.process_time()
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_fields(path)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 1


def test_lines_of_a_long_file_are_read_one_by_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf{}\n" + b"x" * 5_000_000 + b"\n")
    lines = read_lines(path)
    assert next(lines) == (f"line 1 of {path}", "{}\n")
    with pytest.raises(ValueError, match=r"^line 2 of .*a\.jsonl holds more than 4 MB of text"):
        next(lines)
    path.write_bytes(b"{}\n\xff\n")
    with pytest.raises(ValueError, match=r"^line 2 of .*a\.jsonl is not UTF-8 text, from byte 0"):
        [*read_lines(path)]


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
        (10**300, (float,), True),
        (10**400, (float,), False),
        (10**30, (int,), False),
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
