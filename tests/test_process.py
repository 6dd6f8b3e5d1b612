"""One run in a folder, and signals that end a run."""

import os
import pty
import signal
import threading

import pytest

from gen_accel.process import (
    LOCK,
    SignalExit,
    answered,
    check_free,
    leave_closed_terminal,
    locked,
    taken,
    unwinding,
)


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


NUMBERS = (signal.SIGTERM, signal.SIGHUP)


def ended(kinds, before=signal.SIG_DFL):
    """A process with `before` as handlers, sent signals within: how it ended, and what it said."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        for number in NUMBERS:
            signal.signal(number, before)
        with unwinding():
            try:
                with unwinding():
                    for i, kind in enumerate(kinds):
                        try:
                            os.kill(os.getpid(), kind)
                        except SignalExit:
                            os.write(write, b"raised ")
                            if i == len(kinds) - 1:
                                raise
            finally:
                os.write(write, b"tidied")
        os._exit(0)
    os.close(write)
    said = b""
    while part := os.read(read, 100):
        said += part
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode()


@pytest.mark.parametrize("number", NUMBERS)
def test_it_unwinds_and_ends_by_the_same_signal(number):
    assert ended([number]) == (-number, "raised tidied")


def test_a_second_one_ends_at_once():
    assert ended([signal.SIGTERM, signal.SIGTERM]) == (-signal.SIGTERM, "raised ")


def test_what_nohup_ignores_is_ignored():
    assert ended([signal.SIGHUP], signal.SIG_IGN) == (0, "tidied")


def test_other_handlers_stay(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with unwinding():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.SIGTERM in answered()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.SIGHUP not in answered()
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert seen == [signal.SIGTERM]


def test_other_threads_go_on_without():
    done = []

    def work():
        with unwinding():
            done.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.SIG_DFL]


def test_a_closed_terminal_is_left():
    """The shell is gone: what is said to it must not end the run."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        master, terminal = pty.openpty()
        os.dup2(terminal, 1)
        os.dup2(write, 2)
        leave_closed_terminal()
        alive = os.isatty(1)
        os.close(master)
        try:
            os.write(1, b"lost")
            said = b"no error, "
        except OSError:
            said = b"closed, "
        leave_closed_terminal()
        os.write(1, b"nowhere")
        os.write(2, said + (b"left" if alive else b"too early"))
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    assert os.read(read, 100) == b"closed, left"
    os.close(read)
