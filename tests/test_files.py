"""Files that appear whole or not at all, whatever ends the process that writes them."""

import errno
import os
import signal
import stat

import pytest
import torch
from support.full_disk import file_limit

from gen_accel.io import NoRoom, clear_partial, replacing, save_tensors, write_json

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
            os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)

    assert child(write) == -signal.SIGKILL
    assert not path.exists()
    clear_partial(tmp_path)
    with pytest.raises(ZeroDivisionError), replacing(path):
        _ = 1 / 0
    assert names(tmp_path) == ["lora"]
    assert (path / "weights").read_text() == "before"


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


def test_a_file_has_the_mode_of_any_other(tmp_path):
    (tmp_path / "plain").touch()
    write_json(tmp_path / "a.json", {})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1
