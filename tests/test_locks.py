"""One run in a folder."""

import os
import signal

import pytest

from gen_accel.process import LOCK, check_free, locked, taken


def test_a_second_run_is_refused_by_the_name_of_the_first(tmp_path):
    folder = tmp_path / "out"
    with locked(folder):
        with pytest.raises(BlockingIOError) as caught, locked(folder):
            pytest.fail("both run")
        message = str(caught.value)
        assert message.startswith(f"{folder} is in use by process {os.getpid()} on ")
        assert " since 20" in message
        assert "\n" not in message
        (folder / LOCK).write_text("nothing of use")
        with pytest.raises(BlockingIOError, match="in use by another run"):
            check_free(folder)
    assert not folder.exists()  # as nothing was left there
    folder.mkdir()
    check_free(folder)
    assert [path.name for path in folder.iterdir()] == [LOCK]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lock_goes_with_its_process(tmp_path):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with locked(tmp_path):
            os.write(write, b"1")
            signal.pause()
    os.read(read, 1)
    with pytest.raises(BlockingIOError, match=f"process {pid} on"):
        check_free(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / LOCK).exists()
    check_free(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_goes_on_holding_what_it_inherits(tmp_path):
    path = tmp_path / "worker.lock"
    held = taken(path)
    assert held is not None
    pid = os.fork()
    if pid == 0:
        signal.pause()
    held.close()
    with pytest.raises(BlockingIOError):
        taken(path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    again = taken(path)
    assert again is not None
    again.close()
