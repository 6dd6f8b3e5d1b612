"""One run in a folder, and processes that are known to have ended."""

import errno
import os
import signal

import pytest

from gen_accel import owners
from gen_accel.owners import LOCK, locked

fcntl = pytest.importorskip("fcntl")


def test_a_second_run_is_refused_by_the_name_of_the_first(tmp_path):
    folder = tmp_path / "out"
    with locked(folder) as held:
        assert held
        with (
            pytest.raises(BlockingIOError) as caught,
            locked(folder),
        ):
            pytest.fail("both run")
        message = str(caught.value)
        assert message.startswith(f"{folder} is in use by process {os.getpid()} on ")
        assert " since 20" in message
        assert "\n" not in message
        (folder / LOCK).write_text("nothing of use")
        with pytest.raises(BlockingIOError, match="in use by another run"):
            owners.check_free(folder)
    assert not folder.exists()  # as nothing was left there
    folder.mkdir()
    owners.check_free(folder)
    assert list(folder.iterdir()) == []


def test_a_lock_goes_with_its_process(tmp_path):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with locked(tmp_path):
            os.write(write, b"1")
            signal.pause()
    os.read(read, 1)
    with pytest.raises(BlockingIOError, match=f"process {pid} on"):
        owners.check_free(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / LOCK).exists()
    owners.check_free(tmp_path)


def test_a_lock_that_its_owner_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Else two runs would hold two files of one name."""
    flock, calls = fcntl.flock, []

    def late(file, how):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        flock(file, how)

    monkeypatch.setattr(owners.fcntl, "flock", late)
    with locked(tmp_path) as held:
        assert held
        assert len(calls) == 2
        with pytest.raises(BlockingIOError):
            owners.check_free(tmp_path)


@pytest.mark.parametrize("why", [errno.ENOLCK, errno.ENOSYS, None])
def test_without_locks_it_goes_on(tmp_path, monkeypatch, recwarn, why):
    def refuse(file, how):
        raise OSError(why, os.strerror(why))

    if why is None:
        monkeypatch.setattr(owners, "fcntl", None)
    else:
        monkeypatch.setattr(owners.fcntl, "flock", refuse)
    with locked(tmp_path) as held:
        assert not held
        assert list(tmp_path.iterdir()) == []
    said = [str(one.message) for one in recwarn]
    assert len(said) == (why is not None)
    assert all("cannot be locked" in one for one in said)


def test_who_is_dead():
    machine, _, rest = owners.mark().partition("-")
    pid, _, started = rest.partition("-")
    assert int(pid) == os.getpid()
    assert not owners.is_dead(owners.mark())
    assert owners.is_dead(f"{machine}-{2**30}-{started}")
    assert owners.is_dead(f"{machine}-{pid}-1{started}") == bool(started)
    for unknown in (f"0-{2**30}-{started}", f"{machine}-x-{started}", "", f"{machine}-{10**30}-"):
        assert not owners.is_dead(unknown)
